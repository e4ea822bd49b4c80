"""Columns of a pandas DataFrame, and a DataFrame over a matrix of results."""

from typing import Any

import numpy as np

from cupynorm.frames import _arrow as _frames_arrow

__all__ = ["NUMERIC", "build", "not_numeric", "read"]

NUMERIC = "df.select_dtypes(['number', 'bool'])"


def not_numeric(df: Any) -> list[tuple[Any, Any]]:
    """Name and dtype of every column that is not made of numbers."""
    kinds: dict[Any, bool] = {}
    refused = []
    for name, dtype in zip(df.columns, df.dtypes, strict=True):
        if dtype not in kinds:
            kinds[dtype] = _is_number(dtype)
        if not kinds[dtype]:
            refused.append((name, dtype))
    return refused


def _is_number(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biuf" and dtype.itemsize <= 8
    if hasattr(dtype, "pyarrow_dtype"):
        return str(dtype.pyarrow_dtype) in _frames_arrow.DTYPES
    return _is_masked(dtype)


def _is_masked(dtype: Any) -> bool:
    """Whether it is one of Int8 to UInt64, Float32, Float64 and boolean."""
    # Sparse and categorical dtypes have such kinds too, and hold other arrays.
    return hasattr(dtype, "numpy_dtype") and dtype.kind in "biuf" and str(dtype)[0] in "IUFb"


def read(df: Any) -> list[tuple[Any, ...]]:
    """Columns as arrays over the frame's own memory, with a bitmap where there are nulls."""
    return [_column(series) for _, series in df.items()]


def _column(series: Any) -> tuple[Any, ...]:
    dtype = series.dtype
    if isinstance(dtype, np.dtype):
        return (series.to_numpy(),)
    array = series.array
    if hasattr(dtype, "pyarrow_dtype"):
        return _frames_arrow.read(array.__arrow_array__())
    mask = array.isna()
    values = getattr(array, "_data", None)  # what is under a mask has no public name
    if not isinstance(values, np.ndarray):
        return (array.to_numpy(dtype=np.float64, na_value=np.nan),)
    if not mask.any():
        return (values,)
    return values, np.packbits(~mask, bitorder="little")


def build(df: Any, y: np.ndarray[Any, Any]) -> Any:
    """Frame of df's class, index, columns and attrs whose one block is y."""
    result = df._constructor(y, index=df.index, columns=df.columns, copy=False)
    return result.__finalize__(df, method="layer_norm")
