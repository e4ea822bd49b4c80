"""Columns, also those of a table, to one normalized matrix: their rules, and the two calls."""

from collections.abc import Iterable, Mapping, Sequence
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
    columns : sequence of N columns, or table
        Each column an array of M elements, NumPy or CuPy, all of one library: bool, integers,
        float16, bfloat16, float32 or float64, any stride and byte order. One with nulls is a pair
        ``(values, validity)``: uint8, Arrow's bitmap, in which bit ``i % 8`` of byte ``i // 8``
        (the least significant first) is 1 where row i is valid; or a triple ``(values, validity,
        offset)``, whose row i has bit ``i + offset``; or a Series of pandas, polars or cuDF, or an
        array of Arrow. A table of one of these libraries stands for its columns.
    weight, bias, eps : optional
        As for `layer_norm`, of shape (N,).
    dtype : dtype, optional
        Of the result. By default float32, and float64 where a column is float64 or an integer of
        32 or 64 bits, which float32 does not hold.
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
    result is float64. Where integers are beyond 2^24 (2^53), a number of each row is taken off all
    of it before, exactly, so that differences are not lost; on a GPU they are rounded. The formula
    is that of Ba, Kiros and Hinton (2016), arXiv:1607.06450; a row's bits depend on that row alone.
    On a GPU each call uploads the columns' addresses, so it cannot be replayed from a CUDA graph.

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
    columns, weight : optional
        As for `layer_norm_columns`.
    eps : float, optional
        As for `rms_norm`; the result's dtype stands for x's.
    dtype, out, nulls : optional
        As for `layer_norm_columns`, errors too.
    zero_centered_weight : bool, default False
        As for `rms_norm`.

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
    if op.center:
        columns = _about_pivots(columns, _rules.stats_dtype(name))
    x, omit, new = (
        columns[0].values,
        nulls == "omit",
        ((x.shape[0], N), _rules.numpy_dtype(name), order),
    )
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
            arrays.normalize_columns(op, *parts, (weight, bias), y, eps=eps, omit=omit)
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
    if isinstance(columns, (str, bytes, Mapping)) or not isinstance(columns, Sequence):
        kind = type(columns).__name__
        msg = f"columns is a {kind}, not a sequence of 1-D arrays; pass {_as_list(columns)}"
        raise TypeError(msg)
    if not columns:
        msg = "columns is empty, so there is no row to normalize; pass at least one column"
        raise ValueError(msg)
    ready: list[Column] = []
    for j, item in enumerate(columns):
        label = f"columns[{j}]"
        parts = item if isinstance(item, tuple) else tables.column(label, item) or (item,)
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


def _as_list(columns: Any) -> str:
    """How a list is made of what is none, in words that run."""
    ndim, at = getattr(columns, "ndim", None), "columns"
    if isinstance(columns, Mapping):
        return "list(columns.values())"
    for method in ("collect", "compute", "toarray"):  # of polars, Dask, SciPy
        if hasattr(columns, method):
            at = f"columns.{method}()"
            if not isinstance(ndim, int) or hasattr(columns, "columns"):
                return at  # a table
    if ndim == 2:
        return f"list({_libraries.on_host(at, columns)}.T)"
    if ndim == 1 or tables.library(columns, tables.COLUMNS):
        return f"[{at}]"
    more = isinstance(columns, Iterable) and not isinstance(columns, (str, bytes))
    return "list(columns)" if more else "a list of arrays, e.g. [numpy.zeros(3)]"


def _check_values(label: str, x: Any, first: Any) -> None:
    if _libraries.library_of(x) not in ("numpy", "cupy"):
        msg = (
            f"{label} is a {_libraries.kind_of(x)}; columns are NumPy or CuPy "
            f"arrays. Pass {_libraries.on_host(label, x)} (cupy.from_dlpack on a GPU)"
        )
        raise TypeError(msg)
    name = _rules.dtype_name(x.dtype)
    if name not in _NUMBERS:
        msg = (
            f"{label} has dtype {name}; a column is bool, integer, or a float of 16 to 64 bits. "
            f"Cast it first: {_libraries.cast_of(label, x)}"
        )
        raise TypeError(msg)
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
    if dtype is not None:
        return _rules.read_dtype(dtype)
    wide = {"float64", "int32", "int64", "uint32", "uint64"}
    held = wide.isdisjoint(_rules.dtype_name(column.values.dtype) for column in columns)
    name = "float32" if held else "float64"
    return name if out is None else _rules.dtype_name(getattr(out, "dtype", name))


def _about_pivots(columns: list[Column], dtype: str) -> list[Column]:
    """Take a number of each row off all of it, where integers are beyond what `dtype` tells apart.

    It is the first of the row's integer columns, in a row that has such an integer, else 0.
    """
    far = [c for c in columns if is_far(c.values, dtype)]
    if not far:
        return columns
    due, at = False, np.zeros((2, far[0].values.size))
    for c in far:
        due = due | (_beyond(c.values, dtype) & _valid(c))
    for c in reversed(far):
        at = np.where(due & _valid(c), _halves(c.values), at)
    with np.errstate(all="ignore"):
        return [c._replace(values=_less(c.values, at)) for c in columns]


def _valid(c: Column) -> Any:
    """Which rows of a NumPy column are no null."""
    if c.validity is None:
        return np.True_
    return np.unpackbits(c.validity, bitorder="little")[c.offset : c.offset + c.values.size] == 1


def _beyond(x: Any, dtype: str) -> Any:
    limit = 2**53 if dtype == "float64" else 2**24
    return (x > limit) | (x < -limit)


def is_far(x: Any, dtype: str) -> bool:
    """Whether an array holds integers that a float of `dtype` does not tell from each other."""
    size = 4 if dtype == "float64" else 2
    known = isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.itemsize > size
    return known and bool(_beyond(x, dtype).any())


def _halves(x: Any) -> Any:
    """The upper and the lower 32 bits of integers, exact in float64."""
    wide = x if x.dtype.kind == "u" and x.itemsize == 8 else x.astype(np.int64)
    return np.stack([(wide >> 32).astype(np.float64), (wide & 0xFFFFFFFF).astype(np.float64)])


def _less(x: Any, at: Any) -> Any:
    """Values less the integers of which `at` has the halves."""
    if x.dtype.kind in "iu":
        high, low = _halves(x) - at
        return high * 2.0**32 + low
    return (x.astype(np.float64) - at[0] * 2.0**32) - at[1]


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
