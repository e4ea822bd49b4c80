"""Meets the memory of a call: folds its strides into rows and columns, or says what must be copied.

Strides count elements. `Facts` is what the rules have settled, `Problem` what a plan may depend on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cupynorm._ops import Op
from cupynorm._rules import stats_shape

Group = tuple[int, tuple[int, ...]]  # length, and one stride per array
Steps = tuple[int, int, int]  # lengths or strides of (outer, M, N)


class Facts(NamedTuple):
    """What is settled about a call whose arguments have passed every rule; nothing of the data."""

    op: Op
    backward: bool
    shape: tuple[int, ...]  # of x
    axes: tuple[int, ...]  # normalized, ascending
    # Names by array: x, weight, bias and residual where they are given, the sum's being residual's;
    # of a backward x and weight, and dweight and dbias where they are wanted.
    dtypes: dict[str, str]
    # Element strides by array of x's shape: x and y, with a residual that and sum; of a backward x
    # and dy, dsum where it is given, and dx if wanted.
    # None where memory cannot be counted in elements: unaligned, or of the other byte order.
    strides: dict[str, tuple[int, ...] | None]
    eps: float = 0.0
    order: str = "K"  # of a y that is to be made
    out: bool = False  # y is given
    stats: bool = False  # a forward gives mean, if the op has one, and rstd, too
    device: Any = None  # that x is on: index of a GPU for CuPy, for torch its own name of it

    @property
    def size(self) -> int:
        """Elements of x."""
        return math.prod(self.shape)

    @property
    def N(self) -> int:
        """Elements that share a mean."""
        return math.prod(self.shape[a] for a in self.axes)

    @property
    def affine_shape(self) -> tuple[int, ...]:
        """Shape of weight and bias."""
        return tuple(self.shape[a] for a in self.axes)

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """Shape of mean and rstd: x's with the normalized axes of length 1."""
        return stats_shape(self.shape, self.axes)


@dataclass(frozen=True, slots=True)
class Problem:
    """One shape of a call: all that a plan may depend on, and nothing of the data.

    Columns with addresses of their own (K7) have no "x" among their strides.
    """

    op: Op
    backward: bool
    dtypes: tuple[tuple[str, str], ...]  # as in `Facts`
    outer: int
    M: int  # rows of one outer step
    N: int  # columns: elements that share a mean
    strides: tuple[tuple[str, Steps], ...]  # by array
    stats_strides: tuple[int, int]  # of mean and rstd, for (outer, M)
    stats: bool = False  # a forward gives mean and rstd, too
    omit: bool = False  # leave NaN out of the statistics (K7)
    copies: tuple[tuple[str, str], ...] = ()  # arrays met as row-major copies, and why

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.outer * self.M

    def dtype(self, array: str) -> str | None:
        """Name of an array's dtype; None if it is absent or not wanted."""
        return dict(self.dtypes).get(array)

    def steps(self, array: str) -> Steps:
        """Strides of an array."""
        return dict(self.strides)[array]

    def has(self, array: str) -> bool:
        """Whether an array of x's shape takes part: dx may not be wanted."""
        return array in dict(self.strides)

    @property
    def row_major(self) -> bool:
        """Whether the columns of every array are neighbours in memory."""
        return all(steps[2] == 1 for _, steps in self.strides)


def problem_of(facts: Facts) -> Problem | None:
    """Fold a call to (outer, M, N) as its memory lies; None where it does not fold so far.

    The rows along M are neighbours in memory, if any rows are.
    """
    known = {name: strides for name, strides in facts.strides.items() if strides is not None}
    if len(known) < len(facts.strides):
        return None
    batch, cols = fold(facts.shape, facts.axes, *known.values())
    if len(cols) > 1 or len(batch) > 2:
        return None
    none = 1, (0,) * len(known)
    N, steps = cols[0] if cols else (1, (1,) * len(known))
    outer, rows = [none, none, *batch][-2:]
    stats = rows[0], 1
    if outer[0] > 1 and sum(map(abs, outer[1])) < sum(map(abs, rows[1])):
        outer, rows, stats = rows, outer, (1, rows[0])
    strides = dict(zip(known, zip(outer[1], rows[1], steps, strict=True), strict=True))
    return _problem(facts, (outer[0], rows[0], N), strides, stats)


def _problem(
    facts: Facts, sizes: Steps, strides: dict[str, Steps], stats: tuple[int, int], copies: Any = ()
) -> Problem:
    dtypes, arrays = tuple(facts.dtypes.items()), tuple(strides.items())
    folded = *sizes, arrays, stats
    return Problem(facts.op, facts.backward, dtypes, *folded, facts.stats, copies=copies)


def kernel_problem_of(facts: Facts) -> Problem:
    """Fold a call for the kernels: rows, or a tile of strided columns, or row-major copies.

    Row kernels want columns of unit stride, and rows numbered as mean and rstd are. A tile wants
    each array to have rows or columns of unit stride, and knows no residual. What fits neither is
    met as a copy, which `Problem.copies` names with the reason; so are x and y beside a wider
    residual, in its dtype.
    """
    dtype = facts.dtypes["x"]
    wide = facts.dtypes.get("residual", dtype)
    if wide != dtype:
        strides = facts.strides | dict.fromkeys("xy", row_major_strides(facts.shape, facts.axes))
        same = facts._replace(dtypes=facts.dtypes | {"x": wide}, strides=strides)
        found = kernel_problem_of(same)
        reason = f"is {dtype} beside a {wide} residual, and kernels add arrays of one dtype"
        copies = ((name, f"{name} {reason}") for name in "xy")
        return replace(found, copies=(*found.copies, *copies))
    found = _fold_rows(facts)
    if found.copies and not {"residual", "dsum"} & facts.strides.keys():
        return _fold_tile(facts) or found
    return found


def _fold_tile(facts: Facts) -> Problem | None:
    """Fold strided columns; None where an array has neither rows nor columns of unit stride.

    The rows may be the outer group: a Fortran-ordered x with normalized axes in its middle is like
    that. dx must lie along the rows where x does.
    """
    known = {name: strides or () for name, strides in facts.strides.items()}
    batch, cols = fold(facts.shape, facts.axes, *known.values())
    if len(cols) != 1 or len(batch) > 2:
        return None
    N, steps = cols[0]
    first, second = ([(1, (0,) * len(known))] * 2 + batch)[-2:]
    ways = (first, second, (second[0], 1)), (second, first, (1, second[0]))
    for outer, inner, stats in ways:
        unit = [row == 1 or col == 1 for row, col in zip(inner[1], steps, strict=True)]
        if all(unit) and any(col != 1 for col in steps):
            strides = dict(zip(known, zip(outer[1], inner[1], steps, strict=True), strict=True))
            if "dx" in strides and (strides["x"][2] == 1) != (strides["dx"][2] == 1):
                return None
            return _problem(facts, (outer[0], inner[0], N), strides, stats)
    return None


def _fold_rows(facts: Facts) -> Problem:
    """Fold all arrays together, through row-major copies of those that do not."""
    shape, axes = facts.shape, facts.axes
    known = {name: strides or () for name, strides in facts.strides.items()}
    dense = row_major_strides(shape, axes)
    reasons = {
        label: reason
        for label, strides in known.items()
        if (reason := _copy_reason(label, shape, axes, strides))
    }

    def batch() -> list[Group]:
        met = [dense if label in reasons else strides for label, strides in known.items()]
        return fold(shape, axes, *met)[0]

    labels = list(known)
    for i in range(len(labels) - 1, -1, -1):  # each may fold alone, but not all together
        if len(batch()) > 2 and labels[i] not in reasons:
            reasons[labels[i]] = (
                f"the batch axes of {' and '.join(labels[: i + 1])} do not fold together into "
                "two strides"
            )
    (outer, outer_steps), (inner, inner_steps) = ([(1, (0,) * len(labels))] * 2 + batch())[-2:]
    steps = zip(labels, outer_steps, inner_steps, strict=True)
    strides = {label: (o, i, 1) for label, o, i in steps}
    return _problem(facts, (outer, inner, facts.N), strides, (inner, 1), tuple(reasons.items()))


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
    return _dense_strides(shape, rows_last(len(shape), axes))


def rows_last(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Permutation that brings the normalized axes to the end."""
    return (*(a for a in range(ndim) if a not in axes), *axes)


def as_table(facts: Facts) -> tuple[tuple[int, ...], Facts]:
    """How to turn arrays so that their rows come first, and facts of row-major copies (M, N)."""
    shape = facts.size // facts.N, facts.N
    strides: dict[str, tuple[int, ...] | None] = dict.fromkeys(facts.strides, (facts.N, 1))
    table = facts._replace(shape=shape, axes=(1,), strides=strides)
    return rows_last(len(facts.shape), facts.axes), table


def result_strides(shape: tuple[int, ...], strides: Any, order: str) -> Any:
    """Element strides that `empty_like(x, order=order)` gives: dense, for 'K' in x's axis order.

    None where x has none that count elements.
    """
    if strides is None:
        return None
    axes = list(range(len(shape)))
    if order == "F":
        axes.reverse()
    elif order == "K":
        axes.sort(key=lambda a: -abs(strides[a]))
    return _dense_strides(shape, axes)


def _dense_strides(shape: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    """Element strides without gaps, the last axis of the order innermost."""
    strides, step = [0] * len(shape), 1
    for a in reversed(order):
        strides[a] = step
        step *= shape[a]
    return tuple(strides)


def _merge(dims: list[Group]) -> list[Group]:
    """Join neighbouring groups that step evenly in every array; drop length 1."""
    merged: list[Group] = []
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
) -> tuple[list[Group], list[Group]]:
    """Fold batch and normalized axes to as few groups as the layouts of all arrays allow.

    The groups are in C order, so that one walk over them visits the same element of each array;
    rows are numbered in C order of the batch axes, as mean and rstd are.
    """
    dims = [(n, tuple(s[a] for s in strides)) for a, n in enumerate(shape)]
    batch = _merge([d for a, d in enumerate(dims) if a not in axes])
    return batch, _merge([dims[a] for a in axes])
