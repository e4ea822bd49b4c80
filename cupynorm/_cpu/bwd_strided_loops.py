"""Compiled loops of layer norm's backward over rows that lie anyhow, strip by strip."""

from typing import Any

import numpy as np

from cupynorm._cpu.bwd_loops import FIELDS
from cupynorm._cpu.bwd_rows import (
    block_count,
    block_rows,
    differentiate_group,
    group_size,
    sums_pitch,
)
from cupynorm._cpu.kept import seen, shared
from cupynorm._cpu.loops import compiled, take_block
from cupynorm._cpu.pointers import at, pointer
from cupynorm._cpu.shared import counters_of
from cupynorm._cpu.squares import move
from cupynorm._cpu.strided_loops import GAP, start

__all__ = ["backward", "sizes"]


@compiled()
def _bring(stats, lie, o, row, n, to):  # type: ignore[no-untyped-def]
    for k in range(n):
        to[k] = stats[o * lie[12] + (row + k) * lie[13]]


# lie: [outer, M, N], strides of dy, of x, of dx, of the statistics (outer, row), rows of a strip.


def _define_backward(sources: int, jit: Any, stored: Any, computed: Any) -> Any:
    @jit
    def backward(job, who):  # type: ignore[no-untyped-def]
        a, counters = at(job, np.int64), counters_of(job)
        dy, x, dx, lie, w = a[0], a[1], a[2], seen(a[3], 15, np.int64), a[4]
        mean, rstd, sums, bfloat16 = a[5], a[6], a[7], a[8]
        outer, M, N, R = lie[0], lie[1], lie[2], lie[14]
        gs, xs, ts, half = lie[3:6], lie[6:9], lie[9:12], bfloat16 != 0
        rows, pitch, wide = outer * M, N + GAP, sums_pitch(N)
        size, group = block_rows(rows), min(R, group_size(rows, N))
        wp, total = seen(w, N, computed), seen(sums, block_count(rows) * 2 * wide, computed)
        x_tile = np.empty(R * pitch * (sources != 0), stored)
        g_tile = np.empty(R * pitch, stored)
        t_tile = g_tile if dx else g_tile[:0]  # dx takes the place of dy
        x_room = np.empty(group * N if x_tile.itemsize == 2 else 0, computed)
        rooms = x_room, np.empty(x_room.size, computed)
        m, r, stats = np.empty(R, computed), np.empty(R, computed), np.empty(FIELDS * R, computed)
        spare = np.empty(0 if sums else 2 * wide, computed)
        block = take_block(counters, who, block_count(rows))
        while block >= 0:
            part = total[2 * block * wide : 2 * (block + 1) * wide] if sums else spare
            part[:] = 0
            to_w, to_b = pointer(part, 0), pointer(part, wide)
            row, end = block * size, min(rows, (block + 1) * size)
            while row < end:
                o, first = row // M, row % M
                n = min(R, end - row, M - first)
                x_here, g_here = pointer(x_tile, 0), pointer(g_tile, 0)
                move(start(at(x, stored), xs, o, first), xs[1], xs[2], x_here, pitch, 1, n, N)
                move(start(at(dy, stored), gs, o, first), gs[1], gs[2], g_here, pitch, 1, n, N)
                _bring(at(mean, computed), lie, o, first, n, m)
                _bring(at(rstd, computed), lie, o, first, n, r)
                for k in range(0, n, group):
                    differentiate_group(
                        g_tile,
                        pitch,
                        x_tile,
                        pitch,
                        t_tile,
                        pitch,
                        k,
                        min(group, n - k),
                        N,
                        wp,
                        m,
                        r,
                        stats,
                        to_w,
                        to_b,
                        rooms,
                        half,
                    )
                if dx:
                    to = start(at(dx, stored), ts, o, first)
                    move(g_here, pitch, 1, to, ts[1], ts[2], n, N)
                row += n
            block = take_block(counters, who, block_count(rows))

    return backward


def sizes(rows: int, N: int) -> tuple[int, int]:
    """Blocks of rows with column sums of their own, and the elements of one's two rows of sums."""
    return block_count(rows), sums_pitch(N)


def backward(kind: str) -> Any:
    """Backward over rows of at most LONGEST elements; the first call per kind compiles.

    Its record: dy, x, dx, lie, w, mean, rstd, sums, bfloat16; addresses of what is absent are 0.
    The column sums of the blocks of rows stay in ``sums`` for ``_cpu_entries.merge_wide``.
    """
    return shared(_define_backward, kind)
