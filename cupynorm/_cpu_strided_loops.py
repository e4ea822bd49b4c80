"""Compiled loops over rows that lie anyhow: a strip of them is brought together and put back."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu_bits import give, place, take
from cupynorm._cpu_kept import built, seen
from cupynorm._cpu_lanes import advance, at, claim, pointer
from cupynorm._cpu_loops import CHUNK, GROUP, apply_row, compiled, merge, moments, pivot
from cupynorm._cpu_rows import normalize_group
from cupynorm._cpu_squares import move

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


def _define_forward(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def forward(x, y, lie, w, b, eps, low, high, mean, rstd, bfloat16, counter):  # type: ignore[no-untyped-def]
        lie, tickets = seen(lie, 12, np.int64), seen(counter, 1, np.int64)
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, q, xs, ys = at(x, stored), at(y, stored), lie[3:6], lie[6:9]
        wp, bp, half = seen(w, N, computed), seen(b, N, computed), bfloat16 != 0
        strips, pitch = (M + R - 1) // R, N + GAP
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        group = max(1, min(R, GROUP // N))
        room = np.empty(group * N if tile.itemsize == 2 else 0, computed)
        s, m, r, zero = np.empty(group), np.empty(group), np.empty(group), np.zeros(group)
        item = claim(tickets)
        while item < outer * strips:
            o, first = item // strips, item % strips * R
            n, here = min(R, M - first), pointer(tile, 0)
            move(start(p, xs, o, first), xs[1], xs[2], here, pitch, 1, n, N)
            for k in range(0, n, group):
                size = min(group, n - k)
                a, ap = take(tile, k * pitch, pitch, size, N, room, half)
                c, cp = place(tile, k * pitch, pitch, N, room)
                normalize_group(a, ap, c, cp, size, N, wp, bp, eps, low, high, s, m, r)
                give(tile, k * pitch, pitch, size, N, room, half)
                if mean:
                    _keep(at(mean, computed), lie, o, first + k, size, s, m)
                if rstd:
                    _keep(at(rstd, computed), lie, o, first + k, size, r, zero)
            move(here, pitch, 1, start(q, ys, o, first), ys[1], ys[2], n, N)
            item = claim(tickets)

    return forward  # type: ignore[no-any-return]


def _define_moments(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def chunk_moments(x, lie, low, high, parts, bfloat16, counter):  # type: ignore[no-untyped-def]
        lie, tickets = seen(lie, 12, np.int64), seen(counter, 1, np.int64)
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, xs, half = at(x, stored), lie[3:6], bfloat16 != 0
        strips, chunks, pitch = (M + R - 1) // R, (N + CHUNK - 1) // CHUNK, CHUNK + GAP
        to = seen(parts, outer * M * chunks * 3, np.float64)
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        room = np.empty(CHUNK if tile.itemsize == 2 else 0, computed)
        item = claim(tickets)
        while item < outer * strips * chunks:
            strip, c = item // chunks, item % chunks
            o, first = strip // strips, strip % strips * R
            n, lo, here = min(R, M - first), c * CHUNK, pointer(tile, 0)
            size = min(CHUNK, N - lo)
            source = advance(start(p, xs, o, first), lo * xs[2])
            move(source, xs[1], xs[2], here, pitch, 1, n, size)
            for k in range(n):
                a, _ = take(tile, k * pitch, pitch, 1, size, room, half)
                i = 3 * ((o * M + first + k) * chunks + c)
                to[i], to[i + 1], to[i + 2] = moments(a, size, pivot(a, size), low, high)
            item = claim(tickets)

    return chunk_moments  # type: ignore[no-any-return]


def _define_normalize(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def normalize_chunks(x, y, lie, w, b, eps, parts, mean, rstd, bfloat16, counter):  # type: ignore[no-untyped-def]
        lie, tickets = seen(lie, 12, np.int64), seen(counter, 1, np.int64)
        outer, M, N, R = lie[0], lie[1], lie[2], lie[11]
        p, q, xs, ys = at(x, stored), at(y, stored), lie[3:6], lie[6:9]
        wp, bp, half = seen(w, N, computed), seen(b, N, computed), bfloat16 != 0
        strips, chunks, pitch = (M + R - 1) // R, (N + CHUNK - 1) // CHUNK, CHUNK + GAP
        told = seen(parts, outer * M * chunks * 3, np.float64).reshape((outer * M, chunks, 3))
        tile = np.empty(min(R, M) * pitch * (sources != 0), stored)
        room = np.empty(CHUNK if tile.itemsize == 2 else 0, computed)
        item = claim(tickets)
        while item < outer * strips * chunks:
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
                a, _ = take(tile, k * pitch, pitch, 1, size, room, half)
                c_at, _ = place(tile, k * pitch, pitch, size, room)
                apply_row(a, c_at, size, wc, bc, s, m, r, wp.size > 0, bp.size > 0)
                give(tile, k * pitch, pitch, 1, size, room, half)
                if c == 0 and mean:
                    at(mean, computed)[o * lie[9] + (first + k) * lie[10]] = s + m
                if c == 0 and rstd:
                    at(rstd, computed)[o * lie[9] + (first + k) * lie[10]] = r
            target = advance(start(q, ys, o, first), lo * ys[2])
            move(here, pitch, 1, target, ys[1], ys[2], n, size)
            item = claim(tickets)

    return normalize_chunks  # type: ignore[no-any-return]


def forward(kind: str) -> Callable[..., None]:
    """Forward over rows of at most CHUNK elements, all arguments numbers; the first call compiles.

    ``forward(x, y, lie, w, b, eps, low, high, mean, rstd, bfloat16, counter)``: addresses of what
    is absent are 0; calls with one ``counter`` share the strips among them.
    """
    return built(_define_forward, "viiiiifffiiii", kind)  # type: ignore[no-any-return]


def chunk_moments(kind: str) -> Callable[..., None]:
    """``chunk_moments(x, lie, low, high, parts, bfloat16, counter)`` of the chunks of long rows."""
    return built(_define_moments, "viiffiii", kind)  # type: ignore[no-any-return]


def normalize_chunks(kind: str) -> Callable[..., None]:
    """``normalize_chunks(x, y, lie, w, b, eps, parts, mean, rstd, bfloat16, counter)`` after it."""
    return built(_define_normalize, "viiiiifiiiii", kind)  # type: ignore[no-any-return]
