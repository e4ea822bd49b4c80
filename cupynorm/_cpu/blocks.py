"""Layer norm in plain NumPy, any layout and byte order: blocks of rows that stay in a cache.

A block is gathered, its moments are taken in two passes, it is scaled in place and put back.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupynorm._cpu.engine import safe_range
from cupynorm._rules import stats_dtype

Array = np.ndarray[Any, Any]
Rule = tuple[float, bool]  # eps, and whether the mean is subtracted

_BLOCK = 1 << 16  # elements of a block: 256 KiB of float32, within the L2 of one core
_ROWS = 16  # rows whose neighbours share a cache line of float32 where an axis is strided
_LARGEST = 1 << 22  # elements; a block of _ROWS rows may not become larger than this
_PIECE = 256  # elements summed in one go
_TERMS = 16  # rows that are added in float32 before they meet in float64


def row_sums(d: Array, e: Array | None = None) -> Array:  # d, e: (R, n) -> (R,) float64
    """Sum each row of d, or of d * e, in an order that depends on n alone."""
    # einsum takes a contiguous row several lanes at a time, three times as fast as add.reduce,
    # but on to the end: pieces keep the rounding of long rows as small as that of short ones.
    R, n = d.shape
    pair = (d,) if e is None else (d, e)
    rows, pieces = ("ij->i", "ijk->ij") if e is None else ("ij,ij->i", "ijk,ijk->ij")
    if n <= 2 * _PIECE:
        short: Array = np.einsum(rows, *pair).astype(np.float64)
        return short
    k = n // _PIECE
    part = np.einsum(pieces, *(a[:, : k * _PIECE].reshape(R, k, _PIECE) for a in pair))
    total: Array = np.add.reduce(part.astype(np.float64), axis=1)
    if n > k * _PIECE:
        total += np.einsum(rows, *(a[:, k * _PIECE :] for a in pair))
    return total


def _turn(x: Array, axes: tuple[int, ...]) -> tuple[list[int], int]:
    """Permutation to rows, neighbours in memory last, and columns; how many axes are rows'."""
    rows = sorted((a for a in range(x.ndim) if a not in axes), key=lambda a: -abs(x.strides[a]))
    return [*rows, *axes], len(rows)


def _rows_of_block(N: int) -> int:
    return max(1, _BLOCK // N, min(_ROWS, _LARGEST // N))


def _rooms(count: int, x: Array, N: int) -> list[Array]:
    """Memory for blocks, in the dtype of the statistics."""
    size, dtype = min(x.size, _rows_of_block(N) * N), stats_dtype(x.dtype.name)
    return [np.empty(size, dtype) for _ in range(count)]


def _blocks(shape: tuple[int, ...], N: int) -> Iterator[tuple[slice, ...]]:
    """Index rows of this shape in blocks, of rows near each other in memory."""
    rows, split = _rows_of_block(N), 0
    while math.prod(shape[split + 1 :]) > rows:
        split += 1
    if split >= len(shape):
        yield ()
        return
    length = shape[split]
    step = max(1, rows // math.prod(shape[split + 1 :]))
    for index in np.ndindex(*shape[:split]):
        for lo in range(0, length, step):
            yield (*(slice(i, i + 1) for i in index), slice(lo, min(length, lo + step)))


def _gathered(source: Array, room: Array, N: int) -> Array:
    """A block as contiguous rows (R, N), in the dtype of the room."""
    flat = room[: source.size]
    np.copyto(flat.reshape(source.shape), source, casting="unsafe")
    return flat.reshape(-1, N)


def _wide_moments(x: Array, center: bool, eps: float) -> tuple[float, float, float]:
    """s, mean(x - s) and rstd of the n elements of x, out of the safe range."""
    n, s, m = x.size, 0.0, 0.0
    d = wide = x.astype(np.float64)
    if center:
        # The sum of float64 rows near the maximum overflows.
        s = float(x.dtype.type(float(np.add.reduce(wide / n))))
        d = wide - s
        m = float(np.add.reduce(d / n))
    top = float(np.max(np.abs(d), initial=0.0))  # and so do their squares
    top = top if 0 < top < np.inf else 1.0
    v = float(np.add.reduce((d / top) ** 2 / n)) - (m / top) ** 2
    if v > 0:
        return s, m, 1.0 / np.hypot(top * np.sqrt(v), np.sqrt(max(eps, 0.0)))
    return s, m, 1.0 / np.sqrt(v + eps)


def _normalize(
    x: Array, d: Array, w: Array | None, b: Array | None, rule: Rule, omit: bool = False
) -> tuple[Array, Array]:
    """Write the normalized rows of x to d, both (R, n); give mean and rstd in float64.

    With ``omit`` NaN is left out of a row's statistics, and stays.
    """
    eps, center = rule
    n: Any = x.shape[1]
    lost = np.isnan(x) if omit else None
    np.copyto(d, x)
    if lost is not None:
        n = np.add.reduce(~lost, axis=1, dtype=np.float64)
        d[lost] = 0
    s = m = np.zeros(len(x))
    if center:
        rounded = (row_sums(d) / n).astype(d.dtype)
        np.subtract(x, rounded[:, None], out=d)
        if lost is not None:
            d[lost] = 0
        s, m = rounded.astype(np.float64), row_sums(d) / n
    v = row_sums(d, d) / n
    low, high = safe_range(d.dtype.name, eps)
    unsafe = np.flatnonzero(~((v > low) & (v < high)))  # NaN goes the long way with the rest
    r = 1.0 / np.sqrt(v - m * m + eps)
    for row in unsafe:
        values = x[row] if lost is None else x[row][~lost[row]]
        s[row], m[row], r[row] = _wide_moments(values, center, eps)
        np.subtract(x[row], d.dtype.type(s[row]), out=d[row])
    if center:
        d -= m.astype(d.dtype)[:, None]
    d *= r.astype(d.dtype)[:, None]
    if w is not None:
        d *= w
    if b is not None:
        d += b
    if lost is not None:
        d[lost] = np.nan
    return s + m, r


def forward(
    given: tuple[Array, ...],
    axes: tuple[int, ...],
    w: Array | None,
    b: Array | None,
    rule: Rule,
    results: tuple[Array | None, ...],
) -> None:
    """Normalize x over ``axes`` into y, mean and rstd; y may be x.

    w and b are rows in the dtype of the statistics. ``given`` is x, or x and residual, whose sum is
    the last of the ``results`` and is normalized.
    """
    x = given[0]
    turn, rows = _turn(x, axes)
    xt, *residual = (a.transpose(turn) for a in given)
    turned: list[Any] = [None if a is None else a.transpose(turn) for a in results]
    yt, mean, rstd, *total = turned
    N = math.prod(xt.shape[rows:])
    rooms = _rooms(2, x, N)
    with np.errstate(all="ignore"):
        for block in _blocks(xt.shape[:rows], N):
            source = xt[block]
            if residual:
                source = np.add(source, residual[0][block], out=total[0][block])
            values = _gathered(source, rooms[0], N)
            d = rooms[1][: values.size].reshape(values.shape)
            told = _normalize(values, d, w, b, rule)
            np.copyto(yt[block], d.reshape(yt[block].shape), casting="unsafe")
            for whole, part in zip((mean, rstd), told, strict=True):
                if whole is not None:
                    whole[block] = part.reshape(whole[block].shape)


def columns(
    columns: Any, w: Array | None, b: Array | None, rule: Rule, y: Array, omit: bool
) -> None:
    """Normalize the rows of N columns, with validity bitmaps or without, into y (M, N)."""
    M, N = y.shape
    rooms = _rooms(2, y, N)
    with np.errstate(all="ignore"):
        for block in _blocks((M,), N):
            lo, hi, _ = (*block, slice(None))[0].indices(M)
            x, d = (room[: (hi - lo) * N].reshape(-1, N) for room in rooms)
            for j, (values, validity, offset) in enumerate(columns):
                np.copyto(x[:, j], values[lo:hi], casting="unsafe")
                if validity is not None:
                    first = offset + lo
                    bits = validity[first // 8 : (offset + hi + 7) // 8]
                    valid = np.unpackbits(bits, bitorder="little")[first % 8 :][: hi - lo]
                    x[valid == 0, j] = np.nan
            _normalize(x, d, w, b, rule, omit)
            np.copyto(y[lo:hi], d, casting="unsafe")


def _column_sums(a: Array) -> Array:  # a: (R, n) -> (n,) float64
    R, n = a.shape
    k = R // _TERMS
    total = np.zeros(n)
    if k:
        parts = np.add.reduce(a[: k * _TERMS].reshape(k, _TERMS, n), axis=1)
        np.add.reduce(parts.astype(np.float64), axis=0, out=total)
    if k * _TERMS < R:
        total += np.add.reduce(a[k * _TERMS :], axis=0, dtype=np.float64)
    return total


def backward(
    given: tuple[Array | None, ...],
    axes: tuple[int, ...],
    w: Array | None,
    dx: Array | None,
    summed: bool,
) -> Array | None:  # (2, N)
    """Write dx, which may be dy; if ``summed``, give sums of dy * x_hat and of dy in float64.

    ``given``: dy, x, mean, None where there is no centre, rstd, and dsum, which may be None.
    """
    x: Any = given[1]
    turn, rows = _turn(x, axes)
    turned: list[Any] = [None if a is None else a.transpose(turn) for a in given]
    dyt, xt, mean, rstd, dsum = turned
    dxt = None if dx is None else dx.transpose(turn)
    N = math.prod(xt.shape[rows:])
    rooms = _rooms(3, x, N)
    sums = np.zeros((2, N)) if summed else None
    with np.errstate(all="ignore"):
        for block in _blocks(xt.shape[:rows], N):
            h, g = _gathered(xt[block], rooms[0], N), _gathered(dyt[block], rooms[1], N)
            t = rooms[2][: h.size].reshape(h.shape)
            r = rstd[block].astype(h.dtype).reshape(-1, 1)
            if mean is not None:
                h -= mean[block].astype(h.dtype).reshape(-1, 1)
            h *= r
            if mean is not None:
                h -= (row_sums(h) / N).astype(h.dtype)[:, None]  # what the rounded mean lacks
            if sums is not None:
                sums[0] += _column_sums(np.multiply(g, h, out=t))
                sums[1] += _column_sums(g)
            if dxt is None:
                continue
            if w is not None:
                g *= w
            c2 = row_sums(g, h) / N
            if mean is not None:
                g -= (row_sums(g) / N).astype(g.dtype)[:, None]
            h *= c2.astype(h.dtype)[:, None]
            g -= h
            g *= r
            if dsum is not None:
                g += _gathered(dsum[block], rooms[2], N)
            np.copyto(dxt[block], g.reshape(dxt[block].shape), casting="unsafe")
    return sums
