"""Layer norm over rows in numba's loops: what is called, compiled once and kept on disk."""

import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupynorm._cpu_bits import give, place, take
from cupynorm._cpu_blocks import safe_range
from cupynorm._cpu_lanes import advance, pointer
from cupynorm._cpu_loops import CHUNK, apply_row, compiled, merge, moments, row_sum

__all__ = ["CHUNK", "chunk_moments", "finish", "normalize", "rows"]

Array = np.ndarray[Any, Any]


@compiled()
def _group(p, xp, q, yp, M, N, w, b, eps, low, high, s, m, r):  # type: ignore[no-untyped-def]
    # Phase by phase over a group of rows: alone, each row would wait for its own divisions and
    # square root, which take longer than 64 elements.
    for k in range(M):
        s[k] = row_sum(advance(p, k * xp), N)
    for k in range(M):
        s[k], m[k], r[k] = moments(advance(p, k * xp), N, s[k], low, high)
    for k in range(M):
        r[k] = 1.0 / math.sqrt(r[k] + eps)
    wp, bp = pointer(w, 0), pointer(b, 0)
    for k in range(M):
        to = advance(q, k * yp)
        apply_row(advance(p, k * xp), to, N, wp, bp, s[k], m[k], r[k], w.size > 0, b.size > 0)


@compiled()
def _keep(mean, rstd, row, M, s, m, r):  # type: ignore[no-untyped-def]
    if mean.size:
        for k in range(M):
            mean[row + k] = s[k] + m[k]
    if rstd.size:
        for k in range(M):
            rstd[row + k] = r[k]


@compiled()
def _moments(x, at, n, low, high, parts, scratch, bfloat16):  # type: ignore[no-untyped-def]
    for c in range(parts.shape[0]):
        size = min(CHUNK, n - c * CHUNK)
        p, _ = take(x, at + c * CHUNK, size, 1, size, scratch, bfloat16)
        parts[c, 0], parts[c, 1], parts[c, 2] = moments(p, size, row_sum(p, size), low, high)


@compiled()
def _normalize(x, at, y, to, n, w, b, s, m, r, scratch, bfloat16):  # type: ignore[no-untyped-def]
    has_w, has_b = w.size > 0, b.size > 0
    for c in range(0, n, CHUNK):
        size = min(CHUNK, n - c)
        p, _ = take(x, at + c, size, 1, size, scratch, bfloat16)
        q, _ = place(y, to + c, size, size, scratch)
        wp, bp = pointer(w, c), pointer(b, c)
        apply_row(p, q, size, wp, bp, s, m, r, has_w, has_b)
        give(y, to + c, size, 1, size, scratch, bfloat16)


def _sources() -> int:
    """Checksum of the files whose functions the entries are compiled from."""
    names = ("_cpu_lanes.py", "_cpu_loops.py", "_cpu_bits.py")
    text = b"".join(Path(__file__).with_name(name).read_bytes() for name in names)
    return zlib.crc32(text) | 1


def _entries(sources: int, jit: Any) -> SimpleNamespace:
    """Define the functions that are called from Python.

    They close over ``sources`` because numba's cache looks at the time stamp of this file alone,
    and at the values of such variables: an edit or upgrade of the others must not go unseen.
    """

    @jit
    def rows(x, xp, y, yp, M, N, w, b, eps, low, high, mean, rstd, bfloat16):  # type: ignore[no-untyped-def]
        # M rows of N at x, pitch xp, into y, pitch yp; empty w, b, mean, rstd are absent
        group = max(1, min(M, CHUNK // N))
        scratch = np.empty(min(CHUNK, group * N) * (sources != 0), np.float32)
        s, m, r = np.empty(group), np.empty(group), np.empty(group)
        if N <= CHUNK:
            for lo in range(0, M, group):
                n = min(group, M - lo)
                p, pp = take(x, lo * xp, xp, n, N, scratch, bfloat16)
                q, qp = place(y, lo * yp, yp, N, scratch)
                _group(p, pp, q, qp, n, N, w, b, eps, low, high, s, m, r)
                give(y, lo * yp, yp, n, N, scratch, bfloat16)
                _keep(mean, rstd, lo, n, s, m, r)
            return
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3), np.float64)
        for k in range(M):
            _moments(x, k * xp, N, low, high, parts, scratch, bfloat16)
            s[0], m[0], r[0] = merge(parts, N)
            r[0] = 1.0 / math.sqrt(r[0] + eps)
            _keep(mean, rstd, k, 1, s, m, r)
            _normalize(x, k * xp, y, k * yp, N, w, b, s[0], m[0], r[0], scratch, bfloat16)

    @jit
    def chunk_moments(x, low, high, parts, bfloat16):  # type: ignore[no-untyped-def]
        scratch = np.empty(min(CHUNK, x.size) * (sources != 0), np.float32)
        _moments(x, 0, x.size, low, high, parts, scratch, bfloat16)

    @jit
    def finish(parts, N, eps):  # type: ignore[no-untyped-def]
        s, m, v = merge(parts, N)
        return s, m, (sources != 0) / math.sqrt(v + eps)

    @jit
    def normalize(x, y, w, b, s, m, r, bfloat16):  # type: ignore[no-untyped-def]
        scratch = np.empty(min(CHUNK, x.size) * (sources != 0), np.float32)
        _normalize(x, 0, y, 0, x.size, w, b, s, m, r, scratch, bfloat16)

    return SimpleNamespace(
        rows=rows, chunk_moments=chunk_moments, finish=finish, normalize=normalize
    )


def _cached() -> SimpleNamespace:
    try:
        return _entries(_sources(), compiled(cache=True))
    except (RuntimeError, OSError):  # numba found no directory to keep compiled code in
        return _entries(1, compiled())


_entry = _cached()
_EMPTY: dict[str, Array] = {"f": np.empty(0, np.float32), "d": np.empty(0, np.float64)}


def _call(name: str, args: tuple[Any, ...]) -> Any:
    global _entry
    try:
        return getattr(_entry, name)(*args)
    except OSError:  # the cache could not be read or written, on a full disk for one
        _entry = _entries(1, compiled())
        return getattr(_entry, name)(*args)


class _Window:
    """Memory that NumPy shall see as one writable row."""

    def __init__(self, x: Array, size: int) -> None:
        interface = dict(x.__array_interface__)
        interface.update(shape=(size,), strides=None, data=(interface["data"][0], False))
        self.__array_interface__ = interface
        self.owner = x


def _flat(x: Array, M: int, N: int) -> tuple[Array, int]:  # x: (M, N), each row contiguous
    """Show x's memory from its first element to its last as one row, and give its pitch.

    numba compiles once more for arrays that are read-only or have a pitch: they are passed as if
    they were neither. A read-only x is not written to.
    """
    if x.flags.carray and type(x) is np.ndarray:
        return x.ravel(), N
    pitch = x.strides[0] // x.itemsize if M > 1 else N
    return np.asarray(_Window(x, (M - 1) * pitch + N)), pitch


def rows(
    kind: str,
    x: Array,  # (M, N), each row contiguous
    y: Array,  # (M, N), each row contiguous
    w: Array | None,  # (N,)
    b: Array | None,  # (N,)
    eps: float,
    mean: Array | None,  # (M,)
    rstd: Array | None,  # (M,)
) -> None:
    """Normalize every row of x into y."""
    M, N = x.shape
    char = "d" if kind == "float64" else "f"
    empty = _EMPTY[char]
    low, high = safe_range(char, eps)
    x, xp = _flat(x, M, N)
    y, yp = _flat(y, M, N)
    w = empty if w is None else w
    b = empty if b is None else b
    mean = empty if mean is None else mean
    rstd = empty if rstd is None else rstd
    args = (x, xp, y, yp, M, N, w, b, eps, low, high, mean, rstd, kind == "bfloat16")
    _call("rows", args)


def chunk_moments(kind: str, x: Array, eps: float, parts: Array) -> None:
    """Moments of each chunk of x (n,) into parts (chunks, 3); x begins at a chunk's edge."""
    low, high = safe_range("d" if kind == "float64" else "f", eps)
    args = (_flat(x[None], 1, x.size)[0], low, high, parts, kind == "bfloat16")
    _call("chunk_moments", args)


def finish(parts: Array, N: int, eps: float) -> tuple[float, float, float]:
    """Merge the chunks of one row in their order: s, mean - s and rstd, all float64."""
    s, m, r = _call("finish", (parts, N, eps))
    return s, m, r


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
    empty = _EMPTY["d" if kind == "float64" else "f"]
    wb = (empty if w is None else w), (empty if b is None else b)
    xy = _flat(x[None], 1, x.size)[0], _flat(y[None], 1, y.size)[0]
    _call("normalize", (*xy, *wb, s, m, r, kind == "bfloat16"))
