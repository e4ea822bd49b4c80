"""Layer and RMS norm as the definitions say them, in the widest floats NumPy has.

It knows nothing of cupynorm. Every test compares with this. The statistics are two-pass in
`numpy.longdouble` (64 bits of mantissa on x86, 53 where the compiler has no more), and the mean is
corrected by the mean of what it leaves over, so that a common offset of 1e12 times the deviation
costs no digit of float64.
"""

import math

import numpy as np

# What each path may compute its statistics in, by x's dtype.
_COMPUTE_EPS = {"float64": 2.0**-52}
# Below it a result may be off by its last bit (float16), or count as zero (float32 on a GPU).
_LEAST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def _standardized(x, axes, eps, center=True):
    """x_hat, mean and rstd in the widest floats, and the axes, counted from 0 and ascending.

    Without a centre the mean is that of nothing, 0.
    """
    axes = tuple(sorted(a % np.ndim(x) for a in axes))
    wide = np.asarray(x).astype(np.float64).astype(np.longdouble)
    if not center:
        rstd = 1 / np.sqrt((wide * wide).mean(axis=axes, keepdims=True) + np.longdouble(eps))
        return wide * rstd, 0 * rstd, rstd, axes
    mean = wide.mean(axis=axes, keepdims=True)
    d = wide - mean
    lack = d.mean(axis=axes, keepdims=True)
    # Not wide - (mean + lack): that sum rounds, by 5e-8 for a float64 x near 1e12.
    mean, d = mean + lack, d - lack
    rstd = 1 / np.sqrt((d * d).mean(axis=axes, keepdims=True) + np.longdouble(eps))
    return d * rstd, mean, rstd, axes


def _along(x, axes, a):
    """Weight or bias, which may be None, with the axes of x."""
    shape = [n if k in axes else 1 for k, n in enumerate(x.shape)]
    return None if a is None else np.asarray(a).astype(np.float64).reshape(shape)


@np.errstate(all="ignore")  # Inf, NaN and negative var + eps are legal rows
def layer_norm(x, axes, weight, bias, eps, center=True):
    """y, mean and rstd in float64, mean and rstd with length 1 on axes; RMS norm without centre."""
    y, mean, rstd, axes = _standardized(x, axes, eps, center)
    if weight is not None:
        y = y * _along(y, axes, weight)
    if bias is not None:
        y = y + _along(y, axes, bias)
    return tuple(a.astype(np.float64) for a in (y, mean, rstd))


@np.errstate(all="ignore")
def layer_norm_backward(dy, x, axes, weight, eps, center=True):
    """dx, dweight and dbias in float64; the latter two have the shape of the normalized axes."""
    slope, g, x_hat, rstd, axes, batch = _backward_terms(dy, x, axes, weight, eps, center)
    c1 = g.mean(axis=axes, keepdims=True) if center else 0
    c2 = (g * x_hat).mean(axis=axes, keepdims=True)
    sums = ((slope * x_hat).sum(axis=batch), slope.sum(axis=batch))
    return tuple(a.astype(np.float64) for a in (rstd * (g - c1 - x_hat * c2), *sums))


@np.errstate(all="ignore")
def gradient_scales(dy, x, axes, weight, eps, center=True):
    """The size of what is added up and cancels on the way to each gradient, in float64.

    An error of x_hat is one of max(1, |x_hat|), because the mean is among its terms. For dx the
    size is that of rstd * (|g| + mean |g| + |x_hat| * mean |g * x_hat|). For dweight and dbias it
    is the root of the sum of the squared terms, because errors of rows have any sign, and the
    total, to which a sum of terms of one sign rises.
    """
    slope, g, x_hat, rstd, axes, batch = _backward_terms(dy, x, axes, weight, eps, center)
    size, g = np.maximum(np.abs(x_hat), 1), np.abs(g)
    c1 = g.mean(axis=axes, keepdims=True)
    c2 = (g * size).mean(axis=axes, keepdims=True)
    sums = (
        np.sqrt(((slope * factor) ** 2).sum(axis=batch)) + np.abs((slope * by).sum(axis=batch))
        for factor, by in ((size, x_hat), (1, 1))
    )
    return tuple(a.astype(np.float64) for a in (rstd * (g + c1 + size * c2), *sums))


def _backward_terms(dy, x, axes, weight, eps, center):
    x_hat, _, rstd, axes = _standardized(x, axes, eps, center)
    slope = np.asarray(dy).astype(np.float64).astype(np.longdouble)
    g = slope if weight is None else slope * _along(x_hat, axes, weight)
    batch = tuple(a for a in range(x_hat.ndim) if a not in axes)
    return slope, g, x_hat, rstd, axes, batch


def gradient_tolerance(dtype, terms):
    """The one bound on a gradient, in units of its scale, besides the rounding of the result.

    Of the dtype that x's statistics have (float32, float64 for float64 x) one epsilon for each of
    four operations on an element, and one for each level of a tree that sums the terms, N or rows.
    """
    return _COMPUTE_EPS.get(np.dtype(dtype).name, 2.0**-23) * (4 + math.log2(max(terms, 1)))


def tolerance(dtype, N):
    """The one bound, relative and absolute alike, on y with weight and bias of order 1.

    One epsilon of y's dtype for its rounding and that of the last operations, and as for gradients.
    """
    return _EPS[np.dtype(dtype).name] + gradient_tolerance(dtype, N)


def assert_close(got, want, N, dtype=None, scale=1):
    """Hold rows of N values to what is wanted; `dtype`: which they had, `scale`: of their size."""
    assert np.shape(got) == np.shape(want)
    bound = tolerance(got.dtype if dtype is None else dtype, N)
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * scale)


def gradient_excess(got, dy, x, axes, weight=None, eps=1e-5, center=True):
    """Largest error of dx, dweight and dbias over the bound: at most 1; 0 for one that is None.

    The bound is one epsilon of the result's dtype relative to it, and `gradient_tolerance` of its
    scale. NaN and Inf must stand where the definition has a value that is not finite.
    """
    N = math.prod(np.shape(x)[a] for a in axes)
    rows = np.size(x) // N
    want = layer_norm_backward(dy, x, axes, weight, eps, center)
    scales = gradient_scales(dy, x, axes, weight, eps, center)
    excess = []
    for a, exact, scale, terms in zip(got, want, scales, (N, rows, rows), strict=True):
        if a is None:
            excess.append(0.0)
            continue
        assert np.shape(a) == exact.shape, (np.shape(a), exact.shape)
        name = a.dtype.name
        with np.errstate(over="ignore"):  # what the result's dtype cannot hold is infinite there
            exact = np.where(np.isinf(exact.astype(a.dtype)), np.copysign(np.inf, exact), exact)
        bound = _EPS[name] * np.abs(exact) + gradient_tolerance(x.dtype, terms) * scale
        bound = bound + _LEAST[name]
        values, known = np.asarray(a).astype(np.float64), np.isfinite(exact)
        if (np.isfinite(values) != known).any():
            excess.append(math.inf)
            continue
        with np.errstate(all="ignore"):
            ratio = np.where(known, np.abs(values - exact) / bound, 0.0)
        excess.append(float(ratio.max(initial=0.0)))
    return excess


def assert_gradients(got, dy, x, axes, weight=None, eps=1e-5, center=True):
    """Compare dx, dweight and dbias (None: not computed) with the definition."""
    excess = gradient_excess(got, dy, x, axes, weight, eps, center)
    said = ", ".join(
        f"{n} {e:.3g}" for n, e in zip(("dx", "dweight", "dbias"), excess, strict=True)
    )
    assert max(excess) <= 1, f"errors over their bounds: {said}"
