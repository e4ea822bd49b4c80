"""Layer norm of tables: rows over columns, with index and column names kept."""

from typing import Any

from cupynorm import _problem
from cupynorm._cpu.columns import as_matrix
from cupynorm.frames import _tables
from cupynorm.frames._arguments import gather, result_dtype
from cupynorm.frames.columns import normalize

__all__ = ["layer_norm"]


def layer_norm(
    df: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    dtype: Any = None,
    order: str = "K",
    nulls: str = "propagate",
) -> Any:
    """Normalize each row of a table over its columns.

    ``cupynorm.layer_norm(df)`` comes here; this function has the options that only tables have.

    Parameters
    ----------
    df : DataFrame
        Of pandas, polars or cuDF, shape (M, N), all columns numeric or bool; pandas' nullable and
        Arrow-backed dtypes as well. It is read where it lies, column by column.
    weight, bias : array, optional
        Scale and shift of shape (N,), NumPy (CuPy for cuDF), in the order of the columns.
    eps : float, default 1e-5
        Added to the variance; any finite real number.
    dtype : dtype, optional
        Of every column of the result: float16, float32 or float64. By default float32, and float64
        where a column is float64.
    order : {'K', 'C', 'F'}, default 'K'
        Layout of the result's one block of memory: row-major where df is one row-major matrix,
        else column-major; row-major; column-major.
    nulls : {'propagate', 'omit'}, default 'propagate'
        What a null, or NaN, does to its row: all of the row becomes NaN; or the statistics are
        those of the others and it alone stays NaN.

    Returns
    -------
    DataFrame
        Of df's library and class, with its index, column names and ``attrs``. Its columns are plain
        floats in one block of memory, whatever dtypes df has; missing values are NaN.

    Raises
    ------
    TypeError
        If df is no table, or has columns that are not numeric (they are named), or `dtype` is not
        a float.
    ValueError
        If df has no columns, `weight` or `bias` does not fit, or an option has no such value.

    Notes
    -----
    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over each row, with the biased
    variance: the formula of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450.
    See `layer_norm_columns` for the algorithm, and for the same table as one row-major matrix.

    Examples
    --------
    >>> import pandas as pd
    >>> from cupynorm import frames
    >>> df = pd.DataFrame({"a": [1, 2], "b": [2.0, None], "c": [3.0, 5.0]}, index=["x", "y"])
    >>> frames.layer_norm(df, eps=0.0, nulls="omit").round(3)
           a    b      c
    x -1.225  0.0  1.225
    y -1.000  NaN  1.000
    """
    if _tables.library(df) is None:
        msg = (
            f"df is a {type(df).__module__}.{type(df).__qualname__}, not a DataFrame of pandas, "
            "polars or cuDF; pass arrays to cupynorm.layer_norm"
        )
        raise TypeError(msg)
    _problem.check_order(order)
    path, columns = gather(_tables.read(df))
    if order == "K":
        row_major = path == "numpy" and as_matrix(columns) is not None
        order = "C" if row_major else "F"
    name = result_dtype(columns, dtype, None)
    if name == "bfloat16":
        msg = (
            f"dtype={dtype!r}: tables have no bfloat16 columns; call layer_norm_columns, which "
            "gives a matrix"
        )
        raise TypeError(msg)
    y = normalize(path, columns, weight, bias, eps, name, order, None, nulls)
    return _tables.build(df, y)


def from_call(
    df: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    order: str,
    out: Any,
    return_stats: bool,
) -> Any:
    """Serve `layer_norm(df, ...)`, of whose arguments a table takes those that it can mean."""
    axes = _problem.resolve_axes(tuple(df.shape), normalized_shape, axis)
    if axes != (1,):
        msg = (
            f"a table is normalized over its columns, axis=1, not axes {axes}; "
            "pass an array for others, e.g. df.to_numpy()"
        )
        raise ValueError(msg)
    if out is not None or return_stats:
        name = "out=" if out is not None else "return_stats=True"
        msg = f"{name} is for arrays, not for tables; pass df.to_numpy(), or use layer_norm_columns"
        raise TypeError(msg)
    return layer_norm(df, weight, bias, eps, order=order)
