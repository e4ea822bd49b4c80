"""One launch that does all of a call: what is left to check and to pass at each.

It goes when its callers have switched to `arrays.DOOR`.
"""

import math
from typing import Any, NamedTuple

from cupynorm import _problem
from cupynorm._arrays import element_strides
from cupynorm._cuda.launch import Ready as ReadyForward

__all__ = ["Ready", "launch_into", "ready_for", "ready_from", "span_of"]


class Ready(NamedTuple):
    """All of a call with one launch that does not depend on its arrays."""

    function: Any
    grid: Any
    block: Any
    shared_bytes: int
    rest: tuple[Any, ...]  # arguments after x, y, weight and bias
    affine: tuple[int, ...]  # shape of weight and bias
    weight: tuple[int, ...]  # strides in bytes
    bias: tuple[int, ...]
    weight_bytes: int
    bias_bytes: int
    dense: bool  # whether x is row-major
    same: bool  # whether y lies in memory as x does
    x_low: int  # first byte of x, from its address
    x_high: int  # the one after its last
    y_low: int
    y_high: int


def span_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """First byte of an array and the one after its last, counted from its address."""
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize


def ready_for(
    do: Any,
    x: Any,
    axes: tuple[int, ...],
    y_strides: tuple[int, ...],  # in elements
    weight: Any,  # dtypes
    bias: Any,
    eps: float,
    stats: bool = False,
) -> tuple[Ready | None, ReadyForward]:
    """Plan and load a call on arrays like these; no Ready if more than one launch goes into it.

    They have passed every rule, and x's device is the current one.
    """
    names = tuple(None if d is None else _problem.dtype_name(d) for d in (x.dtype, weight, bias))
    strides = element_strides(x), y_strides
    found = do.prepared_fwd(x.data.device_id, x.shape, axes, *strides, names, stats)
    return ready_from(found, x.shape, axes, *strides, names, eps), found


def ready_from(
    found: ReadyForward,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    names: tuple[Any, ...],
    eps: float,
) -> Ready | None:
    """What is left of a planned call at each launch; strides in elements, names of the dtypes."""
    if found.alone is None or found.copies:
        return None
    affine = tuple(shape[a] for a in axes)
    size, *sizes = (0 if name is None else _problem.ITEMSIZE[name] for name in names)
    x_span, y_span = (
        span_of(shape, tuple(s * size for s in strides), size) for strides in (x_strides, y_strides)
    )
    function, grid, block, shared_bytes, tail, after = found.alone
    return Ready(
        function,
        grid,
        block,
        shared_bytes,
        (0, 0, *tail, eps, *after),  # mean and rstd are not asked for
        affine,
        _row_major(affine, sizes[0]),
        _row_major(affine, sizes[1]),
        math.prod(affine) * sizes[0],
        math.prod(affine) * sizes[1],
        x_strides == _row_major(shape, 1),
        x_strides == y_strides,
        *x_span,
        *y_span,
    )


def _row_major(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def launch_into(ready: Ready, x: int, y: int, weight: int, bias: int, stream: Any = None) -> bool:
    """Launch on these addresses, 0 for what is absent.

    False, and nothing done, where y's memory may have an element in common with weight, bias or,
    but for y in the place of x, with x.
    """
    function, grid, block, shared_bytes, rest, _, _, _, w_size, b_size, _, same, *spans = ready
    x_low, x_high, y_low, y_high = spans
    low, high = y + y_low, y + y_high
    if not (same and x == y) and low < x + x_high and x + x_low < high:
        return False
    if (low < weight + w_size and weight < high) or (low < bias + b_size and bias < high):
        return False
    function(grid, block, (x, y, weight, bias, *rest), shared_bytes, stream)
    return True
