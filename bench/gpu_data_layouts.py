"""Inputs of a case of layouts, in as many buffers as it takes to get past the L2 cache."""

from dataclasses import dataclass
from typing import Any

from bench.gpu_check import largest_error, limit
from bench.gpu_data import buffers_for, make_affine, poison, random_flat
from bench.gpu_grid_layouts import LayoutCase
from bench.gpu_session import Session
from cupynorm._problem import numpy_dtype

__all__ = ["LayoutInputs", "make_layout_inputs", "rows_of_layout"]


@dataclass(frozen=True)
class LayoutInputs:
    """Buffers of one case; call number i uses x[i], or columns[i], and y[i]."""

    case: LayoutCase
    x: list[Any]  # each of `case.shape`
    y: list[Any]
    columns: list[list[Any]]  # of each x, where it is a list of columns
    flat_x: list[Any]
    flat_y: list[Any]
    weight: Any  # (N,) or None
    bias: Any

    def __len__(self) -> int:
        return len(self.x)

    @property
    def copy_from(self) -> list[Any]:
        """What the copies beside the case read."""
        return self.flat_x

    @property
    def copy_to(self) -> list[Any]:
        """What they write."""
        return self.flat_y

    def poison(self) -> None:
        """Spoil y before a check."""
        poison(self.flat_y)

    def judge(self, session: Session, i: int, y: Any, ours: bool) -> tuple[float, float]:
        """Error of the result of call i, and the largest that passes."""
        arrays = (rows_of_layout(self.case, self.x[i]), self.weight, self.bias)
        plain = [None if a is None else session.plain(a) for a in arrays]
        got = rows_of_layout(self.case, session.plain(y))
        return largest_error(session.xp, *plain, got), limit(self.case.dtype, self.case.N, ours)


def rows_of_layout(case: LayoutCase, a: Any) -> Any:
    """The rows (M, N) of an array of a case; channels first as a row-major copy."""
    if case.layout != "NCHW":
        return a
    return a.transpose(0, 2, 3, 1).reshape(case.rows, case.N)


def make_layout_inputs(session: Session, case: LayoutCase) -> LayoutInputs:
    """Random numbers; y is poisoned, so that an element that nobody writes is NaN."""
    count, length = buffers_for(session, case), case.rows * case.N
    flat_x = [random_flat(session, case.dtype, length, i) for i in range(count)]
    flat_y = [session.cupy.empty(length, dtype=numpy_dtype(case.dtype)) for _ in range(count)]
    poison(flat_y)
    x = [placed(case, flat, case.layout[0] in "Fc") for flat in flat_x]
    y = [placed(case, flat, case.layout[-1] == "F") for flat in flat_y]
    columns = []
    if case.layout == "columns":
        columns = [[flat.reshape(case.N, case.rows)[j] for j in range(case.N)] for flat in flat_x]
    return LayoutInputs(case, x, y, columns, flat_x, flat_y, *make_affine(session, case))


def placed(case: LayoutCase, flat: Any, by_column: bool) -> Any:
    """An array of the case's shape over flat memory."""
    if by_column:
        return flat.reshape(case.N, case.rows).transpose(1, 0)
    return flat.reshape(case.shape)
