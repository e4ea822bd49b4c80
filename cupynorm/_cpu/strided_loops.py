"""Compiled loops over rows that lie anyhow: a strip of them is brought together and put back."""

import math
from typing import Any

import numpy as np

from cupynorm._cpu.bits import give, place, take
from cupynorm._cpu.kept import seen, shared
from cupynorm._cpu.loops import CHUNK, GROUP, apply_row, compiled, merge, moments, pivot, take_block
from cupynorm._cpu.pointers import advance, at, pointer
from cupynorm._cpu.rows import normalize_group
from cupynorm._cpu.shared import counters_of
from cupynorm._cpu.squares import move

__all__ = ["CHUNK", "GAP", "chunk_moments", "forward", "normalize_chunks", "start"]

# A strip is read along whichever of its strides is 1 and turned in registers, so that the loops
# over contiguous rows do the rest and a row's bits are the same in every layout.

# Elements between rows of a strip, or rows of a power of two would share few sets of the L1.
GAP = 16


@compiled()
def start(p, strides, o, m):  # type: ignore[no-untyped-def]
    """Where row m of outer step o begins; strides of (outer, row, column) in elements."""
    return advance(p, o * strides[0] + m * strides[1])


@compiled()
def _keep(p, lie, o, row, n, s, m):  # type: ignore[no-untyped-def]
    for k in range(n):
        p[o * lie[9] + (row + k) * lie[10]] = s[k] + m[k]


# lie: [outer, M, N], strides of x, of y, of the statistics (outer, row), rows of a strip.


def _define_forward(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def forward(job, who):  # type: ignore[no-untyped-def]
        a, f, counters = at(job, np.int64), at(job, np.float64), counters_of(job)
        x, y, lie, w, b, mean, rstd = a[0], a[1], seen(a[2], 12, np.int64), a[3], a[4], a[8], a[9]
        eps, low, high, bfloat16 = f[5], f[6], f[7], a[10]
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, q, xs, ys = at(x, stored), at(y, stored), lie[3:6], lie[6:9]
        wp, bp, half = seen(w, N, computed), seen(b, N, computed), bfloat16 != 0
        strips, pitch = (M + R - 1) // R, N + GAP
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        group = max(1, min(R, GROUP // N))
        room = np.empty(group * N if tile.itemsize == 2 else 0, computed)
        s, m, r, zero = np.empty(group), np.empty(group), np.empty(group), np.zeros(group)
        item = take_block(counters, who, outer * strips)
        while item >= 0:
            o, first = item // strips, item % strips * R
            n, here = min(R, M - first), pointer(tile, 0)
            move(start(p, xs, o, first), xs[1], xs[2], here, pitch, 1, n, N)
            for k in range(0, n, group):
                size = min(group, n - k)
                p_at, ap = take(tile, k * pitch, pitch, size, N, room, half)
                c, cp = place(tile, k * pitch, pitch, N, room)
                normalize_group(p_at, ap, c, cp, size, N, wp, bp, eps, low, high, s, m, r)
                give(tile, k * pitch, pitch, size, N, room, half)
                if mean:
                    _keep(at(mean, computed), lie, o, first + k, size, s, m)
                if rstd:
                    _keep(at(rstd, computed), lie, o, first + k, size, r, zero)
            move(here, pitch, 1, start(q, ys, o, first), ys[1], ys[2], n, N)
            item = take_block(counters, who, outer * strips)

    return forward


def _define_moments(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def chunk_moments(job, who):  # type: ignore[no-untyped-def]
        a, f, counters = at(job, np.int64), at(job, np.float64), counters_of(job)
        x, lie, low, high = a[0], seen(a[1], 12, np.int64), f[2], f[3]
        parts, bfloat16 = a[4], a[5]
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, xs, half = at(x, stored), lie[3:6], bfloat16 != 0
        strips, chunks, pitch = (M + R - 1) // R, (N + CHUNK - 1) // CHUNK, CHUNK + GAP
        to = seen(parts, outer * M * chunks * 3, np.float64)
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        room = np.empty(CHUNK if tile.itemsize == 2 else 0, computed)
        item = take_block(counters, who, outer * strips * chunks)
        while item >= 0:
            strip, c = item // chunks, item % chunks
            o, first = strip // strips, strip % strips * R
            n, lo, here = min(R, M - first), c * CHUNK, pointer(tile, 0)
            size = min(CHUNK, N - lo)
            source = advance(start(p, xs, o, first), lo * xs[2])
            move(source, xs[1], xs[2], here, pitch, 1, n, size)
            for k in range(n):
                p_at, _ = take(tile, k * pitch, pitch, 1, size, room, half)
                i = 3 * ((o * M + first + k) * chunks + c)
                to[i], to[i + 1], to[i + 2] = moments(p_at, size, pivot(p_at, size), low, high)
            item = take_block(counters, who, outer * strips * chunks)

    return chunk_moments


def _define_normalize(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def normalize_chunks(job, who):  # type: ignore[no-untyped-def]
        a, f, counters = at(job, np.int64), at(job, np.float64), counters_of(job)
        x, y, lie, w, b, eps = a[0], a[1], seen(a[2], 12, np.int64), a[3], a[4], f[5]
        parts, mean, rstd, bfloat16 = a[6], a[7], a[8], a[9]
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, q, xs, ys = at(x, stored), at(y, stored), lie[3:6], lie[6:9]
        wp, bp, half = seen(w, N, computed), seen(b, N, computed), bfloat16 != 0
        strips, chunks, pitch = (M + R - 1) // R, (N + CHUNK - 1) // CHUNK, CHUNK + GAP
        told = seen(parts, outer * M * chunks * 3, np.float64).reshape((outer * M, chunks, 3))
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        room = np.empty(CHUNK if tile.itemsize == 2 else 0, computed)
        item = take_block(counters, who, outer * strips * chunks)
        while item >= 0:
            # Backwards, as the end of x was read last.
            strip, c = divmod(outer * strips * chunks - 1 - item, chunks)
            o, first, lo = strip // strips, strip % strips * R, c * CHUNK
            n, size, here = min(R, M - first), min(CHUNK, N - lo), pointer(tile, 0)
            source = advance(start(p, xs, o, first), lo * xs[2])
            move(source, xs[1], xs[2], here, pitch, 1, n, size)
            wc, bc = pointer(wp, lo), pointer(bp, lo)
            for k in range(n):
                s, m, v = merge(told[o * M + first + k], N)
                r = 1.0 / math.sqrt(v + eps)
                p_at, _ = take(tile, k * pitch, pitch, 1, size, room, half)
                c_at, _ = place(tile, k * pitch, pitch, size, room)
                apply_row(p_at, c_at, size, wc, bc, s, m, r, wp.size > 0, bp.size > 0, False)
                give(tile, k * pitch, pitch, 1, size, room, half)
                if c == 0 and mean:
                    at(mean, computed)[o * lie[9] + (first + k) * lie[10]] = s + m
                if c == 0 and rstd:
                    at(rstd, computed)[o * lie[9] + (first + k) * lie[10]] = r
            target = advance(start(q, ys, o, first), lo * ys[2])
            move(here, pitch, 1, target, ys[1], ys[2], n, size)
            item = take_block(counters, who, outer * strips * chunks)

    return normalize_chunks


def forward(kind: str) -> Any:
    """Forward over rows of at most CHUNK elements; the first call per kind compiles.

    Its record: x, y, lie, w, b, eps, low, high, mean, rstd, bfloat16; addresses of what is absent
    are 0.
    """
    return shared(_define_forward, kind)


def chunk_moments(kind: str) -> Any:
    """Moments of the chunks of long rows. Its record: x, lie, low, high, parts, bfloat16."""
    return shared(_define_moments, kind)


def normalize_chunks(kind: str) -> Any:
    """What follows. Its record: x, y, lie, w, b, eps, parts, mean, rstd, bfloat16."""
    return shared(_define_normalize, kind)
