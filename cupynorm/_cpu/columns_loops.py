"""Inner loops of layer norm over separate columns: neighbours in a vector are rows."""

import math
from typing import Any

import numpy as np

from cupynorm._cpu.columns_lanes import call, fence
from cupynorm._cpu.columns_write import ROWS, put_columns, put_rows
from cupynorm._cpu.kept import seen, shared
from cupynorm._cpu.loops import compiled, take_block
from cupynorm._cpu.pointers import address, advance, at, like, pointer
from cupynorm._cpu.shared import counters_of

__all__ = ["ALONE", "normalize", "rows_of_block"]

# Elements below which one thread does all, as for rows.
ALONE = 1 << 18
# Elements of a block of rows, 256 KiB of float32: within the L2 of one core. Half as many cost
# 200000x100 a sixth, for shorter pieces of each column; twice as many gain nothing.
_BLOCK = 1 << 16
# Columns whose terms meet in the dtype of the block before they are added in float64, so that the
# rounding of a sum hardly grows with the number of columns.
_GROUP = 16


def rows_of_block(M: int, N: int) -> int:
    """How many rows are gathered together, a multiple of 16."""
    most = min(1024, max(ROWS, _BLOCK // N // ROWS * ROWS))
    return min(most, -(-M // ROWS) * ROWS)


@compiled()
def _forget(t, n, mask, bit):  # type: ignore[no-untyped-def]
    """Put NaN where the bitmap has a 0; Arrow's order, least significant bit first."""
    i = 0
    while i < n:
        at = bit + i
        byte = mask[at >> 3]
        if at & 7 == 0 and n - i >= 8:
            if byte != 255:
                for k in range(8):
                    if (byte >> k) & 1 == 0:
                        t[i + k] = like(t, np.nan)
            i += 8
        else:
            if (byte >> (at & 7)) & 1 == 0:
                t[i] = like(t, np.nan)
            i += 1


@compiled()
def _clear(a, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        a[i] = like(a, 0)


@compiled()
def _flush(part, total, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        total[i] += part[i]
        part[i] = like(part, 0)


@compiled()
def _add(part, count, x, n, omit):  # type: ignore[no-untyped-def]
    if omit:
        for i in range(n):
            known = x[i] == x[i]
            part[i] += x[i] if known else like(x, 0)
            count[i] += 1.0 if known else 0.0
    else:
        for i in range(n):
            part[i] += x[i]


@compiled()
def _add_squares(first, second, x, s, n, omit):  # type: ignore[no-untyped-def]
    if omit:
        for i in range(n):
            d = x[i] - s[i] if x[i] == x[i] else like(x, 0)
            first[i] += d
            second[i] += d * d
    else:
        for i in range(n):
            d = x[i] - s[i]
            first[i] += d
            second[i] += d * d


@compiled()
def _wide(t, pitch, N, count, omit):  # type: ignore[no-untyped-def]
    """Moments of one row in float64, scaled: its sums overflow, or vanish beside eps."""
    share = 1.0 / count
    mean = 0.0
    for j in range(N):
        x = float(t[j * pitch])
        mean += 0.0 if omit and x != x else x * share
    s = like(t, mean)
    m = 0.0
    v = mean - mean
    if v == 0.0:  # else the row holds NaN or Inf, and all of it becomes NaN
        for j in range(N):
            d = float(t[j * pitch]) - s
            if not omit or d == d:
                m += d * share
                v += (d * share) * d
    return s, m, v - m * m


@compiled()
def _gather(columns, row, n, t, pitch, first, count, total, omit):  # type: ignore[no-untyped-def]
    """Read a block, column by column, and sum its rows while each column is in the L1."""
    N = columns.shape[1]
    _clear(first, n)
    _clear(total, n)
    for i in range(n):
        count[i] = 0.0 if omit else N
    for j in range(N):
        x = advance(t, j * pitch)
        call(columns[0, j], columns[1, j] + row * columns[2, j], columns[2, j], n, address(x))
        if columns[3, j]:
            _forget(x, n, at(columns[3, j], np.uint8), columns[4, j] + row)
        _add(first, count, x, n, omit)
        if j % _GROUP == _GROUP - 1 or j == N - 1:
            _flush(first, total, n)


@compiled()
def _moments(t, pitch, N, n, s, m, r, work, total, count, limits, omit):  # type: ignore[no-untyped-def]
    """Pivot s, mean - s and 1 / sqrt(var + eps) of every row of a block; total holds its sums."""
    first, second = work
    eps, low, high = limits
    for i in range(n):
        s[i] = like(s, total[0][i] / count[i])
    _clear(first, n)
    _clear(second, n)
    for k in range(2):
        _clear(total[k], n)
    for j in range(N):
        _add_squares(first, second, advance(t, j * pitch), s, n, omit)
        if j % _GROUP == _GROUP - 1 or j == N - 1:
            _flush(first, total[0], n)
            _flush(second, total[1], n)
    for i in range(n):
        mean, v = total[0][i] / count[i], total[1][i] / count[i]
        if low < v < high:
            v -= mean * mean
        else:
            s[i], mean, v = _wide(advance(t, i), pitch, N, count[i], omit)
        m[i] = like(m, mean)
        r[i] = like(r, 1.0 / math.sqrt(v + eps))


@compiled()
def _share(columns, M, R, y, yp, by_row, w, b, limits, omit, bfloat16, counters, who, rooms):  # type: ignore[no-untyped-def]
    # The arrays are arguments because numba frees an array after its last use, pointers or not.
    N, (block, stats, sums) = columns.shape[1], rooms
    pitch = R + ROWS  # not a power of two: rows of a line are read across columns
    t, total, count = pointer(block, 0), (pointer(sums, 0), pointer(sums, R)), pointer(sums, 2 * R)
    s, m, r = pointer(stats, 0), pointer(stats, R), pointer(stats, 2 * R)
    work, room = (pointer(stats, 3 * R), pointer(stats, 4 * R)), block[N * pitch :]
    blocks = (M + R - 1) // R
    row = take_block(counters, who, blocks) * R
    while row >= 0:
        n = min(R, M - row)
        _gather(columns, row, n, t, pitch, work[0], count, total[0], omit)
        _moments(t, pitch, N, n, s, m, r, work, total, count, limits, omit)
        if by_row:
            put_rows(t, pitch, N, n, y, row * yp, yp, s, m, r, w, b, room, bfloat16)
        else:
            put_columns(t, pitch, N, n, y, row, yp, s, m, r, w, b, room, bfloat16)
        row = take_block(counters, who, blocks) * R
    fence()


def _define_normalize(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def normalize(job, who):  # type: ignore[no-untyped-def]
        # columns (5, N): loader, address, stride in bytes, bitmap or 0, its bit of row 0. After the
        # block: room for results.
        a, f, counters = at(job, np.int64), at(job, np.float64), counters_of(job)
        M, N, R, yp, by_row = a[1], a[2], a[3], a[5], a[6] != 0
        columns = seen(a[0], 5 * N, np.int64).reshape((5, N))
        y = seen(a[4], (M - 1) * yp + N if by_row else (N - 1) * yp + M, stored)
        w, b = seen(a[7], N, computed), seen(a[8], N, computed)
        size = N * (R + ROWS) + max(R, ROWS * N)
        block = np.empty(size * (sources != 0), computed)
        stats, sums, limits = np.empty(5 * R, computed), np.empty(3 * R), (f[9], f[10], f[11])
        _share(
            columns,
            M,
            R,
            y,
            yp,
            by_row,
            w,
            b,
            limits,
            a[12] != 0,
            a[13] != 0,
            counters,
            who,
            (block, stats, sums),
        )

    return normalize


def normalize(kind: tuple[Any, Any]) -> Any:
    """Work on the blocks of R rows of a table, for dtypes of y's memory and of what is computed.

    Its record: columns (5, N), M, N, R, y, yp, by_row, w, b, eps, low, high, omit, bfloat16;
    addresses of what is absent are 0.
    """
    return shared(_define_normalize, kind)
