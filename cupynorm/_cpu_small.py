"""Small calls on NumPy arrays, where the Python around the loops costs more than the loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _cpu, _cpu_blocks, _problem
from cupynorm._arguments import axes_of, keyable
from cupynorm._cpu import _plain
from cupynorm._cpu_blocks import safe_range

__all__ = ["Ready", "at_once", "ready_for"]

_empty, _ndarray = np.empty, np.ndarray


class Ready(NamedTuple):
    """All of a small call that does not depend on its arrays."""

    call: Callable[..., int]
    table: tuple[int, int] | None  # shape to show x and y in; None where they have it
    bits: Any  # dtype to show x and y in; None for their own
    compute: Any  # dtype of weight and bias, as a row
    affine: tuple[int, ...]  # shape of weight and bias
    absent: Any  # an empty weight or bias
    fixed: tuple[Any, ...]  # eps, low, high, bfloat16


def ready_for(
    shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...], eps: float
) -> Ready | None:
    """What a small call needs, for arguments that have passed every rule; None if it is not one."""
    kind = _problem.dtype_name(dtype)
    M, N = _problem.rows_and_cols(shape, axes)
    trailing = axes == tuple(range(len(shape) - len(axes), len(shape)))
    if not (M * N and trailing and dtype.isnative) or _cpu._engine() is _cpu_blocks:
        return None
    from cupynorm import _cpu_entries, _cpu_numba

    if N > _cpu_numba.CHUNK or M * N >= _cpu_numba.ALONE:
        return None
    char = "d" if kind == "float64" else "f"
    return Ready(
        _cpu_entries.small(kind),
        None if shape == (M, N) else (M, N),
        np.dtype(np.uint16) if dtype.itemsize == 2 else None,
        np.dtype(char),
        tuple(shape[a] for a in axes),
        np.empty(0, char),
        (eps, *safe_range(char, eps), int(kind == "bfloat16")),
    )


_ready: dict[Any, Ready | None] = {}


def at_once(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any
) -> Any:
    """y of a small call that has nothing special about it; None for any other, faulty or not.

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
    call, table, bits, compute, affine, absent, fixed = ready
    if weight is None:
        weight = absent
    elif (
        type(weight) is not _ndarray
        or weight.dtype != compute
        or weight.shape != affine
        or not weight.flags.carray
    ):
        return None
    if bias is None:
        bias = absent
    elif (
        type(bias) is not _ndarray
        or bias.dtype != compute
        or bias.shape != affine
        or not bias.flags.carray
    ):
        return None
    if out is None:
        out = _empty(shape, dtype)
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
        x, y, weight, bias = x.reshape(table), y.reshape(table), weight.ravel(), bias.ravel()
    # What a status says, the ordinary way says in a sentence.
    return None if call(x, y, weight, bias, *fixed) else out


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
