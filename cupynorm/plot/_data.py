"""What a picture shows of an array of any library: its rows on the host, and which of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import Call, check_arguments
from cupynorm.modules._parameters import to_host

__all__ = [
    "checked",
    "column",
    "mean_and_std_of_columns",
    "picked_rows",
    "rows_of",
    "side_by_side",
    "spread_rows",
]

Array = np.ndarray[Any, np.dtype[np.float64]]


def checked(x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, axis: Any) -> Call:
    """Apply the rules of `layer_norm`, and refuse an x without elements."""
    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, "K", None)
    if not math.prod(call.x.shape):
        msg = f"x with shape {tuple(call.x.shape)} has no elements to draw; pass one that has"
        raise ValueError(msg)
    return call


def rows_of(call: Call, array: Any) -> Array:
    """Contents of x or y on the host, the normalized axes as the columns, (M, N)."""
    host = to_host("x", array).astype(np.float64)
    last = tuple(range(host.ndim - len(call.axes), host.ndim))
    _, n = _problem.rows_and_cols(tuple(host.shape), call.axes)
    return np.moveaxis(host, call.axes, last).reshape(-1, n)


def column(label: str, value: Any) -> Array:
    """Weight or bias on the host, one number per column, (N,)."""
    return to_host(label, value).astype(np.float64).ravel()


def mean_and_std_of_columns(table: Array) -> tuple[Array, Array]:
    """Over the rows that are finite: one other row would leave no column a mean."""
    finite = table[np.isfinite(table).all(axis=1)]
    if not len(finite):
        msg = (
            "every row of y has NaN or infinity, so no column has a mean to draw; pass finite rows"
        )
        raise ValueError(msg)
    return finite.mean(axis=0), finite.std(axis=0)


def spread_rows(table: Array, count: int) -> list[int]:
    """Rows evenly spread from the smallest standard deviation to the largest."""
    by_std = np.argsort(table.std(axis=1), kind="stable")
    return [int(i) for i in by_std[np.linspace(0, len(by_std) - 1, count).astype(int)]]


def picked_rows(table: Array, rows: int | Sequence[int]) -> list[int]:
    """Read the parameter `rows`: a number of rows, or the rows themselves."""
    m = len(table)
    if not isinstance(rows, int):
        wanted = [int(i) for i in rows]
        missing = [i for i in wanted if not -m <= i < m]
        if missing or not wanted:
            msg = f"rows={wanted} is not among the {m} rows of x; pass indices from 0 to {m - 1}"
            raise ValueError(msg)
        return [i % m for i in wanted]
    if rows < 1:
        msg = f"rows={rows} leaves nothing to draw; pass 1 or more, or a list of indices"
        raise ValueError(msg)
    with np.errstate(invalid="ignore"):  # a row with infinities has no standard deviation
        return spread_rows(table, min(rows, m))


def side_by_side(tiles: Array) -> Array:
    """Images (count, height, width) as one, a column of NaN between them."""
    gap = np.full((*tiles.shape[:2], 1), np.nan)
    return np.hstack(list(np.concatenate([tiles, gap], axis=2)))[:, :-1]
