"""How numba's loops reach the values of an array: in place, or widened from 16 bits and back."""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic, overload

from cupynorm._cpu.lanes import lanes, load, store
from cupynorm._cpu.loops import compiled
from cupynorm._cpu.narrow import F16C, brain, half
from cupynorm._cpu.pointers import advance, item, pointer, put

__all__ = ["give", "place", "take"]

# numba has no float16 or bfloat16 on a CPU, so these arrive as uint16. Integer arithmetic
# on their bits is vectorized on every CPU, where LLVM's own conversion may be a call per element:
# it is used where the CPU has an instruction for it, which halves the time of float16 rows.
_BIAS = np.float32(2.0**112)  # between the exponents of float32 (127) and float16 (15)
_HALF = np.float32(0.5)  # its ulp is float16's smallest subnormal


@intrinsic
def _bits(typingctx, value):  # type: ignore[no-untyped-def]
    """Look at a float32 as its 32 bits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _value(typingctx, bits):  # type: ignore[no-untyped-def]
    """Look at 32 bits as the float32 they are."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@compiled()
def _widen(x, n, out, bfloat16):  # type: ignore[no-untyped-def]
    done = 0
    if bfloat16:
        while done + lanes(out) <= n:
            store(out, done, load(brain(x), done))
            done += lanes(out)
        for i in range(done, n):
            out[i] = item(brain(x), i)
        return
    if F16C:
        while done + lanes(out) <= n:
            store(out, done, load(half(x), done))
            done += lanes(out)
    for i in range(done, n):
        h = np.uint32(x[i])
        bits = np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))
        value = _value(bits) * _BIAS
        bits = _bits(value)
        if value >= np.float32(65536.0):  # exponent 31: Inf or NaN
            bits = np.uint32(bits | np.uint32(0x7F800000))
        bits = np.uint32(bits | ((h & np.uint32(0x8000)) << np.uint32(16)))
        out[i] = _value(bits)


@compiled()
def _narrow(values, n, y, bfloat16):  # type: ignore[no-untyped-def]
    # To nearest, ties to even.
    done = 0
    if bfloat16:
        while done + lanes(values) <= n:
            store(brain(y), done, load(values, done))
            done += lanes(values)
        for i in range(done, n):
            put(brain(y), i, values[i])
        return
    if F16C:
        while done + lanes(values) <= n:
            store(half(y), done, load(values, done))
            done += lanes(values)
    for i in range(done, n):
        bits = _bits(values[i])
        size = np.uint32(bits & np.uint32(0x7FFFFFFF))
        odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd)
        result = np.uint32(normal >> np.uint32(13))
        if size < np.uint32(0x38800000):  # below 2^-14: the addition rounds to a subnormal
            fixed = _value(size) + _HALF
            result = np.uint32(_bits(fixed) - np.uint32(0x3F000000))
        if size >= np.uint32(0x477FF000):  # 65520 and above
            result = np.uint32(0x7C00)
        if size > np.uint32(0x7F800000):
            result = np.uint32(0x7E00)
        y[i] = np.uint16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


def take(*arguments: Any) -> Any:  # x, at, xp, M, N, scratch, bfloat16
    """Give a pointer to M rows of N values from x[at], pitch xp, and the pitch to read by."""
    raise NotImplementedError("compiled only")


def place(*arguments: Any) -> Any:  # y, to, yp, N, scratch
    """Give a pointer to write results for y[to] to, and the pitch to write them with."""
    raise NotImplementedError("compiled only")


def give(*arguments: Any) -> Any:  # y, to, yp, M, N, scratch, bfloat16
    """Bring M rows of N results, written where place() said, into y."""
    raise NotImplementedError("compiled only")


@overload(take)
def _take(x, at, xp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
    def in_place(x, at, xp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
        return pointer(x, at), xp

    def widened(x, at, xp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
        p = pointer(scratch, 0)
        for k in range(M):
            _widen(pointer(x, at + k * xp), N, advance(p, k * N), bfloat16)
        return p, N

    return widened if x.dtype == types.uint16 else in_place


@overload(place)
def _place(y, to, yp, N, scratch):  # type: ignore[no-untyped-def]
    def in_place(y, to, yp, N, scratch):  # type: ignore[no-untyped-def]
        return pointer(y, to), yp

    def widened(y, to, yp, N, scratch):  # type: ignore[no-untyped-def]
        return pointer(scratch, 0), N

    return widened if y.dtype == types.uint16 else in_place


@overload(give)
def _give(y, to, yp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
    def in_place(y, to, yp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
        return

    def narrowed(y, to, yp, M, N, scratch, bfloat16):  # type: ignore[no-untyped-def]
        p = pointer(scratch, 0)
        for k in range(M):
            _narrow(advance(p, k * N), N, pointer(y, to + k * yp), bfloat16)

    return narrowed if y.dtype == types.uint16 else in_place
