"""Columns of their own on a GPU: the table that tells a kernel where each of them is."""

from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._cuda.plan_column import ColumnsProblem, choose_plan_columns

__all__ = ["layer_norm_fwd"]

# The numbers that kernels/layer_norm_columns.cuh gives the types.
_TYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)
_NUMBER = {name: number for number, name in enumerate(_TYPES)}


def layer_norm_fwd(
    do: Any,
    columns: list[Any],
    validities: list[Any],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    omit: bool,
) -> None:
    """Normalize the rows over the columns into y (M, N) on CuPy's current stream.

    `do` is the module that launches. Arguments are checked, y is not empty, and its device is the
    current one. A validity is None, or the bytes of Arrow's bitmap from row 0 on.
    """
    index = y.device.id
    names = [None if a is None else _problem.dtype_name(a.dtype) for a in (weight, bias)]
    steps = tuple(stride // y.itemsize for stride in y.strides)
    M, N = y.shape
    problem = ColumnsProblem(_problem.dtype_name(y.dtype), names[0], names[1], M, N, steps, omit)
    plan = choose_plan_columns(problem, do.device_of(index))
    (stage,), (function,) = plan.stages, do.loaded(plan.stages, index)
    host = np.array(
        [
            (
                column.data.ptr,
                0 if validity is None else validity.data.ptr,
                column.strides[0] // column.itemsize,
                _NUMBER[_problem.dtype_name(column.dtype)],
            )
            for column, validity in zip(columns, validities, strict=True)
        ],
        dtype=np.int64,
    )
    table = do.empty(host.shape, dtype="int64")
    table.set(host)  # from pageable memory, so it is copied away before set() returns
    weight, bias = (do.dense(a) for a in (weight, bias))
    pointers = (
        table.data.ptr,
        y.data.ptr,
        *(0 if a is None else a.data.ptr for a in (weight, bias)),
    )
    arguments = (*pointers, M, *steps, N, eps, plan.panel)
    function(stage.grid, stage.block, arguments, stage.shared_bytes)
