"""Doors on the mechanisms of before, until each library's own is there."""

from typing import Any

import numpy as np

from cupynorm import _rules
from cupynorm._cpu import arrays as cpu
from cupynorm._cpu import results
from cupynorm._layout import Facts
from cupynorm._libraries import check_overlap, element_strides


def _overlaps(x: Any, weight: Any, bias: Any, out: Any) -> None:
    check_overlap("x", x, out, same_allowed=True)
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            check_overlap(label, other, out, same_allowed=False)


class _Strided:
    select = None
    do: Any = None
    new: Any = None

    def device(self, a: Any) -> Any:
        return None

    def strides(self, a: Any) -> Any:
        return element_strides(a)

    def look(self, a: Any) -> Any:
        return type(a), a.shape, a.dtype, a.strides

    def normalizer(self, facts: Facts) -> Any:
        do, new = self.do, self.new
        stats_dtype = _rules.stats_dtype(facts.dtypes["x"])

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            if self.elsewhere(x):
                with x.device:
                    return call(x, weight, bias, out)
            if out is None:
                y = new.empty_like(x, order=facts.order)
            else:
                _overlaps(x, weight, bias, out)
                y = out
            mean = rstd = None
            if facts.stats:
                mean, rstd = (new.empty(facts.stats_shape, dtype=stats_dtype) for _ in "mr")
                if not x.size:
                    mean.fill(np.nan)
                    rstd.fill(np.nan)
            if x.size:
                do.layer_norm_fwd(x, facts.axes, weight, bias, facts.eps, y, mean, rstd)
            return (y, mean, rstd) if facts.stats else y

        return call

    def elsewhere(self, x: Any) -> bool:
        return False

    def differentiator(self, facts: Facts) -> Any:
        do, new = self.do, self.new

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            if self.elsewhere(x):
                with x.device:
                    return call(dy, x, mean, rstd, weight)
            dx = new.empty_like(x) if "dx" in facts.strides else None
            dweight, dbias = (
                new.empty(facts.affine_shape, dtype=_rules.numpy_dtype(facts.dtypes[n]))
                if n in facts.dtypes
                else None
                for n in ("dweight", "dbias")
            )
            if x.size and (dx is not None or dweight is not None or dbias is not None):
                do.layer_norm_bwd(dy, x, facts.axes, mean, rstd, weight, dx, dweight, dbias)
            elif not x.size:
                for total in (dweight, dbias):
                    if total is not None:
                        total.fill(0)
            return dx, dweight, dbias

        return call


class _Numpy(_Strided):
    do, new = cpu, results
    types = (np.ndarray,)

    def describe(self, facts: Facts) -> str:
        return cpu.describe()

    def look(self, a: Any) -> Any:
        return type(a), a.shape, a.dtype, a.strides, a.flags.num


NUMPY = _Numpy()
