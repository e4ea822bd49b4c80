"""Compiled calls on contiguous NumPy arrays, one thread: four arrays cost less than addresses."""

from typing import Any

import numpy as np
from numba import from_dtype, types

from cupynorm._cpu.backward import FIELDS, block_count, group_size, merge_sums, sums_pitch
from cupynorm._cpu.compiled import inner, job
from cupynorm._cpu.forward import CHUNK, SPARE, in_step, short_rows
from cupynorm._cpu.jobs import backward_at, dtypes_of, group_of, share_gradients
from cupynorm._cpu.vectors import at, pointer

_LIMITS = [types.float64] * 3


def _arrays(kind: str, readonly: bool) -> tuple[Any, Any]:
    """Tables in x's memory, and rows of what loops compute in; read-only ones are taken too."""
    _, stored, wide = dtypes_of(kind)
    table, row = ((from_dtype(np.dtype(dtype)), ndim) for dtype, ndim in ((stored, 2), (wide, 1)))
    return types.Array(*table, "C", readonly=readonly), types.Array(*row, "C", readonly=readonly)


@inner
def _meet(other, y):  # type: ignore[no-untyped-def]
    first, to = other.ctypes.data, y.ctypes.data
    end, last = first + other.size * other.itemsize, to + y.size * y.itemsize
    return other.size > 0 and first < last and to < end


@inner
def _clash(x, y, w, b):  # type: ignore[no-untyped-def]
    """Whether y shares memory with w, with b, or with x but is not x."""
    if x.ctypes.data != y.ctypes.data and _meet(x, y):
        return True
    return _meet(w, y) or _meet(b, y)


@inner
def _of(a):  # type: ignore[no-untyped-def]
    return a.ctypes.data if a.size else 0


@inner
def _rows(p, q, M, N, w, b, limits, told, stats, rooms):  # type: ignore[no-untyped-def]
    w, b = in_step(w, q, M, rooms[0]), in_step(b, q, M, rooms[1])
    group = stats.size // 3
    short_rows(p, N, q, N, M, N, w, b, limits, told, pointer(stats, 0), group)


@inner
def _merge(to, M, N, targets, room, sums):  # type: ignore[no-untyped-def]
    merge_sums(to, M, N, targets, room)  # while the caller holds ``sums``, where ``to`` points


@job
def small(checksum: int, kind: str) -> Any:
    """``small(x, y, w, b, eps, low, high)``: contiguous rows of at most CHUNK elements.

    x and y (M, N) hold 16-bit kinds as uint16; an absent w or b is empty. True, and nothing has
    been done, where y shares memory with w, b or a part of x.
    """
    computed, _, wide = dtypes_of(kind)
    (x_type, row), (y_type, _) = _arrays(kind, True), _arrays(kind, False)

    def small(x, y, w, b, eps, low, high):  # type: ignore[no-untyped-def]
        if _clash(x, y, w, b):
            return True
        M, N = x.shape
        stats = np.empty(3 * group_of(M * N, M, N) * (checksum != 0))
        rooms = np.empty(N + SPARE, wide), np.empty(N + SPARE, wide)
        wp, bp, none = at(_of(w), computed), at(_of(b), computed), at(0, computed)
        p, q = at(x.ctypes.data, kind), at(y.ctypes.data, kind)
        _rows(p, q, M, N, wp, bp, (eps, low, high), (none, none, 0, 0), stats, rooms)
        return False

    return types.bool_(x_type, y_type, row, row, *_LIMITS), small


@job
def small_with_stats(checksum: int, kind: str) -> Any:
    """``small_with_stats(x, y, w, b, mean, rstd, eps, low, high)``: the same.

    Two arrays more cost a call 100 ns, a twentieth of it.
    """
    computed, _, wide = dtypes_of(kind)
    (x_type, row), (y_type, to) = _arrays(kind, True), _arrays(kind, False)

    def small_with_stats(x, y, w, b, mean, rstd, eps, low, high):  # type: ignore[no-untyped-def]
        if _clash(x, y, w, b):
            return True
        M, N = x.shape
        stats = np.empty(3 * group_of(M * N, M, N) * (checksum != 0))
        rooms = np.empty(N + SPARE, wide), np.empty(N + SPARE, wide)
        wp, bp = at(_of(w), computed), at(_of(b), computed)
        told = at(mean.ctypes.data, computed), at(rstd.ctypes.data, computed), 0, 1
        p, q = at(x.ctypes.data, kind), at(y.ctypes.data, kind)
        _rows(p, q, M, N, wp, bp, (eps, low, high), told, stats, rooms)
        return False

    return types.bool_(x_type, y_type, row, row, to, to, *_LIMITS), small_with_stats


@job
def small_gradients(checksum: int, kind: str) -> Any:
    """``small_gradients(plan, dy, x, mean, rstd, w, dx, dweight, dbias)``: of contiguous rows.

    dy, x and dx (M, N) hold 16-bit kinds as uint16; what is absent is empty. ``plan``: as for
    `jobs.gradients`.
    """
    computed, _, wide = dtypes_of(kind)
    (x_type, row), (y_type, result) = _arrays(kind, True), _arrays(kind, False)

    def small_gradients(plan, dy, x, mean, rstd, w, dx, dweight, dbias):  # type: ignore[no-untyped-def]
        f = backward_at(plan)
        total, N = f.M * (checksum != 0), f.N
        summed = dweight.size > 0 or dbias.size > 0
        sums = np.empty(2 * sums_pitch(N) * (block_count(total) if summed else 1), wide)
        room = np.empty(FIELDS * min(total, group_size(total, N)), wide)
        arrays = at(dy.ctypes.data, kind), at(x.ctypes.data, kind), at(_of(dx), kind)
        stats = at(mean.ctypes.data, computed), at(rstd.ctypes.data, computed)
        to, wp, tiles = at(sums.ctypes.data * summed, computed), at(_of(w), computed), (sums, sums)
        share_gradients(f, arrays, stats, wp, to, 0, block_count(total), tiles, room, sums)
        if summed:
            targets = at(_of(dweight), computed), at(_of(dbias), computed)
            _merge(to, total, N, targets, np.empty(min(N, CHUNK)), sums)

    given = types.int64, x_type, x_type, row, row, row
    return types.void(*given, y_type, result, result), small_gradients
