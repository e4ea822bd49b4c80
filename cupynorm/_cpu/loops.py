"""The inner loops of layer norm on contiguous rows, for numba to compile."""

from collections.abc import Callable
from typing import Any

import numba

from cupynorm._cpu.lanes import (
    add,
    fma,
    fold,
    keep_last,
    lanes,
    load,
    mul,
    splat,
    store,
    store_past,
    sub,
)
from cupynorm._cpu.pointers import address, advance, claim, item, like, put, size_of

__all__ = [
    "CHUNK",
    "FROM_MEMORY",
    "GROUP",
    "LINE",
    "PEELED",
    "apply_row",
    "before_line",
    "compiled",
    "merge",
    "moments",
    "pivot",
    "take_block",
]

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
# Elements of a row whose results are written from a line on: every vector across two lines costs
# two accesses, of x, y, weight and bias alike. A shorter row loses more to the vector before it.
PEELED = 256


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile for use inside other loops. Without fastmath: no sum is reordered, no fma fused."""
    return numba.njit(nogil=True, error_model="numpy", **options)  # type: ignore[no-any-return]


@compiled()
def take_block(counters, who, count):  # type: ignore[no-untyped-def]
    """Claim one of ``count`` blocks for thread ``who``; -1 when none is left.

    Each thread has a part of the blocks, with a counter on a cache line of its own, and takes from
    the others' when it is through with it: so the thread that did a block in the last call, whose
    caches may hold it, most often does it again.
    """
    parts = max(1, counters.size // 8)
    for k in range(parts):
        part = (who + k) % parts
        block = count * part // parts + claim(counters[8 * part :])
        if block < count * (part + 1) // parts:
            return block
    return -1


@compiled()
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


@compiled()
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
        t = sub(load(x, i), shift)
        u = sub(load(x, i + step), shift)
        a, aa = add(a, t), fma(t, t, aa)
        b, bb = add(b, u), fma(u, u, bb)
        t = sub(load(x, i + 2 * step), shift)
        u = sub(load(x, i + 3 * step), shift)
        a, cc = add(a, t), fma(t, t, cc)
        b, dd = add(b, u), fma(u, u, dd)
        i += 4 * step
    while i + step <= n:
        t = sub(load(x, i), shift)
        a, aa = add(a, t), fma(t, t, aa)
        i += step
    if i < n:
        t = keep_last(sub(load(x, n - step), shift), n - i)
        b, bb = add(b, t), fma(t, t, bb)
    return fold(add(a, b)), fold(add(add(aa, bb), add(cc, dd)))


@compiled()
def _wide_sums(x, n, s):  # type: ignore[no-untyped-def]
    # float64, terms scaled by 1/n: a row near the maximum must not overflow its own sum
    share = 1.0 / n
    first = 0.0
    second = 0.0
    for i in range(n):
        d = float(item(x, i)) - s
        first += d * share
        second += (d * share) * d
    return first, second


@compiled()
def _about(x, n, s):  # type: ignore[no-untyped-def]
    """Mean of x - s and of its square, in float64."""
    m = 0.0
    v = 0.0
    for lo in range(0, n, _PIECE):
        first, second = _sums(advance(x, lo), min(_PIECE, n - lo), s)
        m += first
        v += second
    return m / n, v / n


@compiled()
def pivot(x, n):  # type: ignore[no-untyped-def]
    """A value near the mean of the n elements at x."""
    sample = min(n, _SAMPLE)
    return _sum(x, sample) / sample


@compiled()
def moments(x, n, near, low, high):  # type: ignore[no-untyped-def]
    """Return s, mean(x - s) and the variance, with s = near if that is near enough."""
    s = like(x, near)
    m, v = _about(x, n, s)
    if m * m > 0.5 * v:  # the pivot is farther from the mean than the values are
        s = like(x, s + m)
        m, v = _about(x, n, s)
    if low < v < high:
        return float(s), m, v - m * m
    mean, _ = _wide_sums(x, n, 0.0)  # float32 sums overflow, or vanish beside eps
    s = like(x, mean)
    m, v = _wide_sums(x, n, float(s))
    return float(s), m, v - m * m


@compiled()
def _scaled(x, w, b, i, s, m, r, has_w, has_b):  # type: ignore[no-untyped-def]
    """Compute the vector ((x - s) - m) * r * w + b at i; s, m and r are vectors."""
    t = mul(sub(sub(load(x, i), s), m), r)
    if has_w and has_b:
        return fma(t, load(w, i), load(b, i))
    if has_w:
        return mul(t, load(w, i))
    return add(t, load(b, i)) if has_b else t


@compiled()
def before_line(y, n):  # type: ignore[no-untyped-def]
    """Elements of y before the first whole vector of a cache line, or of half of one."""
    bytes_of_vector = lanes(y) * size_of(y)
    return (-address(y) & (bytes_of_vector - 1)) // size_of(y) if n >= PEELED else 0


@compiled()
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
    else:
        for i in range(head, n - step + 1, step):
            store(y, i, _scaled(x, w, b, i, vs, vm, vr, has_w, has_b))
    if head:
        store(y, 0, first)
    store(y, n - step, last)


@compiled()
def merge(parts, N):  # type: ignore[no-untyped-def]
    """Merge s, mean - s and variance of the chunks in their order; the tree goes by N alone."""
    s = parts[0, 0]
    m = 0.0
    for c in range(parts.shape[0]):
        share = min(CHUNK, N - c * CHUNK) / N
        m += share * ((parts[c, 0] - s) + parts[c, 1])
    v = 0.0
    for c in range(parts.shape[0]):
        share = min(CHUNK, N - c * CHUNK) / N
        away = ((parts[c, 0] - s) + parts[c, 1]) - m
        v += share * (parts[c, 2] + away * away)
    return s, m, v
