"""Rows and chunks of NumPy arrays in compiled loops: read, take the moments, normalize, write."""

import math
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from cupynorm._cpu.bits import give, place, take
from cupynorm._cpu.loops import (
    CHUNK,
    FROM_MEMORY,
    GROUP,
    LINE,
    apply_row,
    before_line,
    compiled,
    merge,
    moments,
    pivot,
)
from cupynorm._cpu.narrow import F16C, brain, half
from cupynorm._cpu.pointers import address, advance, pointer

__all__ = ["normalize_group", "normalize_rows", "rooms", "row_moments", "row_results", "short_rows"]

_REPAYS = 4  # rows for which a copy of weight and bias is worth its time


@compiled()
def normalize_group(p, xp, q, yp, M, N, w, b, eps, low, high, s, m, r):  # type: ignore[no-untyped-def]
    # Phase by phase over a group of rows: alone, each row would wait for its own divisions and
    # square root, which take longer than 64 elements.
    for k in range(M):
        s[k] = pivot(advance(p, k * xp), N)
    for k in range(M):
        s[k], m[k], r[k] = moments(advance(p, k * xp), N, s[k], low, high)
    for k in range(M):
        r[k] = 1.0 / math.sqrt(r[k] + eps)
    wp, bp = pointer(w, 0), pointer(b, 0)
    for k in range(M):
        to = advance(q, k * yp)
        apply_row(
            advance(p, k * xp), to, N, wp, bp, s[k], m[k], r[k], w.size > 0, b.size > 0, False
        )


@compiled()
def _keep(mean, rstd, row, M, s, m, r):  # type: ignore[no-untyped-def]
    if mean.size:
        for k in range(M):
            mean[row + k] = s[k] + m[k]
    if rstd.size:
        for k in range(M):
            rstd[row + k] = r[k]


@compiled()
def row_moments(x, at, n, low, high, parts, scratch, bfloat16):  # type: ignore[no-untyped-def]
    for c in range(parts.shape[0]):
        size = min(CHUNK, n - c * CHUNK)
        p, _ = take(x, at + c * CHUNK, size, 1, size, scratch, bfloat16)
        parts[c, 0], parts[c, 1], parts[c, 2] = moments(p, size, pivot(p, size), low, high)


@compiled()
def row_results(x, at, y, to, n, w, b, s, m, r, scratch, bfloat16, past):  # type: ignore[no-untyped-def]
    has_w, has_b = w.size > 0, b.size > 0
    for c in range(0, n, CHUNK):
        size = min(CHUNK, n - c)
        p, _ = take(x, at + c, size, 1, size, scratch, bfloat16)
        q, _ = place(y, to + c, size, size, scratch)
        wp, bp = pointer(w, c), pointer(b, c)
        apply_row(p, q, size, wp, bp, s, m, r, has_w, has_b, past)
        give(y, to + c, size, 1, size, scratch, bfloat16)


@compiled()
def _in_step(a, q, M):  # type: ignore[no-untyped-def]
    """Give a row as it is, or where M rows pay for it a copy that crosses cache lines where q does.

    NumPy's arrays begin 16 bytes past a line, so that every vector of them lies across two: see
    apply_row, which begins on a line of y.
    """
    phase = -before_line(q, a.size) * a.itemsize & (LINE - 1)
    if M < _REPAYS or a.size == 0 or address(pointer(a, 0)) & (LINE - 1) == phase:
        return a
    room = np.empty(a.size + 2 * LINE // a.itemsize, a.dtype)
    first = ((phase - address(pointer(room, 0))) & (LINE - 1)) // a.itemsize
    copy = room[first : first + a.size]
    for i in range(a.size):
        copy[i] = a[i]
    return copy


def _step(*arguments: Any) -> Any:  # a, y, to, M
    """_in_step(a, q, M) for the pointer q by which rows from y[to] on are written."""
    raise NotImplementedError("compiled only")


@overload(_step)
def _step_by_type(a, y, to, M):  # type: ignore[no-untyped-def]
    def in_place(a, y, to, M):  # type: ignore[no-untyped-def]
        return _in_step(a, pointer(y, to), M)

    def narrow(a, y, to, M):  # type: ignore[no-untyped-def]
        return _in_step(a, half(pointer(y, to)), M)

    return narrow if y.dtype == types.uint16 else in_place


def _group(*arguments: Any) -> Any:
    """normalize_group from x[at] to y[to], of 16-bit values too."""
    raise NotImplementedError("compiled only")


@overload(_group)
def _group_by_type(  # type: ignore[no-untyped-def]
    x, at, xp, y, to, yp, M, N, w, b, eps, low, high, s, m, r, bfloat16, scratch
):
    def in_place(x, at, xp, y, to, yp, M, N, w, b, eps, low, high, s, m, r, bfloat16, scratch):  # type: ignore[no-untyped-def]
        p, q = pointer(x, at), pointer(y, to)
        normalize_group(p, xp, q, yp, M, N, w, b, eps, low, high, s, m, r)

    def narrow(x, at, xp, y, to, yp, M, N, w, b, eps, low, high, s, m, r, bfloat16, scratch):  # type: ignore[no-untyped-def]
        p, q = pointer(x, at), pointer(y, to)
        if bfloat16:
            normalize_group(brain(p), xp, brain(q), yp, M, N, w, b, eps, low, high, s, m, r)
        elif F16C:
            normalize_group(half(p), xp, half(q), yp, M, N, w, b, eps, low, high, s, m, r)
        else:
            wide, pp = take(x, at, xp, M, N, scratch, bfloat16)
            result, qp = place(y, to, yp, N, scratch)
            normalize_group(wide, pp, result, qp, M, N, w, b, eps, low, high, s, m, r)
            give(y, to, yp, M, N, scratch, bfloat16)

    return narrow if x.dtype == types.uint16 else in_place


@compiled()
def short_rows(x, xp, y, yp, lo, hi, N, w, b, eps, low, high, mean, rstd, bfloat16, scratch, stats):  # type: ignore[no-untyped-def]
    s, m, r = stats[0], stats[1], stats[2]
    w, b = _step(w, y, lo * yp, hi - lo), _step(b, y, lo * yp, hi - lo)
    group = s.size if x.size < FROM_MEMORY else max(1, s.size // 2)
    for row in range(lo, hi, group):
        n = min(group, hi - row)
        _group(
            x, row * xp, xp, y, row * yp, yp, n, N, w, b, eps, low, high, s, m, r, bfloat16, scratch
        )
        _keep(mean, rstd, row, n, s, m, r)


@compiled()
def _long_rows(x, xp, y, yp, lo, hi, N, w, b, eps, low, high, mean, rstd, bfloat16, scratch, parts):  # type: ignore[no-untyped-def]
    for row in range(lo, hi):
        row_moments(x, row * xp, N, low, high, parts, scratch, bfloat16)
        s, m, v = merge(parts, N)
        r = 1.0 / math.sqrt(v + eps)
        if mean.size:
            mean[row] = s + m
        if rstd.size:
            rstd[row] = r
        row_results(x, row * xp, y, row * yp, N, w, b, s, m, r, scratch, bfloat16, False)


@compiled()
def rooms(M, N):  # type: ignore[no-untyped-def]
    """Memory that normalize_rows works in."""
    group = max(1, min(M, GROUP // N))
    scratch = np.empty(min(CHUNK, group * N), np.float32)
    return scratch, np.empty((3, group)), np.empty(((N + CHUNK - 1) // CHUNK, 3))


@compiled()
def normalize_rows(x, xp, y, yp, lo, hi, N, w, b, eps, low, high, mean, rstd, bfloat16, rooms):  # type: ignore[no-untyped-def]
    """Do the rows lo to hi, at pitch xp in x and yp in y; empty w, b, mean, rstd are absent."""
    scratch, stats, parts = rooms
    if N <= CHUNK:
        short_rows(
            x, xp, y, yp, lo, hi, N, w, b, eps, low, high, mean, rstd, bfloat16, scratch, stats
        )
    else:
        _long_rows(
            x, xp, y, yp, lo, hi, N, w, b, eps, low, high, mean, rstd, bfloat16, scratch, parts
        )
