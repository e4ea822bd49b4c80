"""Warm calls on CuPy arrays: one look-up for every rule and the plan, then one launch.

It goes when its callers have switched to `arrays.DOOR`.
"""

from typing import Any

from cupynorm import _problem
from cupynorm._arguments import axes_of, keyable
from cupynorm._arrays import check_writable, element_strides
from cupynorm._cuda.prelaunch import Ready, launch_into, ready_for
from cupynorm._layout import result_strides

__all__ = ["Calls"]

_MOST = 4096  # look-ups kept: shapes may be as many as the batches of a program


class Calls:
    """The calls on arrays of one CuPy, which `do`, the module `_cuda`, has imported."""

    __slots__ = ("_do", "_ready", "array_type")

    def __init__(self, do: Any) -> None:
        self._do = do
        self.array_type = do.ndarray
        self._ready: dict[Any, Ready | None] = {}

    def at_once(
        self,
        x: Any,
        normalized_shape: Any,
        weight: Any,
        bias: Any,
        eps: Any,
        axis: Any,
        out: Any,
        return_stats: bool,
    ) -> Any:
        """y of a call that has nothing special about it; None for any other, faulty or not.

        x is exactly of `array_type`. Every check that the arrays need is here, in its cheapest
        form; the rules about the others were applied when their values were first met.
        """
        if (
            return_stats
            or type(eps) is not float
            or not (type(normalized_shape) is int or keyable(normalized_shape))
            or not (axis is None or keyable(axis))
        ):
            return None
        kind, do = self.array_type, self._do
        shape, dtype, data = x.shape, x.dtype, x.data
        index, w_dtype, b_dtype, to = data.device_id, None, None, None
        if weight is not None:
            if type(weight) is not kind or weight.data.device_id != index:
                return None
            w_dtype = weight.dtype
        if bias is not None:
            if type(bias) is not kind or bias.data.device_id != index:
                return None
            b_dtype = bias.dtype
        if out is not None:
            if (
                type(out) is not kind
                or out.shape != shape
                or out.dtype != dtype
                or out.data.device_id != index
            ):
                return None
            to = out.strides
        if do.get_device() != index:
            return None
        key = index, shape, x.strides, dtype, normalized_shape, axis, eps, w_dtype, b_dtype, to
        try:
            ready = self._ready[key]
        except KeyError:
            ready = self._prepare(key, x, out)
        if ready is None:
            return None
        w = b = 0
        if weight is not None:
            if weight.shape != ready.affine or weight.strides != ready.weight:
                return None
            w = weight.data.ptr
        if bias is not None:
            if bias.shape != ready.affine or bias.strides != ready.bias:
                return None
            b = bias.data.ptr
        if out is None:
            # empty_like costs twice as much: it finds out the order.
            y = kind(shape, dtype) if ready.dense else do.empty_like(x)
            function, grid, block, shared_bytes, rest, *_ = ready
            function(grid, block, (data.ptr, y.data.ptr, w, b, *rest), shared_bytes)
            return y
        # What is refused here, the ordinary way looks at exactly, and says in a sentence.
        return out if launch_into(ready, data.ptr, out.data.ptr, w, b) else None

    def _prepare(self, key: tuple[Any, ...], x: Any, out: Any) -> Ready | None:
        """Apply the rules to what is no array; None, too, where they refuse it."""
        _, shape, _, dtype, normalized_shape, axis, eps, w_dtype, b_dtype, _ = key
        dtypes = [d for d in (dtype, w_dtype, b_dtype) if d is not None]
        ready = None
        if (
            x.size
            and eps - eps == 0.0
            and all(_problem.dtype_name(d) in _problem.ITEMSIZE for d in dtypes)
        ):
            try:
                axes, turn, _ = axes_of(shape, normalized_shape, axis)
                if out is not None:
                    check_writable(out)
            except (TypeError, ValueError):
                return None
            if turn is None:
                new = result_strides(shape, element_strides(x), "K")
                strides = new if out is None else element_strides(out)
                ready, _ = ready_for(self._do, x, axes, strides, w_dtype, b_dtype, eps)
        if len(self._ready) >= _MOST:
            self._ready.clear()
        self._ready[key] = ready
        return ready
