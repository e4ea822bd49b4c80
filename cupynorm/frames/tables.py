"""Tables of pandas, polars, Arrow and cuDF: their columns as arrays, and a table over a matrix.

No library is imported before a table of it has come.
"""

import re
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
TABLES, COLUMNS = ("DataFrame", "Table", "RecordBatch"), ("Series", "Array", "ChunkedArray")


def library(x: Any, kinds: tuple[str, ...] = TABLES) -> str:
    """'pandas', 'polars', 'pyarrow' or 'cudf' if x is a table of it, or of a subclass."""
    for base in type(x).__mro__:
        origin = base.__module__.partition(".")[0]
        if base.__name__ in kinds and origin in _ADAPTERS:
            return origin
    return ""


def names(table: Any) -> list[Any]:
    """Names of a table's columns."""
    return [name for name, _ in _ADAPTERS[library(table)].named(table)]


def read(table: Any) -> list[Column]:
    """Columns as `layer_norm_columns` takes them, sharing the table's memory where possible."""
    adapter = _ADAPTERS[library(table)]
    named = list(adapter.named(table))
    refused = [(name, x) for name, x in named if not adapter.is_number(_dtype(x))]
    if refused:
        told = ", ".join(f"{name!r} ({_dtype(x)})" for name, x in refused[:5])
        told += f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        made = _ways_out(adapter, named, refused)
        msg = f"columns {told} are not numeric; pass {made}"
        raise TypeError(msg)
    if not named:
        msg = (
            f"the table has shape {tuple(table.shape)}: no column, so no row to normalize; pass "
            "one with at least one column"
        )
        raise ValueError(msg)
    return [adapter.column(x) for _, x in named]


def column(label: str, x: Any) -> Column | None:
    """Column that is a Series, or an array of Arrow; None where x is neither."""
    adapter = _ADAPTERS.get(library(x, COLUMNS))
    if adapter is None:
        return None
    if not adapter.is_number(_dtype(x)):
        made = _number_of(adapter, label, x) or "numbers"
        msg = f"{label} has dtype {_dtype(x)}, which is not numeric; pass {made}"
        raise TypeError(msg)
    return adapter.column(x)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else x.type


def _number_of(adapter: "_Adapter", at: str, x: Any) -> str:
    """How numbers are made of a column, '' where nobody can tell."""
    dtype = str(_dtype(x)).lower()
    if dtype == "object" and adapter.numbers is _PANDAS:
        types = import_module("pandas").api.types
        dtype = types.infer_dtype(x) if all(map(types.is_hashable, x)) else "list"
    return next((way.format(at) for kind, way in adapter.numbers if re.match(kind, dtype)), "")


def _ways_out(adapter: "_Adapter", named: list[Any], refused: list[Any]) -> str:
    """How to leave columns out, and how to make numbers of them, in the words of the library."""
    out = [name for name, _ in refused]
    left = [name for name, x in named if adapter.is_number(_dtype(x))]
    ways = []
    if left:
        few = adapter.keep.format(left) if len(left) < len(out) else adapter.drop.format(out)
        ways = [few + ", which leaves them out"]
    made = {name: _number_of(adapter, adapter.at.format(name), x) for name, x in refused}
    if len(refused) <= 5 and all(made.values()) and all(isinstance(name, str) for name in out):
        ways.append(adapter.replaced(made) + ", which makes numbers of them")
    return ", or ".join(ways) or "columns of numbers"


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


def _build_arrow(table: Any, y: Any) -> Any:
    """Table, or batch, of a table's names and metadata, but pandas', over the columns of y."""
    arrow = import_module("pyarrow")
    made = [arrow.array(np.ascontiguousarray(column)) for column in y.T]
    kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != b"pandas"}
    return type(table).from_arrays(made, table.schema.names, metadata=kept)


# --- pandas -------------------------------------------------------------------------------------


def _is_pandas_number(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biuf" and dtype.itemsize <= 8
    if hasattr(dtype, "pyarrow_dtype"):
        return str(dtype.pyarrow_dtype) in ARROW
    # Int8 to UInt64, Float32, Float64, boolean. Sparse and categorical dtypes have such kinds too,
    # and hold other arrays.
    return hasattr(dtype, "numpy_dtype") and dtype.kind in "biuf" and str(dtype)[0] in "IUFb"


def _pandas_column(series: Any) -> Column:
    if isinstance(series.dtype, np.dtype):
        return (series.to_numpy(),)
    array = series.array
    if hasattr(series.dtype, "pyarrow_dtype"):
        return read_arrow(array.__arrow_array__())
    values = getattr(array, "_data", None)  # what is under a mask has no public name
    if not isinstance(values, np.ndarray):
        values = array.to_numpy(dtype=series.dtype.numpy_dtype, na_value=0)
    missing = array.isna()
    return (values, np.packbits(~missing, bitorder="little")) if missing.any() else (values,)


def _build_pandas(df: Any, y: Any) -> Any:
    """Frame of df's class, index, columns and attrs whose one block is y."""
    result = df._constructor(y, index=df.index, columns=df.columns, copy=False)
    return result.__finalize__(df, method="layer_norm")


# --- polars -------------------------------------------------------------------------------------


def _polars_column(series: Any) -> Column:
    """Over the series' own memory; without pyarrow some are copied."""
    if find_spec("pyarrow") is not None:
        return read_arrow(series.rechunk().to_arrow())
    if str(series.dtype) == "Boolean":
        series = series.cast(import_module("polars").UInt8)
    values = np.asarray(series.fill_null(0).to_numpy())
    if not series.null_count():
        return (values,)
    return values, np.packbits(series.is_not_null().to_numpy(), bitorder="little")


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


def _cudf_column(series: Any) -> Column:
    """Over the series' own memory, with cuDF's bitmap, which is Arrow's."""
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


# --- what differs -------------------------------------------------------------------------------

Numbers = tuple[tuple[str, str], ...]  # what dtypes begin with, and how numbers are made of such


class _Adapter(NamedTuple):
    named: Callable[[Any], Any]  # names and columns of a table
    is_number: Callable[[Any], bool]  # of a column's dtype
    column: Callable[[Any], Column]
    build: Callable[[Any, Any], Any]
    numbers: Numbers
    replaced: Callable[[dict[str, str]], str]  # the table with columns made new
    at: str = "df[{!r}]"
    drop: str = "df.drop(columns={})"
    keep: str = "df[{}]"


def _assigned(made: dict[str, str]) -> str:
    items = ", ".join(f"{name!r}: {way}" for name, way in made.items())
    return f"df.assign(**{{{items}}})"


def _set_columns(made: dict[str, str]) -> str:
    at = "df.schema.get_field_index({!r})"
    return "df" + "".join(f".set_column({at.format(k)}, {k!r}, {v})" for k, v in made.items())


_CODES = "{0}.astype('category').cat.codes"
_PANDAS: Numbers = (
    ("list|struct|map", ""),
    ("timedelta|duration", "{0}.dt.total_seconds()"),
    ("datetime|timestamp|date", "({0} - {0}.min()).dt.total_seconds()"),
    ("complex", "abs({0})"),
    (r"sparse\[(bool|u?int|float)", "{0}.sparse.to_dense()"),
    ("float|decimal|integer|boolean", "{0}.astype('float64')"),
    ("", _CODES),
)
_POLARS_WAYS: Numbers = (
    ("decimal|u?int128|null", "{0}.cast(polars.Float64)"),
    ("date|duration|time|enum|categorical", "{0}.to_physical()"),
    ("string", "{0}.cast(polars.Categorical).to_physical()"),
)
_ARROW_WAYS: Numbers = (
    ("decimal|null", "{0}.cast('float64')"),
    ("date32|time32", "{0}.cast('int32')"),
    ("date64|time|duration", "{0}.cast('int64')"),
    ("string|large_string|binary|large_binary", "pyarrow.compute.rank({0}, tiebreaker='dense')"),
)
_CUDF: Numbers = (
    ("timedelta|datetime", "{0}.astype('int64')"),
    ("decimal", "{0}.astype('float64')"),
    ("object|str|category", _CODES),
)
_ADAPTERS = {
    "pandas": _Adapter(
        lambda df: df.items(), _is_pandas_number, _pandas_column, _build_pandas, _PANDAS, _assigned
    ),
    "polars": _Adapter(
        lambda df: [(series.name, series) for series in df.get_columns()],
        lambda dtype: str(dtype) in _POLARS,
        _polars_column,
        _build_polars,
        _POLARS_WAYS,
        lambda made: f"df.with_columns({', '.join(made.values())})",
        "polars.col({!r})",
        "df.drop({})",
        "df.select({})",
    ),
    "pyarrow": _Adapter(
        lambda table: zip(table.schema.names, table.columns, strict=True),
        lambda dtype: str(dtype) in ARROW,
        read_arrow,
        _build_arrow,
        _ARROW_WAYS,
        _set_columns,
        drop="df.drop_columns({})",
        keep="df.select({})",
    ),
    "cudf": _Adapter(
        lambda df: df.items(), _is_cudf_number, _cudf_column, _build_cudf, _CUDF, _assigned
    ),
}
