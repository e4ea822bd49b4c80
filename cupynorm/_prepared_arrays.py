"""Prepared calls on NumPy and CuPy arrays."""

from typing import Any

import numpy as np

from cupynorm import functional
from cupynorm._arguments import Call, path_of
from cupynorm._arrays import element_strides
from cupynorm._cpu import arrays as _cpu
from cupynorm._cuda import prelaunch as _cuda_launch
from cupynorm._layout import result_strides
from cupynorm._prepared import PreparedLayerNorm

__all__ = ["PreparedCupy", "PreparedNumpy"]


class _Prepared(PreparedLayerNorm):
    __slots__ = ()

    def _ordinary(self, x: Any, out: Any) -> Any:
        """As `cupynorm.layer_norm` does it once the argument rules are through."""
        self._admit(x)
        call = self._given._replace(x=x)
        y, mean, rstd = functional.strided(call, self._order, out, self._stats)
        return functional.LayerNormResult(y, mean, rstd) if self._stats else y


class PreparedNumpy(_Prepared):
    """On NumPy arrays."""

    __slots__ = ()

    def __init__(self, call: Call, order: str, return_stats: bool) -> None:
        super().__init__(call, order, return_stats, _cpu.describe())

    def __call__(self, x: np.ndarray[Any, Any], out: Any = None) -> Any:
        """Normalize x, into `out` if that is given."""
        return self._ordinary(x, out)


class PreparedCupy(_Prepared):
    """On CuPy arrays: where one launch does all, its arguments but for x and y stand ready."""

    __slots__ = ("_bias", "_current", "_dense", "_index", "_ready", "_weight", "_y_strides")

    def __init__(self, call: Call, order: str, return_stats: bool) -> None:
        do, x = path_of("cupy"), call.x
        self._current, self._index = do.get_device, x.data.device_id
        self._weight = self._bias = 0
        kernel = "nothing to run: x is empty"
        self._ready: Any = None
        if x.size and do.is_current(x):
            kernel = self._prepare(do, call, order, return_stats)
        elif x.size:
            with x.device:
                kernel = self._prepare(do, call, order, return_stats)
        super().__init__(call, order, return_stats, kernel)

    def _prepare(self, do: Any, call: Call, order: str, stats: bool) -> str:
        """Plan, compile and load; names of what will run."""
        x, w, b = call.x, call.weight, call.bias
        strides = result_strides(x.shape, element_strides(x), order)
        self._y_strides = tuple(s * x.itemsize for s in strides)
        w_dtype, b_dtype = (None if a is None else a.dtype for a in (w, b))
        self._ready, found = _cuda_launch.ready_for(
            do, x, call.axes, strides, w_dtype, b_dtype, call.eps, stats
        )
        self._dense = self._ready is not None and self._ready.dense and order != "F"
        dense = all(a is None or a.flags.c_contiguous for a in (w, b))
        if stats or not dense:  # arrays to be made at each call
            self._ready = None
        self._weight, self._bias = (0 if a is None else a.data.ptr for a in (w, b))
        return " then ".join(stage.name for stage in found.plan.stages)

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x, into `out` if that is given, on CuPy's current stream."""
        ready, kind = self._ready, self._type
        if (
            ready is None
            or type(x) is not kind
            or x.shape != self._shape
            or x.strides != self._strides
            or x.dtype != self._dtype
        ):
            return self._ordinary(x, out)
        data, index = x.data, self._index
        if data.device_id != index or self._current() != index:
            return self._ordinary(x, out)
        if out is None:
            if not self._dense:
                return self._ordinary(x, out)
            y = kind(self._shape, self._dtype)
            function, grid, block, shared_bytes, rest, *_ = ready
            pointers = (data.ptr, y.data.ptr, self._weight, self._bias)
            function(grid, block, (*pointers, *rest), shared_bytes)
            return y
        if (
            type(out) is not kind
            or out.shape != self._shape
            or out.strides != self._y_strides
            or out.dtype != self._dtype
            or out.data.device_id != index
        ):
            return self._ordinary(x, out)
        done = _cuda_launch.launch_into(ready, data.ptr, out.data.ptr, self._weight, self._bias)
        return out if done else self._ordinary(x, out)
