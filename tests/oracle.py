"""Layer norm as the definition says it, in the widest floats NumPy has; knows nothing of cupynorm.

Every test compares with this. The statistics are two-pass in `numpy.longdouble` (64 bits of
mantissa on x86, 53 where the compiler has no more), and the mean is corrected by the mean of what
it leaves over, so that a common offset of 1e12 times the deviation costs no digit of float64.
"""

import math

import numpy as np

# What each path may compute its statistics in, by x's dtype.
_COMPUTE_EPS = {"float64": 2.0**-52}
_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def layer_norm(x, axes, weight, bias, eps):
    """y, mean and rstd in float64, mean and rstd with length 1 on axes."""
    axes = tuple(sorted(a % np.ndim(x) for a in axes))
    with np.errstate(all="ignore"):  # Inf, NaN and negative var + eps are legal rows
        wide = np.asarray(x).astype(np.float64).astype(np.longdouble)
        mean = wide.mean(axis=axes, keepdims=True)
        d = wide - mean
        lack = d.mean(axis=axes, keepdims=True)
        # Not wide - (mean + lack): that sum rounds, by 5e-8 for a float64 x near 1e12.
        mean, d = mean + lack, d - lack
        rstd = 1 / np.sqrt((d * d).mean(axis=axes, keepdims=True) + np.longdouble(eps))
        y = d * rstd
        shape = [n if a in axes else 1 for a, n in enumerate(wide.shape)]
        if weight is not None:
            y = y * np.asarray(weight).astype(np.float64).reshape(shape)
        if bias is not None:
            y = y + np.asarray(bias).astype(np.float64).reshape(shape)
        return tuple(a.astype(np.float64) for a in (y, mean, rstd))


def layer_norm_backward(dy, x, axes, weight, eps):
    """dx, dweight and dbias in float64; the latter two have the shape of the normalized axes."""
    axes = tuple(sorted(a % np.ndim(x) for a in axes))
    with np.errstate(all="ignore"):
        wide = np.asarray(x).astype(np.float64).astype(np.longdouble)
        slope = np.asarray(dy).astype(np.float64).astype(np.longdouble)
        d = wide - wide.mean(axis=axes, keepdims=True)
        d = d - d.mean(axis=axes, keepdims=True)
        rstd = 1 / np.sqrt((d * d).mean(axis=axes, keepdims=True) + np.longdouble(eps))
        x_hat, g = d * rstd, slope
        if weight is not None:
            shape = [n if a in axes else 1 for a, n in enumerate(wide.shape)]
            g = slope * np.asarray(weight).astype(np.float64).reshape(shape)
        c1 = g.mean(axis=axes, keepdims=True)
        c2 = (g * x_hat).mean(axis=axes, keepdims=True)
        batch = tuple(a for a in range(wide.ndim) if a not in axes)
        sums = ((slope * x_hat).sum(axis=batch), slope.sum(axis=batch))
        return tuple(a.astype(np.float64) for a in (rstd * (g - c1 - x_hat * c2), *sums))


def tolerance(dtype, N):
    """The one bound, relative and absolute alike, on y with weight and bias of order 1.

    One epsilon of y's dtype for its rounding and that of the last operations, and of the dtype
    that statistics are computed in (float32, float64 for float64 x) one for each of four
    operations on an element and for each level of a tree that sums N terms.
    """
    name = str(np.dtype(dtype))
    return _EPS[name] + _COMPUTE_EPS.get(name, 2.0**-23) * (4 + math.log2(max(N, 1)))
