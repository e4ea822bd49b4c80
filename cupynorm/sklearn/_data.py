"""What an estimator is given and what it gives back: kinds of data, checks, conversions."""

from importlib import import_module
from typing import Any

import numpy as np

from cupynorm import _calls, _libraries, _rules, dask, frames
from cupynorm._libraries import cast_of, check_values, classify, library_of, to_host
from cupynorm.frames import tables
from cupynorm.frames.columns import Column, as_matrix, gather


def check_kind(X: Any) -> None:
    """Refuse what would first have to be computed, made dense or filled in."""
    if isinstance(X, np.ma.MaskedArray) or type(X).__name__ == "LazyFrame":
        classify(X, "X")
    if dask.is_collection(X):
        msg = (
            f"X is a {_libraries.kind_of(X)}, and scikit-learn's checks would "
            "compute it; call cupynorm.layer_norm(X), which is lazy, or X.compute() first"
        )
        raise TypeError(msg)
    if _is_sparse(X):
        ways = {"sparse": "X.sparse.to_dense()", "to_dense": "X.to_dense()"}
        ways["toarray"] = "X.toarray()"
        dense = next((way for name, way in ways.items() if hasattr(X, name)), "X.todense()")
        msg = (
            f"X is sparse ({_libraries.kind_of(X)}): subtracting each row's "
            f"mean would make it dense. Pass {dense} if that fits into memory, or scale without "
            "centering, e.g. by sklearn.preprocessing.Normalizer"
        )
        raise TypeError(msg)
    if library_of(X) == "torch":
        check_values("X", X)


def _is_sparse(X: Any) -> bool:
    if library := tables.library(X):
        # scikit-learn makes a frame dense if only some of its columns are sparse
        kinds = {type(dtype).__name__ for dtype in X.dtypes} if library == "pandas" else set()
        return kinds == {"SparseDtype"}
    # SciPy and CuPy; PyData and JAX; torch, whose dense layout is torch.strided.
    by_module = ".sparse" in f".{type(X).__module__}"
    return hasattr(X, "tocsr") or by_module or "sparse" in str(getattr(X, "layout", ""))


def is_foreign(X: Any) -> bool:
    """Whether X is an array that scikit-learn would turn into one of NumPy, or refuse."""
    if isinstance(X, np.ndarray):
        return bool(X.dtype.name == "bfloat16")  # which would become float64
    if isinstance(X, np.generic) or frames.is_table(X):
        return False
    from array_api_compat import is_array_api_obj

    return bool(is_array_api_obj(X)) or hasattr(X, "__cuda_array_interface__")


def columns_of(X: Any, what: str) -> list[Column] | None:
    """Columns of a table of numbers; None if X is none that can be read as it lies."""
    library = tables.library(X)
    if not library:
        return None
    _check_shape(X, what)
    try:
        return gather(tables.read(X))
    except TypeError:  # objects, strings: scikit-learn converts pandas', or says why not
        if library != "pandas":
            raise
        return None


def floats_of(columns: list[Column]) -> str:
    """Name of the float that holds all columns, by NumPy's promotion; no float gives float64."""
    name = np.result_type(*{column.values.dtype for column in columns}).name
    return name if name in _rules.ITEMSIZE else "float64"


def as_floats(X: Any, what: str) -> Any:
    """Check an array's shape and bring it to a float dtype, in its library, on its device."""
    X = _calls.take_in("X", X)
    if X.ndim != 2:
        msg = (
            f"Expected 2D array, got {X.ndim}D array instead (shape {tuple(X.shape)}). Reshape "
            "your data: X.reshape(-1, 1) for a single feature, X.reshape(1, -1) for a single sample"
        )
        raise ValueError(msg)
    _check_shape(X, what)
    dtype = _rules.dtype_name(X.dtype)
    if dtype in _rules.ITEMSIZE:
        return X
    if dtype.startswith("complex"):
        msg = (
            f"Complex data not supported: X has dtype {X.dtype}; pass abs(X), or X.real and X.imag"
        )
        raise ValueError(msg)
    from array_api_compat import array_namespace, device

    xp = array_namespace(X)
    if not xp.isdtype(X.dtype, ("bool", "integral")):
        _rules.check_x_dtype(dtype, cast_of("X", X), what)
    floats = xp.__array_namespace_info__().dtypes(device=device(X), kind="real floating")
    if "float64" in floats or dtype not in ("int32", "uint32"):
        return xp.astype(X, floats.get("float64", xp.float32))
    # JAX by default, and some GPUs, have no float64. Less the first of a row, by halves, integers
    # keep their differences.
    halves = (xp.astype(half, xp.float32) for half in (X >> 16, X & 0xFFFF))
    high, low = (half - half[:, :1] for half in halves)
    return high * 65536.0 + low


def _check_shape(X: Any, what: str) -> None:
    for n, name in zip(X.shape, ("sample", "feature"), strict=True):
        if not n:
            msg = (
                f"Found array with 0 {name}(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
                f"required by {what}. Pass at least one {name}"
            )
            raise ValueError(msg)


_WAY_OUT = (
    "{what} does not accept missing values, as one would make all of its row NaN: impute them, "
    "e.g. by sklearn.impute.SimpleImputer, or drop such rows"
)


def refuse_not_finite(X: Any, what: str) -> None:
    """Refuse an array that holds NaN or infinity."""
    if not _is_finite(X):
        msg = f"Input X contains NaN or infinity. {_WAY_OUT.format(what=what)}"
        raise ValueError(msg)


def refuse_bad_columns(X: Any, columns: list[Column], what: str) -> None:
    """Refuse a table that holds NaN, infinities or nulls, and name such columns."""
    matrix = as_matrix(columns)
    if matrix is not None and _is_finite(matrix):  # columns of a matrix are slow to run down
        return
    bad = [name for name, c in zip(tables.names(X), columns, strict=True) if not _is_finite(*c)]
    if bad:
        named = ", ".join(repr(name) for name in bad[:5])
        named += f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        msg = (
            f"Input X contains NaN, infinity or nulls in {named}. {_WAY_OUT.format(what=what)}; "
            "cupynorm.frames.layer_norm(X, nulls='omit') leaves missing values out"
        )
        raise ValueError(msg)


def _is_finite(values: Any, validity: Any = None, offset: int = 0) -> bool:
    """Whether no NaN, infinity or null is among the values."""
    if validity is None and _rules.dtype_name(values.dtype) not in _rules.ITEMSIZE:
        return True
    from array_api_compat import array_namespace

    xp = array_namespace(values)
    if validity is not None:
        bits = xp.unpackbits(validity, bitorder="little")[offset : offset + values.shape[0]]
        return bool(xp.all(bits)) and _is_finite(values)
    with np.errstate(over="ignore", invalid="ignore"):
        if bool(xp.isfinite(xp.sum(values))):  # needs no array of bools to be written and read
            return True
    return bool(xp.all(xp.isfinite(values)))


def may_overwrite(X: Any) -> bool:
    """Whether a result may be written into X: what its library, and autograd, can follow."""
    if library_of(X) == "torch":
        return not X.requires_grad
    return library_of(X) in ("numpy", "cupy")


def convert(y: Any, kind: str | None, X: Any, names: Any) -> Any:
    """Give y (M, N), the result in the library that computed it, as the `output_type` asked for.

    None stands for 'input' if X is a table of cuDF, whose users expect it, and else for y as it is.
    A table takes index and names of X if that is one, else `names`.
    """
    table = tables.library(X)
    if kind is None and table != "cudf":
        return y
    if table and kind in (None, "input", table):
        return tables.build(X, y)
    if kind == "numpy":
        return to_host(y)
    if kind == "cupy":
        return _to_cupy(y)
    if kind == "input":
        return y
    with _libraries.needing(f"output_type={kind!r} needs {kind}", "leave output_type out"):
        frame = import_module(str(kind)).DataFrame
    index: Any = getattr(X, "index", None) if table else None  # polars has none
    names = tables.names(X) if table else names
    if kind == "cudf":  # which by default makes nulls of NaN, at the cost of another pass
        return frame(_to_cupy(y), index=index, columns=names, nan_as_null=False)
    index = index.to_pandas() if hasattr(index, "to_pandas") else index
    return frame(to_host(y), index=index, columns=names, copy=False)


def _to_cupy(y: Any) -> Any:
    if library_of(y) == "cupy":
        return y
    with _calls.gpu("output_type='cupy'") as arrays:
        if library_of(y) == "torch" and y.is_cuda:
            return arrays.from_exporter(y.detach())
        y = np.ascontiguousarray(to_host(y))
        made = arrays.empty(y.shape, dtype=y.dtype)
        made.set(y)
        return made
