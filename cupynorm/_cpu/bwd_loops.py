"""The inner loops of layer norm's backward on contiguous rows, for numba to compile."""

from cupynorm._cpu.lanes import (
    add,
    fma,
    fold,
    lanes,
    load,
    load_first,
    mul,
    splat,
    store,
    store_first,
    sub,
)
from cupynorm._cpu.loops import compiled
from cupynorm._cpu.pointers import advance, like

__all__ = ["FIELDS", "add_rows", "finish_row", "row_sums"]

# Elements whose sums are float32; those of a longer row meet in float64.
_PIECE = 512
FIELDS = 5  # of a row: what finish_row() puts


@compiled()
def _read(p, i, count, rest):  # type: ignore[no-untyped-def]
    """Read ``count`` lanes at p[i]; where count is the constant lanes(p) no mask is left."""
    return load(p, i) if count == lanes(p) else load_first(p, i, count, rest)


@compiled()
def _terms(x, dy, w, i, count, m, r, has_w):  # type: ignore[no-untyped-def]
    """Compute h and g of one vector; lanes that are not there give 0."""
    zero = splat(x, like(x, 0))
    h, g = mul(sub(_read(x, i, count, m), m), r), _read(dy, i, count, zero)
    if has_w:
        g = mul(g, _read(w, i, count, zero))
    return h, g


@compiled()
def _sums(x, dy, w, n, mean, rstd, has_w):  # type: ignore[no-untyped-def]
    """Sum h = (x - mean) * rstd, g * h and g = dy * w."""
    step = lanes(x)
    m, r = splat(x, mean), splat(x, rstd)
    h0 = h1 = gh0 = gh1 = g0 = g1 = splat(x, like(x, 0))
    i = 0
    while i + 2 * step <= n:
        h, g = _terms(x, dy, w, i, step, m, r, has_w)
        h0, gh0, g0 = add(h0, h), fma(g, h, gh0), add(g0, g)
        h, g = _terms(x, dy, w, i + step, step, m, r, has_w)
        h1, gh1, g1 = add(h1, h), fma(g, h, gh1), add(g1, g)
        i += 2 * step
    while i < n:
        h, g = _terms(x, dy, w, i, min(step, n - i), m, r, has_w)
        h0, gh0, g0 = add(h0, h), fma(g, h, gh0), add(g0, g)
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
def finish_row(stats, k, mean, rstd, sum_h, sum_gh, sum_g, N):  # type: ignore[no-untyped-def]
    """Put mean, rstd, what x_hat is above h (mean is rounded), -mean(g), -mean(g * x_hat)."""
    lack = sum_h / N
    i = FIELDS * k
    stats[i], stats[i + 1] = mean, rstd
    stats[i + 2], stats[i + 3] = -lack, -sum_g / N
    stats[i + 4] = (lack * sum_g - sum_gh) / N


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
    """One vector of one row: write dx, give dy and x_hat."""
    m, r, lack, c1, c2 = row
    d = _read(dy, i, count, splat(x, like(x, 0)))
    x_hat = fma(sub(_read(x, i, count, m), m), r, lack)
    if has_dx:
        # dy * w is rounded as in its sum: where all of a row are equal, nothing must be left over.
        g = mul(fma(x_hat, c2, add(mul(d, w) if has_w else d, c1)), r)
        if count == lanes(x):
            store(dx, i, g)
        else:
            store_first(dx, i, count, g)
    return d, x_hat


@compiled()
def _two_cells(x, xp, dy, dyp, dx, dxp, i, count, w, row0, row1, has_w, has_dx):  # type: ignore[no-untyped-def]
    """Vectors below each other: write dx, give the sums of dy * x_hat and of dy."""
    d, h = _cell(x, dy, dx, i, count, w, row0, has_w, has_dx)
    x, dy, dx = advance(x, xp), advance(dy, dyp), advance(dx, dxp)
    e, k = _cell(x, dy, dx, i, count, w, row1, has_w, has_dx)
    return fma(d, h, mul(e, k)), add(d, e)


@compiled()
def _grow(to_w, to_b, i, a, b):  # type: ignore[no-untyped-def]
    store(to_w, i, add(load(to_w, i), a))
    store(to_b, i, add(load(to_b, i), b))


@compiled()
def _weights(w, i, count, has_w):  # type: ignore[no-untyped-def]
    one = splat(w, like(w, 1))
    return _read(w, i, count, one) if has_w else one


@compiled()
def _add_four(x, xp, dy, dyp, dx, dxp, n, w, stats, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    step = lanes(x)
    r0, r1, r2, r3 = _splats(stats, 0), _splats(stats, 1), _splats(stats, 2), _splats(stats, 3)
    x2, dy2, dx2 = advance(x, 2 * xp), advance(dy, 2 * dyp), advance(dx, 2 * dxp)
    i = 0
    while i + step <= n:
        v = _weights(w, i, step, has_w)
        a, b = _two_cells(x, xp, dy, dyp, dx, dxp, i, step, v, r0, r1, has_w, has_dx)
        c, d = _two_cells(x2, xp, dy2, dyp, dx2, dxp, i, step, v, r2, r3, has_w, has_dx)
        _grow(to_w, to_b, i, add(a, c), add(b, d))
        i += step
    if i < n:
        v = _weights(w, i, n - i, has_w)
        a, b = _two_cells(x, xp, dy, dyp, dx, dxp, i, n - i, v, r0, r1, has_w, has_dx)
        c, d = _two_cells(x2, xp, dy2, dyp, dx2, dxp, i, n - i, v, r2, r3, has_w, has_dx)
        _grow(to_w, to_b, i, add(a, c), add(b, d))


@compiled()
def _add_two(x, xp, dy, dyp, dx, dxp, n, w, stats, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    step = lanes(x)
    r0, r1 = _splats(stats, 0), _splats(stats, 1)
    i = 0
    while i + step <= n:
        v = _weights(w, i, step, has_w)
        a, b = _two_cells(x, xp, dy, dyp, dx, dxp, i, step, v, r0, r1, has_w, has_dx)
        _grow(to_w, to_b, i, a, b)
        i += step
    if i < n:
        v = _weights(w, i, n - i, has_w)
        a, b = _two_cells(x, xp, dy, dyp, dx, dxp, i, n - i, v, r0, r1, has_w, has_dx)
        _grow(to_w, to_b, i, a, b)


@compiled()
def _add_one(x, dy, dx, n, w, stats, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    step = lanes(x)
    row = _splats(stats, 0)
    i = 0
    while i + step <= n:
        d, h = _cell(x, dy, dx, i, step, _weights(w, i, step, has_w), row, has_w, has_dx)
        _grow(to_w, to_b, i, mul(d, h), d)
        i += step
    if i < n:
        d, h = _cell(x, dy, dx, i, n - i, _weights(w, i, n - i, has_w), row, has_w, has_dx)
        _grow(to_w, to_b, i, mul(d, h), d)


@compiled()
def add_rows(x, xp, dy, dyp, dx, dxp, M, n, w, stats, to_w, to_b, has_w, has_dx):  # type: ignore[no-untyped-def]
    """Write dx of M rows of n elements, and add their dy * x_hat and dy to to_w and to_b.

    ``stats`` holds what finish_row() put for each row; to_w and to_b have whole vectors.
    """
    k = 0
    while k < M:
        p, q, t = advance(x, k * xp), advance(dy, k * dyp), advance(dx, k * dxp)
        row = advance(stats, FIELDS * k)
        if M - k >= 4:
            _add_four(p, xp, q, dyp, t, dxp, n, w, row, to_w, to_b, has_w, has_dx)
            k += 4
        elif M - k >= 2:
            _add_two(p, xp, q, dyp, t, dxp, n, w, row, to_w, to_b, has_w, has_dx)
            k += 2
        else:
            _add_one(p, q, t, n, w, row, to_w, to_b, has_w, has_dx)
            k += 1
