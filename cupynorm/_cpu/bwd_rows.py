"""Blocks of rows, and of columns of long rows, in the compiled loops of layer norm's backward."""

import numpy as np

from cupynorm._cpu.bits import give, place, take
from cupynorm._cpu.bwd_loops import FIELDS, add_rows, finish_row, row_sums
from cupynorm._cpu.loops import CHUNK, FROM_MEMORY, compiled, take_block
from cupynorm._cpu.pointers import advance, pointer

__all__ = [
    "LONGEST",
    "block_count",
    "block_rows",
    "differentiate_group",
    "finish_long_rows",
    "group_size",
    "merge_sums",
    "share_long_columns",
    "share_long_sums",
    "share_rows",
    "sums_pitch",
]

# Rows whose dy * x_hat and dy meet in one float32 sum: 200000 rows round like so many. Blocks of
# fewer than the least would leave much to merge.
_MOST_ROWS = 256
_LEAST_ROWS = 32
_BLOCKS = 32  # which enough threads can share, unless that makes the blocks too large or small
# Elements of a group of narrow rows, whose sums are taken before their first gradient: twice as
# many made 200000x64 9.4 ms instead of 6.5, since nothing is read ahead while a group is written;
# half as many gain 8 % at 100000x128 and lose 6 % at 4096x64, which the L2 holds.
_GROUP = 1024
# Columns up to which four rows go together, then two, then one. Together they share the weights
# and column sums, of which there is one row, but crowd the L1: at a pitch of 8 KiB, 128x2048 took
# 170 us with four, 121 with two, 142 with one; 512x768 125, 126 and 144.
_NARROW, _PAIRED = 512, 8192
# From memory a row that fits the L1 goes faster alone, with its one stream of writes: 8192x768
# 5.0 ms with four, 5.7 with two, 4.0 with one.
_FITS = 1024
# Columns from which x and dy are read twice, since one row of both does not stay in the L2.
LONGEST = 32768
_LONG_ROWS = 2  # whose chunks go together
# The column sums of a block are written in whole vectors of up to so many elements.
_VECTOR = 16


@compiled()
def block_rows(M):  # type: ignore[no-untyped-def]
    return max(_LEAST_ROWS, min(_MOST_ROWS, (M + _BLOCKS - 1) // _BLOCKS))


@compiled()
def block_count(M):  # type: ignore[no-untyped-def]
    """Count the blocks of rows that have column sums of their own."""
    size = block_rows(M)
    return (M + size - 1) // size


@compiled()
def sums_pitch(N):  # type: ignore[no-untyped-def]
    """Elements of one block's sums of dy * x_hat; those of dy follow, with as many."""
    return (N + _VECTOR - 1) // _VECTOR * _VECTOR


@compiled()
def group_size(M, N):  # type: ignore[no-untyped-def]
    if N <= _NARROW:
        return max(4, _GROUP // N // 4 * 4)
    alone = N > _PAIRED or (N <= _FITS and M * N >= FROM_MEMORY)
    return 1 if alone else 2


@compiled()
def differentiate_group(  # type: ignore[no-untyped-def]
    dy, dyp, x, xp, dx, dxp, row, M, N, w, mean, rstd, stats, to_w, to_b, rooms, bfloat16
):
    x_room, dy_room = rooms
    p, pp = take(x, row * xp, xp, M, N, x_room, bfloat16)
    q, qp = take(dy, row * dyp, dyp, M, N, dy_room, bfloat16)
    t, tp = place(dx, row * dxp, dxp, N, dy_room)
    wp, has_w = pointer(w, 0), w.size > 0
    for k in range(M):
        m, r = mean[row + k], rstd[row + k]
        h, gh, g = row_sums(advance(p, k * pp), advance(q, k * qp), wp, N, m, r, has_w)
        finish_row(stats, k, m, r, h, gh, g, N)
    to_s = pointer(stats, 0)
    add_rows(p, pp, q, qp, t, tp, M, N, wp, to_s, to_w, to_b, has_w, dx.size > 0)
    if dx.size:
        give(dx, row * dxp, dxp, M, N, dy_room, bfloat16)


@compiled()
def share_rows(dy, dyp, x, xp, dx, dxp, M, N, w, mean, rstd, sums, bfloat16, counters, who):  # type: ignore[no-untyped-def]
    """Do those blocks of rows that thread ``who`` claims; see take_block().

    M rows of N <= LONGEST at dy and x, pitches dyp and xp; an empty dx, w or sums is absent.
    ``sums`` has block_count(M) times two rows of sums_pitch(N), one for dy * x_hat, one for dy.
    """
    size, pitch = block_rows(M), sums_pitch(N)
    group = min(M, group_size(M, N))
    x_room = np.empty(group * N if x.itemsize == 2 else 0, mean.dtype)
    rooms = x_room, np.empty(x_room.size, mean.dtype)
    stats = np.empty(FIELDS * group, mean.dtype)
    spare = np.empty(0 if sums.size else 2 * pitch, mean.dtype)
    block = take_block(counters, who, block_count(M))
    while block >= 0:
        part = sums[2 * block * pitch : 2 * (block + 1) * pitch] if sums.size else spare
        part[:] = 0
        to_w, to_b = pointer(part, 0), pointer(part, pitch)
        end = min(M, (block + 1) * size)
        for row in range(block * size, end, group):
            differentiate_group(
                dy,
                dyp,
                x,
                xp,
                dx,
                dxp,
                row,
                min(group, end - row),
                N,
                w,
                mean,
                rstd,
                stats,
                to_w,
                to_b,
                rooms,
                bfloat16,
            )
        block = take_block(counters, who, block_count(M))


@compiled()
def share_long_sums(dy, dyp, x, xp, M, N, w, mean, rstd, parts, bfloat16, counters, who):  # type: ignore[no-untyped-def]
    """Take the sums over those chunks of rows that thread ``who`` claims; parts (M, chunks, 3)."""
    chunks = parts.shape[1]
    x_room = np.empty(CHUNK if x.itemsize == 2 else 0, mean.dtype)
    dy_room = np.empty(x_room.size, mean.dtype)
    item = take_block(counters, who, M * chunks)
    while item >= 0:
        row, c = item // chunks, item % chunks
        lo = c * CHUNK
        n = min(CHUNK, N - lo)
        p, _ = take(x, row * xp + lo, 0, 1, n, x_room, bfloat16)
        q, _ = take(dy, row * dyp + lo, 0, 1, n, dy_room, bfloat16)
        wp = pointer(w, lo)
        h, gh, g = row_sums(p, q, wp, n, mean[row], rstd[row], w.size > 0)
        parts[row, c, 0], parts[row, c, 1], parts[row, c, 2] = h, gh, g
        item = take_block(counters, who, M * chunks)


@compiled()
def finish_long_rows(parts, N, mean, rstd, stats):  # type: ignore[no-untyped-def]
    """Merge the chunks of every row in their order, into stats (M * FIELDS,)."""
    for row in range(parts.shape[0]):
        h = gh = g = 0.0
        for c in range(parts.shape[1]):
            h += parts[row, c, 0]
            gh += parts[row, c, 1]
            g += parts[row, c, 2]
        finish_row(stats, row, mean[row], rstd[row], h, gh, g, N)


@compiled()
def share_long_columns(dy, dyp, x, xp, dx, dxp, M, N, w, stats, sums, bfloat16, counters, who):  # type: ignore[no-untyped-def]
    """Write dx, and the sums, of those chunks of columns of a block that thread ``who`` claims."""
    size, pitch, chunks = block_rows(M), sums_pitch(N), (N + CHUNK - 1) // CHUNK
    x_room = np.empty(_LONG_ROWS * CHUNK if x.itemsize == 2 else 0, stats.dtype)
    dy_room = np.empty(x_room.size, stats.dtype)
    spare = np.empty(0 if sums.size else 2 * CHUNK, stats.dtype)
    item = take_block(counters, who, block_count(M) * chunks)
    while item >= 0:
        # Backwards, as the end of x and dy was read last.
        block, c = block_count(M) - 1 - item // chunks, chunks - 1 - item % chunks
        lo = c * CHUNK
        n = min(CHUNK, N - lo)
        at = 2 * block * pitch + lo
        to_w = pointer(sums, at) if sums.size else pointer(spare, 0)
        to_b = pointer(sums, at + pitch) if sums.size else pointer(spare, CHUNK)
        for i in range(sums_pitch(n)):
            to_w[i] = to_b[i] = 0
        wp, end = pointer(w, lo), min(M, (block + 1) * size)
        for row in range(block * size, end, _LONG_ROWS):
            k = min(_LONG_ROWS, end - row)
            p, pp = take(x, row * xp + lo, xp, k, n, x_room, bfloat16)
            q, qp = take(dy, row * dyp + lo, dyp, k, n, dy_room, bfloat16)
            t, tp = place(dx, row * dxp + lo, dxp, n, dy_room)
            to_s = pointer(stats, FIELDS * row)
            add_rows(p, pp, q, qp, t, tp, k, n, wp, to_s, to_w, to_b, w.size > 0, dx.size > 0)
            if dx.size:
                give(dx, row * dxp + lo, dxp, k, n, dy_room, bfloat16)
        item = take_block(counters, who, block_count(M) * chunks)


@compiled()
def merge_sums(sums, blocks, N, totals):  # type: ignore[no-untyped-def]
    """Add the sums of the blocks in their order, in float64, into totals (2 * N,)."""
    pitch = sums_pitch(N)
    totals[:] = 0.0
    for block in range(blocks):
        at = 2 * block * pitch
        for i in range(N):
            totals[i] += sums[at + i]
        for i in range(N):
            totals[N + i] += sums[at + pitch + i]
