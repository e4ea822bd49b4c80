"""Layer norm over separate columns in plain NumPy, block by block of rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._cpu.blocks import CHUNK, safe_range
from cupynorm._cpu.half import narrow, widen

if TYPE_CHECKING:
    from cupynorm._cpu.columns import Column

__all__ = ["rows"]

Array = np.ndarray[Any, Any]

_GROUP = 32  # columns whose terms are added in x's dtype before they meet in float64


def rows(
    columns: "Sequence[Column]",
    y: Array,  # (M, N)
    w: Array | None,  # (N,), in the dtype of statistics
    b: Array | None,
    eps: float,
    omit: bool,
) -> None:
    """Normalize the rows of N native, aligned columns into y."""
    M, N = y.shape
    step = max(16, CHUNK // N)
    threads = 1 if M * N < 4 * CHUNK else _threads.num_threads()

    def block(index: int) -> None:
        lo = index * step
        with np.errstate(all="ignore"):  # of this thread; helpers do not inherit the caller's
            _block(columns, lo, min(M, lo + step), y, w, b, eps, omit)

    _threads.run(lambda: block, -(-M // step), threads)


def _block(
    columns: "Sequence[Column]",
    lo: int,
    hi: int,
    y: Array,
    w: Array | None,
    b: Array | None,
    eps: float,
    omit: bool,
) -> None:
    kind = y.dtype.name
    x = np.empty((len(columns), hi - lo), np.float64 if kind == "float64" else np.float32)
    for j, column in enumerate(columns):
        _read(column, lo, hi, x[j])
    s, m, v = _moments(x, eps, omit)
    x -= s
    x -= m
    x *= (1.0 / np.sqrt(v + eps)).astype(x.dtype)
    if w is not None:
        x *= w[:, None]
    if b is not None:
        x += b[:, None]
    target = y[lo:hi].T
    if y.itemsize == 2:
        bits = np.empty(x.shape, np.uint16)
        narrow(kind, x, bits)
        np.copyto(target.view(np.uint16), bits)
    else:
        np.copyto(target, x)


def _read(column: "Column", lo: int, hi: int, into: Array) -> None:
    values = column.values[lo:hi]
    kind = values.dtype.name
    if values.itemsize == 2 and kind in ("float16", "bfloat16"):
        values = widen(kind, np.ascontiguousarray(values).view(np.uint16))
    np.copyto(into, values, casting="unsafe")
    if column.validity is not None:
        first = column.offset + lo
        bits = column.validity[first // 8 : (column.offset + hi + 7) // 8]
        valid = np.unpackbits(bits, bitorder="little")[first % 8 : first % 8 + hi - lo]
        into[valid == 0] = np.nan


def _sum(x: Array) -> Array:  # (N, R) -> (R,) float64, in an order that depends on N alone
    pieces = len(x) // _GROUP
    part = np.add.reduce(x[: pieces * _GROUP].reshape(pieces, _GROUP, x.shape[1]), axis=1)
    total: Array = np.add.reduce(part, axis=0, dtype=np.float64)
    total += np.add.reduce(x[pieces * _GROUP :], axis=0)
    return total


def _moments(x: Array, eps: float, omit: bool) -> tuple[Array, Array, Array]:  # x: (N, R)
    """Pivot s and mean - s in x's dtype, and the variance in float64, of each row of the table."""
    known = ~np.isnan(x) if omit else None
    count: Any = len(x) if known is None else np.add.reduce(known, axis=0, dtype=np.float64)
    s = (_sum(x if known is None else np.where(known, x, x.dtype.type(0))) / count).astype(x.dtype)
    d = x - s
    if known is not None:
        d[~known] = 0
    m = _sum(d) / count
    d *= d
    v = _sum(d) / count
    low, high = safe_range(x.dtype.char, eps)
    unsafe = np.flatnonzero(~((v > low) & (v < high)))
    v -= m * m
    if unsafe.size:  # overflow, or values that vanish beside eps; or NaN, which stays
        part = x[:, unsafe].astype(np.float64)
        share = 1.0 / (count if known is None else count[unsafe])
        s[unsafe] = _sum(_or_0(part * share, omit))
        d = _or_0(part - s[unsafe], omit)
        m[unsafe] = _sum(d * share)
        v[unsafe] = _sum((d * share) * d) - m[unsafe] ** 2
    return s, m.astype(x.dtype), v


def _or_0(x: Array, omit: bool) -> Array:
    return np.where(np.isnan(x), 0.0, x) if omit else x
