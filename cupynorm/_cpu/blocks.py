"""Layer norm over rows in plain NumPy, block by block so that temporaries stay in the cache."""

import threading
from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._cpu.half import narrow, widen

__all__ = [
    "ALONE",
    "CHUNK",
    "LONG",
    "Scratch",
    "chunk_moments",
    "finish",
    "normalize",
    "row_sums",
    "rows",
    "safe_range",
]

Array = np.ndarray[Any, Any]

# Elements of a row whose moments are taken together, and of a block of short rows: a buffer of
# 1 MiB of float32. Smaller ones would stay in the L2, and cost two threads five times as much:
# between two calls of a block each waits for the interpreter, longer than a short call takes.
CHUNK = 1 << 18
ALONE = 4 * CHUNK  # elements below which one thread does all
LONG = 4  # chunks from which a row is shared between threads when there are few of them
_PIECE = 256  # elements summed in one go
# Sums of squares that float32 (float64) cannot hold well are taken again in float64, scaled.
_SAFE = {"f": (2.0**-100, 2.0**126), "d": (2.0**-960, 2.0**1020)}
# Variances so small that their digits matter only if eps is smaller still.
_EPS_HIDES_UNDERFLOW = 1e-20


def safe_range(char: str, eps: float) -> tuple[float, float]:
    """Between which values a variance in dtype ``char`` ('f' or 'd') needs no second look."""
    low, high = _SAFE[char]
    return (-1.0 if abs(eps) >= _EPS_HIDES_UNDERFLOW else low), high


def _wide_moments(x: Array) -> tuple[float, float, float]:  # x: (n,), out of the safe range
    n = x.size
    wide = x.astype(np.float64)
    mean = float(np.add.reduce(wide / n))  # the sum of float64 rows near the maximum overflows
    s = float(x.dtype.type(mean))
    d = wide - s
    m = float(np.add.reduce(d / n))
    return s, m, float(np.add.reduce((d / n) * d)) - m * m


class Scratch(threading.local):
    """A block of memory per thread: from malloc it would come as fresh pages, call by call."""

    def __init__(self) -> None:
        self.memory = np.empty(CHUNK, np.float64)

    def like(self, x: Array) -> Array:
        """Array of x's shape and dtype, of at most CHUNK elements, lost with the next."""
        return self.memory.view(x.dtype)[: x.size].reshape(x.shape)


_scratch = Scratch()


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


def _block_moments(x: Array, d: Array, eps: float) -> Array:  # x, d: (R, n) -> (R, 3) float64
    """Write d = x - s and return s, mean(d) and the variance of each row."""
    n = x.shape[1]
    stats = np.empty((x.shape[0], 3))
    s, m, v = stats[:, 0], stats[:, 1], stats[:, 2]
    rounded = (row_sums(x) / n).astype(x.dtype)
    s[:] = rounded
    np.subtract(x, rounded[:, None], out=d)
    np.divide(row_sums(d), n, out=m)
    np.divide(row_sums(d, d), n, out=v)
    low, high = safe_range(x.dtype.char, eps)
    # NaN is neither above nor below, and goes the long way with the rest.
    all_safe = v.max() < high and (low < 0 or v.min() > low)
    unsafe = () if all_safe else np.flatnonzero(~((v > low) & (v < high)))
    v -= m * m
    for row in unsafe:
        stats[row] = _wide_moments(x[row])
        np.subtract(x[row], x.dtype.type(s[row]), out=d[row])
    return stats


def _scale(d: Array, y: Array, m: Any, r: Any, w: Array | None, b: Array | None) -> None:
    """Write (d - m) * r * w + b to y, in place in d until the last step."""
    np.subtract(d, m, out=d)
    if w is None and b is None:
        np.multiply(d, r, out=y)
        return
    np.multiply(d, r, out=d)
    if w is not None:
        np.multiply(d, w, out=y if b is None else d)
    if b is not None:
        np.add(d, b, out=y)


def _deviation(v: Any, eps: float) -> Any:
    return 1.0 / np.sqrt(v + eps)


def rows(
    kind: str,
    x: Array,  # (M, N), each row contiguous
    y: Array,  # (M, N), each row contiguous
    w: Array | None,  # (N,)
    b: Array | None,  # (N,)
    eps: float,
    mean: Array | None,  # (M,)
    rstd: Array | None,  # (M,)
    threads: int = 1,
) -> None:
    """Normalize every row of x into y."""
    M = x.shape[0]
    count = 1 if threads == 1 else min(M, -(-x.size // CHUNK))

    def block(index: int) -> None:
        part = slice(M * index // count, M * (index + 1) // count)
        to_mean = None if mean is None else mean[part]
        to_rstd = None if rstd is None else rstd[part]
        _block(kind, x[part], y[part], w, b, eps, to_mean, to_rstd)

    _threads.run(lambda: block, count, threads)


def _block(
    kind: str,
    x: Array,
    y: Array,
    w: Array | None,
    b: Array | None,
    eps: float,
    mean: Array | None,
    rstd: Array | None,
) -> None:
    with np.errstate(all="ignore"):  # of this thread; helpers do not inherit the caller's
        if x.shape[1] > CHUNK:
            for row in range(x.shape[0]):
                _long_row(kind, x[row], y[row], w, b, eps, mean, rstd, row)
        else:
            step = max(1, CHUNK // x.shape[1])
            for lo in range(0, x.shape[0], step):
                _short_rows(kind, x, y, w, b, eps, mean, rstd, slice(lo, lo + step))


def _short_rows(
    kind: str,
    x: Array,
    y: Array,
    w: Array | None,
    b: Array | None,
    eps: float,
    mean: Array | None,
    rstd: Array | None,
    block: slice,
) -> None:
    values, target = widen(kind, x[block]), y[block]
    d = _scratch.like(values)
    stats = _block_moments(values, d, eps)
    r = _deviation(stats[:, 2], eps)
    if mean is not None:
        mean[block] = stats[:, 0] + stats[:, 1]
    if rstd is not None:
        rstd[block] = r
    m = stats[:, 1].astype(d.dtype)[:, None]
    out = target if values.dtype == target.dtype else d
    _scale(d, out, m, r.astype(d.dtype)[:, None], w, b)
    narrow(kind, d, target)


def _long_row(
    kind: str,
    x: Array,
    y: Array,
    w: Array | None,
    b: Array | None,
    eps: float,
    mean: Array | None,
    rstd: Array | None,
    row: int,
) -> None:
    parts = np.empty((-(-x.size // CHUNK), 3))
    chunk_moments(kind, x, eps, parts)
    s, m, r = finish(parts, x.size, eps)
    if mean is not None:
        mean[row] = s + m
    if rstd is not None:
        rstd[row] = r
    normalize(kind, x, y, w, b, s, m, r)


def chunk_moments(kind: str, x: Array, eps: float, parts: Array) -> None:
    """Moments of each chunk of x (n,) into parts (chunks, 3); x begins at a chunk's edge."""
    with np.errstate(all="ignore"):
        for chunk in range(parts.shape[0]):
            values = widen(kind, x[None, chunk * CHUNK : (chunk + 1) * CHUNK])
            parts[chunk] = _block_moments(values, _scratch.like(values), eps)[0]


def finish(parts: Array, N: int, eps: float) -> tuple[float, float, float]:
    """Merge the chunks of one row in their order: s, mean - s and rstd, all float64."""
    with np.errstate(all="ignore"):
        share = np.full(parts.shape[0], CHUNK / N)
        share[-1] = (N - CHUNK * (parts.shape[0] - 1)) / N
        s = parts[0, 0]
        away = (parts[:, 0] - s) + parts[:, 1]
        m = np.add.reduce(share * away)
        v = np.add.reduce(share * (parts[:, 2] + (away - m) ** 2))
        return float(s), float(m), float(_deviation(v, eps))


def normalize(
    kind: str,
    x: Array,  # (n,)
    y: Array,  # (n,)
    w: Array | None,  # (n,)
    b: Array | None,  # (n,)
    s: float,
    m: float,
    r: float,
) -> None:
    """Write ((x - s) - m) * r * w + b to y, over a piece of one row."""
    with np.errstate(all="ignore"):
        for lo in range(0, x.size, CHUNK):
            piece = slice(lo, lo + CHUNK)
            values, target = widen(kind, x[piece]), y[piece]
            scalar = values.dtype.type
            d = np.subtract(values, scalar(s), out=_scratch.like(values))
            out = target if values.dtype == target.dtype else d
            wp, bp = (None if a is None else a[piece] for a in (w, b))
            _scale(d, out, scalar(m), scalar(r), wp, bp)
            narrow(kind, d, target)
