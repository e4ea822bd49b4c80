"""The check that precedes every number: float64, two passes, on the very bits that were normalized.

Independent of the package; the same lines run on NumPy and on CuPy.
"""

from typing import Any

import numpy as np

__all__ = ["EPS", "largest_error", "limit", "widened"]

EPS = 1e-5
BLOCK = 2**25  # elements that are widened at a time

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

# In units of epsilon(dtype) times the size of what is added up. Ours rounds a handful of times, and
# to 16 bits once, by half a unit.
OURS = {"float16": 0.75, "bfloat16": 0.75, "float32": 8.0, "float64": 16.0}
PEERS_16_BIT = 3.0  # they may round x_hat before the product, and the product before the sum
CHAIN, MOST = 128, 8192.0  # and sum up N / 128 float32 numbers one after the other


def limit(dtype: str, N: int, ours: bool) -> float:
    """Largest error that passes; a peer's own inaccuracy stands in its `error` column."""
    if ours:
        return OURS[dtype]
    return PEERS_16_BIT if dtype.endswith("16") else min(MOST, 16.0 + N / CHAIN)


def widened(xp: Any, a: Any) -> Any:
    """float64 values of any of the four dtypes; bfloat16 by its bits."""
    if str(a.dtype) == "bfloat16":
        bits = xp.ascontiguousarray(a.view("uint16")).astype("uint32") << 16
        a = bits.view("float32")
    return a.astype("float64")


def row_means(a: Any) -> Any:
    """Means (rows, 1); of long rows by 1024 equal parts, since CuPy gives each sum one block."""
    rows, N = a.shape
    if N >= 2**20 and N % 1024 == 0:
        a = a.reshape(rows, 1024, N // 1024).mean(axis=2)
    return a.mean(axis=1, keepdims=True)


def max_one(xp: Any, b: Any) -> Any:
    """At least 1, and at least |b|."""
    return 1.0 if isinstance(b, float) else xp.maximum(xp.abs(b), 1.0)


def largest_error(xp: Any, x: Any, weight: Any, bias: Any, y: Any, eps: float = EPS) -> float:
    """Largest |y - expected| in units of epsilon(dtype) * max(1, |y|, |x_hat * weight|, |bias|).

    NaN if any element is. The unit has the terms' size and not y's alone, because a sum that
    cancels cannot be more exact than its terms.

    Parameters
    ----------
    xp : module
        NumPy or CuPy, whose arrays all the others are.
    x, y : array, (rows, N)
    weight, bias : array, (N,), or None
    """
    epsilon = EPSILON[str(y.dtype)]
    rows, N = x.shape
    w = 1.0 if weight is None else widened(xp, weight)
    b = 0.0 if bias is None else widened(xp, bias)
    worst = 0.0
    step = max(1, BLOCK // N)
    for begin in range(0, rows, step):
        d = widened(xp, x[begin : begin + step])
        d -= row_means(d)
        d -= row_means(d)  # what rounding left of the mean
        scaled = d / xp.sqrt(row_means(d * d) + eps) * w
        expected = scaled + b
        off = xp.abs(widened(xp, y[begin : begin + step]) - expected)
        unit = xp.maximum(xp.maximum(xp.abs(scaled), xp.abs(expected)), max_one(xp, b))
        part = float((off / unit).max()) / epsilon
        worst = part if np.isnan(part) else max(worst, part)
        if np.isnan(worst):
            return worst
    return worst
