"""What a picture shows of an array of any library: its rows on the host, and which of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupynorm import _calls
from cupynorm._layout import Facts
from cupynorm._libraries import library_of
from cupynorm._ops import LAYER_NORM

Array = np.ndarray[Any, np.dtype[np.float64]]


def checked(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, axis: Any
) -> _calls.Checked:
    """Apply the rules of `layer_norm`, and refuse an x without elements."""
    how = normalized_shape, axis, eps, "K", False
    call = _calls.check(LAYER_NORM, x, weight, bias, None, how)
    if not call.facts.size:
        msg = f"x with shape {call.facts.shape} has no elements to draw; pass one that has"
        raise ValueError(msg)
    return call


def on_host(array: Any) -> Array:
    """Values of an array of any library, as NumPy's float64."""
    if hasattr(array, "detach"):  # torch
        array = array.detach().cpu().double()
    elif library_of(array) == "cupy":
        array = array.get()
    return np.asarray(array).astype(np.float64)


def rows_of(facts: Facts, array: Any) -> Array:
    """Values of x or y, the normalized axes as the columns, (M, N)."""
    last = range(-len(facts.axes), 0)
    return np.moveaxis(on_host(array), facts.axes, last).reshape(-1, facts.N)


def column(turn: tuple[int, ...] | None, value: Any) -> Array:
    """Values of weight or bias, one per column, (N,)."""
    values = on_host(value)
    return (values if turn is None else values.transpose(turn)).ravel()


def mean_and_std_of_columns(table: Array) -> tuple[Array, Array]:
    """Over the rows that are finite: one other row would leave no column a mean."""
    finite = table[np.isfinite(table).all(axis=1)]
    if not len(finite):
        msg = (
            "every row of y has NaN or infinity, so no column has a mean to draw; pass finite rows"
        )
        raise ValueError(msg)
    return finite.mean(axis=0), finite.std(axis=0)


def picked_rows(table: Array, rows: int | Sequence[int]) -> list[int]:
    """Read the parameter `rows`: the rows themselves, or so many from the narrowest to the widest.

    Those are evenly spread over the order of standard deviations.
    """
    m = len(table)
    if not isinstance(rows, int):
        wanted = [int(i) for i in rows]
        if not wanted or not all(-m <= i < m for i in wanted):
            msg = f"rows={wanted} is not among the {m} rows of x; pass indices from 0 to {m - 1}"
            raise ValueError(msg)
        return [i % m for i in wanted]
    if rows < 1:
        msg = f"rows={rows} leaves nothing to draw; pass 1 or more, or a list of indices"
        raise ValueError(msg)
    with np.errstate(invalid="ignore"):  # a row with infinities has no standard deviation
        by_std = np.argsort(table.std(axis=1), kind="stable")
    return [int(i) for i in by_std[np.linspace(0, m - 1, min(rows, m)).astype(int)]]


def side_by_side(tiles: Array) -> Array:
    """Images (count, height, width) as one, a column of NaN between them."""
    gap = np.full((*tiles.shape[:2], 1), np.nan)
    return np.hstack(list(np.concatenate([tiles, gap], axis=2)))[:, :-1]
