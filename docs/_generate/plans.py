"""The problems whose plans are drawn: one of each family, as the library would launch it."""

from cupynorm._cuda.plan import Device, Plan, choose_plan
from cupynorm._cuda.plan_column import (
    ColumnPlan,
    ColumnProblem,
    ColumnsProblem,
    choose_plan_column,
    choose_plan_columns,
)
from cupynorm._problem import Problem

__all__ = ["A100", "H100", "ROWS", "T4", "column_plan", "columns_plan", "row_plan"]

T4 = Device(75, 40, 64 * 1024)
A100 = Device(80, 108, 163 * 1024)
H100 = Device(90, 132, 227 * 1024)

# Rows, columns, dtype and device of each family with row-major rows.
ROWS = {
    "warp": (4096, 50, "float32", H100),
    "block": (4096, 5000, "float16", H100),
    "shared": (4096, 28_000, "float16", T4),
    "cluster": (4096, 50_000, "float32", H100),
    "split": (2, 200_000, "float32", A100),
}


def row_plan(family: str) -> tuple[Plan, int] | None:
    """Plan and columns of a family's problem; None where no device takes that family."""
    rows, N, dtype, device = ROWS[family]
    strides = (rows * N, N, 1)
    problem = Problem("layer_norm_fwd", dtype, None, None, 1, rows, N, strides, strides, False)
    plan = choose_plan(problem, device)
    return (plan, N) if plan.family == family else None


def column_plan(rows: int, N: int) -> ColumnPlan:
    """What a column-major float32 x takes whose y is to be row-major."""
    far, near = (rows * N, 1, rows), (rows * N, N, 1)
    problem = ColumnProblem("float32", None, None, 1, rows, N, far, near, (rows, 1))
    return choose_plan_column(problem, H100)


def columns_plan(rows: int, N: int) -> ColumnPlan:
    """What columns of their own take, for a float32 matrix."""
    return choose_plan_columns(ColumnsProblem("float32", None, None, rows, N, (N, 1), False), H100)
