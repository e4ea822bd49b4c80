"""The inner loops of layer norm's backward on contiguous rows, for numba to compile."""

from cupynorm._cpu_lanes import (
    add,
    advance,
    fold,
    lanes,
    like,
    load,
    load_first,
    mul,
    splat,
    store,
    store_first,
    sub,
)
from cupynorm._cpu_loops import compiled

__all__ = ["FIELDS", "TILE", "add_rows", "finish_row", "row_sums"]

# Rows whose gradients are computed together: weight and the two column sums are read and written
# once for all of them, and four rows are added before the sum that grows.
TILE = 4
# Elements whose sums are float32; those of a longer row meet in float64.
_PIECE = 1024
FIELDS = 5


@compiled()
def _read(p, i, count, rest):  # type: ignore[no-untyped-def]
    """Read ``count`` lanes at p[i]; where count is the constant lanes(p) no mask is left."""
    return load(p, i) if count == lanes(p) else load_first(p, i, count, rest)


@compiled()
def _terms(x, dy, w, i, count, m, r, has_w):  # type: ignore[no-untyped-def]
    """Compute h, g * h and g of one vector; lanes that are not there give 0."""
    zero = splat(x, like(x, 0))
    h, g = mul(sub(_read(x, i, count, m), m), r), _read(dy, i, count, zero)
    if has_w:
        g = mul(g, _read(w, i, count, zero))
    return h, mul(g, h), g


@compiled()
def _sums(x, dy, w, n, mean, rstd, has_w):  # type: ignore[no-untyped-def]
    """Sum h = (x - mean) * rstd, g * h and g = dy * w."""
    step = lanes(x)
    m, r = splat(x, mean), splat(x, rstd)
    h0 = h1 = gh0 = gh1 = g0 = g1 = splat(x, like(x, 0))
    i = 0
    while i + 2 * step <= n:
        h, gh, g = _terms(x, dy, w, i, step, m, r, has_w)
        h0, gh0, g0 = add(h0, h), add(gh0, gh), add(g0, g)
        h, gh, g = _terms(x, dy, w, i + step, step, m, r, has_w)
        h1, gh1, g1 = add(h1, h), add(gh1, gh), add(g1, g)
        i += 2 * step
    while i < n:
        h, gh, g = _terms(x, dy, w, i, min(step, n - i), m, r, has_w)
        h0, gh0, g0 = add(h0, h), add(gh0, gh), add(g0, g)
        i += step
    return fold(add(h0, h1)), fold(add(gh0, gh1)), fold(add(g0, g1))


@compiled()
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


@compiled()
def finish_row(sum_h, sum_gh, sum_g, N):  # type: ignore[no-untyped-def]
    """What h exceeds x_hat by (mean is rounded), mean of g, mean of g * x_hat."""
    lack = sum_h / N
    return lack, sum_g / N, (sum_gh - lack * sum_g) / N


@compiled()
def _splats(stats, k):  # type: ignore[no-untyped-def]
    i = FIELDS * k
    return (
        splat(stats, stats[i]),
        splat(stats, stats[i + 1]),
        splat(stats, stats[i + 2]),
        splat(stats, stats[i + 3]),
        splat(stats, stats[i + 4]),
    )


@compiled()
def _cell(x, dy, dx, i, count, w, row, has_w, has_dx):  # type: ignore[no-untyped-def]
    """One vector of one row: write dx, give dy * x_hat and dy."""
    m, r, lack, c1, c2 = row
    d = _read(dy, i, count, splat(x, like(x, 0)))
    x_hat = sub(mul(sub(_read(x, i, count, m), m), r), lack)
    if has_dx:
        g = mul(d, w) if has_w else d
        g = mul(sub(sub(g, c1), mul(x_hat, c2)), r)
        if count == lanes(x):
            store(dx, i, g)
        else:
            store_first(dx, i, count, g)
    return mul(d, x_hat), d


@compiled()
def _four_cells(x, xp, dy, dyp, dx, dxp, i, count, w, rows, has_w, has_dx):  # type: ignore[no-untyped-def]
    """The vectors below each other in four rows: write dx, give the sums of what _cell gives."""
    r0, r1, r2, r3 = rows
    a, e = _cell(x, dy, dx, i, count, w, r0, has_w, has_dx)
    x, dy, dx = advance(x, xp), advance(dy, dyp), advance(dx, dxp)
    b, f = _cell(x, dy, dx, i, count, w, r1, has_w, has_dx)
    x, dy, dx = advance(x, xp), advance(dy, dyp), advance(dx, dxp)
    a, e = add(a, b), add(e, f)
    b, f = _cell(x, dy, dx, i, count, w, r2, has_w, has_dx)
    x, dy, dx = advance(x, xp), advance(dy, dyp), advance(dx, dxp)
    c, g = _cell(x, dy, dx, i, count, w, r3, has_w, has_dx)
    return add(a, add(b, c)), add(e, add(f, g))


@compiled()
def _grow(p, i, v):  # type: ignore[no-untyped-def]
    store(p, i, add(load(p, i), v))


@compiled()
def _add_four(x, xp, dy, dyp, dx, dxp, n, w, stats, k, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    step, wv = lanes(x), splat(x, like(x, 1))
    rows = (
        _splats(stats, k),
        _splats(stats, k + 1),
        _splats(stats, k + 2),
        _splats(stats, k + 3),
    )
    i = 0
    while i + step <= n:
        if has_w:
            wv = load(w, i)
        a, e = _four_cells(x, xp, dy, dyp, dx, dxp, i, step, wv, rows, has_w, has_dx)
        _grow(to_w, i, a)
        _grow(to_b, i, e)
        i += step
    if i < n:
        if has_w:
            wv = load_first(w, i, n - i, wv)
        a, e = _four_cells(x, xp, dy, dyp, dx, dxp, i, n - i, wv, rows, has_w, has_dx)
        _grow(to_w, i, a)
        _grow(to_b, i, e)


@compiled()
def _add_one(x, dy, dx, n, w, stats, k, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    step, wv = lanes(x), splat(x, like(x, 1))
    row = _splats(stats, k)
    i = 0
    while i + step <= n:
        if has_w:
            wv = load(w, i)
        a, e = _cell(x, dy, dx, i, step, wv, row, has_w, has_dx)
        _grow(to_w, i, a)
        _grow(to_b, i, e)
        i += step
    if i < n:
        if has_w:
            wv = load_first(w, i, n - i, wv)
        a, e = _cell(x, dy, dx, i, n - i, wv, row, has_w, has_dx)
        _grow(to_w, i, a)
        _grow(to_b, i, e)


@compiled()
def add_rows(x, xp, dy, dyp, dx, dxp, M, n, w, stats, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    """Write dx of M rows of n elements, and add their dy * x_hat and dy to to_w and to_b.

    ``stats`` (5, M) holds mean, rstd and finish_row()'s three; to_w and to_b have whole vectors.
    """
    k = 0
    while k < M:
        p, q, t = advance(x, k * xp), advance(dy, k * dyp), advance(dx, k * dxp)
        if k + TILE <= M:
            _add_four(p, xp, q, dyp, t, dxp, n, w, stats, k, to_w, to_b, has_w, has_dx)
            k += TILE
        else:
            _add_one(p, q, t, n, w, stats, k, to_w, to_b, has_w, has_dx)
            k += 1
