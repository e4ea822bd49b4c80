"""Tables of pandas, polars, Arrow and cuDF: rows over columns, with index and column names kept.

`tables` knows the libraries, `columns` has the rules and the call.
"""

from typing import Any

from cupynorm import _rules
from cupynorm._calls import How
from cupynorm._libraries import floats_of_table, kind_of
from cupynorm._ops import LAYER_NORM, RMS_NORM, ZERO_CENTERED, Op
from cupynorm.frames import columns, tables

__all__ = ["layer_norm", "rms_norm"]


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
    df : DataFrame or pyarrow.Table
        Of pandas, polars, Arrow (a RecordBatch as well) or cuDF, shape (M, N), all columns numeric
        or bool; pandas' nullable and Arrow-backed dtypes too. It is read where it lies, column by
        column.
    weight, bias, eps, dtype : optional
        As for `cupynorm.layer_norm_columns`; the dtype is not bfloat16.
    order : {'K', 'C', 'F'}, default 'K'
        Layout of the result's one block of memory: row-major where df is one row-major matrix,
        else column-major; row-major; column-major.
    nulls : {'propagate', 'omit'}, default 'propagate'
        As for `cupynorm.layer_norm_columns`: what a null, or NaN, does to its row.

    Returns
    -------
    DataFrame
        Of df's library and class, with its index, column names and ``attrs``. Its columns are plain
        floats in one block of memory, whatever dtypes df has; missing values are NaN.

    Raises
    ------
    TypeError
        If df is no table, has columns that are not numeric, or `dtype` is not a float.
    ValueError
        If df has no columns, `weight` or `bias` does not fit, or an option has no such value.

    Notes
    -----
    `cupynorm.layer_norm_columns` gives the same as one row-major matrix. The formula is that of
    Ba, Kiros and Hinton (2016), arXiv:1607.06450.

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
    return _of_table(LAYER_NORM, df, weight, bias, eps, dtype=dtype, order=order, nulls=nulls)


def rms_norm(
    df: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    dtype: Any = None,
    order: str = "K",
    nulls: str = "propagate",
    zero_centered_weight: bool = False,
) -> Any:
    """Divide each row of a table by its root mean square.

    Parameters
    ----------
    df, weight : optional
        As for `layer_norm`.
    eps : float, optional
        As for `cupynorm.rms_norm`; the result's dtype stands for x's.
    dtype, order, nulls : optional
        As for `layer_norm`, errors too.
    zero_centered_weight : bool, default False
        As for `cupynorm.rms_norm`.

    Returns
    -------
    DataFrame
        As of `layer_norm`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import pandas as pd
    >>> from cupynorm import frames
    >>> frames.rms_norm(pd.DataFrame({"a": [3.0], "b": [float("nan")]}), eps=0.0, nulls="omit")
         a   b
    0  1.0 NaN
    """
    op = ZERO_CENTERED[RMS_NORM] if zero_centered_weight else RMS_NORM
    return _of_table(op, df, weight, None, eps, dtype=dtype, order=order, nulls=nulls)


def _of_table(op: Op, df: Any, *given: Any, **named: Any) -> Any:
    if not is_table(df):
        fault = f"df is a {kind_of(df)}, not a table of pandas, polars, Arrow or cuDF"
        msg = f"{fault}; pass arrays to cupynorm.layer_norm"
        raise TypeError(msg)
    return _normalize(op, df, *given, **named)


def _normalize(
    op: Op, df: Any, weight: Any, bias: Any, eps: Any, *, dtype: Any, order: str, nulls: str
) -> Any:
    _rules.check_order(order)
    ready = columns.gather(tables.read(df))
    if order == "K":
        x = columns.as_matrix(ready)
        by_row = x is not None and x.strides[1] == x.itemsize <= x.strides[0] // x.shape[1]
        order = "C" if by_row else "F"
    name = columns.result_dtype(ready, dtype)
    if name == "bfloat16":
        msg = (
            f"dtype={dtype!r}: tables have no bfloat16 columns; call layer_norm_columns, which "
            "gives a matrix"
        )
        raise TypeError(msg)
    named = {"dtype": name, "order": order, "nulls": nulls}
    return tables.build(df, columns.normalize(op, ready, weight, bias, eps, **named))


def is_table(x: Any) -> bool:
    """Whether x is a DataFrame of a library known here; asked of its type."""
    return bool(tables.library(x))


def normalize(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Any:
    """Serve `layer_norm(df, ...)`, of whose arguments a table takes those that it can mean."""
    normalized_shape, axis, eps, order, return_stats = how
    axes = _rules.resolve_axes(tuple(x.shape), normalized_shape, axis)
    library = tables.library(x)
    if axes != (1,):
        msg = (
            f"a table is normalized over its columns, axis=1, not axes {axes}; "
            f"pass an array for others, e.g. {floats_of_table(x, 'df', library)}"
        )
        raise ValueError(msg)
    if out is not None or return_stats:
        name = "out=" if out is not None else "return_stats=True"
        msg = f"{name} is for arrays, not for tables; pass {floats_of_table(x, 'df', library)}"
        raise TypeError(msg)
    return _normalize(op, x, weight, bias, eps, dtype=None, order=order, nulls="propagate")
