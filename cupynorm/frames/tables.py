"""Tables of pandas, polars and cuDF: their columns as arrays, and a table over a matrix.

No library is imported before a table of it has come.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

# Arrow's and polars' names of numbers; Arrow's with the dtypes of their buffers.
_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
ARROW = {"bool": "bool", "halffloat": "float16", "float": "float32", "double": "float64"}
ARROW |= {name: name for name in _INTEGERS}
_POLARS = {"Boolean", "Float16", "Float32", "Float64"}
_POLARS |= {name.replace("uint", "UInt").replace("int", "Int") for name in _INTEGERS}

Column = tuple[Any, ...]  # values; or values and Arrow's bitmap; or those and row 0's bit in it


def library(x: Any) -> str:
    """'pandas', 'polars' or 'cudf' if x is a DataFrame, or of a subclass, of that library."""
    for base in type(x).__mro__:
        origin = base.__module__.partition(".")[0]
        if base.__name__ == "DataFrame" and origin in _ADAPTERS:
            return origin
    return ""


def read(table: Any) -> list[Column]:
    """Columns as `layer_norm_columns` takes them, sharing the table's memory where possible."""
    adapter = _ADAPTERS[library(table)]
    typed = zip(table.columns, table.dtypes, strict=True)
    refused = [(name, dtype) for name, dtype in typed if not adapter.is_number(dtype)]
    if refused:
        named = ", ".join(f"{name!r} ({dtype})" for name, dtype in refused[:5])
        named += f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        msg = f"columns {named} are not numeric; leave them out: {adapter.numeric}"
        raise TypeError(msg)
    columns = adapter.read(table)
    if not columns:
        msg = (
            f"the table has shape {tuple(table.shape)}: no column, so no row to normalize; pass "
            "one with at least one column"
        )
        raise ValueError(msg)
    return columns


def build(table: Any, y: Any) -> Any:
    """Give y (M, N) as a table with the index, names and class of `table`, sharing y's memory."""
    return _ADAPTERS[library(table)].build(table, y)


# --- Arrow --------------------------------------------------------------------------------------


def read_arrow(data: Any) -> Column:
    """Column of a pyarrow Array or ChunkedArray of a type of `ARROW`.

    Nothing is copied but what lies in more than one chunk, and bools, which Arrow packs to bits.
    """
    if hasattr(data, "chunks"):
        chunks = [chunk for chunk in data.chunks if len(chunk)]
        if not chunks:
            return (np.empty(0, ARROW[str(data.type)]),)
        join = import_module("pyarrow").concat_arrays
        data = chunks[0] if len(chunks) == 1 else join(chunks)
    validity, buffer = data.buffers()
    first, size = data.offset, len(data)
    if str(data.type) == "bool":
        bits = np.frombuffer(buffer, np.uint8)[first // 8 : (first + size + 7) // 8]
        unpacked = np.unpackbits(bits, bitorder="little")
        values = unpacked[first % 8 : first % 8 + size].view(np.bool_)
    else:
        values = np.frombuffer(buffer, ARROW[str(data.type)])[first : first + size]
    if validity is None or data.null_count == 0:
        return (values,)
    return values, np.frombuffer(validity, np.uint8), first


# --- pandas -------------------------------------------------------------------------------------


def _is_pandas_number(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biuf" and dtype.itemsize <= 8
    if hasattr(dtype, "pyarrow_dtype"):
        return str(dtype.pyarrow_dtype) in ARROW
    # Int8 to UInt64, Float32, Float64, boolean. Sparse and categorical dtypes have such kinds too,
    # and hold other arrays.
    return hasattr(dtype, "numpy_dtype") and dtype.kind in "biuf" and str(dtype)[0] in "IUFb"


def _read_pandas(df: Any) -> list[Column]:
    return [_pandas_column(series) for _, series in df.items()]


def _pandas_column(series: Any) -> Column:
    if isinstance(series.dtype, np.dtype):
        return (series.to_numpy(),)
    array = series.array
    if hasattr(series.dtype, "pyarrow_dtype"):
        return read_arrow(array.__arrow_array__())
    values = getattr(array, "_data", None)  # what is under a mask has no public name
    if not isinstance(values, np.ndarray):
        return (array.to_numpy(dtype=np.float64, na_value=np.nan),)
    missing = array.isna()
    return (values, np.packbits(~missing, bitorder="little")) if missing.any() else (values,)


def _build_pandas(df: Any, y: Any) -> Any:
    """Frame of df's class, index, columns and attrs whose one block is y."""
    result = df._constructor(y, index=df.index, columns=df.columns, copy=False)
    return result.__finalize__(df, method="layer_norm")


# --- polars -------------------------------------------------------------------------------------


def _is_polars_number(dtype: Any) -> bool:
    return str(dtype) in _POLARS


def _read_polars(df: Any) -> list[Column]:
    """Columns over the frame's own memory; without pyarrow some are copied."""
    columns = df.get_columns()
    if find_spec("pyarrow") is not None:
        return [read_arrow(series.rechunk().to_arrow()) for series in columns]
    byte = import_module("polars").UInt8
    plain = [s.cast(byte) if str(s.dtype) == "Boolean" else s for s in columns]
    # Nulls become NaN there, in float64 where they stand among integers.
    return [(np.asarray(series.to_numpy()),) for series in plain]


def _build_polars(df: Any, y: Any) -> Any:
    """Frame of df's column names over the columns of y; a row-major y is copied."""
    polars = import_module("polars")
    columns = list(y.T)
    if find_spec("pyarrow") is not None:  # polars itself copies NumPy's memory, but not Arrow's
        array = import_module("pyarrow").array
        columns = [array(np.ascontiguousarray(column)) for column in columns]
    named = [polars.Series(name, x) for name, x in zip(df.columns, columns, strict=True)]
    return polars.DataFrame(named)


# --- cuDF ---------------------------------------------------------------------------------------


class _Memory:
    """Device memory as `__cuda_array_interface__` shows it, with its owner kept alive."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__cuda_array_interface__ = interface
        self.owner = owner


def _is_cudf_number(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biuf"


def _read_cudf(df: Any) -> list[Column]:
    """Columns over the frame's own memory, with cuDF's bitmap, which is Arrow's."""
    return [_cudf_column(series) for _, series in df.items()]


def _cudf_column(series: Any) -> Column:
    interface = dict(series.__cuda_array_interface__)
    mask = interface.pop("mask", None)  # CuPy refuses arrays that have one
    values = _Memory(interface, series)
    if mask is None:
        return (values,)
    bits = dict(mask.__cuda_array_interface__)  # one element per bit, typestr "<t1"
    bits |= {"shape": (-(-len(series) // 8),), "typestr": "|u1", "strides": None, "version": 3}
    return values, _Memory(bits, (series, mask))


def _build_cudf(df: Any, y: Any) -> Any:
    """Frame of df's index and columns over y, column-major: cuDF transposes a row-major one."""
    frame = import_module("cudf").DataFrame
    # By default cuDF makes nulls of NaN, at the cost of another pass.
    result = frame(y, index=df.index, columns=df.columns, nan_as_null=False)
    if getattr(df, "attrs", None):
        result.attrs = dict(df.attrs)
    return result


class _Adapter(NamedTuple):
    is_number: Callable[[Any], bool]  # of a column's dtype
    read: Callable[[Any], list[Column]]
    build: Callable[[Any, Any], Any]
    numeric: str = "df.select_dtypes(['number', 'bool'])"  # how to leave the other columns out


_ADAPTERS = {
    "pandas": _Adapter(_is_pandas_number, _read_pandas, _build_pandas),
    "polars": _Adapter(
        _is_polars_number,
        _read_polars,
        _build_polars,
        "df.select(polars.selectors.numeric() | polars.selectors.boolean())",
    ),
    "cudf": _Adapter(_is_cudf_number, _read_cudf, _build_cudf),
}
