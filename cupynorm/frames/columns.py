"""Columns of different dtypes in separate memory to one normalized matrix, in one pass."""

from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import path_of
from cupynorm._cpu.columns import Column
from cupynorm.frames import _tables
from cupynorm.frames._arguments import checked_affine, checked_out, gather, result_dtype

__all__ = ["layer_norm_columns"]


def layer_norm_columns(
    columns: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    dtype: Any = None,
    out: Any = None,
    nulls: str = "propagate",
) -> Any:
    """Normalize the rows of a table that is given as columns, into one row-major matrix.

    What ``layer_norm(numpy.stack(columns, axis=1))`` computes, without the stack: each column is
    read once, in its own dtype, and each result written once.

    Parameters
    ----------
    columns : sequence of N columns, or DataFrame
        Each column an array of M elements, NumPy or CuPy, all of one library: bool, integers,
        float16, bfloat16, float32 or float64, any stride and byte order. One with nulls is a pair
        ``(values, validity)``: uint8, Arrow's bitmap, in which bit ``i % 8`` of byte ``i // 8``
        (the least significant first) is 1 where row i is valid; or a triple ``(values, validity,
        offset)``, whose row i has bit ``i + offset``. A pandas, polars or cuDF DataFrame stands
        for its columns.
    weight, bias : array, optional
        Scale and shift of shape (N,), in any floating dtype, in the columns' library.
    eps : float, default 1e-5
        Added to the variance; any finite real number.
    dtype : dtype, optional
        Of the result: float16, bfloat16, float32 or float64. By default float32, and float64 where
        a column is float64.
    out : array, optional
        Where to write: shape (M, N), the result's dtype, any strides.
    nulls : {'propagate', 'omit'}, default 'propagate'
        What a null, or NaN, does to its row: all of the row becomes NaN; or the statistics are
        those of the others and it alone stays NaN. As in pandas, NaN counts as missing.

    Returns
    -------
    array
        Shape (M, N), row-major unless `out` is not, in the columns' library and on their device.

    Raises
    ------
    TypeError
        If a column, `weight` or `bias` is no array or has another dtype, such as strings, objects,
        dates or complex numbers; if `dtype` is not one of the four.
    ValueError
        If there are no columns, if they or their bitmaps differ in length, if shapes do not fit,
        if arrays live on different devices, or if `out` shares memory with an input.

    Notes
    -----
    A column is rounded to the dtype of the statistics as it is read: float32, or float64 where the
    result is float64. Integers beyond 2^24 (2^53) lose digits there; ask for ``dtype="float64"``
    where differences between such columns matter. The formula is that of Ba, Kiros and Hinton
    (2016), "Layer Normalization", arXiv:1607.06450; the algorithm is that of `layer_norm`,
    corrected two-pass; a row's result depends on that row alone, bit for bit.
    On a GPU each call uploads a table of the columns' addresses, so it cannot be replayed from a
    CUDA graph.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> age = np.array([30, 41], np.int8)
    >>> height = np.array([1.5, 2.0], np.float32)
    >>> member = np.array([True, False])
    >>> cn.layer_norm_columns([age, height, member], eps=0.0).round(3)
    array([[ 1.414, -0.689, -0.725],
           [ 1.413, -0.653, -0.759]], dtype=float32)
    """
    table = _tables.library(columns)
    if table is not None:
        columns = _tables.read(columns)
    path, ready = gather(columns)
    return normalize(path, ready, weight, bias, eps, dtype, "C", out, nulls)


def normalize(
    path: str,
    columns: list[Column],
    weight: Any,
    bias: Any,
    eps: Any,
    dtype: Any,
    order: str,
    out: Any,
    nulls: str,
) -> Any:
    """Apply the rules that are left, then normalize checked columns into `out` or a new matrix."""
    eps = _problem.check_eps(eps)
    if nulls not in ("propagate", "omit"):
        msg = (
            f"nulls={nulls!r} is not one of 'propagate' (NaN for the row) and 'omit'; pass one of "
            "them"
        )
        raise ValueError(msg)
    x, N = columns[0].values, len(columns)
    weight, bias = (
        None if value is None else checked_affine(label, value, x, N)
        for label, value in (("weight", weight), ("bias", bias))
    )
    shape = (x.shape[0], N)
    name = result_dtype(columns, dtype, out)
    if out is not None:
        out = checked_out(out, shape, name, columns, weight, bias)
    if path == "cupy":
        return _on_gpu(columns, weight, bias, eps, (shape, name, order), out, nulls == "omit")
    y = np.empty(shape, _problem.numpy_dtype(name), order) if out is None else out  # type: ignore[call-overload]
    if y.size:
        from cupynorm._cpu import columns as _cpu_columns

        _cpu_columns.layer_norm_fwd(columns, weight, bias, eps, y, nulls == "omit")
    return y


def _on_gpu(
    columns: list[Column],
    weight: Any,
    bias: Any,
    eps: float,
    result: tuple[tuple[int, int], str, str],
    out: Any,
    omit: bool,
) -> Any:
    do, x = path_of("cupy"), columns[0].values
    if not do.is_current(x):
        with x.device:  # or y would be allocated, and the kernel launched, on another GPU
            return _on_gpu(columns, weight, bias, eps, result, out, omit)
    shape, name, order = result
    y = do.empty(shape, dtype=_problem.numpy_dtype(name), order=order) if out is None else out
    if y.size:
        bitmaps = [_from_byte(j, column) for j, column in enumerate(columns)]
        values = [c.values for c in columns]
        do.layer_norm_columns(values, bitmaps, weight, bias, eps, y, omit=omit)
    return y


def _from_byte(j: int, column: Column) -> Any:
    """The bitmap from the byte on that holds row 0, whose bit must be the first there."""
    if column.validity is None:
        return None
    if column.offset % 8:
        msg = (
            f"the validity of columns[{j}] has its first row at bit {column.offset}; on a GPU that "
            "must be a multiple of 8: copy the column, or cut it elsewhere"
        )
        raise ValueError(msg)
    return column.validity[column.offset // 8 :]
