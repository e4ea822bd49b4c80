"""Layer norm over rows in numba's loops: what is called, compiled once and kept on disk."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupynorm import _threads
from cupynorm._cpu_blocks import safe_range
from cupynorm._cpu_lanes import claim
from cupynorm._cpu_loops import CHUNK, GROUP, compiled, merge
from cupynorm._cpu_rows import long_rows, row_moments, row_results, short_rows

__all__ = [
    "ALONE",
    "CHUNK",
    "LONG",
    "Kept",
    "chunk_moments",
    "finish",
    "flat",
    "normalize",
    "rows",
]

Array = np.ndarray[Any, Any]

# Elements below which one thread does all: at 512x768 two threads took 160 us, one took 117 to 134
# (bench/NOTES.md), since waking the second costs more than it saves.
ALONE = 1 << 19
# Elements of a block that a thread claims: 6 us, so that no thread waits long for another's last.
BLOCK = 1 << 15
# Chunks from which a row is shared between threads when there are few of them.
LONG = 16


def _sources() -> int:
    """Checksum of the files whose functions the entries are compiled from."""
    names = ("lanes", "loops", "bits", "rows", "squares", "bwd_loops", "bwd_rows")
    text = b"".join(Path(__file__).with_name(f"_cpu_{name}.py").read_bytes() for name in names)
    return zlib.crc32(text) | 1


def _entries(sources: int, jit: Any) -> SimpleNamespace:
    """Define the functions that are called from Python.

    They close over ``sources`` because numba's cache looks at the time stamp of this file alone,
    and at the values of such variables: an edit or upgrade of the others must not go unseen.
    """

    @jit
    def rows(x, xp, y, yp, M, N, w, b, eps, low, high, mean, rstd, bfloat16, counter, count):  # type: ignore[no-untyped-def]
        # M rows of N at x, pitch xp, into y, pitch yp; empty w, b, mean, rstd are absent. With a
        # count, the rows are cut into so many blocks, and this thread does those that it claims.
        group = max(1, min(M, GROUP // N))
        scratch = np.empty(min(CHUNK, group * N) * (sources != 0), np.float32)
        stats = np.empty((3, group))
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3))
        block, blocks = 0, 1
        if count > 0:
            block, blocks = claim(counter), count
        while block < blocks:
            lo, hi = M * block // blocks, M * (block + 1) // blocks
            if N <= CHUNK:
                short_rows(
                    x,
                    xp,
                    y,
                    yp,
                    lo,
                    hi,
                    N,
                    w,
                    b,
                    eps,
                    low,
                    high,
                    mean,
                    rstd,
                    bfloat16,
                    scratch,
                    stats,
                )
            else:
                long_rows(
                    x,
                    xp,
                    y,
                    yp,
                    lo,
                    hi,
                    N,
                    w,
                    b,
                    eps,
                    low,
                    high,
                    mean,
                    rstd,
                    bfloat16,
                    scratch,
                    parts,
                )
            block = claim(counter) if count > 0 else 1

    @jit
    def chunk_moments(x, low, high, parts, bfloat16):  # type: ignore[no-untyped-def]
        scratch = np.empty(min(CHUNK, x.size) * (sources != 0), np.float32)
        row_moments(x, 0, x.size, low, high, parts, scratch, bfloat16)

    @jit
    def finish(parts, N, eps):  # type: ignore[no-untyped-def]
        s, m, v = merge(parts, N)
        return s, m, (sources != 0) / math.sqrt(v + eps)

    @jit
    def normalize(x, y, w, b, s, m, r, bfloat16):  # type: ignore[no-untyped-def]
        scratch = np.empty(min(CHUNK, x.size) * (sources != 0), np.float32)
        row_results(x, 0, y, 0, x.size, w, b, s, m, r, scratch, bfloat16)

    return SimpleNamespace(
        rows=rows, chunk_moments=chunk_moments, finish=finish, normalize=normalize
    )


class Kept:
    """Functions to call from Python, compiled when first called and kept on disk if possible."""

    def __init__(self, define: Callable[[int, Any], SimpleNamespace]) -> None:
        self._define = define
        try:
            self._table = define(_sources(), compiled(cache=True))
        except (RuntimeError, OSError):  # numba found no directory to keep compiled code in
            self._table = define(1, compiled())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """Call one of them, compiled in memory alone if it cannot be kept."""
        try:
            return getattr(self._table, name)(*args)
        except OSError:  # the cache could not be read or written, on a full disk for one
            self._table = self._define(1, compiled())
            return getattr(self._table, name)(*args)


_entry = Kept(_entries)
_NO_COUNTER = np.zeros(1, np.int64)
_EMPTY: dict[str, Array] = {"f": np.empty(0, np.float32), "d": np.empty(0, np.float64)}


class _Window:
    """Memory that NumPy shall see as one writable row."""

    def __init__(self, x: Array, size: int) -> None:
        interface = dict(x.__array_interface__)
        interface.update(shape=(size,), strides=None, data=(interface["data"][0], False))
        self.__array_interface__ = interface
        self.owner = x


def flat(x: Array, M: int, N: int) -> tuple[Array, int]:  # x: (M, N), each row contiguous
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
    threads: int = 1,
) -> None:
    """Normalize every row of x into y."""
    M, N = x.shape
    char = "d" if kind == "float64" else "f"
    empty = _EMPTY[char]
    low, high = safe_range(char, eps)
    x, xp = flat(x, M, N)
    y, yp = flat(y, M, N)
    w = empty if w is None else w
    b = empty if b is None else b
    mean = empty if mean is None else mean
    rstd = empty if rstd is None else rstd
    args = (x, xp, y, yp, M, N, w, b, eps, low, high, mean, rstd, kind == "bfloat16")
    if threads == 1:
        _entry.call("rows", (*args, _NO_COUNTER, 0))
        return
    # The threads claim blocks inside the loops: between calls from Python each would wait for the
    # others' hold of the interpreter, tens of microseconds at a time.
    shared = (*args, np.zeros(1, np.int64), min(M, -(-M * N // BLOCK)))
    _threads.run(lambda: lambda ticket: _entry.call("rows", shared), threads, threads)


def chunk_moments(kind: str, x: Array, eps: float, parts: Array) -> None:
    """Moments of each chunk of x (n,) into parts (chunks, 3); x begins at a chunk's edge."""
    low, high = safe_range("d" if kind == "float64" else "f", eps)
    args = (flat(x[None], 1, x.size)[0], low, high, parts, kind == "bfloat16")
    _entry.call("chunk_moments", args)


def finish(parts: Array, N: int, eps: float) -> tuple[float, float, float]:
    """Merge the chunks of one row in their order: s, mean - s and rstd, all float64."""
    s, m, r = _entry.call("finish", (parts, N, eps))
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
    xy = flat(x[None], 1, x.size)[0], flat(y[None], 1, y.size)[0]
    _entry.call("normalize", (*xy, *wb, s, m, r, kind == "bfloat16"))
