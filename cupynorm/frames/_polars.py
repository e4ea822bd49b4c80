"""Columns of a polars DataFrame, and a DataFrame over a matrix of results."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from cupynorm.frames import _arrow

NUMERIC = "df.select(polars.selectors.numeric() | polars.selectors.boolean())"
_NAMES = {"Boolean", "Float16", "Float32", "Float64"}
_NAMES |= {f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)}


def not_numeric(df: Any) -> list[tuple[str, Any]]:
    """Name and dtype of every column that is not made of numbers."""
    return [(name, dtype) for name, dtype in df.schema.items() if str(dtype) not in _NAMES]


def read(df: Any) -> list[tuple[Any, ...]]:
    """Columns as arrays over the frame's own memory; without pyarrow some are copied."""
    columns = df.get_columns()
    if find_spec("pyarrow") is not None:
        return [_arrow.read(series.rechunk().to_arrow()) for series in columns]
    byte = import_module("polars").UInt8
    plain = [s.cast(byte) if str(s.dtype) == "Boolean" else s for s in columns]
    # Nulls become NaN there, in float64 where they stand among integers.
    return [(np.asarray(series.to_numpy()),) for series in plain]


def build(df: Any, y: np.ndarray[Any, Any]) -> Any:
    """Frame of df's column names over the columns of y; a row-major y is copied."""
    polars = import_module("polars")
    columns = [y[:, j] for j in range(y.shape[1])]
    if find_spec("pyarrow") is not None:  # polars itself copies NumPy's memory, but not Arrow's
        array = import_module("pyarrow").array
        columns = [array(np.ascontiguousarray(column)) for column in columns]
    named = [polars.Series(name, x) for name, x in zip(df.columns, columns, strict=True)]
    return polars.DataFrame(named)
