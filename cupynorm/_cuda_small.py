"""Warm calls on CuPy arrays: one look-up for every rule and the plan, then one launch."""

from typing import Any, NamedTuple

from cupynorm import _problem
from cupynorm._arguments import axes_of, keyable
from cupynorm._arrays import check_writable, element_strides

__all__ = ["Calls", "Ready", "launch_into", "ready_for", "span_of"]

_MOST = 4096  # look-ups kept: shapes may be as many as the batches of a program


class Ready(NamedTuple):
    """All of a call with one launch that does not depend on its arrays."""

    launch: tuple[Any, ...]  # `ReadyForward.alone`
    affine: tuple[int, ...]  # shape of weight and bias
    weight: tuple[int, ...]  # strides in bytes
    bias: tuple[int, ...]
    weight_bytes: int
    bias_bytes: int
    dense: bool  # whether x, and so a new y, is row-major
    same: bool  # whether y lies in memory as x does
    x_span: tuple[int, int]  # bytes before and after x's address
    y_span: tuple[int, int]


def span_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """First byte of an array and the one after its last, counted from its address."""
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize


def ready_for(
    do: Any,
    x: Any,
    axes: tuple[int, ...],
    y: Any,
    weight_dtype: Any,
    bias_dtype: Any,
) -> Ready | None:
    """What a call needs for arrays like these; None if more than one launch goes into it.

    They have passed every rule, and x's device is the current one.
    """
    names = tuple(
        None if dtype is None else _problem.dtype_name(dtype)
        for dtype in (x.dtype, weight_dtype, bias_dtype)
    )
    strides = element_strides(x), element_strides(y)
    found = do.prepared_fwd(x.data.device_id, x.shape, axes, *strides, names, False)
    if found.alone is None or found.copies:
        return None
    affine = tuple(x.shape[a] for a in axes)
    cols = _problem.rows_and_cols(x.shape, axes)[1]
    sizes = [0 if name is None else _problem.ITEMSIZE[name] for name in names[1:]]
    return Ready(
        found.alone,
        affine,
        *(_row_major(affine, size) for size in sizes),
        *(cols * size for size in sizes),
        x.flags.c_contiguous,
        x.strides == y.strides,
        span_of(x.shape, x.strides, x.itemsize),
        span_of(y.shape, y.strides, y.itemsize),
    )


def _row_major(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def launch_into(ready: Ready, x: int, y: int, weight: int, bias: int, eps: float) -> bool:
    """Launch on these addresses, 0 for what is absent.

    False, and nothing done, where y's memory may have an element in common with weight, bias or,
    but for y in the place of x, with x.
    """
    launch, _, _, _, w_size, b_size, _, same, (x_low, x_high), (y_low, y_high) = ready
    low, high = y + y_low, y + y_high
    if not (same and x == y) and low < x + x_high and x + x_low < high:
        return False
    if (low < weight + w_size and weight < high) or (low < bias + b_size and bias < high):
        return False
    function, grid, block, shared_bytes, tail, after = launch
    function(grid, block, (x, y, weight, bias, 0, 0, *tail, eps, *after), shared_bytes)
    return True


class Calls:
    """The calls on arrays of one CuPy, which `do`, the module `_cuda`, has imported."""

    __slots__ = ("_do", "_ready", "array_type")

    def __init__(self, do: Any) -> None:
        self._do = do
        self.array_type = do.ndarray
        self._ready: dict[Any, Ready | None] = {}

    def at_once(
        self, x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any
    ) -> Any:
        """y of a call that has nothing special about it; None for any other, faulty or not.

        x is exactly of `array_type`. Every check that the arrays need is here, in its cheapest
        form; the rules about the others were applied when their values were first met.
        """
        if (
            type(eps) is not float
            or eps - eps != 0.0
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
        if do.current_index() != index:
            return None
        key = index, shape, x.strides, dtype, normalized_shape, axis, w_dtype, b_dtype, to
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
            function, grid, block, shared_bytes, tail, after = ready.launch
            arguments = (data.ptr, y.data.ptr, w, b, 0, 0, *tail, eps, *after)
            function(grid, block, arguments, shared_bytes)
            return y
        # What is refused here, the ordinary way looks at exactly, and says in a sentence.
        return out if launch_into(ready, data.ptr, out.data.ptr, w, b, eps) else None

    def _prepare(self, key: tuple[Any, ...], x: Any, out: Any) -> Ready | None:
        """Apply the rules to what is no array; None, too, where they refuse it."""
        _, shape, _, dtype, normalized_shape, axis, w_dtype, b_dtype, _ = key
        dtypes = [d for d in (dtype, w_dtype, b_dtype) if d is not None]
        ready = None
        if x.size and all(_problem.dtype_name(d) in _problem.ITEMSIZE for d in dtypes):
            try:
                axes, turn, _ = axes_of(shape, normalized_shape, axis)
                if out is not None:
                    check_writable(out)
            except (TypeError, ValueError):
                return None
            if turn is None:
                y = self._do.empty_like(x) if out is None else out
                ready = ready_for(self._do, x, axes, y, w_dtype, b_dtype)
        if len(self._ready) >= _MOST:
            self._ready.clear()
        self._ready[key] = ready
        return ready
