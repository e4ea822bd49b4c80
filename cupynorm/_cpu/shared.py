"""Forward over rows on several threads: the compiled work, and the records that tell it what."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu import crew as _cpu_crew
from cupynorm._cpu import entries as _cpu_entries
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.blocks import safe_range
from cupynorm._cpu.crew import COUNTER, THREADS, lead
from cupynorm._cpu.entries import clash
from cupynorm._cpu.kept import built, seen, shared
from cupynorm._cpu.loops import CHUNK, compiled, merge, take_block
from cupynorm._cpu.pointers import at
from cupynorm._cpu.rows import normalize_rows, rooms, row_moments, row_results

__all__ = ["ALONE", "CHUNK", "at_once", "counters_of", "forward", "useful"]

# Elements below which one thread does all.
ALONE = 1 << 18
# Elements of a block that a thread claims: 6 us, so that no thread waits long for another's last.
_BLOCK = 1 << 15
# Elements that pay for another thread.
_SHARE = 1 << 17
# Chunks from which a row is shared between threads when there are few of them, and of a piece.
_LONG, _PIECE = 16, 4
# Bytes from which long rows, which are read a second time, are written past the caches.
_PAST = 1 << 24


@compiled()
def counters_of(job):  # type: ignore[no-untyped-def]
    """Where the threads of a job claim their blocks."""
    return seen(job + 8 * COUNTER, 8 * at(job, np.int64)[THREADS], np.int64)


def _blocks(M: int, N: int) -> int:
    return min(M, (M * N + _BLOCK - 1) // _BLOCK)


_compiled_blocks = compiled()(_blocks)


def _define_rows(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def rows(job, who):  # type: ignore[no-untyped-def]
        a, f = at(job, np.int64), at(job, np.float64)
        M, N, count = a[4], a[5], a[14] * (sources != 0)
        x, y = seen(a[0], (M - 1) * a[1] + N, stored), seen(a[2], (M - 1) * a[3] + N, stored)
        w, b = seen(a[6], N, computed), seen(a[7], N, computed)
        mean, rstd = seen(a[11], M, computed), seen(a[12], M, computed)
        counters, room = counters_of(job), rooms(M, N)
        block = take_block(counters, who, count)
        while block >= 0:
            lo, hi = M * block // count, M * (block + 1) // count
            normalize_rows(
                x,
                a[1],
                y,
                a[3],
                lo,
                hi,
                N,
                w,
                b,
                f[8],
                f[9],
                f[10],
                mean,
                rstd,
                a[13] != 0,
                room,
            )
            block = take_block(counters, who, count)

    return rows


def _define_at_once(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def at_once(x, y, w, b, eps, low, high, bfloat16, mean, rstd, control, work, threads):  # type: ignore[no-untyped-def]
        M, N = x.shape
        if clash(x, y, w, b):
            return 1
        job = np.zeros(COUNTER + 8 * threads, np.int64)
        at_job = job.ctypes.data
        wide = at(at_job, np.float64)
        job[0], job[1], job[2], job[3] = x.ctypes.data, N, y.ctypes.data, N
        job[4], job[5] = M, N * (sources != 0)
        job[6], job[7] = w.ctypes.data if w.size else 0, b.ctypes.data if b.size else 0
        wide[8], wide[9], wide[10] = eps, low, high
        job[11] = mean.ctypes.data if mean.size else 0
        job[12] = rstd.ctypes.data if rstd.size else 0
        job[13], job[14], job[THREADS] = bfloat16, _compiled_blocks(M, N), threads
        done = lead(control, work, at_job, threads - 1)
        job[THREADS] = 0  # its last use: numba frees an array after that, address or not
        return 0 if done else 2

    return at_once  # type: ignore[no-any-return]


def _define_moments(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def moments(job, who):  # type: ignore[no-untyped-def]
        a, f = at(job, np.int64), at(job, np.float64)
        M, N = a[2], a[3]
        x, counters = seen(a[0], (M - 1) * a[1] + N, stored), counters_of(job)
        chunks = (N + CHUNK - 1) // CHUNK
        pieces = (chunks + _PIECE - 1) // _PIECE
        parts = seen(a[6], M * chunks * 3, np.float64).reshape((M, chunks, 3))
        scratch = np.empty(CHUNK * (sources != 0), np.float32)
        item = take_block(counters, who, M * pieces)
        while item >= 0:
            row, first = item % M, item // M * _PIECE
            part = parts[row, first : min(chunks, first + _PIECE)]
            lo = first * CHUNK
            size = min(N - lo, _PIECE * CHUNK)
            row_moments(x, row * a[1] + lo, size, f[4], f[5], part, scratch, a[7] != 0)
            item = take_block(counters, who, M * pieces)

    return moments


def _define_merge(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def merge_rows(parts, M, N, eps, stats, mean, rstd):  # type: ignore[no-untyped-def]
        chunks = (N + CHUNK - 1) // CHUNK
        part = seen(parts, M * chunks * 3, np.float64).reshape((M, chunks, 3))
        to, m, r = at(stats, np.float64), seen(mean, M, computed), seen(rstd, M, computed)
        for row in range(M * (sources != 0)):
            i = 3 * row
            to[i], to[i + 1], v = merge(part[row], N)
            to[i + 2] = 1.0 / math.sqrt(v + eps)
            if m.size:
                m[row] = to[i] + to[i + 1]
            if r.size:
                r[row] = to[i + 2]

    return merge_rows  # type: ignore[no-any-return]


def _define_results(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def results(job, who):  # type: ignore[no-untyped-def]
        a = at(job, np.int64)
        M, N = a[4], a[5]
        x, y = seen(a[0], (M - 1) * a[1] + N, stored), seen(a[2], (M - 1) * a[3] + N, stored)
        w, b, stats = seen(a[6], N, computed), seen(a[7], N, computed), at(a[8], np.float64)
        counters = counters_of(job)
        pieces = (N + _PIECE * CHUNK - 1) // (_PIECE * CHUNK)
        scratch = np.empty(CHUNK * (sources != 0), np.float32)
        past = y.itemsize > 2 and M * N * y.itemsize >= _PAST  # 16 bits are written from scratch
        item = take_block(counters, who, M * pieces)
        while item >= 0:
            # Backwards, as the end of x was read last; rows in turn share a piece of weight, bias.
            piece, row = divmod(M * pieces - 1 - item, M)
            lo, i = piece * _PIECE * CHUNK, 3 * row
            n = min(N - lo, _PIECE * CHUNK)
            wp, bp = w[lo : lo + n], b[lo : lo + n]
            row_results(
                x,
                row * a[1] + lo,
                y,
                row * a[3] + lo,
                n,
                wp,
                bp,
                stats[i],
                stats[i + 1],
                stats[i + 2],
                scratch,
                a[9] != 0,
                past,
            )
            item = take_block(counters, who, M * pieces)

    return results


def forward(
    kind: str,
    x: int,  # (M, N)
    xp: int,
    y: int,  # (M, N); may be x
    yp: int,
    M: int,
    N: int,
    weight: int,  # (N,)
    bias: int,  # (N,)
    eps: float,
    mean: int,  # (M,)
    rstd: int,  # (M,)
    threads: int,
) -> None:
    """Normalize M contiguous rows at address x, pitch xp, into those at y, pitch yp.

    ``weight``, ``bias``, ``mean`` and ``rstd`` are addresses of float32 (float64 for float64 x), 0
    where absent. A row's bits go by the row alone, whoever does it.
    """
    low, high = safe_range("d" if kind == "float64" else "f", eps)
    half, threads = int(kind == "bfloat16"), useful(M * N, threads)
    if not _by_pieces(M, N, threads):
        count = _blocks(M, N) if threads > 1 else 1
        numbers = weight, bias, eps, low, high, mean, rstd, half, count
        job = _cpu_crew.record(threads, x, xp, y, yp, M, N, *numbers)
        _cpu_crew.run(shared(_define_rows, kind), job, threads)
        return
    parts, merged = np.empty((M, -(-N // CHUNK), 3)), np.empty((M, 3))
    to_parts, to_merged = parts.ctypes.data, merged.ctypes.data
    job = _cpu_crew.record(threads, x, xp, M, N, low, high, to_parts, half)
    _cpu_crew.run(shared(_define_moments, kind), job, threads)
    built(_define_merge, "viiifiii", kind)(to_parts, M, N, eps, to_merged, mean, rstd)
    job = _cpu_crew.record(threads, x, xp, y, yp, M, N, weight, bias, to_merged, half)
    _cpu_crew.run(shared(_define_results, kind), job, threads)


def at_once(kind: str, M: int, N: int) -> Callable[..., int]:
    """What does for many rows, on several threads, what ``_cpu_entries.small`` does for few.

    The function takes the arguments of ``_cpu_entries.small``, and two more for statistics.
    """
    together, work = built(_define_at_once, "immrrfffirriii", kind), shared(_define_rows, kind)
    none = np.empty(0, np.float64 if kind == "float64" else np.float32)

    def call(x: Any, y: Any, w: Any, b: Any, *fixed: Any) -> int:
        threads = useful(M * N, _threads.num_threads())
        stats = fixed[4:] or (none, none)
        if threads == 1:
            return _cpu_entries.small_with_stats(kind)(x, y, w, b, *fixed[:4], *stats)
        control = _cpu_crew.control(threads)
        if control and not _by_pieces(M, N, threads):
            crew = control, work.address, threads
            status: int = together(x, y, w, b, *fixed[:4], *stats, *crew)
            if status < 2:  # else another call has the crew
                return status
        elif _cpu_entries.overlap(kind)(x, y, w, b):
            return 1
        source, to = x.ctypes.data, y.ctypes.data
        weight, bias, mean, rstd = (a.ctypes.data if a.size else 0 for a in (w, b, *stats))
        forward(kind, source, N, to, N, M, N, weight, bias, fixed[0], mean, rstd, threads)
        return 0

    return call


def _by_pieces(M: int, N: int, threads: int) -> bool:
    """Whether rows are so few and long that threads share each."""
    return 4 * threads > M and threads > 1 and N >= _LONG * CHUNK


def useful(size: int, threads: int) -> int:
    """Count the threads that so many elements are worth."""
    return 1 if size < ALONE else min(threads, -(-size // _SHARE))
