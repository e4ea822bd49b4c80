"""Layer norm's backward over rows in plain NumPy, block by block as the forward does."""

from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._cpu.blocks import CHUNK, Scratch, row_sums
from cupynorm._cpu.half import narrow, widen

__all__ = ["ALONE", "rows"]

Array = np.ndarray[Any, Any]

ALONE = CHUNK // 2  # elements below which one thread does all
_BLOCKS = 64  # of rows that have column sums of their own
_SUMS = 1 << 21  # elements that the column sums of all blocks may have together
_PIECE = 16  # rows that are added in float32 before they meet in float64
_hat, _grad = Scratch(), Scratch()


def _columns(a: Array) -> Array:  # a: (R, n) -> (n,) float64
    """Sum the rows of a."""
    R, n = a.shape
    k = R // _PIECE
    total = np.zeros(n)
    if k:
        parts = np.add.reduce(a[: k * _PIECE].reshape(k, _PIECE, n), axis=1)
        np.add.reduce(parts.astype(np.float64), axis=0, out=total)
    if k * _PIECE < R:
        total += np.add.reduce(a[k * _PIECE :], axis=0, dtype=np.float64)
    return total


def _x_hat(x: Array, mean: Array, rstd: Array) -> Array:  # x: (R, n); mean, rstd: (R,)
    h = np.subtract(x, mean[:, None], out=_hat.like(x))
    h *= rstd[:, None]
    return h


def _weighted(dy: Array, w: Array | None) -> Array:  # dy: (R, n); w: (n,)
    g = _grad.like(dy)
    if w is None:
        np.copyto(g, dy)
    else:
        np.multiply(dy, w, out=g)
    return g


def _write(kind: str, g: Array, h: Array, r: Array, c1: Array, c2: Array, dx: Array) -> None:
    """Write (g - c1 - h * c2) * r to dx; g, h: (R, n), spoiled; r, c1, c2: (R,)."""
    h *= c2.astype(h.dtype)[:, None]
    g -= c1.astype(g.dtype)[:, None]
    g -= h
    np.multiply(g, r[:, None], out=dx if g.dtype == dx.dtype else g)
    narrow(kind, g, dx)


def _short_rows(
    kind: str,
    dy: Array,  # (R, N)
    x: Array,  # (R, N)
    dx: Array | None,
    w: Array | None,
    mean: Array,  # (R,)
    rstd: Array,  # (R,)
    sums: Array | None,  # (2, N)
) -> None:
    N = x.shape[1]
    d, h = widen(kind, dy), _x_hat(widen(kind, x), mean, rstd)
    h -= (row_sums(h) / N).astype(h.dtype)[:, None]
    if sums is not None:
        sums[0] += _columns(np.multiply(d, h, out=_grad.like(d)))
        sums[1] += _columns(d)
    if dx is not None:
        g = _weighted(d, w)
        _write(kind, g, h, rstd, row_sums(g) / N, row_sums(g, h) / N, dx)


def rows(
    kind: str,
    dy: Array,  # (M, N), each row contiguous
    x: Array,  # (M, N), each row contiguous
    dx: Array | None,  # (M, N), each row contiguous; may be dy
    w: Array | None,  # (N,)
    mean: Array,  # (M,)
    rstd: Array,  # (M,)
    summed: bool,
    threads: int = 1,
) -> Array | None:  # (2, N)
    """Write dx; if ``summed``, give the sums over rows of dy * x_hat and of dy in float64."""
    M, N = x.shape
    if N > CHUNK:
        return _long_rows(kind, dy, x, dx, w, mean, rstd, summed, threads)
    count = min(M, -(-M * N // CHUNK), _BLOCKS, max(1, _SUMS // N))
    sums = np.zeros((count, 2, N)) if summed else None
    step = max(1, CHUNK // N)

    def block(index: int) -> None:
        end = M * (index + 1) // count
        to = None if sums is None else sums[index]
        with np.errstate(all="ignore"):  # of this thread; helpers do not inherit the caller's
            for lo in range(M * index // count, end, step):
                part = slice(lo, min(end, lo + step))
                target = None if dx is None else dx[part]
                _short_rows(kind, dy[part], x[part], target, w, mean[part], rstd[part], to)

    _threads.run(lambda: block, count, threads)
    with np.errstate(all="ignore"):
        return None if sums is None else np.add.reduce(sums, axis=0)


def _long_rows(
    kind: str,
    dy: Array,
    x: Array,
    dx: Array | None,
    w: Array | None,
    mean: Array,
    rstd: Array,
    summed: bool,
    threads: int,
) -> Array | None:
    """Take the sums of every chunk, then the gradients of each, in all rows at a time."""
    M, N = x.shape
    chunks = -(-N // CHUNK)
    parts = np.empty((M, chunks, 3))
    sums = np.zeros((2, N)) if summed else None

    def part(row: int, chunk: int) -> tuple[Array, Array, slice, Array | None]:
        cols = slice(chunk * CHUNK, min(N, (chunk + 1) * CHUNK))
        h = _x_hat(widen(kind, x[row : row + 1, cols]), mean[row : row + 1], rstd[row : row + 1])
        d = widen(kind, dy[row : row + 1, cols])
        return d, h, cols, None if w is None else w[cols]

    def take_sums(index: int) -> None:
        row, chunk = divmod(index, chunks)
        with np.errstate(all="ignore"):
            d, h, _, to_w = part(row, chunk)
            g = _weighted(d, to_w)
            parts[row, chunk] = row_sums(h)[0], row_sums(g, h)[0], row_sums(g)[0]

    _threads.run(lambda: take_sums, M * chunks, threads)
    with np.errstate(all="ignore"):
        sum_h, sum_gh, sum_g = (_in_order(parts[:, :, i]) for i in range(3))
        lack = sum_h / N
        c1, c2 = sum_g / N, (sum_gh - lack * sum_g) / N

    def gradients(index: int) -> None:
        with np.errstate(all="ignore"):
            for row in range(M):
                d, h, cols, to_w = part(row, chunks - 1 - index)
                one = slice(row, row + 1)
                h -= h.dtype.type(lack[row])
                if sums is not None:
                    sums[0, cols] += np.multiply(d, h, out=_grad.like(d))[0]
                    sums[1, cols] += d[0]
                if dx is not None:
                    g = _weighted(d, to_w)
                    _write(kind, g, h, rstd[one], c1[one], c2[one], dx[one, cols])

    _threads.run(lambda: gradients, chunks, threads)
    return sums


def _in_order(parts: Array) -> Array:  # (M, chunks) -> (M,)
    """Sum the chunks of every row one after the other, however many rows there are."""
    total = np.zeros(parts.shape[0])
    for chunk in range(parts.shape[1]):
        total += parts[:, chunk]
    return total
