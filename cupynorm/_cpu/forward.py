"""The arithmetic of layer norm's forward: rows in registers, long rows in chunks.

Rows are pointers, so that nothing here knows whether they lie in an array or in a tile; 16-bit
values are widened and narrowed on the way. A row's bits go by its values and N alone.
"""

import math

from cupynorm._cpu.compiled import inner
from cupynorm._cpu.vectors import (
    add,
    address,
    advance,
    fma,
    fold,
    item,
    keep_last,
    lanes,
    like,
    load,
    mul,
    pointer,
    put,
    size_of,
    splat,
    store,
    store_first,
    store_last,
    store_past,
    sub,
    typed,
)

# Elements of a row whose moments are taken together: 16 KiB of float32.
CHUNK = 4096
# Elements of a group of short rows. Twice as many cost 4096x768 40 % (x, y, weight and bias of a
# group leave the L1). Half as many lose 15 % where x is in a cache, but gain 10 to 15 % where it
# comes from memory, as nothing is read ahead while a group is written: 16384x1024 7.7 and 6.5 ms.
GROUP = 2048
# Elements of x from which it comes from memory.
FROM_MEMORY = 1 << 21
# Squares of values on a coarse grid (a large common offset) end in 00 or 01, so that float32 sums
# of many of them round down more often than up: pieces of 16 terms a lane meet in float64.
_PIECE = 1024
# Elements whose mean is the pivot s. Any s gives the moments of x - s; what it costs is a factor
# E[(x-s)^2] / var in their rounding, which is held below 2. A sum of all would read the row twice,
# and while the second reading goes on in the L1, nothing comes from memory.
_SAMPLE = 256
LINE = 64  # bytes of a cache line, and of a vector
SPARE = 32  # elements of two lines of float32
_REPAYS = 4  # rows for which a copy of weight and bias is worth its time
# Elements of a row whose results are written from a line on: every vector across two lines costs
# two accesses, of x, y, weight and bias alike. A shorter row loses more to the vector before it.
PEELED = 256


@inner
def chunks_of(N):  # type: ignore[no-untyped-def]
    return (N + CHUNK - 1) // CHUNK


@inner
def _sum(x, n):  # type: ignore[no-untyped-def]
    """Sum of the n elements at x, in an order that depends on n alone."""
    step = lanes(x)
    if n < step:
        total = like(x, 0)
        for i in range(n):
            total += item(x, i)
        return total
    a = b = c = d = splat(x, like(x, 0))
    i = 0
    while i + 4 * step <= n:
        a = add(a, load(x, i))
        b = add(b, load(x, i + step))
        c = add(c, load(x, i + 2 * step))
        d = add(d, load(x, i + 3 * step))
        i += 4 * step
    while i + step <= n:
        a = add(a, load(x, i))
        i += step
    if i < n:
        b = add(b, keep_last(load(x, n - step), n - i))
    return fold(add(add(a, b), add(c, d)))


@inner
def _add_deviation(t, first, second):  # type: ignore[no-untyped-def]
    """Add t to one sum and its square to the other."""
    return add(first, t), fma(t, t, second)


@inner
def _sums(x, n, s):  # type: ignore[no-untyped-def]
    """Sum x - s and its square."""
    step = lanes(x)
    if n < step:
        first = second = like(x, 0)
        for i in range(n):
            t = item(x, i) - s
            first += t
            second += t * t
        return first, second
    shift = splat(x, s)
    a = b = aa = bb = cc = dd = splat(x, like(x, 0))
    i = 0
    while i + 4 * step <= n:
        a, aa = _add_deviation(sub(load(x, i), shift), a, aa)
        b, bb = _add_deviation(sub(load(x, i + step), shift), b, bb)
        a, cc = _add_deviation(sub(load(x, i + 2 * step), shift), a, cc)
        b, dd = _add_deviation(sub(load(x, i + 3 * step), shift), b, dd)
        i += 4 * step
    while i + step <= n:
        a, aa = _add_deviation(sub(load(x, i), shift), a, aa)
        i += step
    if i < n:
        b, bb = _add_deviation(keep_last(sub(load(x, n - step), shift), n - i), b, bb)
    return fold(add(a, b)), fold(add(add(aa, bb), add(cc, dd)))


@inner
def _wide(x, n, s, centred):  # type: ignore[no-untyped-def]
    """Mean of x - s in float64, and of its squares the root, as minus that.

    The root is told from the mean where ``centred`` is 1.0, from s where it is 0.0; it is taken of
    shares of the largest, as squares may leave float64's range. 0 and NaN are given as they are.
    """
    # Terms scaled by 1/n: a row near the maximum must not overflow its own sum.
    share, mean, top = 1.0 / n, 0.0, 0.0
    for i in range(n):
        d = item(x, i) - s
        mean += d * share
        top = d if d > top else -d if -d > top else top
    top = top if 0 < top < math.inf else 1.0
    v = 0.0
    for i in range(n):
        d = (item(x, i) - s) / top
        v += d * d
    away = mean / top if centred else 0.0  # not 0.0 * mean, which Inf in x makes NaN
    v = v * share - away * away
    return mean, -top * math.sqrt(v) if v > 0 else v


@inner
def rstd_of(v, eps):  # type: ignore[no-untyped-def]
    if not v < 0:
        return 1.0 / math.sqrt(v + eps)
    root, other = -v, math.sqrt(eps if eps > 0 else 0.0)
    if root < other:
        root, other = other, root
    return 1.0 / (root * math.sqrt(1.0 + (other / root) * (other / root)))


@inner
def _about(x, n, s):  # type: ignore[no-untyped-def]
    """Mean of x - s and of its square, in float64."""
    m = 0.0
    v = 0.0
    for lo in range(0, n, _PIECE):
        first, second = _sums(advance(x, lo), min(_PIECE, n - lo), s)
        m += first
        v += second
    return m / n, v / n


@inner
def pivot(x, n):  # type: ignore[no-untyped-def]
    """A value near the mean of the n elements at x."""
    sample = min(n, _SAMPLE)
    return _sum(x, sample) / sample


@inner
def moments(x, n, near, low, high):  # type: ignore[no-untyped-def]
    """Return s, mean(x - s) and the variance, with s = near if that is near enough.

    The latter may be minus its root, as `_wide` gives it.
    """
    s = like(x, near)
    m, v = _about(x, n, s)
    if m * m > 0.5 * v:  # the pivot is farther from the mean than the values are
        s = like(x, s + m)
        m, v = _about(x, n, s)
    if low < v < high:
        return float(s), m, v - m * m
    mean, _ = _wide(x, n, 0.0, 1.0)  # sums of squares overflow, or vanish beside eps
    wide = 0.0 + like(x, mean)
    m, v = _wide(x, n, wide, 1.0)
    return wide, m, v


@inner
def origin(x, n):  # type: ignore[no-untyped-def]
    """As `pivot`, where nothing is centred."""
    return like(x, 0)


@inner
def squares(x, n, near, low, high):  # type: ignore[no-untyped-def]
    """As `moments`, where nothing is centred: 0, 0 and the mean square."""
    _, v = _about(x, n, like(x, 0))
    if low < v < high:
        return 0.0, 0.0, v
    _, v = _wide(x, n, 0.0, 0.0)
    return 0.0, 0.0, v


@inner
def _scaled(x, w, b, i, s, m, r, has_w, has_b):  # type: ignore[no-untyped-def]
    """Compute the vector ((x - s) - m) * r * w + b at i; s, m and r are vectors."""
    t = mul(sub(sub(load(x, i), s), m), r)
    if has_w and has_b:
        return fma(t, load(w, i), load(b, i))
    if has_w:
        return mul(t, load(w, i))
    return add(t, load(b, i)) if has_b else t


@inner
def before_line(y, n):  # type: ignore[no-untyped-def]
    """Elements of y before the first whole vector of a cache line, or of half of one."""
    bytes_of_vector = lanes(y) * size_of(y)
    return (-address(y) & (bytes_of_vector - 1)) // size_of(y) if n >= PEELED else 0


@inner
def apply_row(x, y, n, w, b, wide_s, wide_m, wide_r, has_w, has_b, past):  # type: ignore[no-untyped-def]
    """Write ((x - s) - m) * r * w + b to y, n elements, past the caches or not; y may be x."""
    step = lanes(x)
    s = like(x, wide_s + wide_m)  # the mean to x's precision, and what that leaves over
    m, r = like(x, (wide_s - float(s)) + wide_m), like(x, wide_r)
    if n < step:
        for i in range(n):
            t = ((item(x, i) - s) - m) * r
            if has_w:
                t *= w[i]
            if has_b:
                t += b[i]
            put(y, i, t)
        return
    vs, vm, vr = splat(x, s), splat(x, m), splat(x, r)
    # The last vector overlaps the one before it, so it is computed first, for the case y is x; the
    # first one too where the others begin on a line of y.
    last = _scaled(x, w, b, n - step, vs, vm, vr, has_w, has_b)
    head = before_line(y, n)
    first = last
    if head:
        first = _scaled(x, w, b, 0, vs, vm, vr, has_w, has_b)
    if past and n >= PEELED:
        for i in range(head, n - step + 1, step):
            store_past(y, i, _scaled(x, w, b, i, vs, vm, vr, has_w, has_b))
        # Nothing twice: a line that went past the caches would be read back into them.
        store_first(y, 0, head, first)
        store_last(y, n - step, (n - head) % step, last)
        return
    for i in range(head, n - step + 1, step):
        store(y, i, _scaled(x, w, b, i, vs, vm, vr, has_w, has_b))
    if head:
        store(y, 0, first)
    store(y, n - step, last)


@inner
def merge(parts, N):  # type: ignore[no-untyped-def]
    """Merge s, mean - s and variance of the chunks in their order; the tree goes by N alone."""
    s = parts[0]
    m = v = top = least = 0.0
    for c in range(chunks_of(N)):
        share = min(CHUNK, N - c * CHUNK) / N
        m += share * ((parts[3 * c] - s) + parts[3 * c + 1])
    for c in range(chunks_of(N)):
        share = min(CHUNK, N - c * CHUNK) / N
        away = ((parts[3 * c] - s) + parts[3 * c + 1]) - m
        v += share * (parts[3 * c + 2] + away * away)
        root = -parts[3 * c + 2]  # if it is one
        least = -root if -root < least else least
        root = root if root > 0 else math.sqrt(-root)
        away = -away if away < 0 else away
        top = away if away > top else top
        top = root if root > top else top
    if (least == 0 and v < math.inf) or not 0 < top < math.inf:
        return s, m, v
    v = 0.0
    for c in range(chunks_of(N)):
        share = min(CHUNK, N - c * CHUNK) / N
        away = (((parts[3 * c] - s) + parts[3 * c + 1]) - m) / top
        root = -parts[3 * c + 2]
        root = (root if root > 0 else math.sqrt(-root)) / top
        v += share * (root * root + away * away)
    return s, m, -top * math.sqrt(v)


@inner
def short_rows(p, xp, q, yp, M, N, w, b, rule, told, stats, group):  # type: ignore[no-untyped-def]
    """Normalize M rows of at most CHUNK elements at p, pitch xp, into those at q, pitch yp.

    ``rule`` is eps, the range of variances that need no second look, functions, which are types to
    the compiler: `pivot` and `moments`, or `origin` and `squares`, whether y goes past the caches,
    and what brings rows.
    w, b and the pointers in ``told`` may be null: mean and rstd, the index there of the first row,
    and the step to the next. ``stats`` points to three numbers for each row of a group.
    """
    mean, rstd, at, step = told
    s, m, r = stats, advance(stats, group), advance(stats, 2 * group)
    has_w, has_b = address(w) != 0, address(b) != 0
    for row in range(0, M, group):
        n, x, y = min(group, M - row), advance(p, row * xp), advance(q, row * yp)
        # Phase by phase over a group of rows: alone, each row would wait for its own divisions and
        # square root, which take longer than 64 elements.
        for k in range(n):
            s[k] = rule[3](advance(x, k * xp), N)
        least = 0.0
        for k in range(n):
            s[k], m[k], r[k] = rule[4](advance(x, k * xp), N, s[k], rule[1], rule[2])
            least = r[k] if r[k] < least else least
        if least < 0:
            for k in range(n):
                r[k] = rstd_of(r[k], rule[0])
        else:  # in vectors
            for k in range(n):
                r[k] = 1.0 / math.sqrt(r[k] + rule[0])
        for k in range(n):
            to = advance(y, k * yp)
            apply_row(advance(x, k * xp), to, N, w, b, s[k], m[k], r[k], has_w, has_b, rule[5])
        if address(mean) != 0:
            for k in range(n):
                put(mean, at + (row + k) * step, like(mean, s[k] + m[k]))
        if address(rstd) != 0:
            for k in range(n):
                put(rstd, at + (row + k) * step, like(rstd, r[k]))


@inner
def row_moments(p, n, rule, parts):  # type: ignore[no-untyped-def]
    """Moments of the chunks of n elements at p, into three numbers for each at ``parts``."""
    for c in range(chunks_of(n)):
        size, x = min(CHUNK, n - c * CHUNK), advance(p, c * CHUNK)
        s, m, v = rule[4](x, size, rule[3](x, size), rule[1], rule[2])
        parts[3 * c], parts[3 * c + 1], parts[3 * c + 2] = s, m, v


@inner
def row_results(p, q, n, w, b, s, m, r, past):  # type: ignore[no-untyped-def]
    """Write n elements of one row, chunk by chunk."""
    has_w, has_b = address(w) != 0, address(b) != 0
    for c in range(0, n, CHUNK):
        size = min(CHUNK, n - c)
        x, y, wc, bc = advance(p, c), advance(q, c), advance(w, c), advance(b, c)
        apply_row(x, y, size, wc, bc, s, m, r, has_w, has_b, past)


@inner
def finish_row(parts, N, eps, told, row):  # type: ignore[no-untyped-def]
    """Merge the chunks of a row: s, mean - s and rstd, which are told where that is wanted."""
    mean, rstd, at, step = told
    s, m, v = merge(parts, N)
    r = rstd_of(v, eps)
    if address(mean) != 0:
        put(mean, at + row * step, like(mean, s + m))
    if address(rstd) != 0:
        put(rstd, at + row * step, like(rstd, r))
    return s, m, r


@inner
def known_moments(x, N, rule, told, parts, known):  # type: ignore[no-untyped-def]
    """Moments of those of N values that are not NaN: as if they were all of the row.

    ``known`` has room for N.
    """
    count = 0
    for i in range(N):
        value = item(x, i)
        known[count] = value
        count += 1 if value == value else 0
    if count == 0:  # of nothing; what is left of the row is NaN
        return 0.0, 0.0, 0.0
    row_moments(known, count, rule, parts)
    return finish_row(parts, count, rule[0], told, 0)


@inner
def long_rows(p, xp, q, yp, M, N, w, b, rule, told, parts):  # type: ignore[no-untyped-def]
    """As `short_rows`, for more than CHUNK elements; ``parts``: as for `row_moments`."""
    for row in range(M):
        row_moments(advance(p, row * xp), N, rule, parts)
        s, m, r = finish_row(parts, N, rule[0], told, row)
        row_results(advance(p, row * xp), advance(q, row * yp), N, w, b, s, m, r, rule[5])


@inner
def in_step(a, q, M, N, room):  # type: ignore[no-untyped-def]
    """Give weight or bias as it is, or where M rows pay for it a copy that meets lines as q does.

    NumPy's arrays begin 16 bytes past a line, so that every vector of them lies across two: see
    apply_row, which begins on a line of y. ``room`` has space for N elements and SPARE more.
    """
    phase = -before_line(q, N) * size_of(a) & (LINE - 1)
    if M < _REPAYS or address(a) == 0 or address(a) & (LINE - 1) == phase:
        return a
    here = typed(room, a)
    copy = advance(here, ((phase - address(here)) & (LINE - 1)) // size_of(a))
    for i in range(N):
        copy[i] = a[i]
    return copy


@inner
def dense_rows(p, q, M, N, wb, rule, told, group, work):  # type: ignore[no-untyped-def]
    """As `short_rows`, of rows that follow each other; ``work`` has room for all beside them.

    It is an argument because numba frees an array after its last use, pointers or not.
    """
    stats = pointer(work, 0)
    w_room = advance(stats, 3 * group)
    w = in_step(wb[0], q, M, N, w_room)
    b = in_step(wb[1], q, M, N, advance(w_room, N + SPARE))
    short_rows(p, N, q, N, M, N, w, b, rule, told, stats, group)
