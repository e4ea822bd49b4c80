"""Meets the memory of a call: folds it into rows, or says which copy is needed and why."""

from dataclasses import dataclass

from cupynorm import _problem
from cupynorm._problem import Problem

__all__ = ["Layout", "layout_of", "result_strides", "row_major_strides", "rows_last"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory of a call is met: as it lies, or through a copy and why."""

    problem: Problem
    copy_x: str = ""  # the reason for a row-major copy of x; empty: none
    copy_y: str = ""  # the reason for a row-major result that is copied into y; empty: none


def layout_of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtypes: tuple[str, str | None, str | None],
    stats: bool,
) -> Layout:
    """Fold a call into the rows that the row kernels take; strides in elements."""
    copy_x = _copy_reason("x", shape, axes, x_strides)
    copy_y = _copy_reason("y", shape, axes, y_strides)
    dense = row_major_strides(shape, axes)
    strides = (dense if copy_x else x_strides, dense if copy_y else y_strides)
    batch, _ = _problem.fold(shape, axes, *strides)
    if len(batch) > 2:  # each folds, but not the two together
        copy_y = "the batch axes of x and y do not fold together into two strides"
        batch, _ = _problem.fold(shape, axes, strides[0], dense)
    if len(batch) > 2:
        copy_x = "the batch axes of x do not fold into two strides"
        batch, _ = _problem.fold(shape, axes, dense, dense)
    outer, inner = ([(1, (0, 0))] * 2 + batch)[-2:]
    problem = Problem(
        op="layer_norm_fwd",
        x_dtype=dtypes[0],
        weight_dtype=dtypes[1],
        bias_dtype=dtypes[2],
        outer=outer[0],
        M=inner[0],
        N=_problem.rows_and_cols(shape, axes)[1],
        x_strides=(outer[1][0], inner[1][0], 1),
        y_strides=(outer[1][1], inner[1][1], 1),
        stats=stats,
    )
    return Layout(problem, copy_x, copy_y)


def _copy_reason(
    label: str, shape: tuple[int, ...], axes: tuple[int, ...], strides: tuple[int, ...]
) -> str:
    _, cols = _problem.fold(shape, axes, strides)
    if len(cols) > 1:
        return f"the normalized axes {axes} of {label} do not fold into one stride"
    if cols and cols[0][1] != (1,):
        return f"the normalized axes {axes} of {label} have stride {cols[0][1][0]}, not 1"
    return ""


def row_major_strides(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides, by axis of x, of a copy whose normalized axes lie innermost."""
    strides = [0] * len(shape)
    step = 1
    for a in reversed([a for a in range(len(shape)) if a not in axes] + list(axes)):
        strides[a] = step
        step *= shape[a]
    return tuple(strides)


def rows_last(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Permutation that brings the normalized axes to the end."""
    return (*(a for a in range(ndim) if a not in axes), *axes)


def result_strides(shape: tuple[int, ...], strides: tuple[int, ...], order: str) -> tuple[int, ...]:
    """Element strides that `empty_like(x, order=order)` gives: dense, for 'K' in x's axis order."""
    axes = list(range(len(shape)))
    if order == "F":
        axes.reverse()
    elif order == "K":
        axes.sort(key=lambda a: -abs(strides[a]))
    dense = [0] * len(shape)
    step = 1
    for a in reversed(axes):
        dense[a] = step
        step *= shape[a]
    return tuple(dense)
