"""Columns, also those of a table, to one normalized matrix: their rules, and the two calls."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _calls, _libraries, _rules
from cupynorm._ops import LAYER_NORM, RMS_NORM, ZERO_CENTERED, Op
from cupynorm.frames import tables

__all__ = ["layer_norm_columns", "rms_norm_columns"]

_NUMBERS = {*_rules.ITEMSIZE, *tables.ARROW.values()}


class Column(NamedTuple):
    """One column of a table."""

    values: Any  # (M,)
    validity: Any = None  # Arrow's bitmap: 1 is valid, least significant bit first; None: all are
    offset: int = 0  # its bit that row 0 has


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
    weight, bias, eps : optional
        As for `layer_norm`, of shape (N,).
    dtype : dtype, optional
        Of the result. By default float32, and float64 where a column is float64.
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
        If a column, `weight` or `bias` is no array or has another dtype, or `dtype` is no float.
    ValueError
        If there are no columns, lengths, shapes or devices do not fit, or `out` shares memory.

    Notes
    -----
    A column is rounded to the dtype of the statistics as it is read: float32, or float64 where the
    result is float64. Integers beyond 2^24 (2^53) lose digits there; ask for ``dtype="float64"``
    where differences between such columns matter. The formula is that of Ba, Kiros and Hinton
    (2016), arXiv:1607.06450; a row's bits depend on that row alone. On a GPU each call uploads the
    columns' addresses, so it cannot be replayed from a CUDA graph.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> age = np.array([30, 41], np.int8)
    >>> height = np.array([1.5, 2.0], np.float32)
    >>> cn.layer_norm_columns([age, height], eps=0.0).round(3)
    array([[ 1., -1.],
           [ 1., -1.]], dtype=float32)
    """
    ready = gather(tables.read(columns) if tables.library(columns) else columns)
    return normalize(LAYER_NORM, ready, weight, bias, eps, dtype=dtype, out=out, nulls=nulls)


def rms_norm_columns(
    columns: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    dtype: Any = None,
    out: Any = None,
    nulls: str = "propagate",
    zero_centered_weight: bool = False,
) -> Any:
    """Divide the rows of a table that is given as columns by their root mean square.

    What ``rms_norm(numpy.stack(columns, axis=1))`` computes, without the stack.

    Parameters
    ----------
    columns, weight, dtype, out, nulls : optional
        As for `layer_norm_columns`, errors too.
    eps, zero_centered_weight : optional
        As for `rms_norm`; the result's dtype stands for x's.

    Returns
    -------
    array
        As of `layer_norm_columns`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> cn.rms_norm_columns([np.array([3.0]), np.array([-3])], eps=0.0)
    array([[ 1., -1.]])
    """
    ready = gather(tables.read(columns) if tables.library(columns) else columns)
    op = ZERO_CENTERED[RMS_NORM] if zero_centered_weight else RMS_NORM
    return normalize(op, ready, weight, None, eps, dtype=dtype, out=out, nulls=nulls)


def normalize(
    op: Op,
    columns: list[Column],
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    dtype: Any = None,
    order: str = "C",
    out: Any = None,
    nulls: str = "propagate",
) -> Any:
    """Apply the rules that are left, then normalize gathered columns into `out` or a new matrix."""
    if nulls not in ("propagate", "omit"):
        msg = (
            f"nulls={nulls!r} is not one of 'propagate' (NaN for the row) and 'omit'; pass one of "
            "them"
        )
        raise ValueError(msg)
    x, N = columns[0].values, len(columns)
    weight, bias = (
        None if value is None else _calls.checked_affine(label, value, x, (N,))
        for label, value in (("weight", weight), ("bias", bias))
    )
    name = result_dtype(columns, dtype, out)
    eps = _rules.eps_of(op, eps, name)
    if out is not None:
        out = _checked_out(out, (x.shape[0], N), name, columns, (weight, bias))
    omit, new = nulls == "omit", ((x.shape[0], N), _rules.numpy_dtype(name), order)
    matrix = None if omit else as_matrix(columns)
    if matrix is not None and matrix.dtype == (new[1] if out is None else out.dtype):
        how = None, 1, eps, order if out is None else "K", False
        return _calls.normalize(op, matrix, weight, bias, out, how)
    if isinstance(x, np.ndarray):
        y = np.empty(*new) if out is None else out  # type: ignore[call-overload]
        if y.size:
            from cupynorm._cpu.arrays import normalize_columns

            normalize_columns(op, columns, weight, bias, eps, y, omit=omit)
        return y
    from cupynorm._cuda import arrays

    with arrays.device(x.data.device_id):  # or y would be another GPU's, and the launch as well
        y = arrays.empty(*new) if out is None else out
        if y.size:
            parts = [column.values for column in columns], _whole_bytes(columns)
            arrays.normalize_columns(op, *parts, weight, bias, eps, y, omit=omit)
    return y


def _whole_bytes(columns: Sequence[Column]) -> list[Any]:
    """Bitmaps, each from the byte on that holds row 0, whose bit must be the first there."""
    bitmaps = []
    for j, (_, validity, bit) in enumerate(columns):
        if bit % 8:
            msg = (
                f"the validity of columns[{j}] has its first row at bit {bit}; on a GPU that "
                "must be a multiple of 8: copy the column, or cut it elsewhere"
            )
            raise ValueError(msg)
        bitmaps.append(None if validity is None else validity[bit // 8 :])
    return bitmaps


def as_matrix(columns: Sequence[Column]) -> np.ndarray[Any, Any] | None:
    """View NumPy columns of one dtype at equal distances in memory as one matrix."""
    first, N = columns[0].values, len(columns)
    if not isinstance(first, np.ndarray) or first.size < 2:
        return None
    at, pitch, size = first.ctypes.data, first.strides[0], first.itemsize
    step = columns[1].values.ctypes.data - at if N > 1 else size
    if pitch % size or step % size:
        return None
    for j, (x, validity, _) in enumerate(columns):
        here = x.dtype == first.dtype and x.strides[0] == pitch and x.ctypes.data == at + j * step
        if validity is not None or not here:
            return None
    return np.lib.stride_tricks.as_strided(first, (first.size, N), (pitch, step), writeable=False)


# --- rules --------------------------------------------------------------------------------------


def gather(columns: Any) -> list[Column]:
    """Check the columns, NumPy's or CuPy's, and give all of them in one form."""
    if isinstance(columns, (str, Mapping)) or not isinstance(columns, Sequence):
        hint = "list(columns.T)" if getattr(columns, "ndim", 0) == 2 else "a list"
        hint = "list(columns.values())" if isinstance(columns, Mapping) else hint
        msg = f"columns is a {type(columns).__name__}, not a sequence of 1-D arrays; pass {hint}"
        raise TypeError(msg)
    if not columns:
        msg = "columns is empty, so there is no row to normalize; pass at least one column"
        raise ValueError(msg)
    ready: list[Column] = []
    for j, item in enumerate(columns):
        label, parts = f"columns[{j}]", item if isinstance(item, tuple) else (item,)
        if not 1 <= len(parts) <= 3:
            msg = f"{label} is a tuple of {len(parts)}; pass (values, validity) or values alone"
            raise ValueError(msg)
        if not ready:  # the column that says whose arrays the others are
            values = first = _calls.take_in(label, parts[0])
        else:
            values = _calls.companion_of(label, parts[0], first)
        _check_values(label, values, first)
        ready.append(_with_validity(label, values, *parts[1:]))
    return ready


def _check_values(label: str, x: Any, first: Any) -> None:
    if _libraries.library_of(x) not in ("numpy", "cupy"):
        msg = (
            f"{label} is a {type(x).__module__}.{type(x).__qualname__}; columns are NumPy or CuPy "
            f"arrays. Pass numpy.from_dlpack({label}) (cupy.from_dlpack on a GPU), which shares "
            "its memory"
        )
        raise TypeError(msg)
    name = _rules.dtype_name(x.dtype)
    if name not in _NUMBERS:
        msg = f"{label} has dtype {name}; a column is bool, integer, or a float of 16 to 64 bits. "
        ways = {
            "M": f"Say what number a date is, e.g. {label}.astype('int64')",
            "m": f"Say in which unit, e.g. {label} / numpy.timedelta64(1, 's')",
            "c": f"Take its parts, {label}.real and {label}.imag, or numpy.abs({label})",
            "O": f"Cast it first: {label}.astype('float64'), or leave it out",
            "f": f"Cast it first: {label}.astype('float64')",
        }
        other = f"Encode {label} as numbers, or leave it out"
        raise TypeError(msg + ways.get(getattr(x.dtype, "kind", ""), other))
    if x.ndim != 1:
        msg = f"{label} has shape {tuple(x.shape)}; a column is 1-D: pass {label}.reshape(-1)"
        raise ValueError(msg)
    if x.shape != first.shape:
        msg = (
            f"{label} has {x.shape[0]} elements, but columns[0] has {first.shape[0]}; pass "
            "columns of one length"
        )
        raise ValueError(msg)


def _with_validity(label: str, values: Any, validity: Any = None, offset: Any = 0) -> Column:
    if validity is None:
        return Column(values)
    (bit,) = _rules.integers(offset, f"the offset of {label}") or (0,)
    bits = _calls.companion_of(f"the validity of {label}", validity, values)
    if _rules.dtype_name(bits.dtype) != "uint8" or bits.ndim != 1:
        msg = (
            f"the validity of {label} has dtype {bits.dtype} and shape {tuple(bits.shape)}; pass "
            "a bitmap of uint8: numpy.packbits(valid, bitorder='little')"
        )
        raise TypeError(msg)
    need = -(-(bit + values.shape[0]) // 8)
    if bit < 0 or bits.shape[0] < need:
        msg = (
            f"the validity of {label} has {bits.shape[0]} bytes, but {values.shape[0]} rows from "
            f"bit {bit} on need {max(need, 0)}; pass numpy.packbits(valid, bitorder='little')"
        )
        raise ValueError(msg)
    return Column(values, bits if bits.strides[0] == 1 else bits.copy(), bit)


def result_dtype(columns: Sequence[Column], dtype: Any, out: Any = None) -> str:
    """Name of the result's dtype: the one asked for, or out's, or what the columns say."""
    names = {_rules.dtype_name(column.values.dtype) for column in columns}
    name = "float64" if "float64" in names else "float32"
    if dtype is None:
        return name if out is None else _rules.dtype_name(getattr(out, "dtype", name))
    name = _rules.name_of_dtype(dtype)
    if name not in _rules.ITEMSIZE:
        choices = ", ".join(_rules.ITEMSIZE)
        msg = f"dtype={dtype!r} is no float of 16 to 64 bits; pass one of {choices}"
        raise TypeError(msg)
    return name


def _checked_out(
    out: Any, shape: tuple[int, int], name: str, columns: list[Column], affine: tuple[Any, Any]
) -> Any:
    """Check `out` whole before anything is written to it."""
    y = _calls.companion_of("out", out, columns[0].values)
    if tuple(y.shape) != shape:
        msg = f"out has shape {tuple(y.shape)}, but the result has shape {shape}; make it that"
        raise ValueError(msg)
    if _rules.dtype_name(y.dtype) != name or name not in _rules.ITEMSIZE:
        wanted = name if name in _rules.ITEMSIZE else "a float of 16 to 64 bits"
        msg = f"out has dtype {y.dtype}, but the result is {wanted}; drop dtype=, or make it that"
        raise ValueError(msg)
    _libraries.check_writable("out", y)
    others = list(zip(("weight", "bias"), affine, strict=True))
    for j, column in enumerate(columns):
        others += [(f"columns[{j}]", part) for part in column[:2]]
    for label, other in others:
        if other is not None:
            _libraries.check_overlap(label, other, y, same_allowed=False)
    return y
