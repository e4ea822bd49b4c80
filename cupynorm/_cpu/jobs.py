"""The compiled work: what Python calls, without the interpreter's lock, for a share of one call.

Each function takes the address of a record that says all of a problem, addresses of arrays (0:
absent), and which items of the work to do, so that threads do not have to agree on anything else.
Those named ``small`` do all of a call; they take arrays, which cost less than addresses of them.
"""

from typing import Any

import numpy as np
from numba import from_dtype, types

from cupynorm._cpu import backward, forward, strips
from cupynorm._cpu.compiled import inner, job
from cupynorm._cpu.forward import CHUNK, chunks_of
from cupynorm._cpu.strips import GAP
from cupynorm._cpu.vectors import (
    address,
    advance,
    at,
    like,
    move,
    pointer,
    raw,
    record_at,
    size_of,
    typed,
)
from cupynorm._rules import stats_dtype

_TABLES = ("x", "y", "residual", "sum", "dy", "dx", "dsum")
PLAN = np.dtype(
    [(name, "i8") for name in ("outer", "M", "N", "rows", "stats_outer", "stats_row")]
    + [(f"{a}_{way}", "i8") for a in _TABLES for way in ("outer", "row", "col")]
    + [(name, "i8") for name in ("past", "omit", "tiles")]
    + [(name, "f8") for name in ("eps", "low", "high")]
)
# A job closes over the checksum by what it hands on here, where nothing depends on it.
plan_at = record_at(PLAN)


def _arrays(kind: str) -> tuple[Any, ...]:
    """Types of tables of x's dtype, of statistics and of rows; each of an input, and of a result.

    Only where a table begins is read of it: what layout it is of says the record.
    """
    stored = np.dtype("uint16" if kind.endswith("16") else kind)
    table, wide = from_dtype(stored), from_dtype(np.dtype(stats_dtype(kind)))
    return tuple(
        types.Array(*array, readonly=readonly)
        for array in ((table, 2, "A"), (wide, 2, "A"), (wide, 1, "C"))
        for readonly in (True, False)
    )


@inner
def _two(p, q, kind):  # type: ignore[no-untyped-def]
    return at(p, kind), at(q, kind)


# --- forward ------------------------------------------------------------------------------------


def _sharing(may_omit: bool) -> Any:
    """Make what normalizes strips; NaN may be left out of statistics."""

    @inner
    def strips_of(f, x, y, wb, told, rule, lo, hi, group, work):  # type: ignore[no-untyped-def]
        # ``work`` is an argument because numba frees an array after its last use, pointers or not.
        (w, b), (mean, rstd), N = wb, told, f.N
        pieces = (f.M + f.rows - 1) // f.rows
        stats = pointer(work, 0)
        parts = advance(stats, 3 * group)
        w_room = advance(parts, 3 * chunks_of(N))
        b_room = advance(w_room, N + forward.SPARE)
        room = typed(advance(b_room, N + forward.SPARE), w)
        tile = advance(b_room, N + forward.SPARE + strips.room_size(f))
        for block in range(lo, hi):
            o, first = block // pieces, block % pieces * f.rows
            n, target = min(f.rows, f.M - first), strips.start(y, f.y_outer, f.y_row, o, first)
            p, pp = rule[6](f, x, (o, first, n, 0, N), tile, room)
            # Where the tile takes results of 16 bits, they come before what is still to be read.
            q, qp = strips.place(target, f.y_row, f.y_col, tile, N)
            if block == lo:
                w = forward.in_step(w, q, n * (hi - lo), N, w_room)
                b = forward.in_step(b, q, n * (hi - lo), N, b_room)
            at_rows = mean, rstd, o * f.stats_outer + first * f.stats_row, f.stats_row
            if may_omit and f.omit:
                for k in range(n):
                    row = advance(p, k * pp)
                    s, m, r = forward.known_moments(row, N, rule, at_rows, parts, room)
                    forward.row_results(row, advance(q, k * qp), N, w, b, s, m, r, rule[5])
            elif N <= CHUNK:
                forward.short_rows(p, pp, q, qp, n, N, w, b, rule, at_rows, stats, group)
            else:
                forward.long_rows(p, pp, q, qp, n, N, w, b, rule, at_rows, parts)
            strips.put_back(target, f.y_row, f.y_col, tile, n, N)

    @inner
    def share(f, x, y, wb, told, rule, lo, hi):  # type: ignore[no-untyped-def]
        N, most = f.N, max(1, min(f.rows, forward.GROUP // f.N))  # rows whose phases go together
        group = most if f.outer * f.M * N < forward.FROM_MEMORY else max(1, most // 2)
        size = 3 * group + 3 * chunks_of(N) + 2 * (N + forward.SPARE)
        if f.tiles:
            size += strips.room_size(f) + f.tiles * f.rows * (N + GAP)
        strips_of(f, x, y, wb, told, rule, lo, hi, group, np.empty(size))

    return share


_share, _share_of_columns = _sharing(False), _sharing(True)


def _measures(center: bool) -> tuple[Any, Any]:
    """What takes a pivot, and moments: constants to a job, and types to the compiler."""
    return (forward.pivot, forward.moments) if center else (forward.origin, forward.squares)


@job
def rows(checksum: int, kind: str, center: bool = True, wide: str = "", small: bool = False) -> Any:
    """``rows(plan, lo, hi, x, y, w, b, mean, rstd, residual, total)``: normalize strips lo to hi.

    residual and total, their sum with x, are of the dtype ``wide``. As ``small`` it takes arrays.
    """
    source, given = (strips.of_sums, wide) if wide else (strips.of_rows, kind)
    computed, (near, measure) = stats_dtype(kind), _measures(center)

    def rows(plan, lo, hi, x, y, w, b, mean, rstd, residual, total):  # type: ignore[no-untyped-def]
        f, wb, told = plan_at(plan, checksum), _two(w, b, computed), _two(mean, rstd, computed)
        arrays = at(x, kind), *_two(residual, total, given)
        to = at(y, kind)
        past = f.past and address(to) != address(arrays[0]) and address(to) != address(arrays[1])
        rule = f.eps, f.low, f.high, near, measure, past, source
        _share(f, arrays, to, wb, told, rule, lo, hi)

    if not small:
        return rows
    (x, y, _, stat, row, _), more = _arrays(kind), _arrays(given)[:2]
    return types.void(*[types.int64] * 3, x, y, row, row, stat, stat, *more), rows


@job
def table(checksum: int, kind: str, center: bool = True) -> Any:
    """``table(plan, lo, hi, columns, y, w, b)``: the same, of a table given as columns."""
    computed, (near, measure), source = stats_dtype(kind), _measures(center), strips.of_columns

    def table(plan, lo, hi, columns, y, w, b):  # type: ignore[no-untyped-def]
        f, wb = plan_at(plan, checksum), _two(w, b, computed)
        none, rule = at(0, computed), (f.eps, f.low, f.high, near, measure, f.past != 0, source)
        _share_of_columns(f, at(columns, "int64"), at(y, kind), wb, (none, none), rule, lo, hi)

    return table


@inner
def _meet(p, n, q, size):  # type: ignore[no-untyped-def]
    first, to = address(p), address(q)
    return first != 0 and first < to + size * size_of(q) and to < first + n * size_of(p)


@inner
def _small(f, x, y, wb, told, rule):  # type: ignore[no-untyped-def]
    size, group = f.M * f.N, max(1, min(f.M, forward.GROUP // f.N))
    apart = address(x) == address(y) or not _meet(x, size, y, size)
    if apart and not _meet(wb[0], f.N, y, size) and not _meet(wb[1], f.N, y, size):
        at_rows, work = (*told, 0, f.stats_row), np.empty(3 * group + 2 * (f.N + forward.SPARE))
        forward.dense_rows(x, y, f.M, f.N, wb, rule, at_rows, group, work)
        return False
    return True


@inner
def _small_in_strips(f, x, y, wb, told, rule):  # type: ignore[no-untyped-def]
    _share(f, (x,), y, wb, told, rule, 0, f.outer * ((f.M + f.rows - 1) // f.rows))
    return False


@job
def small(checksum: int, kind: str, dense: bool = True, center: bool = True) -> Any:
    """``small(plan, x, y, w, b, mean, rstd)``: normalize all rows.

    x and y hold 16-bit kinds as uint16; what is absent is empty. Where all are dense, and of at
    most CHUNK elements, it is True, and nothing has been done, if y shares memory with w, b or a
    part of x. Strips, for any layout, are another function: to compile both takes twice as long.
    """
    computed, all_rows = stats_dtype(kind), _small if dense else _small_in_strips
    (near, measure), source = _measures(center), strips.of_rows
    x_type, y_type, _, stat, row, _ = _arrays(kind)

    def small(plan, x, y, w, b, mean, rstd):  # type: ignore[no-untyped-def]
        f, wb, told = plan_at(plan, checksum), _two(w, b, computed), _two(mean, rstd, computed)
        rule = f.eps, f.low, f.high, near, measure, False, source
        return all_rows(f, at(x, kind), at(y, kind), wb, told, rule)

    return types.bool_(types.int64, x_type, y_type, row, row, stat, stat), small


# --- chunks of long rows, few of them or strided: each by itself ----------------------------------


@inner
def _chunk(f, item, backwards):  # type: ignore[no-untyped-def]
    """Of an item of the work: outer step, first row and rows of a strip; first column, columns."""
    pieces, chunks = (f.M + f.rows - 1) // f.rows, chunks_of(f.N)
    c, block = item // (f.outer * pieces), item % (f.outer * pieces)
    o, first, left = block // pieces, block % pieces * f.rows, c * CHUNK
    if backwards:
        left = (chunks - 1 - c) * CHUNK
    return o, first, min(f.rows, f.M - first), left, min(CHUNK, f.N - left)


@inner
def _moments(f, x, rule, parts, lo, hi, tile):  # type: ignore[no-untyped-def]
    here = pointer(tile, 0)
    for item in range(lo, hi):
        part = _chunk(f, item, False)
        o, first, n, left, size = part
        p, pp = rule[6](f, x, part, here, here)
        for k in range(n):
            q = advance(p, k * pp)
            s, m, v = rule[4](q, size, rule[3](q, size), rule[1], rule[2])
            i = 3 * ((o * f.M + first + k) * chunks_of(f.N) + left // CHUNK)
            parts[i], parts[i + 1], parts[i + 2] = s, m, v


@inner
def _results(f, x, y, w, b, stats, lo, hi, tile):  # type: ignore[no-untyped-def]
    has_w, has_b, here = address(w) != 0, address(b) != 0, pointer(tile, 0)
    past = f.past and address(x) != address(y)
    for item in range(lo, hi):
        # Backwards, as the end of x was read last; rows in turn share a chunk of weight and bias.
        part = _chunk(f, item, True)
        o, first, n, left, size = part
        target = advance(strips.start(y, f.y_outer, f.y_row, o, first), left * f.y_col)
        p, pp = strips.of_rows(f, (x,), part, here, here)
        q, qp = strips.place(target, f.y_row, f.y_col, here, size)
        wc, bc = advance(w, left), advance(b, left)
        for k in range(n):
            u, v, i = advance(p, k * pp), advance(q, k * qp), 3 * (o * f.M + first + k)
            s, m, r = stats[i], stats[i + 1], stats[i + 2]
            forward.apply_row(u, v, size, wc, bc, s, m, r, has_w, has_b, past)
        strips.put_back(target, f.y_row, f.y_col, here, n, size)


@job
def chunk_moments(checksum: int, kind: str, center: bool = True, wide: str = "") -> Any:
    """``chunk_moments(plan, lo, hi, x, residual, total, parts)``: of chunks of rows, as `rows`."""
    source, given = (strips.of_sums, wide) if wide else (strips.of_rows, kind)
    near, measure = _measures(center)

    def chunk_moments(plan, lo, hi, x, residual, total, parts):  # type: ignore[no-untyped-def]
        f, arrays = plan_at(plan, checksum), (at(x, kind), *_two(residual, total, given))
        rule, to = (f.eps, f.low, f.high, near, measure, False, source), at(parts, "float64")
        _moments(f, arrays, rule, to, lo, hi, np.empty(f.tiles * f.rows * (CHUNK + GAP)))

    return chunk_moments


@job
def finish(checksum: int, kind: str) -> Any:
    """``finish(plan, parts, mean, rstd, stats)``: merge the chunks of each row."""
    computed = stats_dtype(kind)

    def finish(plan, parts, mean, rstd, stats):  # type: ignore[no-untyped-def]
        f, to, found = plan_at(plan, checksum), at(stats, "float64"), at(parts, "float64")
        for i in range(f.outer * f.M):
            at_row = i // f.M * f.stats_outer + i % f.M * f.stats_row
            told = *_two(mean, rstd, computed), at_row, 0
            part = advance(found, 3 * i * chunks_of(f.N))
            to[3 * i], to[3 * i + 1], to[3 * i + 2] = forward.finish_row(part, f.N, f.eps, told, 0)

    return finish


@job
def chunk_results(checksum: int, kind: str, wide: str = "") -> Any:
    """``chunk_results(plan, lo, hi, x, y, w, b, stats)``: normalize them; x may be `wide`."""
    computed, given = stats_dtype(kind), wide or kind

    def chunk_results(plan, lo, hi, x, y, w, b, stats):  # type: ignore[no-untyped-def]
        f = plan_at(plan, checksum)
        tile = np.empty(f.tiles * f.rows * (CHUNK + GAP))
        wp, bp, s = at(w, computed), at(b, computed), at(stats, "float64")
        _results(f, at(x, given), at(y, kind), wp, bp, s, lo, hi, tile)

    return chunk_results


# --- backward -----------------------------------------------------------------------------------


@inner
def _blocks(f, arrays, stats, w, sums, lo, hi, group, work):  # type: ignore[no-untyped-def]
    # ``work``: as for `_strips`.
    (dy, x, dsum, dx), N, total, wide = arrays, f.N, f.outer * f.M, backward.sums_pitch(f.N)
    size, has_dx, has_dsum = backward.block_rows(total), address(dx) != 0, address(dsum) != 0
    spare = typed(pointer(work, 0), w)
    here = typed(pointer(work, 2 * wide), w)
    x_tile = pointer(work, 2 * wide + backward.FIELDS * group)
    g_tile = advance(x_tile, f.rows * (N + GAP))
    d_tile = advance(g_tile, has_dsum * f.rows * (N + GAP))
    for block in range(lo, hi):
        part = spare
        if address(sums) != 0:
            part = advance(sums, 2 * block * wide)
        for i in range(2 * wide):
            part[i] = 0
        to = part, advance(part, wide)
        row, end = block * size, min(total, (block + 1) * size)
        while row < end:
            o, first = row // f.M, row % f.M
            n = min(f.rows, end - row, f.M - first)
            source = strips.start(x, f.x_outer, f.x_row, o, first)
            p, pp = strips.bring(source, f.x_row, f.x_col, x_tile, n, N)
            source = strips.start(dy, f.dy_outer, f.dy_row, o, first)
            q, qp = strips.bring(source, f.dy_row, f.dy_col, g_tile, n, N)
            t, tp, target = dx, 0, dx
            if has_dx:
                target = strips.start(dx, f.dx_outer, f.dx_row, o, first)
                t, tp = strips.place(target, f.dx_row, f.dx_col, d_tile, N)
                if has_dsum:  # dx begins as what is added to it
                    source = strips.start(dsum, f.dsum_outer, f.dsum_row, o, first)
                    move(raw(source), f.dsum_row, f.dsum_col, raw(t), tp, 1, n, N)
            i = o * f.stats_outer + first * f.stats_row
            for k in range(0, n, group):
                told = stats[0], stats[1], i + k * f.stats_row, f.stats_row
                count, u = min(group, n - k), t
                if has_dx:
                    u = advance(t, k * tp)
                qk, pk = advance(q, k * qp), advance(p, k * pp)
                backward.short_rows(qk, qp, pk, pp, u, tp, count, N, w, told, to, here, has_dsum)
            if has_dx:
                strips.put_back(target, f.dx_row, f.dx_col, d_tile, n, N)
            row += n


@inner
def _share_of_gradients(f, arrays, stats, w, sums, lo, hi):  # type: ignore[no-untyped-def]
    total = f.outer * f.M
    group = min(f.rows, backward.group_size(total, f.N))
    size = 2 * backward.sums_pitch(f.N) + backward.FIELDS * group
    size += f.tiles * f.rows * (f.N + GAP)
    _blocks(f, arrays, stats, w, sums, lo, hi, group, np.empty(size))


@job
def gradients(checksum: int, kind: str) -> Any:
    """``gradients(plan, lo, hi, dy, x, mean, rstd, w, dsum, dx, sums)``: of blocks of rows."""
    computed = stats_dtype(kind)

    def gradients(plan, lo, hi, dy, x, mean, rstd, w, dsum, dx, sums):  # type: ignore[no-untyped-def]
        f, stats = plan_at(plan, checksum), _two(mean, rstd, computed)
        arrays = *_two(dy, x, kind), *_two(dsum, dx, kind)
        _share_of_gradients(f, arrays, stats, at(w, computed), at(sums, computed), lo, hi)

    return gradients


@inner
def _small_gradients(f, arrays, stats, w, targets, sums):  # type: ignore[no-untyped-def]
    to, total = typed(pointer(sums, 0), w), f.outer * f.M
    _share_of_gradients(f, arrays, stats, w, to, 0, backward.block_count(total))
    backward.merge_sums(to, total, f.N, targets, np.empty(min(f.N, CHUNK)))


@job
def small_gradients(checksum: int, kind: str) -> Any:
    """``small_gradients(plan, dy, x, mean, rstd, w, dsum, dx, dweight, dbias)``: of all rows.

    They are merged. dy, x, dsum and dx hold 16-bit kinds as uint16; what is absent is empty.
    """
    computed = stats_dtype(kind)
    given, made, stat, _, row, result = _arrays(kind)

    def small_gradients(plan, dy, x, mean, rstd, w, dsum, dx, dweight, dbias):  # type: ignore[no-untyped-def]
        f, stats = plan_at(plan, checksum), _two(mean, rstd, computed)
        arrays = at(dy, kind), at(x, kind), at(dsum, kind), at(dx, kind)
        targets = _two(dweight, dbias, computed)
        sums = np.empty(backward.sums_size(f.outer * f.M, f.N))
        _small_gradients(f, arrays, stats, at(w, computed), targets, sums)

    tables = types.int64, given, given, stat, stat, row, given, made
    return types.void(*tables, result, result), small_gradients


@job
def long_sums(checksum: int, kind: str) -> Any:
    """``long_sums(plan, lo, hi, dy, x, mean, rstd, w, parts)``: of chunks of rows."""
    computed = stats_dtype(kind)

    def long_sums(plan, lo, hi, dy, x, mean, rstd, w, parts):  # type: ignore[no-untyped-def]
        f = plan_at(plan, checksum)
        chunks = chunks_of(f.N)
        to, m, r = at(parts, "float64"), at(mean, computed), at(rstd, computed)
        for item in range(lo, hi):
            row, left = item // chunks, item % chunks * CHUNK
            p = advance(at(x, kind), row * f.x_row + left)
            q = advance(at(dy, kind), row * f.dy_row + left)
            wp, n = advance(at(w, computed), left), min(CHUNK, f.N - left)
            middle = m[row] if mean != 0 else like(r, 0)
            h, gh, g = backward.row_sums(p, q, wp, n, middle, r[row], w != 0)
            to[3 * item], to[3 * item + 1], to[3 * item + 2] = h, gh, g

    return long_sums


@job
def long_finish(checksum: int, kind: str) -> Any:
    """``long_finish(plan, parts, mean, rstd, stats)``: merge the chunks of each row."""
    computed = stats_dtype(kind)

    def long_finish(plan, parts, mean, rstd, stats):  # type: ignore[no-untyped-def]
        f, part = plan_at(plan, checksum), at(parts, "float64")
        m, r, to = at(mean, computed), at(rstd, computed), at(stats, computed)
        chunks = chunks_of(f.N)
        for row in range(f.M):
            h = gh = g = 0.0
            for c in range(chunks):
                i = 3 * (row * chunks + c)
                h, gh, g = h + part[i], gh + part[i + 1], g + part[i + 2]
            middle = m[row] if mean != 0 else like(r, 0)
            backward.finish_row(to, row, middle, r[row], h, gh, g, f.N, mean != 0)

    return long_finish


@inner
def _long_gradients(f, arrays, w, stats, sums, lo, hi, spare):  # type: ignore[no-untyped-def]
    dy, x, dsum, dx = arrays
    size, pitch, chunks = backward.block_rows(f.M), backward.sums_pitch(f.N), chunks_of(f.N)
    has_w, has_dx, has_dsum = address(w) != 0, address(dx) != 0, address(dsum) != 0
    writes = has_dx * (1 + has_dsum)
    for item in range(lo, hi):
        # Backwards, as the end of x and dy was read last.
        block, c = backward.block_count(f.M) - 1 - item // chunks, chunks - 1 - item % chunks
        left = c * CHUNK
        n = min(CHUNK, f.N - left)
        to_w = typed(pointer(spare, 0), w)
        to_b = advance(to_w, CHUNK)
        if address(sums) != 0:
            to_w = advance(sums, 2 * block * pitch + left)
            to_b = advance(to_w, pitch)
        for i in range(backward.sums_pitch(n)):
            to_w[i] = to_b[i] = 0
        wp, end = advance(w, left), min(f.M, (block + 1) * size)
        for row in range(block * size, end, backward.LONG_ROWS):
            k, t = min(backward.LONG_ROWS, end - row), dx
            if has_dx:
                t = advance(dx, row * f.dx_row + left)
                if has_dsum:
                    source = advance(dsum, row * f.dsum_row + left)
                    move(raw(source), f.dsum_row, 1, raw(t), f.dx_row, 1, k, n)
            p, q = advance(x, row * f.x_row + left), advance(dy, row * f.dy_row + left)
            s = advance(stats, backward.FIELDS * row)
            to = to_w, to_b
            backward.add_rows(p, f.x_row, q, f.dy_row, t, f.dx_row, k, n, wp, s, to, has_w, writes)


@job
def long_gradients(checksum: int, kind: str) -> Any:
    """``long_gradients(plan, lo, hi, dy, x, w, stats, dsum, dx, sums)``: of chunks of blocks."""
    computed = stats_dtype(kind)

    def long_gradients(plan, lo, hi, dy, x, w, stats, dsum, dx, sums):  # type: ignore[no-untyped-def]
        f, arrays = plan_at(plan, checksum), (*_two(dy, x, kind), *_two(dsum, dx, kind))
        wp, s, to = at(w, computed), at(stats, computed), at(sums, computed)
        _long_gradients(f, arrays, wp, s, to, lo, hi, np.empty(2 * CHUNK))

    return long_gradients


@job
def merge(checksum: int, kind: str, made: str = "float32") -> Any:
    """``merge(plan, sums, dweight, dbias)``: column sums of all blocks, in the dtype ``made``."""
    computed = stats_dtype(kind)

    def merge(plan, sums, dweight, dbias):  # type: ignore[no-untyped-def]
        f, targets = plan_at(plan, checksum), _two(dweight, dbias, made)
        backward.merge_sums(at(sums, computed), f.outer * f.M, f.N, targets, np.empty(CHUNK))

    return merge
