"""The arithmetic of layer norm's backward: rows in registers, in blocks with sums of their own.

Rows are pointers, as in the forward. Which rows meet in one sum goes by their number alone.
"""

from functools import partial
from typing import Any

from cupynorm._cpu.compiled import inner
from cupynorm._cpu.forward import FROM_MEMORY
from cupynorm._cpu.vectors import (
    add,
    address,
    advance,
    fma,
    fold,
    lanes,
    like,
    load,
    load_first,
    mul,
    pointer,
    splat,
    store,
    store_first,
    sub,
)

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
LONG_ROWS = 2  # whose chunks go together
# The column sums of a block are written in whole vectors of up to so many elements.
_VECTOR = 16


@inner
def block_rows(M):  # type: ignore[no-untyped-def]
    return max(_LEAST_ROWS, min(_MOST_ROWS, (M + _BLOCKS - 1) // _BLOCKS))


@inner
def block_count(M):  # type: ignore[no-untyped-def]
    """Count the blocks of rows that have column sums of their own."""
    size = block_rows(M)
    return (M + size - 1) // size


@inner
def sums_pitch(N):  # type: ignore[no-untyped-def]
    """Elements of one block's sums of dy * x_hat; those of dy follow, with as many."""
    return (N + _VECTOR - 1) // _VECTOR * _VECTOR


@inner
def sums_size(M, N):  # type: ignore[no-untyped-def]
    """Elements of the column sums of all blocks."""
    return 2 * block_count(M) * sums_pitch(N)


@inner
def group_size(M, N):  # type: ignore[no-untyped-def]
    if N <= _NARROW:
        return max(4, _GROUP // N // 4 * 4)
    alone = N > _PAIRED or (N <= _FITS and M * N >= FROM_MEMORY)
    return 1 if alone else 2


# Elements whose sums are float32; those of a longer row meet in float64.
_PIECE = 512
FIELDS = 5  # of a row: what finish_row() puts
ADDS = 2  # to what dx holds; 1: overwrites it, 0: no dx is wanted


@inner
def _read(p, i, count, rest):  # type: ignore[no-untyped-def]
    """Read ``count`` lanes at p[i]; where count is the constant lanes(p) no mask is left."""
    return load(p, i) if count == lanes(p) else load_first(p, i, count, rest)


@partial(inner, forceinline=True)
def _add_terms(x, dy, w, i, count, m, r, has_w, sum_h, sum_gh, sum_g):  # type: ignore[no-untyped-def]
    """Add h, g * h and g of one vector to their sums; lanes that are not there give 0."""
    zero = splat(x, like(x, 0))
    h, g = mul(sub(_read(x, i, count, m), m), r), _read(dy, i, count, zero)
    if has_w:
        g = mul(g, _read(w, i, count, zero))
    return add(sum_h, h), fma(g, h, sum_gh), add(sum_g, g)


@inner
def _sums(x, dy, w, n, mean, rstd, has_w):  # type: ignore[no-untyped-def]
    """Sum h = (x - mean) * rstd, g * h and g = dy * w."""
    step = lanes(x)
    m, r = splat(x, mean), splat(x, rstd)
    h0 = h1 = gh0 = gh1 = g0 = g1 = splat(x, like(x, 0))
    i = 0
    while i + 2 * step <= n:
        h0, gh0, g0 = _add_terms(x, dy, w, i, step, m, r, has_w, h0, gh0, g0)
        h1, gh1, g1 = _add_terms(x, dy, w, i + step, step, m, r, has_w, h1, gh1, g1)
        i += 2 * step
    while i < n:
        h0, gh0, g0 = _add_terms(x, dy, w, i, min(step, n - i), m, r, has_w, h0, gh0, g0)
        i += step
    return fold(add(h0, h1)), fold(add(gh0, gh1)), fold(add(g0, g1))


@inner
def row_sums(x, dy, w, n, mean, rstd, has_w):  # type: ignore[no-untyped-def]
    """Sum h, g * h and g over n elements of a row, in float64 beyond a piece."""
    sum_h = sum_gh = sum_g = 0.0
    for lo in range(0, n, _PIECE):
        size = min(_PIECE, n - lo)
        h, gh, g = _sums(advance(x, lo), advance(dy, lo), advance(w, lo), size, mean, rstd, has_w)
        sum_h += h
        sum_gh += gh
        sum_g += g
    return sum_h, sum_gh, sum_g


@inner
def finish_row(stats, k, mean, rstd, sum_h, sum_gh, sum_g, N, center):  # type: ignore[no-untyped-def]
    """Put mean, rstd, what x_hat is above h (mean is rounded), -mean(g), -mean(g * x_hat).

    Where nothing is centred, h is x_hat and g is not, either.
    """
    lack = sum_h / N if center else 0.0
    i = FIELDS * k
    stats[i], stats[i + 1] = mean, rstd
    stats[i + 2], stats[i + 3] = -lack, -sum_g / N if center else 0.0
    stats[i + 4] = (lack * sum_g - sum_gh) / N


@inner
def _splats(stats, k):  # type: ignore[no-untyped-def]
    row = advance(stats, FIELDS * k)
    return (
        splat(row, row[0]),
        splat(row, row[1]),
        splat(row, row[2]),
        splat(row, row[3]),
        splat(row, row[4]),
    )


@inner
def _cell(x, dy, dx, i, count, w, row, has_w, writes):  # type: ignore[no-untyped-def]
    """One vector of one row: write dx, or add it to what is there, and give dy and x_hat."""
    m, r, lack, c1, c2 = row
    d = _read(dy, i, count, splat(x, like(x, 0)))
    x_hat = fma(sub(_read(x, i, count, m), m), r, lack)
    if writes:
        # dy * w is rounded as in its sum: where all of a row are equal, nothing must be left over.
        g = mul(fma(x_hat, c2, add(mul(d, w) if has_w else d, c1)), r)
        if writes == ADDS:
            g = add(g, _read(dx, i, count, splat(x, like(x, 0))))
        if count == lanes(x):
            store(dx, i, g)
        else:
            store_first(dx, i, count, g)
    return d, x_hat


@inner
def _of_one(x, xp, dy, dyp, dx, dxp, i, count, w, rows, has_w, writes):  # type: ignore[no-untyped-def]
    """One vector of a row: write dx, give dy * x_hat and dy."""
    d, h = _cell(x, dy, dx, i, count, w, rows[0], has_w, writes)
    return mul(d, h), d


@inner
def _of_two(x, xp, dy, dyp, dx, dxp, i, count, w, rows, has_w, writes):  # type: ignore[no-untyped-def]
    """Vectors below each other: write dx, give the sums of dy * x_hat and of dy."""
    d, h = _cell(x, dy, dx, i, count, w, rows[0], has_w, writes)
    x, dy, dx = advance(x, xp), advance(dy, dyp), advance(dx, dxp)
    e, k = _cell(x, dy, dx, i, count, w, rows[1], has_w, writes)
    return fma(d, h, mul(e, k)), add(d, e)


@inner
def _of_four(x, xp, dy, dyp, dx, dxp, i, count, w, rows, has_w, writes):  # type: ignore[no-untyped-def]
    a, b = _of_two(x, xp, dy, dyp, dx, dxp, i, count, w, rows[:2], has_w, writes)
    x, dy, dx = advance(x, 2 * xp), advance(dy, 2 * dyp), advance(dx, 2 * dxp)
    c, d = _of_two(x, xp, dy, dyp, dx, dxp, i, count, w, rows[2:], has_w, writes)
    return add(a, c), add(b, d)


@inner
def _grow(to_w, to_b, i, a, b):  # type: ignore[no-untyped-def]
    store(to_w, i, add(load(to_w, i), a))
    store(to_b, i, add(load(to_b, i), b))


@inner
def _weights(w, i, count, has_w):  # type: ignore[no-untyped-def]
    one = splat(w, like(w, 1))
    return _read(w, i, count, one) if has_w else one


def _adding(cells: Any, count: int) -> Any:
    """Make what writes dx of ``count`` rows, which ``cells`` takes, and adds to the column sums."""
    second, third, fourth = 1 % count, 2 % count, 3 % count  # no row that is not there is read

    @inner
    def add_up(x, xp, dy, dyp, dx, dxp, n, w, stats, to, has_w, writes):  # type: ignore[no-untyped-def]
        step, i, (to_w, to_b) = lanes(x), 0, to
        rows = (  # before the loop: for all that LLVM knows, its stores may change them
            _splats(stats, 0),
            _splats(stats, second),
            _splats(stats, third),
            _splats(stats, fourth),
        )
        while i + step <= n:
            v = _weights(w, i, step, has_w)
            a, b = cells(x, xp, dy, dyp, dx, dxp, i, step, v, rows, has_w, writes)
            _grow(to_w, to_b, i, a, b)
            i += step
        if i < n:
            v = _weights(w, i, n - i, has_w)
            a, b = cells(x, xp, dy, dyp, dx, dxp, i, n - i, v, rows, has_w, writes)
            _grow(to_w, to_b, i, a, b)

    return add_up


_add_one, _add_two, _add_four = _adding(_of_one, 1), _adding(_of_two, 2), _adding(_of_four, 4)


@inner
def add_rows(x, xp, dy, dyp, dx, dxp, M, n, w, stats, to, has_w, writes):  # type: ignore[no-untyped-def]
    """Write dx of M rows of n elements, and add their dy * x_hat and dy to to_w and to_b.

    ``stats`` holds what finish_row() put for each row; to_w and to_b have whole vectors; for
    ``writes`` see ADDS.
    """
    k = 0
    while k < M:
        p, q, t = advance(x, k * xp), advance(dy, k * dyp), advance(dx, k * dxp)
        row = advance(stats, FIELDS * k)
        if M - k >= 4:
            _add_four(p, xp, q, dyp, t, dxp, n, w, row, to, has_w, writes)
            k += 4
        elif M - k >= 2:
            _add_two(p, xp, q, dyp, t, dxp, n, w, row, to, has_w, writes)
            k += 2
        else:
            _add_one(p, xp, q, dyp, t, dxp, n, w, row, to, has_w, writes)
            k += 1


@inner
def short_rows(q, qp, p, pp, t, tp, M, N, w, stats, sums, room, adds):  # type: ignore[no-untyped-def]
    """Write dx of a group of rows to t, and add to their column sums.

    q, p, t: dy, x and dx, and their pitches; w and t may be null. ``stats`` is mean, null where
    nothing is centred, rstd, the index there of the first row and the step to the next, ``sums``
    where the sums of dy * x_hat and of dy are, ``room`` FIELDS for each row. ``adds``: dx holds
    what it is added to.
    """
    mean, rstd, at, step = stats
    has_w, center = address(w) != 0, address(mean) != 0
    writes = (address(t) != 0) * (1 + adds)
    for k in range(M):
        m, r = mean[at + k * step] if center else like(rstd, 0), rstd[at + k * step]
        h, gh, g = row_sums(advance(p, k * pp), advance(q, k * qp), w, N, m, r, has_w)
        finish_row(room, k, m, r, h, gh, g, N, center)
    add_rows(p, pp, q, qp, t, tp, M, N, w, room, sums, has_w, writes)


@inner
def merge_sums(sums, M, N, targets, room):  # type: ignore[no-untyped-def]
    """Add the sums of the blocks of M rows in their order, in float64, into dweight and dbias.

    ``targets`` are these two, each of which may be null; ``room`` holds a piece of one.
    """
    pitch, total = sums_pitch(N), pointer(room, 0)
    for k in range(2):
        to = targets[k]
        for left in range(0, N if address(to) != 0 else 0, room.size):
            n = min(room.size, N - left)
            for i in range(n):
                total[i] = 0.0
            for block in range(block_count(M)):
                part = advance(sums, (2 * block + k) * pitch + left)
                for i in range(n):
                    total[i] += part[i]
            for i in range(n):
                to[left + i] = like(to, total[i])
