"""ADAPTER, to be deleted when `dask` no longer takes it.

float16 and bfloat16 to float32 and back on whole NumPy blocks, through their bits.
"""

from typing import Any

import numpy as np

__all__ = ["narrow", "round_into", "widen"]

Array = np.ndarray[Any, Any]

# NumPy's own float16 casts run one element at a time in its wheels (2 to 5 ns each), and
# ml_dtypes' bfloat16 casts likewise; integer arithmetic on blocks in the cache is vectorized.

_BIAS = np.float32(2.0**112)  # between the exponents of float32 (127) and float16 (15)
_HALF = np.float32(0.5)  # its ulp is float16's smallest subnormal


def widen(kind: str, x: Array) -> Array:
    """Float32 values of a block of float16 or bfloat16 bits; other blocks pass as they are."""
    if kind == "bfloat16":
        bits = x.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if kind != "float16":
        return x
    signed = x.view(np.int16).astype(np.int32)
    signed <<= 13  # keeps the sign on top, with copies of it in bits 28 to 30
    signed &= np.int32(-0x70002000)
    values = signed.view(np.float32)
    values *= _BIAS
    special = np.abs(values) >= np.float32(65536.0)
    if special.any():  # exponent 31: Inf and NaN
        signed[special] |= np.int32(0x7F800000)
    return values


def narrow(kind: str, values: Array, y: Array) -> None:
    """Round float32 values to nearest, ties to even, into y's bits; values are spoiled."""
    if kind == "bfloat16":
        nan = values != values
        bits = values.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        odd += bits
        odd >>= 16
        np.copyto(y, odd, casting="unsafe")
        if nan.any():
            y[nan] = 0x7FC0
    elif kind == "float16":
        _narrow_float16(values, y)


def _narrow_float16(values: Array, y: Array) -> None:
    bits = values.view(np.uint32)
    sign = (bits >> 16) & np.uint32(0x8000)
    np.abs(values, out=values)
    small = values < np.float32(2.0**-14)
    huge = ~(values < np.float32(65520.0))  # rounds to Inf, or is NaN
    tiny = (values[small] + _HALF).view(np.uint32) - np.uint32(0x3F000000) if small.any() else None
    big = values[huge] if huge.any() else None
    odd = bits >> 13
    odd &= 1
    odd += np.uint32(0xFFF)
    odd -= np.uint32(112 << 23)
    odd += bits
    odd >>= 13
    if tiny is not None:
        odd[small] = tiny
    if big is not None:
        odd[huge] = np.where(big != big, np.uint32(0x7E00), np.uint32(0x7C00))
    odd |= sign
    np.copyto(y, odd, casting="unsafe")


def round_into(values: Array, y: Array) -> None:  # values: (N,) float64; y: N, C-contiguous
    """Round float64 values once into y, of any of the four dtypes."""
    if values.shape != y.shape:
        values = values.reshape(y.shape)
    with np.errstate(all="ignore"):
        if y.dtype.char in "efd":
            np.copyto(y, values, casting="same_kind")
            return
        # To float32 first, towards odd: what is cut off must not look like half of a last digit.
        single = values.astype(np.float32)
        near = single.astype(np.float64)
        beyond = np.abs(near) > np.abs(values)
        bits = np.where(beyond, np.nextafter(single, np.float32(0)), single).view(np.uint32)
        bits |= near != values
        native = y.view(np.dtype(np.uint16).newbyteorder(y.dtype.byteorder))
        narrow("bfloat16", bits.view(np.float32), native)
