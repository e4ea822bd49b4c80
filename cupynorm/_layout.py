"""Meets the memory of a call: folds it into rows, or says which copy is needed and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from cupynorm import _problem
from cupynorm._cuda.plan_column import ColumnProblem
from cupynorm._cuda.plan_column_bwd import ColumnGradientProblem
from cupynorm._problem import GradientProblem, Problem

__all__ = [
    "GradientLayout",
    "Layout",
    "column_gradient_problem_of",
    "column_problem_of",
    "fold",
    "gradient_layout_of",
    "layout_of",
    "result_strides",
    "row_major_strides",
    "rows_last",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory of a call is met: as it lies, or through a copy and why."""

    problem: Problem
    copy_x: str = ""  # the reason for a row-major copy of x; empty: none
    copy_y: str = ""  # the reason for a row-major result that is copied into y; empty: none


@dataclass(frozen=True, slots=True)
class GradientLayout:
    """How the memory of a backward call is met; copies by array, with the reason."""

    problem: GradientProblem
    copies: tuple[tuple[str, str], ...] = ()


def layout_of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtypes: tuple[str, str | None, str | None],
    stats: bool,
) -> Layout:
    """Fold a call into the rows that the row kernels take; strides in elements."""
    sizes, steps, reasons = _fit(shape, axes, {"x": x_strides, "y": y_strides})
    problem = Problem(
        op="layer_norm_fwd",
        x_dtype=dtypes[0],
        weight_dtype=dtypes[1],
        bias_dtype=dtypes[2],
        outer=sizes[0],
        M=sizes[1],
        N=sizes[2],
        x_strides=steps[0],
        y_strides=steps[1],
        stats=stats,
    )
    return Layout(problem, reasons.get("x", ""), reasons.get("y", ""))


def column_problem_of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtypes: tuple[str, str | None, str | None],
) -> ColumnProblem | None:
    """Fold a call whose columns are strided in x, in y or in both; None if that does not go.

    In each of the two either the columns or the rows of one batch group have unit stride, which may
    be the outer group: a Fortran-ordered x with normalized axes in its middle is like that.
    """
    found = _fit_columns(shape, axes, x_strides, y_strides)
    if found is None:
        return None
    sizes, (x, y), stats = found
    return ColumnProblem(*dtypes, *sizes, x, y, stats)


def column_gradient_problem_of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dy_strides: tuple[int, ...],
    x_strides: tuple[int, ...],
    dx_strides: tuple[int, ...] | None,
    dtypes: tuple[str, str | None, str | None, str | None],
) -> ColumnGradientProblem | None:
    """Fold a backward call as `column_problem_of` does; dx must lie along the rows where x does."""
    to = x_strides if dx_strides is None else dx_strides
    found = _fit_columns(shape, axes, dy_strides, x_strides, to)
    if found is None:
        return None
    sizes, (dy, x, dx), stats = found
    if (x[2] == 1) != (dx[2] == 1):
        return None
    return ColumnGradientProblem(*dtypes, dx_strides is not None, *sizes, dy, x, dx, stats)


def _fit_columns(
    shape: tuple[int, ...], axes: tuple[int, ...], *arrays: tuple[int, ...]
) -> tuple[tuple[int, int, int], list[tuple[int, int, int]], tuple[int, int]] | None:
    """Sizes (outer, M, N), the strides of each array, and those of the statistics."""
    batch, cols = fold(shape, axes, *arrays)
    if len(cols) != 1 or len(batch) > 2:
        return None
    N, steps = cols[0]
    first, second = ([(1, (0,) * len(arrays))] * 2 + batch)[-2:]
    for outer, inner, stats in (
        (first, second, (second[0], 1)),
        (second, first, (1, second[0])),
    ):
        unit = [row == 1 or col == 1 for row, col in zip(inner[1], steps, strict=True)]
        if all(unit) and any(col != 1 for col in steps):
            strides = list(zip(outer[1], inner[1], steps, strict=True))
            return (outer[0], inner[0], N), strides, stats
    return None


def gradient_layout_of(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dy_strides: tuple[int, ...],
    x_strides: tuple[int, ...],
    dx_strides: tuple[int, ...] | None,
    dtypes: tuple[str, str | None, str | None, str | None],
) -> GradientLayout:
    """Fold a backward call; dtypes of x, weight, dweight and dbias, no dx_strides: no dx."""
    arrays = {"x": x_strides, "dy": dy_strides}
    if dx_strides is not None:
        arrays["dx"] = dx_strides
    sizes, steps, reasons = _fit(shape, axes, arrays)
    problem = GradientProblem(
        x_dtype=dtypes[0],
        weight_dtype=dtypes[1],
        dweight_dtype=dtypes[2],
        dbias_dtype=dtypes[3],
        dx=dx_strides is not None,
        outer=sizes[0],
        M=sizes[1],
        N=sizes[2],
        x_strides=steps[0],
        dy_strides=steps[1],
        dx_strides=steps[-1] if dx_strides is not None else (0, 0, 1),
    )
    return GradientLayout(problem, tuple(reasons.items()))


def _fit(
    shape: tuple[int, ...], axes: tuple[int, ...], arrays: dict[str, tuple[int, ...]]
) -> tuple[tuple[int, int, int], list[tuple[int, int, int]], dict[str, str]]:
    """Fold several arrays together, through row-major copies of those that do not.

    Returns
    -------
    sizes : (outer, M, N)
    steps : list of (outer, M, N) element strides, one for each array
    reasons : dict
        By array, why it needs a copy.
    """
    dense = row_major_strides(shape, axes)
    reasons = {
        label: reason
        for label, strides in arrays.items()
        if (reason := _copy_reason(label, shape, axes, strides))
    }

    def batch() -> list[tuple[int, tuple[int, ...]]]:
        met = [dense if label in reasons else strides for label, strides in arrays.items()]
        return fold(shape, axes, *met)[0]

    labels = list(arrays)
    for i in range(len(labels) - 1, -1, -1):  # each may fold alone, but not all together
        if len(batch()) > 2 and labels[i] not in reasons:
            reasons[labels[i]] = (
                f"the batch axes of {' and '.join(labels[: i + 1])} do not fold together into "
                "two strides"
            )
    groups = ([(1, (0,) * len(labels))] * 2 + batch())[-2:]
    (outer, outer_steps), (inner, inner_steps) = groups
    sizes = outer, inner, _problem.rows_and_cols(shape, axes)[1]
    return sizes, [(o, i, 1) for o, i in zip(outer_steps, inner_steps, strict=True)], reasons


def _copy_reason(
    label: str, shape: tuple[int, ...], axes: tuple[int, ...], strides: tuple[int, ...]
) -> str:
    _, cols = fold(shape, axes, strides)
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


def _merge(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Join neighbouring (length, strides) groups that step evenly in every array; drop length 1."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for length, strides in dims:
        if length == 1:
            continue
        if merged and all(s == length * t for s, t in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * length, strides)
        else:
            merged.append((length, strides))
    return merged


def fold(
    shape: Sequence[int], axes: Sequence[int], *strides: Sequence[int]
) -> tuple[list[tuple[int, tuple[int, ...]]], list[tuple[int, tuple[int, ...]]]]:
    """Fold batch and normalized axes to as few groups as the layouts allow.

    Parameters
    ----------
    shape : sequence of int
        Shape that the arrays share.
    axes : sequence of int
        Normalized axes, ascending.
    *strides : sequence of int
        Element strides, one sequence per array (x and y). They are folded together, so that one
        walk over the groups visits the same element of each array.

    Returns
    -------
    batch, cols : list of (length, strides)
        Groups in C order, each with one stride per array. Rows are numbered in C order of the
        batch axes, which is also the order of mean and rstd.
    """
    dims = [(n, tuple(s[a] for s in strides)) for a, n in enumerate(shape)]
    batch = _merge([d for a, d in enumerate(dims) if a not in axes])
    return batch, _merge([dims[a] for a in axes])
