"""Columns of a pandas DataFrame, and a DataFrame over a matrix of results."""

from typing import Any

import numpy as np

from cupynorm.frames import _arrow

NUMERIC = "df.select_dtypes(['number', 'bool'])"


def not_numeric(df: Any) -> list[tuple[Any, Any]]:
    """Name and dtype of every column that is not made of numbers."""
    known = {dtype: _is_number(dtype) for dtype in set(df.dtypes)}
    return [item for item in zip(df.columns, df.dtypes, strict=True) if not known[item[1]]]


def _is_number(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biuf" and dtype.itemsize <= 8
    if hasattr(dtype, "pyarrow_dtype"):
        return str(dtype.pyarrow_dtype) in _arrow.DTYPES
    # Int8 to UInt64, Float32, Float64, boolean. Sparse and categorical dtypes have such kinds too,
    # and hold other arrays.
    return hasattr(dtype, "numpy_dtype") and dtype.kind in "biuf" and str(dtype)[0] in "IUFb"


def read(df: Any) -> list[tuple[Any, ...]]:
    """Columns as arrays over the frame's own memory, with a bitmap where there are nulls."""
    return [_column(series) for _, series in df.items()]


def _column(series: Any) -> tuple[Any, ...]:
    if isinstance(series.dtype, np.dtype):
        return (series.to_numpy(),)
    array = series.array
    if hasattr(series.dtype, "pyarrow_dtype"):
        return _arrow.read(array.__arrow_array__())
    values = getattr(array, "_data", None)  # what is under a mask has no public name
    if not isinstance(values, np.ndarray):
        return (array.to_numpy(dtype=np.float64, na_value=np.nan),)
    missing = array.isna()
    return (values, np.packbits(~missing, bitorder="little")) if missing.any() else (values,)


def build(df: Any, y: np.ndarray[Any, Any]) -> Any:
    """Frame of df's class, index, columns and attrs whose one block is y."""
    result = df._constructor(y, index=df.index, columns=df.columns, copy=False)
    return result.__finalize__(df, method="layer_norm")
