"""Layer norm's backward over rows in numba's loops: what is called, compiled once and kept."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from cupynorm import _cpu_bwd_rows, _threads
from cupynorm._cpu_bwd_loops import FIELDS
from cupynorm._cpu_bwd_rows import LONGEST, block_count, sums_pitch
from cupynorm._cpu_loops import CHUNK
from cupynorm._cpu_numba import Kept, flat

__all__ = ["ALONE", "LONGEST", "rows"]

Array = np.ndarray[Any, Any]

ALONE = 1 << 19  # elements below which one thread does all


def _entries(sources: int, jit: Any) -> SimpleNamespace:
    """Define the functions that are called from Python; ``sources`` as in ``_cpu_numba``."""

    @jit
    def rows(dy, dyp, x, xp, dx, dxp, M, N, w, mean, rstd, sums, bfloat16, counter):  # type: ignore[no-untyped-def]
        if sources:
            _cpu_bwd_rows.share_rows(
                dy, dyp, x, xp, dx, dxp, M, N, w, mean, rstd, sums, bfloat16, counter
            )

    @jit
    def long_sums(dy, dyp, x, xp, M, N, w, mean, rstd, parts, bfloat16, counter):  # type: ignore[no-untyped-def]
        if sources:
            _cpu_bwd_rows.share_long_sums(
                dy, dyp, x, xp, M, N, w, mean, rstd, parts, bfloat16, counter
            )

    @jit
    def long_columns(dy, dyp, x, xp, dx, dxp, M, N, w, stats, sums, bfloat16, counter):  # type: ignore[no-untyped-def]
        if sources:
            _cpu_bwd_rows.share_long_columns(
                dy, dyp, x, xp, dx, dxp, M, N, w, stats, sums, bfloat16, counter
            )

    @jit
    def finish(parts, N, mean, rstd, stats):  # type: ignore[no-untyped-def]
        if sources:
            _cpu_bwd_rows.finish_long_rows(parts, N, mean, rstd, stats)

    @jit
    def sizes(M, N):  # type: ignore[no-untyped-def]
        return block_count(M) * (sources != 0), sums_pitch(N)

    @jit
    def merge(sums, blocks, N, totals):  # type: ignore[no-untyped-def]
        if sources:
            _cpu_bwd_rows.merge_sums(sums, blocks, N, totals)

    return SimpleNamespace(
        rows=rows,
        long_sums=long_sums,
        long_columns=long_columns,
        finish=finish,
        sizes=sizes,
        merge=merge,
    )


_entry = Kept(_entries)
_EMPTY = {dtype: np.empty(0, dtype) for dtype in (np.uint16, np.float32, np.float64)}


def _shared(name: str, args: tuple[Any, ...], threads: int) -> None:
    """Call an entry on every thread; each does the items that it claims inside the loops."""
    args = (*args, np.zeros(1, np.int64))
    if threads == 1:
        _entry.call(name, args)
    else:
        _threads.run(lambda: lambda ticket: _entry.call(name, args), threads, threads)


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
    compute, bfloat16 = mean.dtype.type, kind == "bfloat16"
    w = _EMPTY[compute] if w is None else w
    pair = (*flat(dy, M, N), *flat(x, M, N))
    target = (_EMPTY[x.dtype.type], 0) if dx is None else flat(dx, M, N)
    sums, totals = _EMPTY[compute], None
    if summed:
        blocks, pitch = _entry.call("sizes", (M, N))
        sums, totals = np.empty(2 * blocks * pitch, compute), np.empty((2, N))
    if N <= LONGEST:
        _shared("rows", (*pair, *target, M, N, w, mean, rstd, sums, bfloat16), threads)
    else:
        parts = np.empty((M, -(-N // CHUNK), 3))
        stats = np.empty(FIELDS * M, compute)
        _shared("long_sums", (*pair, M, N, w, mean, rstd, parts, bfloat16), threads)
        _entry.call("finish", (parts, N, mean, rstd, stats))
        _shared("long_columns", (*pair, *target, M, N, w, stats, sums, bfloat16), threads)
    if totals is not None:
        _entry.call("merge", (sums, blocks, N, totals.reshape(-1)))
    return totals
