"""Tables of any library: their columns as arrays with bitmaps, and a table of results."""

from importlib import import_module
from typing import Any

__all__ = ["build", "library", "read"]

_LIBRARIES = ("pandas", "polars", "cudf")


def library(x: Any) -> str | None:
    """'pandas', 'polars' or 'cudf' if x is a DataFrame, or of a subclass, of that library."""
    for base in type(x).__mro__:
        origin = base.__module__.partition(".")[0]
        if base.__name__ == "DataFrame" and origin in _LIBRARIES:
            return origin
    return None


def read(table: Any) -> list[tuple[Any, ...]]:
    """Columns as `layer_norm_columns` takes them, sharing the table's memory where possible.

    Raises
    ------
    TypeError
        If columns are not numeric: their names, and how to leave them out.
    ValueError
        If there are none.
    """
    adapter = import_module(f"cupynorm.frames._{library(table)}")
    refused = adapter.not_numeric(table)
    if refused:
        named = ", ".join(f"{name!r} ({dtype})" for name, dtype in refused[:5])
        named += f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        msg = f"columns {named} are not numeric; leave them out: {adapter.NUMERIC}"
        raise TypeError(msg)
    columns: list[tuple[Any, ...]] = adapter.read(table)
    if not columns:
        msg = (
            f"the table has shape {tuple(table.shape)}: no column, so no row to normalize; pass "
            "one with at least one column"
        )
        raise ValueError(msg)
    return columns


def build(table: Any, y: Any) -> Any:
    """Give y (M, N) as a table with the index, names and class of `table`, sharing y's memory."""
    return import_module(f"cupynorm.frames._{library(table)}").build(table, y)
