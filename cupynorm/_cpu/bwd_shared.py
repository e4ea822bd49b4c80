"""Backward over rows on several threads: the compiled work, and the records that tell it what."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu import crew as _cpu_crew
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.bwd_loops import FIELDS
from cupynorm._cpu.bwd_rows import (
    LONGEST,
    finish_long_rows,
    share_long_columns,
    share_long_sums,
    share_rows,
)
from cupynorm._cpu.crew import COUNTER, THREADS, lead
from cupynorm._cpu.entries import merge, merge_into, size_of_sums, sums_size
from cupynorm._cpu.kept import built, seen, shared
from cupynorm._cpu.loops import CHUNK, compiled
from cupynorm._cpu.pointers import at
from cupynorm._cpu.shared import ALONE, counters_of, useful

__all__ = ["ALONE", "LONGEST", "at_once", "backward"]


@compiled()
def _tables(job, stored, computed):  # type: ignore[no-untyped-def]
    """View dy, x, dx and weight of a job, whose first nine numbers these are."""
    a = at(job, np.int64)
    last, N = a[6] - 1, a[7]
    dy, x = seen(a[0], last * a[1] + N, stored), seen(a[2], last * a[3] + N, stored)
    return dy, x, seen(a[4], last * a[5] + N, stored), seen(a[8], N, computed)


def _define_gradients(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def gradients(job, who):  # type: ignore[no-untyped-def]
        a, counters = at(job, np.int64), counters_of(job)
        M, N = a[6], a[7] * (sources != 0)
        dy, x, dx, w = _tables(job, stored, computed)
        mean, rstd = seen(a[9], M, computed), seen(a[10], M, computed)
        sums = seen(a[11], size_of_sums(M, N), computed)
        half = a[12] != 0
        share_rows(dy, a[1], x, a[3], dx, a[5], M, N, w, mean, rstd, sums, half, counters, who)

    return gradients


def _define_at_once(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def at_once(dy, x, dx, mean, rstd, w, dweight, dbias, bfloat16, control, work, threads):  # type: ignore[no-untyped-def]
        M, N = x.shape
        size = size_of_sums(M, N) if dweight.size or dbias.size else 0
        sums, half = np.empty(size, computed), bfloat16 != 0
        if threads > 1:
            job = np.zeros(COUNTER + 8 * threads, np.int64)
            job[0], job[1], job[2], job[3] = dy.ctypes.data, N, x.ctypes.data, N
            job[4], job[5] = dx.ctypes.data if dx.size else 0, N
            job[6], job[7], job[8] = M, N * (sources != 0), w.ctypes.data if w.size else 0
            job[9], job[10] = mean.ctypes.data, rstd.ctypes.data
            job[11], job[12], job[THREADS] = sums.ctypes.data if size else 0, bfloat16, threads
            done = lead(control, work, job.ctypes.data, threads - 1)
            job[THREADS] = 0  # its last use: numba frees an array after that, address or not
            if not done:
                return 2
        else:
            p, q, t = dy.reshape(M * N), x.reshape(M * N), dx.reshape(dx.size)
            one = np.zeros(1, np.int64)
            share_rows(p, N, q, N, t, N, M, N, w, mean, rstd, sums, half, one, 0)
        merge_into(sums, M, N, dweight, dbias)
        return 0

    return at_once  # type: ignore[no-any-return]


def _define_long_sums(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def long_sums(job, who):  # type: ignore[no-untyped-def]
        a, counters = at(job, np.int64), counters_of(job)
        M, N = a[6], a[7] * (sources != 0)
        chunks = (N + CHUNK - 1) // CHUNK
        dy, x, _, w = _tables(job, stored, computed)
        mean, rstd = seen(a[9], M, computed), seen(a[10], M, computed)
        parts = seen(a[13], M * chunks * 3, np.float64).reshape((M, chunks, 3))
        share_long_sums(dy, a[1], x, a[3], M, N, w, mean, rstd, parts, a[12] != 0, counters, who)

    return long_sums


def _define_finish(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def finish(parts, M, N, mean, rstd, stats):  # type: ignore[no-untyped-def]
        chunks = (N + CHUNK - 1) // CHUNK
        part = seen(parts, M * chunks * 3, np.float64).reshape((M, chunks, 3))
        m, r = seen(mean, M, computed), seen(rstd, M, computed)
        finish_long_rows(part, N * (sources != 0), m, r, seen(stats, M * FIELDS, computed))

    return finish  # type: ignore[no-any-return]


def _define_long_columns(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def long_columns(job, who):  # type: ignore[no-untyped-def]
        a, counters = at(job, np.int64), counters_of(job)
        M, N = a[6], a[7] * (sources != 0)
        dy, x, dx, w = _tables(job, stored, computed)
        sums = seen(a[11], size_of_sums(M, N), computed)
        stats, half = seen(a[14], M * FIELDS, computed), a[12] != 0
        share_long_columns(dy, a[1], x, a[3], dx, a[5], M, N, w, stats, sums, half, counters, who)

    return long_columns


def at_once(kind: str, M: int, N: int) -> Callable[..., None]:
    """Backward over contiguous rows of at most LONGEST elements, for NumPy arrays of one shape.

    ``at_once(kind, M, N)(dy, x, dx, mean, rstd, w, dweight, dbias, bfloat16)``: dy, x and dx (M, N)
    hold 16-bit kinds as uint16; an absent dx, w, dweight or dbias is empty.
    """
    entry = built(_define_at_once, "immmrrrrriiii", kind)
    if M * N < ALONE:
        return lambda *arguments: entry(*arguments, 0, 0, 1)
    work = shared(_define_gradients, kind)

    def call(*arguments: Any) -> None:
        threads = useful(M * N, _threads.num_threads())
        if threads == 1:
            entry(*arguments, 0, 0, 1)
            return
        control = _cpu_crew.control(threads)
        if not control or entry(*arguments, control, work.address, threads):
            # There is no crew, or another call has it.
            dy, x, dx, mean, rstd, w, dweight, dbias = (
                a.ctypes.data if a.size else 0 for a in arguments[:8]
            )
            sums = np.empty(sums_size(M, N) if dweight or dbias else 0, arguments[3].dtype)
            at_sums = sums.ctypes.data if sums.size else 0
            tables = dy, N, x, N, dx, N, M, N
            backward(kind, *tables, w, mean, rstd, at_sums, threads)
            if at_sums:
                merge(kind)(at_sums, M, N, dweight, dbias)

    return call


def backward(
    kind: str,
    dy: int,  # (M, N)
    dyp: int,
    x: int,  # (M, N)
    xp: int,
    dx: int,  # (M, N); may be dy
    dxp: int,
    M: int,
    N: int,
    weight: int,  # (N,)
    mean: int,  # (M,)
    rstd: int,  # (M,)
    sums: int,
    threads: int,
) -> None:
    """Write dx, and the column sums of each block of rows to ``sums``; each may be 0.

    Rows are contiguous, at those pitches; ``weight``, ``mean``, ``rstd`` and ``sums``, of
    ``_cpu_entries.sums_size`` elements, are float32 (float64 for float64 x).
    """
    half, threads = int(kind == "bfloat16"), useful(M * N, threads)
    numbers = dy, dyp, x, xp, dx, dxp, M, N, weight, mean, rstd, sums, half
    if N <= LONGEST:
        _cpu_crew.run(shared(_define_gradients, kind), _cpu_crew.record(threads, *numbers), threads)
        return
    parts = np.empty((M, -(-N // CHUNK), 3))
    stats = np.empty(FIELDS * M, np.float64 if kind == "float64" else np.float32)
    at_parts, at_stats = parts.ctypes.data, stats.ctypes.data
    _cpu_crew.run(
        shared(_define_long_sums, kind),
        _cpu_crew.record(threads, *numbers, at_parts, at_stats),
        threads,
    )
    finish = built(_define_finish, "viiiiii", kind)
    finish(at_parts, M, N, mean, rstd, at_stats)
    _cpu_crew.run(
        shared(_define_long_columns, kind),
        _cpu_crew.record(threads, *numbers, at_parts, at_stats),
        threads,
    )
