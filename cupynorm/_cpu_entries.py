"""Compiled loops over rows at raw addresses: an integer costs a call a quarter of an array."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, from_dtype, types
from numba.extending import intrinsic

from cupynorm import _cpu_numba
from cupynorm._cpu_bwd_rows import block_count, merge_sums, share_rows, sums_pitch
from cupynorm._cpu_lanes import claim
from cupynorm._cpu_loops import CHUNK, GROUP, compiled
from cupynorm._cpu_rows import long_rows, short_rows

__all__ = ["at", "backward", "built", "forward", "merge", "seen", "small", "sums_size"]

# What the memory of x holds and what loops compute in; the 16-bit kinds share their code.
_TYPES = {
    "float16": (np.uint16, np.float32),
    "bfloat16": (np.uint16, np.float32),
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
}
_ready: dict[Any, Any] = {}


@intrinsic
def at(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """Take an integer for the address of elements of dtype."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(address, dtype), codegen


@compiled()
def seen(address, size, dtype):  # type: ignore[no-untyped-def]
    """View the elements at an address as a row, or an empty one where the address is 0."""
    return carray(at(address, dtype), (size if address else 0,))


# The functions that are called close over ``sources``, as those of _cpu_numba do and for the same
# reason: numba's cache looks at the time stamp of this file alone.


def _define_forward(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def forward(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16, counter, count):  # type: ignore[no-untyped-def]
        p, q = seen(x, M * N, stored), seen(y, M * N, stored)
        wp, bp = seen(w, N, computed), seen(b, N, computed)
        m, r = seen(mean, M, computed), seen(rstd, M, computed)
        tickets, half = seen(counter, 1, np.int64), bfloat16 != 0
        group = max(1, min(M, GROUP // N))
        room = np.empty(min(CHUNK, group * N) * (sources != 0), np.float32)
        stats = np.empty((3, group))
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3))
        block, blocks = 0, 1
        if count > 0:
            block, blocks = claim(tickets), count
        while block < blocks:
            lo, hi = M * block // blocks, M * (block + 1) // blocks
            if N <= CHUNK:
                short_rows(p, N, q, N, lo, hi, N, wp, bp, eps, low, high, m, r, half, room, stats)
            else:
                long_rows(p, N, q, N, lo, hi, N, wp, bp, eps, low, high, m, r, half, room, parts)
            block = claim(tickets) if count > 0 else 1

    return forward  # type: ignore[no-any-return]


@compiled()
def _clash(other, size, y, count):  # type: ignore[no-untyped-def]
    """Whether `size` bytes at one address and `count` at another have one in common."""
    return size > 0 and other < y + count and y < other + size


def _define_small(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def small(x, y, w, b, eps, low, high, bfloat16):  # type: ignore[no-untyped-def]
        M, N = x.shape
        source, to, size = x.ctypes.data, y.ctypes.data, y.size * y.itemsize
        if source != to and _clash(source, size, to, size):
            return 1
        for a in (w, b):
            if _clash(a.ctypes.data, a.size * a.itemsize, to, size):
                return 1
        group = max(1, min(M, GROUP // N))
        room = np.empty(min(CHUNK, group * N) * (sources != 0), np.float32)
        stats, none, half = np.empty((3, group)), np.empty(0, computed), bfloat16 != 0
        p, q = x.reshape(M * N), y.reshape(M * N)
        short_rows(p, N, q, N, 0, M, N, w, b, eps, low, high, none, none, half, room, stats)
        return 0

    return small  # type: ignore[no-any-return]


@compiled()
def _size(M, N):  # type: ignore[no-untyped-def]
    return 2 * block_count(M) * sums_pitch(N)


@compiled()
def _merge(sums, M, N, dweight, dbias):  # type: ignore[no-untyped-def]
    if sums.size:
        totals = np.empty(2 * N)
        merge_sums(sums, block_count(M), N, totals)
        for i in range(dweight.size):
            dweight[i] = totals[i]
        for i in range(dbias.size):
            dbias[i] = totals[N + i]


def _define_backward(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def backward(dy, x, dx, M, N, mean, rstd, w, dweight, dbias, bfloat16, sums, counter):  # type: ignore[no-untyped-def]
        p, q = seen(dy, M * N, stored), seen(x, M * N, stored)
        t, wp = seen(dx, M * N, stored), seen(w, N, computed)
        m, r = seen(mean, M, computed), seen(rstd, M, computed)
        dw, db, half = seen(dweight, N, computed), seen(dbias, N, computed), bfloat16 != 0
        size = _size(M, N) * (sources != 0)
        if counter:
            tickets, part = seen(counter, 1, np.int64), seen(sums, size, computed)
            share_rows(p, N, q, N, t, N, M, N, wp, m, r, part, half, tickets)
        else:
            own = np.empty(size if dweight or dbias else 0, computed)
            share_rows(p, N, q, N, t, N, M, N, wp, m, r, own, half, np.zeros(1, np.int64))
            _merge(own, M, N, dw, db)

    return backward  # type: ignore[no-any-return]


def _define_merge(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def merge(sums, M, N, dweight, dbias):  # type: ignore[no-untyped-def]
        size = _size(M, N) * (sources != 0)
        dw, db = seen(dweight, N, computed), seen(dbias, N, computed)
        _merge(seen(sums, size, computed), M, N, dw, db)

    return merge  # type: ignore[no-any-return]


def _define_size(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def size(M, N):  # type: ignore[no-untyped-def]
        return _size(M, N) * (sources != 0)

    return size  # type: ignore[no-any-return]


def built(define: Callable[..., Any], letters: str, kind: str = "float32") -> Any:
    """Compile for a kind, or load what an earlier process kept.

    Letters of the arguments: i an int64, f a float64, m rows of x's memory, r a row for sums.
    """
    stored, computed = _TYPES[kind]
    key = define, stored
    if key not in _ready:
        result = types.int64 if define in (_define_size, _define_small) else types.void
        letter = {"i": types.int64, "f": types.float64}
        letter["m"] = types.Array(from_dtype(np.dtype(stored)), 2, "C")
        letter["r"] = types.Array(from_dtype(np.dtype(computed)), 1, "C")
        signature = result(*(letter[c] for c in letters))
        try:
            jit = compiled(signature_or_function=signature, cache=True)
            _ready[key] = define(_cpu_numba._sources(), jit, stored, computed)
        except (RuntimeError, OSError):  # no directory to keep compiled code in, or it is full
            jit = compiled(signature_or_function=signature)
            _ready[key] = define(1, jit, stored, computed)
    return _ready[key]


def forward(kind: str) -> Callable[..., None]:
    """Forward over contiguous rows, all arguments numbers; the first call per kind compiles.

    ``forward(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16, counter, count)``: addresses
    of what is absent are 0; ``count`` 0 does all rows, else those blocks of ``count`` that the
    calls with one ``counter`` claim among them.
    """
    return built(_define_forward, "iiiiiifffiiiii", kind)  # type: ignore[no-any-return]


def small(kind: str) -> Callable[..., int]:
    """Forward over contiguous rows of at most CHUNK elements on one thread, for NumPy arrays.

    ``small(x, y, w, b, eps, low, high, bfloat16)``: x and y (M, N) hold 16-bit kinds as uint16; an
    absent w or b is empty. The result is 1, and nothing has been done, where y shares memory with
    w, b or a part of x, else 0. Four arrays cost a call less than the fourteen numbers of
    forward() and the looks at four addresses before it.
    """
    return built(_define_small, "mmrrfffi", kind)  # type: ignore[no-any-return]


def backward(kind: str) -> Callable[..., None]:
    """Backward over contiguous rows of at most ``_cpu_bwd_rows.LONGEST`` elements.

    ``backward(dy, x, dx, M, N, mean, rstd, w, dweight, dbias, bfloat16, sums, counter)``: with
    ``counter`` 0 it does all; else those blocks of rows that the calls with one counter claim among
    them, whose column sums stay in ``sums``, if that is not 0, for merge().
    """
    return built(_define_backward, "iiiiiiiiiiiii", kind)  # type: ignore[no-any-return]


def merge(kind: str) -> Callable[..., None]:
    """``merge(sums, M, N, dweight, dbias)`` after backward() with a counter."""
    return built(_define_merge, "iiiii", kind)  # type: ignore[no-any-return]


def sums_size(M: int, N: int) -> int:
    """Elements of the column sums that backward() with a counter leaves."""
    return built(_define_size, "ii")(M, N)  # type: ignore[no-any-return]
