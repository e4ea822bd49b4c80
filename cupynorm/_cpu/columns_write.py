"""Writes a block of columns, normalized: along the columns, or turned into rows."""

from cupynorm._cpu.bits import give, place
from cupynorm._cpu.columns_lanes import stream
from cupynorm._cpu.lanes import add, lanes, load, mul, splat, sub
from cupynorm._cpu.loops import LINE, compiled
from cupynorm._cpu.pointers import address, advance, like
from cupynorm._cpu.squares import square, turn

__all__ = ["ROWS", "put_columns", "put_rows"]

# Bytes of a result that no cache holds until someone reads it.
_LARGE = 1 << 26
ROWS = 16  # written together: a line of float32 of each column


@compiled()
def _apply(x, y, n, s, m, r, w, b, has_w, has_b):  # type: ignore[no-untyped-def]
    """Write ((x - s) - m) * r * w + b to y, for n rows of one column; y may be x."""
    if has_w and has_b:
        for i in range(n):
            y[i] = (((x[i] - s[i]) - m[i]) * r[i]) * w + b
    elif has_w:
        for i in range(n):
            y[i] = (((x[i] - s[i]) - m[i]) * r[i]) * w
    elif has_b:
        for i in range(n):
            y[i] = (((x[i] - s[i]) - m[i]) * r[i]) + b
    else:
        for i in range(n):
            y[i] = ((x[i] - s[i]) - m[i]) * r[i]


@compiled()
def _apply_past_caches(x, y, n, s, m, r, w, b, has_w, has_b):  # type: ignore[no-untyped-def]
    """As _apply, to y in memory that is not wanted soon: else each line of it is read first."""
    step, size = lanes(x), LINE // lanes(x)
    i = min(n, (-address(y) & (LINE - 1)) // size)
    _apply(x, y, i, s, m, r, w, b, has_w, has_b)
    vw, vb = splat(x, w), splat(x, b)
    while i + step <= n:
        t = mul(sub(sub(load(x, i), load(s, i)), load(m, i)), load(r, i))
        if has_w:
            t = mul(t, vw)
        if has_b:
            t = add(t, vb)
        stream(y, i, t)
        i += step
    _apply(
        advance(x, i),
        advance(y, i),
        n - i,
        advance(s, i),
        advance(m, i),
        advance(r, i),
        w,
        b,
        has_w,
        has_b,
    )


@compiled()
def put_columns(t, pitch, N, n, y, to, yp, s, m, r, w, b, room, bfloat16):  # type: ignore[no-untyped-def]
    direct = y.itemsize == room.itemsize and y.size * y.itemsize >= _LARGE
    has_w, has_b = w.size > 0, b.size > 0
    for j in range(N):
        wj = w[j] if has_w else like(s, 1)
        bj = b[j] if has_b else like(s, 0)
        q, _ = place(y, to + j * yp, n, n, room)
        if direct:
            _apply_past_caches(advance(t, j * pitch), q, n, s, m, r, wj, bj, has_w, has_b)
        else:
            _apply(advance(t, j * pitch), q, n, s, m, r, wj, bj, has_w, has_b)
        give(y, to + j * yp, n, 1, n, room, bfloat16)


@compiled()
def put_rows(t, pitch, N, n, y, to, yp, s, m, r, w, b, room, bfloat16):  # type: ignore[no-untyped-def]
    has_w, has_b = w.size > 0, b.size > 0
    for j in range(N):
        wj = w[j] if has_w else like(s, 1)
        bj = b[j] if has_b else like(s, 0)
        x = advance(t, j * pitch)
        _apply(x, x, n, s, m, r, wj, bj, has_w, has_b)
    side = square(t)
    for i in range(0, n, ROWS):
        rows = min(ROWS, n - i)
        q, qp = place(y, to + i * yp, yp, N, room)
        done = N // side * side if rows == ROWS else 0
        for j in range(0, done, side):
            for k in range(0, ROWS, side):
                turn(advance(t, j * pitch + i + k), pitch, advance(q, k * qp + j), qp)
        for j in range(done, N):
            for k in range(rows):
                q[k * qp + j] = t[j * pitch + i + k]
        give(y, to + i * yp, yp, rows, N, room, bfloat16)
