"""The check that precedes every number of the backward: float64, on the very bits that went in.

Independent of the package, as `gpu_check` is; the same lines run on NumPy and on CuPy.
"""

from collections.abc import Iterator
from typing import Any

from bench.gpu_check import BLOCK, EPS, EPSILON, limit, row_means, widened

__all__ = ["gradient_errors", "statistics", "worst_of"]

Gradients = tuple[Any, Any, Any]  # dx, dweight, dbias; None for what was not asked for


def _blocks(rows: int, N: int) -> Iterator[slice]:
    step = max(1, BLOCK // N)
    for begin in range(0, rows, step):
        yield slice(begin, begin + step)


def _normalized(xp: Any, x: Any, eps: float) -> tuple[Any, Any, Any]:
    """Mean, rstd and x_hat of rows, float64."""
    d = widened(xp, x)
    mean = row_means(d)
    d -= mean
    lack = row_means(d)  # what rounding left of the mean
    d -= lack
    rstd = 1.0 / xp.sqrt(row_means(d * d) + eps)
    return mean + lack, rstd, d * rstd


def statistics(xp: Any, x: Any, eps: float = EPS) -> tuple[Any, Any]:
    """Mean and rstd (rows, 1) as a forward leaves them: float32, or float64 for float64 x."""
    rows, N = x.shape
    parts = [_normalized(xp, x[block], eps)[:2] for block in _blocks(rows, N)]
    dtype = "float64" if str(x.dtype) == "float64" else "float32"
    mean, rstd = (xp.concatenate(part).astype(dtype) for part in zip(*parts, strict=True))
    return mean, rstd


def gradient_errors(
    xp: Any, dy: Any, x: Any, weight: Any, gradients: Gradients, eps: float = EPS
) -> dict[str, float]:
    """Largest error of each gradient that was asked for; NaN where any element is.

    dx: |dx - expected| in units of epsilon(dtype) * rstd * max(1, the size of the terms that the
    formula adds up), and not less than epsilon * |expected|. dweight and dbias: in units of
    epsilon(their dtype) * max(|expected|, root of the sum of the squared terms), which is what a
    sum of random terms comes to, plus epsilon(float32, or float64 for float64 x) * sum of |terms|,
    where x_hat counts as the difference of x * rstd and mean * rstd that it is.

    Parameters
    ----------
    xp : module
        NumPy or CuPy, whose arrays all the others are.
    dy, x : array, (rows, N)
    weight : array, (N,), or None
    gradients : (dx, dweight, dbias)
        (rows, N), (N,), (N,); None for what was not asked for.
    """
    dx, *totals = gradients
    w = 1.0 if weight is None else widened(xp, weight)
    errors = {} if dx is None else {"dx": 0.0}
    sums: list[list[Any]] = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # terms, their squares, their sizes
    for block in _blocks(*x.shape):
        mean, rstd, x_hat = _normalized(xp, x[block], eps)
        slope = widened(xp, dy[block])
        if dx is not None:
            off, size = _off(xp, slope * w, x_hat, rstd, widened(xp, dx[block]))
            part = float((off / size).max()) / EPSILON[str(dx.dtype)]
            errors["dx"] = max(errors["dx"], part, key=_nan_first)
        sizes = xp.abs(slope) * (xp.abs(x_hat) + xp.abs(mean * rstd)), xp.abs(slope)
        for total, sum_, terms, size in zip(
            totals, sums, (slope * x_hat, slope), sizes, strict=True
        ):
            if total is not None:
                for k, part in enumerate((terms, terms * terms, size)):
                    sum_[k] = sum_[k] + part.sum(axis=0)
    accumulated = EPSILON["float64" if str(x.dtype) == "float64" else "float32"]
    for label, total, (exact, squares, sizes) in zip(
        ("dweight", "dbias"), totals, sums, strict=True
    ):
        if total is not None:
            size = EPSILON[str(total.dtype)] * xp.maximum(xp.abs(exact), xp.sqrt(squares))
            off = xp.abs(widened(xp, total) - exact)
            errors[label] = float((off / (size + accumulated * sizes)).max())
    return errors


def _off(xp: Any, g: Any, x_hat: Any, rstd: Any, dx: Any) -> tuple[Any, Any]:
    """Distance of dx from what is expected, and the size that it is measured by."""
    c1, pull = row_means(g), x_hat * row_means(g * x_hat)
    expected = rstd * (g - c1 - pull)
    size = xp.maximum(xp.maximum(xp.abs(g), xp.abs(pull)), xp.maximum(xp.abs(c1), 1.0)) * rstd
    return xp.abs(dx - expected), xp.maximum(size, xp.abs(expected))


def _nan_first(value: float) -> float:
    return value if value == value else float("inf")


def worst_of(
    errors: dict[str, float], dtypes: dict[str, str], shape: tuple[int, int], ours: bool
) -> tuple[float, float]:
    """The error that is nearest to its limit or furthest beyond it, and that limit.

    dx is a sum over N columns, dweight and dbias are sums over the rows; a peer may be inexact in
    proportion to the length of what it adds up.
    """
    rows, N = shape
    allowed = {k: limit(dtypes[k], N if k in ("y", "dx") else rows, ours) for k in errors}
    label = max(errors, key=lambda k: _nan_first(errors[k]) / allowed[k])
    return errors[label], allowed[label]
