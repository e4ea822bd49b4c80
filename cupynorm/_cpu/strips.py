"""How rows come and go: in place where they lie row by row, else turned into a tile and back."""

import numpy as np

from cupynorm._cpu.compiled import inner
from cupynorm._cpu.vectors import (
    address,
    advance,
    at,
    item,
    like,
    lanes,
    load,
    move,
    pointer,
    raw,
    square,
    store,
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
    if col == 1:
        return p, row
    pitch = N + GAP
    here = pointer(tile, 0)
    move(raw(p), row, col, here, pitch, 1, n, N)
    return typed(here, p), pitch


@inner
def place(q, row, col, tile, N):  # type: ignore[no-untyped-def]
    """Give where to write rows that `put_back` brings to q, and their pitch."""
    if col == 1:
        return q, row
    return typed(pointer(tile, 0), q), N + GAP


@inner
def put_back(q, row, col, tile, n, N):  # type: ignore[no-untyped-def]
    """Bring n rows from where `place` had them written to q."""
    if col != 1:
        move(pointer(tile, 0), N + GAP, 1, raw(q), row, col, n, N)
