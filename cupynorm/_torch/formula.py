"""Layer norm and its derivatives in torch's own functions, which torch can differentiate again."""

import math
from typing import Any

import torch

__all__ = ["backward", "forward", "stats_dtype", "tangents"]


def stats_dtype(dtype: Any) -> Any:
    """Torch dtype in which statistics are computed and returned."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _along(value: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """Weight, bias or a tangent of one, in the compute dtype and broadcastable against x."""
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    return value.to(stats_dtype(x.dtype)).reshape(shape)


def _mean(terms: Any, axes: tuple[int, ...]) -> Any:
    return terms.mean(axes, keepdim=True)


def _normalized(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any, Any]:
    """x_hat, mean and rstd as functions of x, by the corrected two-pass algorithm."""
    wide = x.to(stats_dtype(x.dtype))
    start = _mean(wide, axes)
    offset = wide - start
    # `start` is rounded; what the offsets sum to is what it lacks.
    shift = _mean(offset, axes)
    centred = offset - shift
    rstd = torch.rsqrt(_mean(centred * centred, axes) + eps)
    return centred * rstd, start + shift, rstd


def forward(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Any]:
    """y, mean and rstd; axes ascending, weight and bias of the shape of these axes."""
    y, mean, rstd = _normalized(x, axes, eps)
    if weight is not None:
        y = y * _along(weight, x, axes)
    if bias is not None:
        y = y + _along(bias, x, axes)
    return y.to(x.dtype), mean, rstd


def _projected(z: Any, x_hat: Any, rstd: Any, axes: tuple[int, ...]) -> Any:
    """The derivative of x_hat by x, a symmetric matrix for each row, applied to z."""
    return rstd * (z - _mean(z, axes) - x_hat * _mean(z * x_hat, axes))


def backward(
    dy: Any,
    dmean: Any,
    drstd: Any,
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    eps: float,
    wanted: tuple[bool, bool, bool],
    dtypes: tuple[Any, Any],
) -> tuple[Any, Any, Any]:
    """dx, dweight and dbias from the gradients of y, mean and rstd, each of which may be None.

    The statistics are computed from x again: those that forward gave are, to autograd, constants,
    and a second derivative taken through them would lack a term. ``dtypes`` are those of dweight
    and dbias.
    """
    x_hat, _, rstd = _normalized(x, axes, eps)
    slope = None if dy is None else dy.to(rstd.dtype)
    dx = dweight = dbias = None
    if wanted[0]:
        dx = torch.zeros_like(x_hat)
        if slope is not None:
            g = slope if weight is None else slope * _along(weight, x, axes)
            dx = _projected(g, x_hat, rstd, axes)
        dx = (dx + stats_term(dmean, drstd, x_hat, rstd, axes)).to(x.dtype)
    if slope is not None and wanted[1]:
        dweight = _over_rows(slope * x_hat, axes).to(dtypes[0])
    if slope is not None and wanted[2]:
        dbias = _over_rows(slope, axes).to(dtypes[1])
    return dx, dweight, dbias


def stats_term(dmean: Any, drstd: Any, x_hat: Any, rstd: Any, axes: tuple[int, ...]) -> Any:
    """What the gradients of mean and rstd add to dx: 1 / N and -rstd^2 x_hat / N of them."""
    n = math.prod([x_hat.shape[a] for a in axes])
    term: Any = 0.0
    if dmean is not None:
        term = term + dmean / n
    if drstd is not None:
        term = term - drstd * rstd * rstd * x_hat / n
    return term


def _over_rows(terms: Any, axes: tuple[int, ...]) -> Any:
    batch = [a for a in range(terms.ndim) if a not in axes]
    return terms.sum(batch) if batch else terms  # sum(()) would be the sum of everything


def tangents(
    dx: Any, dweight: Any, dbias: Any, x: Any, axes: tuple[int, ...], weight: Any, eps: float
) -> tuple[Any, Any, Any]:
    """Forward-mode derivatives of y, mean and rstd; a tangent that is None is zero."""
    x_hat, _, rstd = _normalized(x, axes, eps)
    dy, dmean, drstd = torch.zeros_like(x_hat), torch.zeros_like(rstd), torch.zeros_like(rstd)
    if dx is not None:
        slope = dx.to(rstd.dtype)
        dmean = _mean(slope, axes)
        drstd = -rstd * rstd * _mean(slope * x_hat, axes)
        dy = _projected(slope, x_hat, rstd, axes)
        if weight is not None:
            dy = dy * _along(weight, x, axes)
    if dweight is not None:
        dy = dy + x_hat * _along(dweight, x, axes)
    if dbias is not None:
        dy = dy + _along(dbias, x, axes)
    return dy.to(x.dtype), dmean, drstd
