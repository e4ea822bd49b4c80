"""Calls on NumPy arrays with nothing special about them: the least Python around the loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import axes_of, keyable
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import results as _results
from cupynorm._cpu.arrays import _plain
from cupynorm._cpu.blocks import safe_range

__all__ = ["Ready", "at_once", "ready_for"]

# It costs more than the loops do for a few rows, and a tenth of the time even of 512x768.

_empty, _ndarray = np.empty, np.ndarray


class Ready(NamedTuple):
    """All of a call that does not depend on its arrays."""

    call: Callable[..., int]
    with_stats: Callable[..., int]
    new: Callable[..., Any]  # makes y of a shape and a dtype
    table: tuple[int, int] | None  # shape to show x and y in; None where they have it
    bits: Any  # dtype to show x and y in; None for their own
    compute: Any  # dtype of weight and bias, as a row
    affine: tuple[int, ...]  # shape of weight and bias
    absent: Any  # an empty weight or bias
    stats: tuple[int, ...]  # shape of mean and rstd
    fixed: tuple[Any, ...]  # eps, low, high, bfloat16


def ready_for(
    shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...], eps: float
) -> Ready | None:
    """What such a call needs, for arguments that have passed every rule; None if it is not one."""
    kind = _problem.dtype_name(dtype)
    M, N = _problem.rows_and_cols(shape, axes)
    trailing = axes == tuple(range(len(shape) - len(axes), len(shape)))
    if not (M * N and trailing and dtype.isnative) or _cpu._engine() is _cpu_blocks:
        return None
    from cupynorm._cpu import entries as _cpu_entries
    from cupynorm._cpu import shared as _cpu_shared

    small = N <= _cpu_shared.CHUNK and M * N < _cpu_shared.ALONE
    char = "d" if kind == "float64" else "f"

    def small_with_stats(*arguments: Any) -> int:  # compiled when it is first asked for
        return _cpu_entries.small_with_stats(kind)(*arguments)

    call = _cpu_entries.small(kind) if small else _cpu_shared.at_once(kind, M, N)
    return Ready(
        call,
        small_with_stats if small else call,
        np.empty if M * N * dtype.itemsize < _results.LEAST else _results.empty,
        None if shape == (M, N) else (M, N),
        np.dtype(np.uint16) if dtype.itemsize == 2 else None,
        np.dtype(char),
        tuple(shape[a] for a in axes),
        np.empty(0, char),
        _problem.stats_shape(shape, axes),
        (eps, *safe_range(char, eps), int(kind == "bfloat16")),
    )


_ready: dict[Any, Ready | None] = {}


def at_once(
    x: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    out: Any,
    return_stats: bool,
) -> Any:
    """y, or (y, mean, rstd), of a call that has nothing special about it.

    None for any other call, faulty or not.

    x is exactly a NumPy array. Every check that the arrays need is here, in its cheapest form; the
    rules about the others were applied when their values were first met.
    """
    shape, dtype = x.shape, x.dtype
    if (
        type(eps) is not float
        or not (type(normalized_shape) is int or keyable(normalized_shape))
        or not (axis is None or keyable(axis))
    ):
        return None
    key = shape, dtype, normalized_shape, axis, eps
    try:
        ready = _ready[key]
    except KeyError:
        ready = _prepare(key)
    if ready is None or not x.flags.carray or _plain.get():
        return None
    call, with_stats, new, table, bits, compute, affine, absent, stats, fixed = ready
    if weight is None:
        weight = absent
    elif type(weight) is not _ndarray or weight.shape != affine or not weight.flags.carray:
        return None
    elif weight.dtype != compute:
        weight = _as_wide(weight, dtype, compute, out)
        if weight is None:
            return None
    if bias is None:
        bias = absent
    elif type(bias) is not _ndarray or bias.shape != affine or not bias.flags.carray:
        return None
    elif bias.dtype != compute:
        bias = _as_wide(bias, dtype, compute, out)
        if bias is None:
            return None
    if out is None:
        out = new(shape, dtype)
    elif (
        type(out) is not _ndarray
        or out.shape != shape
        or out.dtype != dtype
        or not out.flags.carray
    ):
        return None
    y = out
    if bits is not None:
        x, y = x.view(bits), y.view(bits)
    if table is not None:
        x, y, weight, bias = (
            x.reshape(table),
            y.reshape(table),
            weight.reshape(-1),
            bias.reshape(-1),
        )
    # What a status says, the ordinary way says in a sentence.
    if return_stats:
        mean, rstd = _empty(stats, compute), _empty(stats, compute)
        if with_stats(x, y, weight, bias, *fixed, mean.ravel(), rstd.ravel()):
            return None
        return out, mean, rstd
    return None if call(x, y, weight, bias, *fixed) else out


def _as_wide(value: Any, dtype: Any, compute: Any, out: Any) -> Any:
    """Weight or bias of x's own 16 bits as a row that loops compute with; None if it is not that.

    None, too, where out may share its memory: of a copy the loops could not tell.
    """
    if value.dtype != dtype or (out is not None and np.may_share_memory(value, out)):
        return None
    return _cpu._affine(value, compute)


def _prepare(key: tuple[Any, ...]) -> Ready | None:
    """Apply the rules to what is no array; None, too, where they refuse it."""
    shape, dtype, normalized_shape, axis, eps = key
    ready = None
    if eps - eps == 0.0 and _problem.dtype_name(dtype) in _problem.ITEMSIZE:
        try:
            axes, turn, _ = axes_of(shape, normalized_shape, axis)
        except (TypeError, ValueError):
            return None
        if turn is None:
            ready = ready_for(shape, dtype, axes, eps)
    if _plain.get():
        return None  # not kept: it is so for a while
    if len(_ready) >= 4096:
        _ready.clear()
    _ready[key] = ready
    return ready
