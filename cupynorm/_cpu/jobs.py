"""The compiled work: what Python calls, without the interpreter's lock, for a share of one call.

Each function takes the address of a record that says all of a problem, addresses of arrays (0:
absent), and which items of the work to do, so that threads do not have to agree on anything else.
"""

from typing import Any

import numpy as np
from numba import carray

from cupynorm._cpu.backward import (
    FIELDS,
    LONG_ROWS,
    add_rows,
    block_count,
    block_rows,
    group_size,
    merge_sums,
    row_sums,
    sums_pitch,
)
from cupynorm._cpu.backward import finish_row as finish_gradient_row
from cupynorm._cpu.backward import short_rows as gradients_of_rows
from cupynorm._cpu.compiled import inner, job
from cupynorm._cpu.forward import (
    CHUNK,
    FROM_MEMORY,
    GROUP,
    SPARE,
    apply_row,
    finish_row,
    in_step,
    long_rows,
    moments,
    pivot,
    row_moments,
    row_results,
    short_rows,
)
from cupynorm._cpu.strips import GAP, TOGETHER, bring, bring_columns, keep_known, place, put_back
from cupynorm._cpu.vectors import address, advance, at, pointer, record_at

# What the memory of x holds, in numba's words, and what loops compute in.
_STORED = {"float16": "uint16", "bfloat16": "uint16", "float32": "float32", "float64": "float64"}
_COMPUTED = {"float64": "float64"}

FORWARD = np.dtype(
    [(name, "i8") for name in ("outer", "M", "N", "rows")]
    + [(f"{array}_{way}", "i8") for array in "xy" for way in ("outer", "row", "col")]
    + [("stats_outer", "i8"), ("stats_row", "i8"), ("past", "i8")]
    + [(name, "f8") for name in ("eps", "low", "high")]
)
_forward_at = record_at(FORWARD)


def dtypes_of(kind: str) -> tuple[str, Any, Any]:
    computed = _COMPUTED.get(kind, "float32")
    return computed, np.dtype(_STORED[kind]).type, np.dtype(computed).type


@inner
def _start(p, outer, row, o, m):  # type: ignore[no-untyped-def]
    return advance(p, o * outer + m * row)


@inner
def _rows(f, x, y, w, b, mean, rstd, lo, hi, tile, stats, parts, rooms):  # type: ignore[no-untyped-def]
    # Arrays are arguments because numba frees one after its last use, pointers or not.
    limits, strips = (f.eps, f.low, f.high), (f.M + f.rows - 1) // f.rows
    group = stats.size // 3
    for block in range(lo, hi):
        o, first = block // strips, block % strips * f.rows
        n = min(f.rows, f.M - first)
        source = _start(x, f.x_outer, f.x_row, o, first)
        target = _start(y, f.y_outer, f.y_row, o, first)
        q, qp = place(target, f.y_row, f.y_col, tile, f.N)
        if block == lo:
            repeats = n * (hi - lo)
            w, b = in_step(w, q, repeats, rooms[0]), in_step(b, q, repeats, rooms[1])
        p, pp = bring(source, f.x_row, f.x_col, tile, n, f.N)
        told = mean, rstd, o * f.stats_outer + first * f.stats_row, f.stats_row
        if f.N <= CHUNK:
            short_rows(p, pp, q, qp, n, f.N, w, b, limits, told, pointer(stats, 0), group)
        else:
            long_rows(p, pp, q, qp, n, f.N, w, b, limits, told, parts)
        put_back(target, f.y_row, f.y_col, tile, n, f.N)


@inner
def group_of(total, most, N):  # type: ignore[no-untyped-def]
    """Rows whose phases go together."""
    group = max(1, min(most, GROUP // N))
    return group if total < FROM_MEMORY else max(1, group // 2)


@job
def rows(checksum: int, kind: str) -> Any:
    """``rows(plan, x, y, w, b, mean, rstd, lo, hi)``: normalize the strips lo to hi."""
    computed, stored, wide = dtypes_of(kind)

    def rows(plan, x, y, w, b, mean, rstd, lo, hi):  # type: ignore[no-untyped-def]
        f = _forward_at(plan)
        N = f.N * (checksum != 0)
        in_place = f.x_col == 1 and f.y_col == 1
        tile = np.empty(0 if in_place else f.rows * (N + GAP), stored)
        stats = np.empty(3 * group_of(f.outer * f.M * N, f.rows, N))
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3))
        rooms = np.empty(N + SPARE, wide), np.empty(N + SPARE, wide)
        p, q, m, r = at(x, kind), at(y, kind), at(mean, computed), at(rstd, computed)
        wp, bp = at(w, computed), at(b, computed)
        _rows(f, p, q, wp, bp, m, r, lo, hi, tile, stats, parts, rooms)

    return rows


@job
def chunk_moments(checksum: int, kind: str) -> Any:
    """``chunk_moments(plan, x, parts, lo, hi)``: of chunks of long rows."""
    _, stored, _ = dtypes_of(kind)

    def chunk_moments(plan, x, parts, lo, hi):  # type: ignore[no-untyped-def]
        f = _forward_at(plan)
        tile = np.empty(f.rows * (CHUNK + GAP) * (checksum != 0) * (f.x_col != 1), stored)
        _moments(f, at(x, kind), at(parts, "float64"), lo, hi, tile)

    return chunk_moments


@inner
def _moments(f, x, parts, lo, hi, tile):  # type: ignore[no-untyped-def]
    strips, chunks = (f.M + f.rows - 1) // f.rows, (f.N + CHUNK - 1) // CHUNK
    limits = f.eps, f.low, f.high
    for item in range(lo, hi):
        c, block = item // (f.outer * strips), item % (f.outer * strips)
        o, first = block // strips, block % strips * f.rows
        n, size = min(f.rows, f.M - first), min(CHUNK, f.N - c * CHUNK)
        source = advance(_start(x, f.x_outer, f.x_row, o, first), c * CHUNK * f.x_col)
        p, pp = bring(source, f.x_row, f.x_col, tile, n, size)
        for k in range(n):
            q = advance(p, k * pp)
            s, m, v = moments(q, size, pivot(q, size), limits[1], limits[2])
            i = 3 * ((o * f.M + first + k) * chunks + c)
            parts[i], parts[i + 1], parts[i + 2] = s, m, v


@job
def finish(checksum: int, kind: str) -> Any:
    """``finish(plan, parts, mean, rstd, stats, lo, hi)``: merge the chunks of the rows lo to hi."""
    computed = dtypes_of(kind)[0]

    def finish(plan, parts, mean, rstd, stats, lo, hi):  # type: ignore[no-untyped-def]
        f, to = _forward_at(plan), at(stats, "float64")
        chunks = (f.N + CHUNK - 1) // CHUNK * (checksum != 0)
        found = carray(at(parts, "float64"), (f.outer * f.M, chunks, 3))
        for i in range(lo, hi):
            o, row = i // f.M, i % f.M
            at_row = o * f.stats_outer + row * f.stats_row
            told = at(mean, computed), at(rstd, computed), at_row, 0
            to[3 * i], to[3 * i + 1], to[3 * i + 2] = finish_row(found[i], f.N, f.eps, told, 0)

    return finish


@job
def chunk_results(checksum: int, kind: str) -> Any:
    """``chunk_results(plan, x, y, w, b, stats, lo, hi)``: normalize chunks of long rows."""
    computed, stored, _ = dtypes_of(kind)

    def chunk_results(plan, x, y, w, b, stats, lo, hi):  # type: ignore[no-untyped-def]
        f = _forward_at(plan)
        in_place = f.x_col == 1 and f.y_col == 1
        tile = np.empty(f.rows * (CHUNK + GAP) * (checksum != 0) * (not in_place), stored)
        wp, bp = at(w, computed), at(b, computed)
        _results(f, at(x, kind), at(y, kind), wp, bp, at(stats, "float64"), lo, hi, tile)

    return chunk_results


@inner
def _results(f, x, y, w, b, stats, lo, hi, tile):  # type: ignore[no-untyped-def]
    strips, chunks = (f.M + f.rows - 1) // f.rows, (f.N + CHUNK - 1) // CHUNK
    has_w, has_b = address(w) != 0, address(b) != 0
    total = f.outer * strips
    for item in range(lo, hi):
        # Backwards, as the end of x was read last; rows in turn share a chunk of weight and bias.
        c, block = chunks - 1 - item // total, item % total
        o, first, left = block // strips, block % strips * f.rows, c * CHUNK
        n, size = min(f.rows, f.M - first), min(CHUNK, f.N - left)
        source = advance(_start(x, f.x_outer, f.x_row, o, first), left * f.x_col)
        target = advance(_start(y, f.y_outer, f.y_row, o, first), left * f.y_col)
        p, pp = bring(source, f.x_row, f.x_col, tile, n, size)
        q, qp = place(target, f.y_row, f.y_col, tile, size)
        wc, bc = advance(w, left), advance(b, left)
        for k in range(n):
            i = 3 * (o * f.M + first + k)
            s, m, r = stats[i], stats[i + 1], stats[i + 2]
            apply_row(
                advance(p, k * pp), advance(q, k * qp), size, wc, bc, s, m, r, has_w, has_b, f.past
            )
        put_back(target, f.y_row, f.y_col, tile, n, size)


# --- rows of a table that is given as columns -----------------------------------------------------

TABLE = np.dtype(
    [(name, "i8") for name in ("M", "N", "rows", "y_row", "y_col", "omit")]
    + [(name, "f8") for name in ("eps", "low", "high")]
)
_table_at = record_at(TABLE)


@job
def table(checksum: int, kind: str) -> Any:
    """``table(plan, columns, y, w, b, lo, hi)``: normalize the strips lo to hi of a table."""
    computed, _, wide = dtypes_of(kind)

    def table(plan, columns, y, w, b, lo, hi):  # type: ignore[no-untyped-def]
        f = _table_at(plan)
        N = f.N * (checksum != 0)
        tile = np.empty(f.rows * (N + GAP), wide)
        stats = np.empty(3 * group_of(f.M * N, f.rows, N))
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3))
        room = np.empty(max(N, TOGETHER * (f.rows + GAP)), wide)
        none = at(0, computed)
        wb, found = (at(w, computed), at(b, computed)), at(columns, "int64")
        _table(f, found, at(y, kind), wb, none, lo, hi, tile, stats, parts, room)

    return table


@inner
def _table(f, columns, y, wb, none, lo, hi, tile, stats, parts, room):  # type: ignore[no-untyped-def]
    (w, b), N, limits = wb, f.N, (f.eps, f.low, f.high)
    p, pp, told, here = pointer(tile, 0), N + GAP, (none, none, 0, 0), pointer(stats, 0)
    for block in range(lo, hi):
        first = block * f.rows
        n, target = min(f.rows, f.M - first), advance(y, first * f.y_row)
        bring_columns(columns, N, first, n, tile, room)
        # Where the tile takes results of 16 bits, they come to lie before what is still to be read.
        q, qp = place(target, f.y_row, f.y_col, tile, N)
        if f.omit:
            for k in range(n):
                x = advance(p, k * pp)
                s, m, r = _known_moments(x, N, limits, told, parts, room)
                row_results(x, advance(q, k * qp), N, w, b, s, m, r, False)
        elif N <= CHUNK:
            short_rows(p, pp, q, qp, n, N, w, b, limits, told, here, stats.size // 3)
        else:
            long_rows(p, pp, q, qp, n, N, w, b, limits, told, parts)
        put_back(target, f.y_row, f.y_col, tile, n, N)


@inner
def _known_moments(x, N, limits, told, parts, room):  # type: ignore[no-untyped-def]
    """Moments of those of N values that are not NaN: as if they were all of the row."""
    known = pointer(room, 0)
    count = keep_known(x, N, known)
    part = parts[: (count + CHUNK - 1) // CHUNK]
    if count == 0:  # of nothing; what is left of the row is NaN
        return 0.0, 0.0, 0.0
    row_moments(known, count, limits, part)
    return finish_row(part, count, limits[0], told, 0)


# --- backward ------------------------------------------------------------------------------------

BACKWARD = np.dtype(
    [(name, "i8") for name in ("outer", "M", "N", "rows")]
    + [(f"{array}_{way}", "i8") for array in ("dy", "x", "dx") for way in ("outer", "row", "col")]
    + [("stats_outer", "i8"), ("stats_row", "i8")]
)
backward_at = record_at(BACKWARD)


@job
def gradients(checksum: int, kind: str) -> Any:
    """``gradients(plan, dy, x, mean, rstd, w, dx, sums, lo, hi)``: of blocks of rows."""
    computed, stored, wide = dtypes_of(kind)

    def gradients(plan, dy, x, mean, rstd, w, dx, sums, lo, hi):  # type: ignore[no-untyped-def]
        f = backward_at(plan)
        pitch, total = f.N + GAP, f.outer * f.M
        group = min(f.rows, group_size(total, f.N)) * (checksum != 0)
        x_tile = np.empty(f.rows * pitch * (f.x_col != 1), stored)
        g_tile = np.empty(f.rows * pitch * (f.dy_col != 1 or f.dx_col != 1), stored)
        room = np.empty(FIELDS * group, wide)
        spare = np.empty(0 if sums else 2 * sums_pitch(f.N), wide)
        arrays = at(dy, kind), at(x, kind), at(dx, kind)
        stats = at(mean, computed), at(rstd, computed)
        to = at(sums, computed)
        share_gradients(
            f, arrays, stats, at(w, computed), to, lo, hi, (x_tile, g_tile), room, spare
        )

    return gradients


@inner
def share_gradients(f, arrays, stats, w, sums, lo, hi, tiles, room, spare):  # type: ignore[no-untyped-def]
    dy, x, dx = arrays
    total, wide = f.outer * f.M, sums_pitch(f.N)
    size, group, has_dx = block_rows(total), room.size // FIELDS, address(dx) != 0
    here = pointer(room, 0)
    for block in range(lo, hi):
        part = pointer(spare, 0)
        if address(sums) != 0:
            part = advance(sums, 2 * block * wide)
        for i in range(2 * wide):
            part[i] = 0
        to = part, advance(part, wide)
        row, end = block * size, min(total, (block + 1) * size)
        while row < end:
            o, first = row // f.M, row % f.M
            n = min(f.rows, end - row, f.M - first)
            source = _start(x, f.x_outer, f.x_row, o, first)
            p, pp = bring(source, f.x_row, f.x_col, tiles[0], n, f.N)
            source = _start(dy, f.dy_outer, f.dy_row, o, first)
            q, qp = bring(source, f.dy_row, f.dy_col, tiles[1], n, f.N)
            t, tp, target = dx, 0, dx
            if has_dx:
                target = _start(dx, f.dx_outer, f.dx_row, o, first)
                t, tp = place(target, f.dx_row, f.dx_col, tiles[1], f.N)
            i = o * f.stats_outer + first * f.stats_row
            for k in range(0, n, group):
                told = stats[0], stats[1], i + k * f.stats_row, f.stats_row
                size_of_group, u = min(group, n - k), t
                if has_dx:
                    u = advance(t, k * tp)
                qk, pk = advance(q, k * qp), advance(p, k * pp)
                gradients_of_rows(qk, qp, pk, pp, u, tp, size_of_group, f.N, w, told, to, here)
            if has_dx:
                put_back(target, f.dx_row, f.dx_col, tiles[1], n, f.N)
            row += n


@job
def long_sums(checksum: int, kind: str) -> Any:
    """``long_sums(plan, dy, x, mean, rstd, w, parts, lo, hi)``: of chunks of rows."""
    computed = dtypes_of(kind)[0]

    def long_sums(plan, dy, x, mean, rstd, w, parts, lo, hi):  # type: ignore[no-untyped-def]
        f = backward_at(plan)
        chunks = (f.N + CHUNK - 1) // CHUNK * (checksum != 0)
        to, m, r = at(parts, "float64"), at(mean, computed), at(rstd, computed)
        for item in range(lo, hi):
            row, left = item // chunks, item % chunks * CHUNK
            p = advance(at(x, kind), row * f.x_row + left)
            q = advance(at(dy, kind), row * f.dy_row + left)
            wp, n = advance(at(w, computed), left), min(CHUNK, f.N - left)
            h, gh, g = row_sums(p, q, wp, n, m[row], r[row], w != 0)
            to[3 * item], to[3 * item + 1], to[3 * item + 2] = h, gh, g

    return long_sums


@job
def long_finish(checksum: int, kind: str) -> Any:
    """``long_finish(plan, parts, mean, rstd, stats, lo, hi)``: merge the chunks of rows."""
    computed = dtypes_of(kind)[0]

    def long_finish(plan, parts, mean, rstd, stats, lo, hi):  # type: ignore[no-untyped-def]
        f, part = backward_at(plan), at(parts, "float64")
        m, r, to = at(mean, computed), at(rstd, computed), at(stats, computed)
        chunks = (f.N + CHUNK - 1) // CHUNK * (checksum != 0)
        for row in range(lo, hi):
            h = gh = g = 0.0
            for c in range(chunks):
                i = 3 * (row * chunks + c)
                h, gh, g = h + part[i], gh + part[i + 1], g + part[i + 2]
            finish_gradient_row(to, row, m[row], r[row], h, gh, g, f.N)

    return long_finish


@job
def long_gradients(checksum: int, kind: str) -> Any:
    """``long_gradients(plan, dy, x, w, stats, dx, sums, lo, hi)``: of chunks of blocks of rows."""
    computed, _, wide = dtypes_of(kind)

    def long_gradients(plan, dy, x, w, stats, dx, sums, lo, hi):  # type: ignore[no-untyped-def]
        spare = np.empty(0 if sums else 2 * CHUNK * (checksum != 0), wide)
        arrays = at(dy, kind), at(x, kind), at(dx, kind)
        wp, s, to = at(w, computed), at(stats, computed), at(sums, computed)
        _long_gradients(backward_at(plan), arrays, wp, s, to, lo, hi, spare)

    return long_gradients


@inner
def _long_gradients(f, arrays, w, stats, sums, lo, hi, spare):  # type: ignore[no-untyped-def]
    dy, x, dx = arrays
    size, pitch, chunks = block_rows(f.M), sums_pitch(f.N), (f.N + CHUNK - 1) // CHUNK
    has_w, has_dx = address(w) != 0, address(dx) != 0
    for item in range(lo, hi):
        # Backwards, as the end of x and dy was read last.
        block, c = block_count(f.M) - 1 - item // chunks, chunks - 1 - item % chunks
        left = c * CHUNK
        n = min(CHUNK, f.N - left)
        to_w, to_b = pointer(spare, 0), pointer(spare, CHUNK)
        if address(sums) != 0:
            to_w = advance(sums, 2 * block * pitch + left)
            to_b = advance(to_w, pitch)
        for i in range(sums_pitch(n)):
            to_w[i] = to_b[i] = 0
        wp, end = advance(w, left), min(f.M, (block + 1) * size)
        for row in range(block * size, end, LONG_ROWS):
            k, t = min(LONG_ROWS, end - row), dx
            if has_dx:
                t = advance(dx, row * f.dx_row + left)
            p, q = advance(x, row * f.x_row + left), advance(dy, row * f.dy_row + left)
            s = advance(stats, FIELDS * row)
            add_rows(p, f.x_row, q, f.dy_row, t, f.dx_row, k, n, wp, s, to_w, to_b, has_w, has_dx)


@job
def merge(checksum: int, kind: str) -> Any:
    """``merge(plan, sums, dweight, dbias, wide, none)``: the column sums of all blocks.

    dweight and dbias hold float64 where ``wide``, else what loops compute in.
    """
    computed = dtypes_of(kind)[0]

    def merge(plan, sums, dweight, dbias, wide, none):  # type: ignore[no-untyped-def]
        f = backward_at(plan)
        M, part, room = f.outer * f.M * (checksum != 0), at(sums, computed), np.empty(CHUNK)
        if wide:
            merge_sums(part, M, f.N, (at(dweight, "float64"), at(dbias, "float64")), room)
        else:
            merge_sums(part, M, f.N, (at(dweight, computed), at(dbias, computed)), room)

    return merge


def sums_size(rows: int, N: int) -> int:
    """Elements of the column sums of all blocks of rows."""
    size: int = 2 * block_count.py_func(rows) * sums_pitch.py_func(N)
    return size
