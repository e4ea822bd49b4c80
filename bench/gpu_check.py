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
# to 16 bits once, by half a unit. A peer may carry a long chain of float32 sums: that is its own
# affair, and stands in its own `error` column, up to 1e-3.
OURS = {"float16": 1.0, "bfloat16": 1.0, "float32": 8.0, "float64": 16.0}
PEERS = {"float16": 8.0, "bfloat16": 8.0, "float32": 8192.0, "float64": 2.0**20}


def limit(dtype: str, ours: bool) -> float:
    """Largest error that passes."""
    return OURS[dtype] if ours else PEERS[dtype]


def widened(xp: Any, a: Any) -> Any:
    """float64 values of any of the four dtypes; bfloat16 by its bits."""
    if str(a.dtype) == "bfloat16":
        bits = xp.ascontiguousarray(a.view("uint16")).astype("uint32") << 16
        a = bits.view("float32")
    return a.astype("float64")


def largest_error(xp: Any, x: Any, weight: Any, bias: Any, y: Any, eps: float = EPS) -> float:
    """Largest |y - expected| in units of epsilon(dtype) * max(1, |x_hat * weight|, |bias|).

    NaN if any element is. The unit is the size of the terms and not of y, because a sum that
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
        d -= d.mean(axis=1, keepdims=True)
        d -= d.mean(axis=1, keepdims=True)  # what rounding left of the mean
        scaled = d / xp.sqrt((d * d).mean(axis=1, keepdims=True) + eps) * w
        off = xp.abs(widened(xp, y[begin : begin + step]) - (scaled + b))
        part = float((off / xp.maximum(xp.maximum(xp.abs(scaled), abs(b)), 1.0)).max()) / epsilon
        worst = part if np.isnan(part) else max(worst, part)
        if np.isnan(worst):
            return worst
    return worst
