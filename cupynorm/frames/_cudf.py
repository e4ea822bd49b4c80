"""Columns of a cuDF DataFrame as device arrays, and a DataFrame over a matrix of results."""

from importlib import import_module
from typing import Any

import numpy as np

NUMERIC = "df.select_dtypes(['number', 'bool'])"


class _Memory:
    """Device memory as `__cuda_array_interface__` shows it, with its owner kept alive."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__cuda_array_interface__ = interface
        self.owner = owner


def not_numeric(df: Any) -> list[tuple[Any, Any]]:
    """Name and dtype of every column that is not made of numbers."""
    return [
        (name, dtype)
        for name, dtype in df.dtypes.items()
        if not (isinstance(dtype, np.dtype) and dtype.kind in "biuf")
    ]


def read(df: Any) -> list[tuple[Any, ...]]:
    """Columns over the frame's own memory, with cuDF's bitmap, which is Arrow's."""
    return [_column(series) for _, series in df.items()]


def _column(series: Any) -> tuple[Any, ...]:
    interface = dict(series.__cuda_array_interface__)
    mask = interface.pop("mask", None)  # CuPy refuses arrays that have one
    values = _Memory(interface, series)
    if mask is None:
        return (values,)
    bits = dict(mask.__cuda_array_interface__)  # one element per bit, typestr "<t1"
    bits |= {"shape": (-(-len(series) // 8),), "typestr": "|u1", "strides": None, "version": 3}
    return values, _Memory(bits, (series, mask))


def build(df: Any, y: Any) -> Any:
    """Frame of df's index and columns over y, column-major: cuDF transposes a row-major one."""
    frame = import_module("cudf").DataFrame
    # By default cuDF makes nulls of NaN, at the cost of another pass.
    result = frame(y, index=df.index, columns=df.columns, nan_as_null=False)
    if getattr(df, "attrs", None):
        result.attrs = dict(df.attrs)
    return result
