"""The argument rules of layer norm over columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import companion_of
from cupynorm._arrays import check_overlap, check_writable, classify
from cupynorm._cpu.columns import Column

__all__ = ["checked_affine", "checked_out", "gather", "result_dtype"]

_NUMBERS = frozenset(_problem.ITEMSIZE) | {"bool"}
_NUMBERS |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def gather(columns: Any) -> tuple[str, list[Column]]:
    """Check the columns; give their path, 'numpy' or 'cupy', and all of them in one form."""
    if isinstance(columns, (str, Mapping)) or not isinstance(columns, Sequence):
        hint = "list(columns.T)" if getattr(columns, "ndim", 0) == 2 else "a list"
        hint = "list(columns.values())" if isinstance(columns, Mapping) else hint
        msg = f"columns is a {type(columns).__name__}, not a sequence of 1-D arrays; pass {hint}"
        raise TypeError(msg)
    if not columns:
        msg = "columns is empty, so there is no row to normalize; pass at least one column"
        raise ValueError(msg)
    path, first = "", None
    ready: list[Column] = []
    for j, item in enumerate(columns):
        label, parts = f"columns[{j}]", item if isinstance(item, tuple) else (item,)
        if not 1 <= len(parts) <= 3:
            msg = f"{label} is a tuple of {len(parts)}; pass (values, validity) or values alone"
            raise ValueError(msg)
        if first is None:
            path = _path(parts[0], label)
        values = companion_of(label, parts[0], parts[0] if first is None else first)
        first = values if first is None else first
        _check_values(label, values, first)
        ready.append(_with_validity(label, values, *parts[1:]))
    return path, ready


def _path(x: Any, label: str) -> str:
    x, path = classify(x, label)
    if path == "namespace":
        msg = (
            f"{label} is a {type(x).__module__}.{type(x).__qualname__}; columns are NumPy or CuPy "
            f"arrays. Pass numpy.from_dlpack({label}) (cupy.from_dlpack on a GPU), which shares "
            "its memory"
        )
        raise TypeError(msg)
    return "numpy" if path == "numpy" else "cupy"


def _check_values(label: str, x: Any, first: Any) -> None:
    name = _problem.dtype_name(x.dtype)
    if name not in _NUMBERS:
        msg = f"{label} has dtype {name}; a column is bool, integer, or a float of 16 to 64 bits. "
        raise TypeError(msg + _way_out(label, x.dtype))
    if x.ndim != 1:
        msg = f"{label} has shape {tuple(x.shape)}; a column is 1-D: pass {label}.reshape(-1)"
        raise ValueError(msg)
    if x.shape != first.shape:
        msg = (
            f"{label} has {x.shape[0]} elements, but columns[0] has {first.shape[0]}; pass "
            "columns of one length"
        )
        raise ValueError(msg)


def _way_out(label: str, dtype: Any) -> str:
    ways = {
        "M": f"Say what number a date is, e.g. {label}.astype('int64')",
        "m": f"Say in which unit, e.g. {label} / numpy.timedelta64(1, 's')",
        "c": f"Take its parts, {label}.real and {label}.imag, or numpy.abs({label})",
        "O": f"Cast it first: {label}.astype('float64'), or leave it out",
        "f": f"Cast it first: {label}.astype('float64')",
    }
    return ways.get(getattr(dtype, "kind", ""), f"Encode {label} as numbers, or leave it out")


def _with_validity(label: str, values: Any, validity: Any = None, offset: Any = 0) -> Column:
    if validity is None:
        return Column(values)
    (bit,) = _problem.integers(offset, f"the offset of {label}") or (0,)
    bits = companion_of(f"the validity of {label}", validity, values)
    if _problem.dtype_name(bits.dtype) != "uint8" or bits.ndim != 1:
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
    if bits.strides[0] != 1:
        bits = bits.copy()
    return Column(values, bits, bit)


def checked_affine(label: str, value: Any, x: Any, N: int) -> Any:
    """Check a weight or bias of N columns."""
    value = companion_of(label, value, x)
    name = _problem.dtype_name(value.dtype)
    _problem.check_affine_dtype(label, name, f"{label}.astype('float32')")
    _problem.check_affine_shape(label, tuple(value.shape), (N,))
    return value


def result_dtype(columns: list[Column], dtype: Any, out: Any) -> str:
    """Name of the result's dtype: the one asked for, or out's, or what the columns say."""
    names = {_problem.dtype_name(column.values.dtype) for column in columns}
    name = "float64" if "float64" in names else "float32"
    if dtype is None:
        return name if out is None else _problem.dtype_name(getattr(out, "dtype", name))
    try:
        named = isinstance(dtype, str) and dtype in _problem.ITEMSIZE
        name = dtype if named else _problem.dtype_name(np.dtype(dtype))
    except TypeError:
        name = _problem.dtype_name(dtype)  # of another library, or no dtype at all
    if name not in _problem.ITEMSIZE:
        choices = ", ".join(_problem.ITEMSIZE)
        msg = f"dtype={dtype!r} is no float of 16 to 64 bits; pass one of {choices}"
        raise TypeError(msg)
    return name


def checked_out(
    out: Any, shape: tuple[int, int], name: str, columns: list[Column], weight: Any, bias: Any
) -> Any:
    """Check `out` whole before anything is written to it."""
    y = companion_of("out", out, columns[0].values)
    if tuple(y.shape) != shape:
        msg = f"out has shape {tuple(y.shape)}, but the result has shape {shape}; make it that"
        raise ValueError(msg)
    if _problem.dtype_name(y.dtype) != name or name not in _problem.ITEMSIZE:
        wanted = name if name in _problem.ITEMSIZE else "a float of 16 to 64 bits"
        msg = f"out has dtype {y.dtype}, but the result is {wanted}; drop dtype=, or make it that"
        raise ValueError(msg)
    check_writable(y)
    others = [("weight", weight), ("bias", bias)]
    for j, column in enumerate(columns):
        others += [(f"columns[{j}]", column.values), (f"columns[{j}]", column.validity)]
    for label, other in others:
        if other is not None:
            check_overlap(label, other, y, same_allowed=False)
    return y
