"""Dask arrays, lazily: block by block, or by merged moments where chunks split the rows."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arrays import check_companion, library_of
from cupynorm.dask._moments import block_moments, normalize_block, statistics

__all__ = ["layer_norm"]


def layer_norm(
    do: Callable[..., Any],
    x: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    order: str,
    out: Any,
    return_stats: bool,
) -> tuple[Any, Any, Any]:
    """Lay out the tasks for a Dask collection: y, mean and rstd, the latter None if unasked.

    `do` is the library's own `layer_norm`, which each task calls on its block or partition: it
    stands above this module, and hands itself down.
    """
    eps = _problem.check_eps(eps)
    _problem.check_order(order)
    if out is not None:
        msg = (
            "out= is given but a Dask collection has no memory to write to; use the returned one, "
            "e.g. y.store(target)"
        )
        raise TypeError(msg)
    if not isinstance(x, _da().Array):
        from cupynorm.dask import _frames as _dask_frames

        y = _dask_frames.layer_norm(
            do, x, normalized_shape, weight, bias, eps, axis, order, return_stats
        )
        return y, None, None
    _check_blocks(x)
    asked = _axes(x, normalized_shape, axis)
    axes = tuple(sorted(asked))
    w, b = (_affine(*named, x, asked) for named in (("weight", weight), ("bias", bias)))
    if all(x.numblocks[a] == 1 for a in axes):
        return _mapped(do, x, axes, w, b, eps, order, return_stats)
    return _combined(x, axes, w, b, eps, order, return_stats)


def _da() -> Any:
    import dask.array

    return dask.array


def _mapped(
    do: Callable[..., Any],
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    order: str,
    return_stats: bool,
) -> tuple[Any, Any, Any]:
    """One call per block, which holds whole rows."""
    every, w, b = tuple(range(x.ndim)), _indexed(weight, axes), _indexed(bias, axes)
    named = {"axis": axes, "order": order, "return_stats": return_stats}
    args = (x, every, None, None, *w, *b, eps, None)
    y = _blocks(do, every, *args, **named, token="layer_norm", like=x._meta)
    if not return_stats:
        return y, None, None
    # Each block of that is the named tuple of all three.
    return (
        _blocks(_part, every, y, every, 0, None, token="layer_norm-y", like=x._meta),
        *(
            _blocks(
                _part, every, y, every, k, None, token=f"layer_norm-{name}", like=like, ones=axes
            )
            for k, name, like in ((1, "mean", _stats_meta(x)), (2, "rstd", _stats_meta(x)))
        ),
    )


def _combined(
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    order: str,
    return_stats: bool,
) -> tuple[Any, Any, Any]:
    """Moments per block, merged per row, then each block with the statistics of its rows."""
    every, like = tuple(range(x.ndim)), _stats_meta(x)
    parts = _blocks(
        block_moments, every, x, every, axes=axes, token="layer_norm-moments", like=like, ones=axes
    )
    stats = _merge(parts, axes, eps)
    args = (x, every, stats, every, *_indexed(weight, axes), *_indexed(bias, axes))
    y = _blocks(
        normalize_block, every, *args, axes=axes, order=order, token="layer_norm", like=x._meta
    )
    if not return_stats:
        return y, None, None
    return (
        y,
        _blocks(_part, every, stats, every, 0, None, token="layer_norm-mean", like=like),
        _blocks(_part, every, stats, every, 2, None, token="layer_norm-rstd", like=like),
    )


def _merge(parts: Any, axes: tuple[int, ...], eps: float) -> Any:
    """One task per block of rows, with the moments of all its blocks in the order of their place.

    The layer is written out because Dask fuses layers that say only which block goes into which:
    each block of y would merge, and the merge compute its blocks' moments, again. No tree of
    merges: it would save no memory, as the blocks of x wait for the result anyway.
    """
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    name = f"layer_norm-statistics-{tokenize(parts.name, eps)}"
    counts = parts.numblocks
    tasks: Any = {}
    for rows in itertools.product(*(range(1 if a in axes else n) for a, n in enumerate(counts))):
        places = itertools.product(
            *(range(counts[a]) if a in axes else (i,) for a, i in enumerate(rows))
        )
        tasks[(name, *rows)] = (statistics, [(parts.name, *place) for place in places], eps)
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[parts])
    chunks = tuple((1,) if a in axes else c for a, c in enumerate(parts.chunks))
    return _da().Array(graph, name, chunks, meta=parts._meta)


def _part(result: tuple[Any, ...], index: int) -> Any:
    # Not operator.getitem, which Dask takes for a slice and joins with the slices that follow.
    return result[index]


def _blocks(
    task: Callable[..., Any], every: tuple[int, ...], *args: Any, like: Any, **named: Any
) -> Any:
    """Blockwise without a probe of the task, and without a rechunk to align blocks."""
    ones = named.pop("ones", ())
    return _da().blockwise(
        task,
        every,
        *args,
        dtype=like.dtype,
        meta=like,
        align_arrays=False,
        adjust_chunks=dict.fromkeys(ones, _one),
        **named,
    )


def _one(_: Any) -> int:
    return 1


def _indexed(value: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    return (None, None) if value is None else (value, axes)


def _stats_meta(x: Any) -> Any:
    return x._meta.astype(_problem.stats_dtype(_problem.dtype_name(x.dtype)))


# --- rules --------------------------------------------------------------------------------------


def _check_blocks(x: Any) -> None:
    meta = x._meta
    if type(meta) is not np.ndarray and library_of(meta) != "cupy":
        msg = (
            f"x is a Dask array of {type(meta).__module__}.{type(meta).__qualname__} blocks; "
            "layer_norm takes blocks of NumPy and of CuPy. Convert them first, e.g. "
            "x.map_blocks(numpy.asarray), or dask.array.ma.filled(x, numpy.nan) for masked ones"
        )
        raise TypeError(msg)
    _problem.check_x_dtype(_problem.dtype_name(x.dtype))


def _axes(x: Any, normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    """Resolve the axes to normalize, all of known length, in the order asked for."""
    shape = list(x.shape)
    if normalized_shape is not None and axis is None:
        # A length that Dask does not know contradicts nothing; it is refused below.
        wanted = _problem.integers(normalized_shape, "normalized_shape")
        for back, n in enumerate(reversed(wanted), start=1):
            if back <= len(shape) and math.isnan(shape[-back]):
                shape[-back] = n
    axes = _problem.resolve_axes(tuple(shape), normalized_shape, axis)
    unknown = [a for a in axes if math.isnan(x.shape[a])]
    if unknown:
        msg = (
            f"x has shape {x.shape}: the length of axis {unknown[0]}, which is to be normalized, "
            "is not known before x is computed. Call x.compute_chunk_sizes() first, which computes "
            "x, or normalize over axes of known length"
        )
        raise ValueError(msg)
    return axes


def _affine(label: str, value: Any, x: Any, asked: tuple[int, ...]) -> Any:
    """Check a weight or bias, and chunk it (never x) as x is chunked along the axes."""
    if value is None:
        return None
    lazy = isinstance(value, _da().Array)
    check_companion(label, value._meta if lazy else value, x._meta)
    cast = f"{label}.astype('float32')"
    _problem.check_affine_dtype(label, _problem.dtype_name(value.dtype), cast)
    _problem.check_affine_shape(label, tuple(value.shape), tuple(x.shape[a] for a in asked))
    turn = _problem.axis_order(asked)
    if turn is not None:
        value = value.transpose(turn)
    chunks = tuple(x.chunks[a] for a in sorted(asked))
    # One key per block in the graph, whichever number of tasks reads it.
    return value.rechunk(chunks) if lazy else _da().from_array(value, chunks=chunks)
