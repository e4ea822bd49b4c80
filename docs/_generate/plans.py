"""The problems whose plans are drawn: one of each family, as the library would launch it."""

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Plan
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM

__all__ = ["A100", "H100", "ROWS", "column_plan", "columns_plan", "problem_of", "row_plan"]

A100 = Device(80, 108, 163 * 1024)
H100 = Device(90, 132, 227 * 1024)

# Rows, columns, dtype and device of each family with row-major rows.
ROWS = {
    "warp": (4096, 50, "float32", H100),
    "block": (4096, 5000, "float16", H100),
    "shared": (4096, 28_000, "float16", A100),
    "cluster": (4096, 50_000, "float32", H100),
    "split": (2, 200_000, "float32", A100),
}


Steps = tuple[int, int, int]


def problem_of(rows: int, N: int, dtype: str, **strides: Steps) -> Problem:
    """A forward of (1, rows, N) without weight, bias and statistics."""
    steps = tuple(strides.items())
    return Problem(LAYER_NORM, False, (("x", dtype),), 1, rows, N, steps, (rows, 1))


def row_plan(family: str) -> tuple[Plan, int] | None:
    """Plan and columns of a family's problem; None where no device takes that family."""
    rows, N, dtype, device = ROWS[family]
    strides = (rows * N, N, 1)
    plan = choose_plan(problem_of(rows, N, dtype, x=strides, y=strides), device)
    return (plan, N) if plan.family == family else None


def column_plan(rows: int, N: int) -> Plan:
    """What a column-major float32 x takes whose y is to be row-major."""
    far, near = (rows * N, 1, rows), (rows * N, N, 1)
    return choose_plan(problem_of(rows, N, "float32", x=far, y=near), H100)


def columns_plan(rows: int, N: int) -> Plan:
    """What columns of their own take, for a float32 matrix."""
    return choose_plan(problem_of(rows, N, "float32", y=(0, N, 1)), H100)
