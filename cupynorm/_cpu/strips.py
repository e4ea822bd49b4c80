"""How rows come and go: in place where they lie row by row, else turned into a tile and back.

Rows of a table come from its columns, each of any dtype, with validity bitmaps or without.
"""

from typing import Any

import numpy as np

from cupynorm._cpu.compiled import inner
from cupynorm._cpu.vectors import (
    F16C,
    add,
    advance,
    at,
    item,
    lanes,
    like,
    load,
    load_first,
    move,
    raw,
    splat,
    store,
    store_first,
    typed,
)

# A strip is read along whichever of its strides is 1 and turned in registers, so that the
# arithmetic of contiguous rows does the rest and a row's bits are the same in every layout.

# Elements between rows of a tile, or rows of a power of two would share few sets of the L1.
GAP = 16
# Elements of a strip. Half as many read shorter pieces of each column, twice as many leave the L2.
_STRIP = 1 << 16
# Rows of a strip at least: a line of float32 of each column, and the line that comes with it.
_LEAST, _MOST = 32, 512


def rows_of_strip(N: int) -> int:
    """How many rows of N elements are brought together."""
    return min(_MOST, max(_LEAST, _STRIP // N // _LEAST * _LEAST))


@inner
def bring(p, row, col, tile, n, N):  # type: ignore[no-untyped-def]
    """Give n rows at p, with these strides, as contiguous ones: a pointer, and their pitch."""
    if col != 1:
        move(raw(p), row, col, typed(tile, raw(p)), N + GAP, 1, n, N)
    return place(p, row, col, tile, N)


@inner
def place(q, row, col, tile, N):  # type: ignore[no-untyped-def]
    """Give where to write rows that `put_back` brings to q, and their pitch."""
    if col == 1:
        return q, row
    return typed(tile, q), N + GAP


@inner
def put_back(q, row, col, tile, n, N):  # type: ignore[no-untyped-def]
    """Bring n rows from where `place` had them written to q."""
    if col != 1:
        move(typed(tile, raw(q)), N + GAP, 1, raw(q), row, col, n, N)


@inner
def start(p, outer, row, o, m):  # type: ignore[no-untyped-def]
    return advance(p, o * outer + m * row)


@inner
def of_rows(f, arrays, part, tile, room):  # type: ignore[no-untyped-def]
    """Bring a part of the rows of x, the first of ``arrays``, where the record tells it lies.

    It is the outer step, the first row and how many, the first column and how many.
    """
    o, first, n, left, size = part
    source = advance(start(arrays[0], f.x_outer, f.x_row, o, first), left * f.x_col)
    return bring(source, f.x_row, f.x_col, tile, n, size)


@inner
def _add(p, pp, q, qp, t, tp, n, N):  # type: ignore[no-untyped-def]
    """Write the sum of n rows at p and n at q to t, which may be either."""
    step = lanes(p)
    for k in range(n):
        a, b, c, i = advance(p, k * pp), advance(q, k * qp), advance(t, k * tp), 0
        while i + step <= N:
            store(c, i, add(load(a, i), load(b, i)))
            i += step
        if i < N:
            zero = splat(a, like(a, 0))
            there = add(load_first(a, i, N - i, zero), load_first(b, i, N - i, zero))
            store_first(c, i, N - i, there)


@inner
def of_sums(f, arrays, part, tile, room):  # type: ignore[no-untyped-def]
    """Bring rows of x and of residual, and put their sum, which is what is normalized.

    The second of two tiles takes residual and the sum, the first what comes of it.
    """
    (_, residual, total), (o, first, n, left, size) = arrays, part
    p, pp = of_rows(f, arrays, part, tile, room)
    other = advance(tile, f.rows * (size + GAP))
    source = start(residual, f.residual_outer, f.residual_row, o, first)
    source = advance(source, left * f.residual_col)
    q, qp = bring(source, f.residual_row, f.residual_col, other, n, size)
    target = advance(start(total, f.sum_outer, f.sum_row, o, first), left * f.sum_col)
    t, tp = place(target, f.sum_row, f.sum_col, other, size)
    _add(p, pp, q, qp, t, tp, n, size)
    put_back(target, f.sum_row, f.sum_col, other, n, size)
    return t, tp


# --- columns ------------------------------------------------------------------------------------

# Dtypes of columns: the number of each is what `_load` is told.
COLUMN_DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
TOGETHER = 16  # columns that are turned together: a line of float32 of each row


@inner
def _cast(p, n, q):  # type: ignore[no-untyped-def]
    for i in range(n):
        q[i] = like(q, item(p, i))


@inner
def _truths(p, n, q):  # type: ignore[no-untyped-def]
    for i in range(n):
        q[i] = like(q, p[i] != 0)


def _loading(kinds: tuple[str, ...], first: int = 0) -> Any:
    """Make what reads n elements at x, of the dtype with this number, in the dtype of q.

    A tree: the compiler's recursion is as deep as that of the functions.
    """
    if len(kinds) == 1:
        cast, kind = (_truths, "uint8") if kinds == ("bool",) else (_cast, *kinds)

        @inner
        def load_one(which, x, n, q):  # type: ignore[no-untyped-def]
            cast(at(x, kind), n, q)

        return load_one
    split = first + len(kinds) // 2
    low, high = _loading(kinds[: split - first], first), _loading(kinds[split - first :], split)

    @inner
    def load_some(which, x, n, q):  # type: ignore[no-untyped-def]
        if which < split:
            low(which, x, n, q)
        else:
            high(which, x, n, q)

    return load_some


# Where there is no instruction, Python has widened columns of float16, and none has its number.
_load = _loading(tuple("float32" if k == "float16" and not F16C else k for k in COLUMN_DTYPES))


@inner
def _forget(t, n, mask, bit):  # type: ignore[no-untyped-def]
    """Put NaN where the bitmap has a 0; Arrow's order, least significant bit first."""
    i = 0
    while i < n:
        here = bit + i
        byte = mask[here >> 3]
        if here & 7 == 0 and n - i >= 8:
            if byte != 255:
                for k in range(8):
                    if (byte >> k) & 1 == 0:
                        t[i + k] = like(t, np.nan)
            i += 8
        else:
            if (byte >> (here & 7)) & 1 == 0:
                t[i] = like(t, np.nan)
            i += 1


@inner
def room_size(f):  # type: ignore[no-untyped-def]
    """Elements that `of_columns` needs beside the tile, and that a row of known values does."""
    return max(f.N, TOGETHER * (f.rows + GAP))


@inner
def of_columns(f, columns, part, tile, room):  # type: ignore[no-untyped-def]
    """Bring the rows of a strip from columns.

    columns (5, N): number of the dtype, address, bytes of an element, address of the bitmap or 0,
    and the bit of row 0. ``room`` holds TOGETHER columns.
    """
    p, N, first, n, pitch = typed(tile, room), f.N, part[1], part[2], f.rows + GAP
    for left in range(0, N, TOGETHER):
        count = min(TOGETHER, N - left)
        for c in range(count):
            j, q = left + c, advance(room, c * pitch)
            _load(columns[j], columns[N + j] + first * columns[2 * N + j], n, q)
            if columns[3 * N + j] != 0:
                _forget(q, n, at(columns[3 * N + j], "uint8"), columns[4 * N + j] + first)
        move(room, 1, pitch, advance(p, left), N + GAP, 1, n, count)
    return p, N + GAP
