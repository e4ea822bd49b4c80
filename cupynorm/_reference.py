"""Two-pass layer norm in array-API calls: the path of every namespace without one of its own."""

import contextlib
import math
from typing import Any

import numpy as np
from array_api_compat import is_dask_namespace, is_jax_namespace, is_torch_namespace

from cupynorm._problem import dtype_name, stats_dtype

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]


def layer_norm_fwd(
    xp: Any,
    x: Any,
    axes: tuple[int, ...],
    weight: Any | None,
    bias: Any | None,
    eps: float,
) -> tuple[Any, Any, Any]:
    """Normalize `x` over `axes` with functions of `xp` only.

    Nothing is written in place and no step depends on the values, so that the library that owns
    `x` can differentiate, trace, vectorize or delay the whole.

    Parameters
    ----------
    xp : module
        Array-API namespace of `x`.
    x : array
        Input, of any floating dtype.
    axes : tuple of int
        Axes to normalize, non-negative and ascending.
    weight, bias : array or None
        Scale and shift, of shape ``tuple(x.shape[a] for a in axes)`` and any floating dtype.
    eps : float
        Added to the variance.

    Returns
    -------
    y : array
        Shape and dtype of `x`.
    mean, rstd : array
        float32 (float64 for float64 `x`), with length 1 on `axes`; NaN where rows are empty.
    """
    dtype = getattr(xp, stats_dtype(dtype_name(x.dtype)))
    affine_shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    n = math.prod([x.shape[a] for a in axes])
    # A power of two that is at most 1/n: scaling by it is exact, and a sum of n scaled terms
    # overflows no sooner than its largest term.
    q = 2.0 ** -max(n - 1, 0).bit_length()

    def row_mean(scaled: Any) -> Any:
        return _row_sum(xp, scaled, axes, n, dtype) / (n * q)

    def affine(value: Any) -> Any:
        return xp.reshape(xp.astype(value, dtype, copy=False), affine_shape)

    # Libraries that compute through NumPy would warn about every row that holds NaN or Inf. torch
    # does not, and torch.compile cannot trace errstate.
    quiet = contextlib.nullcontext() if is_torch_namespace(xp) else np.errstate(all="ignore")
    with quiet:
        values = xp.astype(x, dtype, copy=False)
        start = row_mean(values * q)
        offset = values - start
        # `start` is rounded, at 1e6 in float32 by 0.03, and every offset is off by that much.
        # Their mean is that error, and being small it is known precisely.
        shift = row_mean(offset * q)
        centred = offset - shift
        rstd = 1.0 / xp.sqrt(row_mean(centred * q * centred) + eps)
        y = centred * rstd
        if weight is not None:
            y = y * affine(weight)
        if bias is not None:
            y = y + affine(bias)
        return xp.astype(y, x.dtype, copy=False), start + shift, rstd


def layer_norm_bwd(
    xp: Any,
    dy: Any,
    x: Any,
    axes: tuple[int, ...],
    mean: Any,
    rstd: Any,
    weight: Any | None,
) -> tuple[Any, Any, Any]:
    """Differentiate `layer_norm_fwd` with functions of `xp` only.

    Parameters
    ----------
    xp : module
        Array-API namespace of `x`.
    dy, x : array
        Gradient of y, and x; of one shape and dtype.
    axes : tuple of int
        Normalized axes, non-negative and ascending.
    mean, rstd : array
        As `layer_norm_fwd` gave them.
    weight : array or None
        Scale, of shape ``tuple(x.shape[a] for a in axes)``.

    Returns
    -------
    dx : array
        Shape and dtype of `x`.
    dweight, dbias : array
        float32 (float64 for float64 `x`), of the shape of the normalized axes.
    """
    dtype = getattr(xp, stats_dtype(dtype_name(x.dtype)))
    affine_shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    n = math.prod([x.shape[a] for a in axes])
    m = math.prod([x.shape[a] for a in batch])
    q = 2.0 ** -max(n - 1, 0).bit_length()

    def row_mean(scaled: Any) -> Any:
        return _row_sum(xp, scaled, axes, n, dtype) / (n * q) if n else scaled

    def over_rows(terms: Any) -> Any:
        shape = tuple(x.shape[a] for a in axes)
        return xp.reshape(_row_sum(xp, terms, batch, m, dtype), shape)

    quiet = contextlib.nullcontext() if is_torch_namespace(xp) else np.errstate(all="ignore")
    with quiet:
        g = slope = xp.astype(dy, dtype, copy=False)
        if weight is not None:
            g = slope * xp.reshape(xp.astype(weight, dtype, copy=False), affine_shape)
        offset = xp.astype(x, dtype, copy=False) - mean
        # What the rounded mean lacks; see layer_norm_fwd.
        x_hat = (offset - row_mean(offset * q)) * rstd
        dx = rstd * (g - row_mean(g * q) - x_hat * row_mean(g * q * x_hat))
        dx = xp.astype(dx, x.dtype, copy=False)
        return dx, over_rows(slope * x_hat), over_rows(slope)


def _row_sum(xp: Any, terms: Any, axes: tuple[int, ...], n: int, dtype: Any) -> Any:
    """Sum over `axes`, kept with length 1, in an order that depends on n alone.

    `xp.sum` chooses its order by strides, thread count and number of rows (torch's does), and so
    would give one row different bits in different batches. Halving the row by elementwise sums
    cannot, and a tree rounds less too. XLA and Dask rearrange what they are given, so they get
    the plain sum, which they know how to split.
    """
    if n == 0 or is_jax_namespace(xp) or is_dask_namespace(xp):
        # dtype is spelled out: `sum` of the standards before 2023 widens float32 without it.
        return xp.sum(terms, axis=axes, dtype=dtype, keepdims=True)
    batch = tuple(a for a in range(terms.ndim) if a not in axes)
    kept = tuple(1 if a in axes else length for a, length in enumerate(terms.shape))
    rows = xp.permute_dims(terms, (*batch, *axes))
    rows = xp.reshape(rows, (*(terms.shape[a] for a in batch), n))
    half = 1 << (n.bit_length() - 1)  # the largest power of two within n
    if n > half:
        folded = rows[..., : n - half] + rows[..., half:]
        rows = xp.concat([folded, rows[..., n - half : half]], axis=-1)
    while half > 1:
        half //= 2
        rows = rows[..., :half] + rows[..., half:]
    return xp.reshape(rows, kept)
