"""Compiled loops over contiguous rows, to call with numbers: one costs a quarter of an array."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu.bwd_rows import block_count, merge_sums, share_rows, sums_pitch
from cupynorm._cpu.kept import built, seen
from cupynorm._cpu.loops import compiled
from cupynorm._cpu.rows import normalize_rows, rooms, short_rows

__all__ = [
    "backward",
    "clash",
    "forward",
    "merge",
    "merge_into",
    "merge_wide",
    "overlap",
    "size_of_sums",
    "small",
    "small_with_stats",
    "sums_size",
]


def _define_forward(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def forward(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16):  # type: ignore[no-untyped-def]
        p, q = seen(x, M * N, stored), seen(y, M * N, stored)
        wp, bp = seen(w, N, computed), seen(b, N, computed)
        m, r = seen(mean, M, computed), seen(rstd, M, computed)
        end = M * (sources != 0)
        normalize_rows(
            p, N, q, N, 0, end, N, wp, bp, eps, low, high, m, r, bfloat16 != 0, rooms(M, N)
        )

    return forward  # type: ignore[no-any-return]


@compiled()
def _meet(other, y):  # type: ignore[no-untyped-def]
    first, to = other.ctypes.data, y.ctypes.data
    end, last = first + other.size * other.itemsize, to + y.size * y.itemsize
    return other.size > 0 and first < last and to < end


@compiled()
def clash(x, y, w, b):  # type: ignore[no-untyped-def]
    """Whether y shares memory with w, with b, or with x but is not x."""
    if x.ctypes.data != y.ctypes.data and _meet(x, y):
        return True
    return _meet(w, y) or _meet(b, y)


def _define_small(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def small(x, y, w, b, eps, low, high, bfloat16):  # type: ignore[no-untyped-def]
        M, N = x.shape
        if clash(x, y, w, b):
            return 1
        none, half = np.empty(0, computed), bfloat16 != 0
        p, q, end = x.reshape(M * N), y.reshape(M * N), M * (sources != 0)
        scratch, stats, _ = rooms(M, N)
        short_rows(p, N, q, N, 0, end, N, w, b, eps, low, high, none, none, half, scratch, stats)
        return 0

    return small  # type: ignore[no-any-return]


def _define_small_with_stats(
    sources: int, jit: Any, stored: Any, computed: Any
) -> Callable[..., int]:
    @jit
    def small_with_stats(x, y, w, b, eps, low, high, bfloat16, mean, rstd):  # type: ignore[no-untyped-def]
        M, N = x.shape
        if clash(x, y, w, b):
            return 1
        p, q, end, half = x.reshape(M * N), y.reshape(M * N), M * (sources != 0), bfloat16 != 0
        normalize_rows(p, N, q, N, 0, end, N, w, b, eps, low, high, mean, rstd, half, rooms(M, N))
        return 0

    return small_with_stats  # type: ignore[no-any-return]


def _define_overlap(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def overlap(x, y, w, b):  # type: ignore[no-untyped-def]
        return int(clash(x, y, w, b) and sources != 0)

    return overlap  # type: ignore[no-any-return]


@compiled()
def size_of_sums(M, N):  # type: ignore[no-untyped-def]
    """Elements of the column sums of all blocks."""
    return 2 * block_count(M) * sums_pitch(N)


@compiled()
def merge_into(sums, M, N, dweight, dbias):  # type: ignore[no-untyped-def]
    """Add up the column sums of the blocks, if there are any, into rows that may be empty."""
    if sums.size:
        totals = np.empty(2 * N)
        merge_sums(sums, block_count(M), N, totals)
        for i in range(dweight.size):
            dweight[i] = totals[i]
        for i in range(dbias.size):
            dbias[i] = totals[N + i]


def _define_backward(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def backward(dy, x, dx, M, N, mean, rstd, w, dweight, dbias, bfloat16):  # type: ignore[no-untyped-def]
        p, q = seen(dy, M * N, stored), seen(x, M * N, stored)
        t, wp = seen(dx, M * N, stored), seen(w, N, computed)
        m, r = seen(mean, M, computed), seen(rstd, M, computed)
        dw, db, half = seen(dweight, N, computed), seen(dbias, N, computed), bfloat16 != 0
        sums = np.empty(size_of_sums(M, N) * (sources != 0) if dweight or dbias else 0, computed)
        share_rows(p, N, q, N, t, N, M, N, wp, m, r, sums, half, np.zeros(1, np.int64), 0)
        merge_into(sums, M, N, dw, db)

    return backward  # type: ignore[no-any-return]


def _define_merge(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def merge(sums, M, N, dweight, dbias):  # type: ignore[no-untyped-def]
        size = size_of_sums(M, N) * (sources != 0)
        dw, db = seen(dweight, N, computed), seen(dbias, N, computed)
        merge_into(seen(sums, size, computed), M, N, dw, db)

    return merge  # type: ignore[no-any-return]


def _define_merge_wide(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def merge_wide(sums, M, N, totals):  # type: ignore[no-untyped-def]
        part = seen(sums, size_of_sums(M, N) * (sources != 0), computed)
        merge_sums(part, block_count(M), N, seen(totals, 2 * N, np.float64))

    return merge_wide  # type: ignore[no-any-return]


def _define_size(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def size(M, N):  # type: ignore[no-untyped-def]
        return size_of_sums(M, N) * (sources != 0)

    return size  # type: ignore[no-any-return]


def forward(kind: str) -> Callable[..., None]:
    """Forward on one thread, all arguments numbers; the first call per kind compiles.

    ``forward(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16)``: addresses of what is absent
    are 0.
    """
    return built(_define_forward, "viiiiiifffiii", kind)  # type: ignore[no-any-return]


def small(kind: str) -> Callable[..., int]:
    """Forward over contiguous rows of at most CHUNK elements on one thread, for NumPy arrays.

    ``small(x, y, w, b, eps, low, high, bfloat16)``: x and y (M, N) hold 16-bit kinds as uint16; an
    absent w or b is empty. The result is 1, and nothing has been done, where y shares memory with
    w, b or a part of x, else 0. Four arrays cost a call less than the twelve numbers of forward()
    and the looks at four addresses before it.
    """
    return built(_define_small, "immrrfffi", kind)  # type: ignore[no-any-return]


def small_with_stats(kind: str) -> Callable[..., int]:
    """``small_with_stats(x, y, w, b, eps, low, high, bfloat16, mean, rstd)``: rows of any length.

    An absent mean or rstd is empty. The two cost a call 80 ns, and the long rows its first call a
    second of compiling, so small() is not this.
    """
    return built(_define_small_with_stats, "immrrfffirr", kind)  # type: ignore[no-any-return]


def overlap(kind: str) -> Callable[..., int]:
    """``overlap(x, y, w, b)``: whether small() would refuse them."""
    return built(_define_overlap, "immrr", kind)  # type: ignore[no-any-return]


def backward(kind: str) -> Callable[..., None]:
    """Backward on one thread over rows of at most ``_cpu_bwd_rows.LONGEST`` elements.

    ``backward(dy, x, dx, M, N, mean, rstd, w, dweight, dbias, bfloat16)``.
    """
    return built(_define_backward, "viiiiiiiiiii", kind)  # type: ignore[no-any-return]


def merge(kind: str) -> Callable[..., None]:
    """``merge(sums, M, N, dweight, dbias)`` after ``_cpu_bwd_shared.backward``."""
    return built(_define_merge, "viiiii", kind)  # type: ignore[no-any-return]


def merge_wide(kind: str) -> Callable[..., None]:
    """``merge_wide(sums, M, N, totals)``: the same, not yet rounded, totals (2, N) in float64."""
    return built(_define_merge_wide, "viiii", kind)  # type: ignore[no-any-return]


def sums_size(M: int, N: int) -> int:
    """Elements of the column sums that ``_cpu_bwd_shared.backward`` leaves."""
    return built(_define_size, "iii")(M, N)  # type: ignore[no-any-return]
