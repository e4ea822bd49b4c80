"""Backward calls on NumPy arrays with nothing special about them: little Python around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import axes_of, keyable
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import results as _results
from cupynorm._cpu.arrays import _plain

__all__ = ["at_once"]

# What ``_cpu_at_once`` is to forward calls.

_empty, _ndarray = np.empty, np.ndarray


class _Ready(NamedTuple):
    """All of a call that does not depend on its arrays."""

    call: Callable[..., None]
    new: Callable[..., Any]  # makes dx of a shape and a dtype
    table: tuple[int, int]  # shape to show x, dy and dx in
    bits: Any  # dtype to show them in; None for their own
    compute: Any  # dtype of weight and its gradients, as rows, and of the statistics
    affine: tuple[int, ...]  # shape of weight
    stats: tuple[int, ...]  # shape of mean and rstd
    none: Any  # an empty dx
    absent: Any  # an empty row
    bfloat16: int


_ready: dict[Any, _Ready | None] = {}


def _fits(a: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    return type(a) is _ndarray and a.shape == shape and a.dtype == dtype and a.flags.carray


def at_once(
    dy: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    axis: Any,
    output_mask: Any,
) -> tuple[Any, Any, Any] | None:
    """dx, dweight and dbias; None for any call that is not so simple, faulty or not.

    x is exactly a NumPy array. The rules about what is no array were applied when their values were
    first met.
    """
    shape, dtype = x.shape, x.dtype
    if not (
        (type(normalized_shape) is int or keyable(normalized_shape))
        and (axis is None or keyable(axis))
    ):
        return None
    key = shape, dtype, normalized_shape, axis
    try:
        ready = _ready[key]
    except KeyError:
        ready = _prepare(key)
    if ready is None or not x.flags.carray or _plain.get():
        return None
    call, new, table, bits, compute, affine, stats, none, absent, bfloat16 = ready
    if not (
        _fits(dy, shape, dtype)
        and _fits(mean, stats, compute)
        and _fits(rstd, stats, compute)
        and (weight is None or _fits(weight, affine, compute))
    ):
        return None
    if output_mask is None:
        to_x, to_weight, to_bias = True, weight is not None, True
    elif type(output_mask) is tuple and [type(m) for m in output_mask] == [bool] * 3:
        to_x, to_weight, to_bias = output_mask
    else:
        return None
    dx = new(shape, dtype) if to_x else None
    dweight = _empty(affine, compute) if to_weight else None
    dbias = _empty(affine, compute) if to_bias else None
    tables = [none if a is None else a.reshape(table) for a in (dy, x, dx)]
    if bits is not None:
        tables = [a.view(bits) for a in tables]
    rows = [absent if a is None else a.reshape(-1) for a in (mean, rstd, weight, dweight, dbias)]
    call(*tables, *rows, bfloat16)
    return dx, dweight, dbias


def _prepare(key: tuple[Any, ...]) -> _Ready | None:
    """Apply the rules to what is no array; None, too, where they refuse it."""
    shape, dtype, normalized_shape, axis = key
    ready = None
    if _problem.dtype_name(dtype) in _problem.ITEMSIZE:
        try:
            axes, turn, _ = axes_of(shape, normalized_shape, axis)
        except (TypeError, ValueError):
            return None
        if turn is None:
            ready = _ready_for(shape, dtype, axes)
    if _plain.get():
        return None  # not kept: it is so for a while
    if len(_ready) >= 4096:
        _ready.clear()
    _ready[key] = ready
    return ready


def _ready_for(shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...]) -> _Ready | None:
    kind = _problem.dtype_name(dtype)
    M, N = _problem.rows_and_cols(shape, axes)
    trailing = axes == tuple(range(len(shape) - len(axes), len(shape)))
    if not (M * N and trailing and dtype.isnative) or _cpu._engine() is _cpu_blocks:
        return None
    from cupynorm._cpu import bwd_shared as _cpu_bwd_shared

    if N > _cpu_bwd_shared.LONGEST:
        return None
    compute = np.dtype(np.float64 if kind == "float64" else np.float32)
    return _Ready(
        _cpu_bwd_shared.at_once(kind, M, N),
        np.empty if M * N * dtype.itemsize < _results.LEAST else _results.empty,
        (M, N),
        np.dtype(np.uint16) if dtype.itemsize == 2 else None,
        compute,
        tuple(shape[a] for a in axes),
        _problem.stats_shape(shape, axes),
        np.empty((0, 0), dtype),
        np.empty(0, compute),
        int(kind == "bfloat16"),
    )
