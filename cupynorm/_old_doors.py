"""Doors on the mechanisms of before, until each library's own is there."""

from typing import Any

import numpy as np

from cupynorm import _namespace, _rules
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


class _Namespace:
    select = None
    look = None

    def device(self, a: Any) -> Any:
        return None

    def strides(self, a: Any) -> Any:
        return None

    def normalizer(self, facts: Facts) -> Any:
        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            found = _namespace.layer_norm(x, facts.axes, weight, bias, facts.eps, facts.order, out)
            return found if facts.stats else found[0]

        return call

    def differentiator(self, facts: Facts) -> Any:
        mask: Any = tuple(n in (*facts.strides, *facts.dtypes) for n in ("dx", "dweight", "dbias"))
        dtype = facts.dtypes.get("dweight") or facts.dtypes.get("dbias", "float32")

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            return _namespace.layer_norm_backward(
                dy, x, facts.axes, mean, rstd, weight, mask, dtype
            )

        return call


class _Torch:
    """All tensors; nothing kept."""

    look = None
    select = None

    def device(self, a: Any) -> Any:
        return None

    def strides(self, a: Any) -> Any:
        return tuple(a.stride())

    def normalizer(self, facts: Facts) -> Any:
        from cupynorm._torch import autograd

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            if out is not None:
                _namespace.check_out(x, weight, bias, facts.order, out)
                if autograd.unwatched(x, weight, bias) and autograd.unwatched(out, None, None):
                    stats = autograd.into(x, facts.axes, weight, bias, facts.eps, out, facts.stats)
                    return (out, *stats) if facts.stats else out
            mean = rstd = None
            if facts.stats:
                y, mean, rstd = autograd.layer_norm_with_stats(
                    x, facts.axes, weight, bias, facts.eps
                )
            else:
                y = autograd.layer_norm(x, facts.axes, weight, bias, facts.eps)
            if out is None:
                y = _namespace.ordered(y, facts.order)
            else:
                out[...] = y
                y = out
            return (y, mean, rstd) if facts.stats else y

        return call

    def differentiator(self, facts: Facts) -> Any:
        reference = NAMESPACE.differentiator(facts)
        mask: Any = tuple(n in (*facts.strides, *facts.dtypes) for n in ("dx", "dweight", "dbias"))

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            import torch

            from cupynorm._torch import autograd, tensors

            if not all(autograd.unwatched(t, weight, None) for t in (x, dy, mean, rstd)):
                return reference(dy, x, mean, rstd, weight)
            name = facts.dtypes.get("dweight") or facts.dtypes.get("dbias", "float32")
            dtypes = (getattr(torch, name),) * 2
            mean, rstd = mean.contiguous(), rstd.contiguous()
            return tensors.backward(dy, x, facts.axes, mean, rstd, weight, mask, dtypes)

        return call


NUMPY = _Numpy()
NAMESPACE = _Namespace()
TORCH = _Torch()


def door_for(x: Any, library: str) -> Any:
    if isinstance(x, np.ndarray):
        return NUMPY
    if library == "torch":
        from cupynorm._arguments import is_launchable

        return TORCH if is_launchable(x) else NAMESPACE
    return NAMESPACE
