"""Dask DataFrames, lazily: each partition holds whole rows."""

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["layer_norm"]


def layer_norm(
    do: Callable[..., Any],
    x: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: float,
    axis: Any,
    order: str,
    return_stats: bool,
) -> Any:
    """Lay out one task per partition; `do` is the library's own `layer_norm`."""
    if "DataFrame" not in [base.__name__ for base in type(x).__mro__]:
        _refuse(
            f"x is a Dask {type(x).__name__}, which is neither a Dask array nor a DataFrame",
            "pass a Dask array, e.g. dask.array.from_array or x.to_frame() for a Series",
        )
    if return_stats:
        _refuse(
            "return_stats=True is given, but the statistics of a Dask DataFrame have no form here",
            "normalize its array, e.g. x.to_dask_array(lengths=True)",
        )
    for label, value in (("weight", weight), ("bias", bias)):
        if hasattr(value, "dask"):
            _refuse(
                f"{label} is a Dask collection, but partitions need the values themselves",
                f"pass {label}.compute()",
            )
    named = {"weight": weight, "bias": bias, "eps": eps, "axis": axis, "order": order}
    named["normalized_shape"] = normalized_shape
    # The frame without rows that Dask keeps, through the same function: the dtypes, and every
    # error, at once and without a partition.
    meta = _partition(x._meta, do, **named)
    return x.map_partitions(_partition, do, **named, meta=meta, token="layer_norm")


def _partition(frame: Any, do: Callable[..., Any], **named: Any) -> Any:
    return do(frame, **named)


def _refuse(fault: str, way_out: str) -> NoReturn:
    msg = f"{fault}; {way_out}"
    raise TypeError(msg)
