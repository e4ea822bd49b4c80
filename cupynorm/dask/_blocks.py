"""Graphs of Dask collections: block by block, or by merged moments where chunks split the rows.

Imports Dask, so it is imported itself when a collection has come.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
from array_api_compat import array_namespace
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from cupynorm import _calls, _libraries, _reference, _rules, frames
from cupynorm._calls import How
from cupynorm._libraries import cast_of, check_companion, library_of
from cupynorm._ops import Op
from cupynorm._reference import Moments

# Elements that are taken at a time. NumPy: 1 MiB of float64; a quarter of that took twice as long,
# in calls of the interpreter. A GPU: what temporaries may hold.
_SLAB, _SLAB_GPU = 1 << 17, 1 << 24

Axes = tuple[int, ...]
Index = tuple[slice, ...]
Statistics = tuple[Moments, Any, Any]  # of whole rows, with mean and rstd as they are given out


def normalize(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Any:
    """Lay out the tasks for a Dask collection: y, or (y, mean, rstd) where `how` asks for them."""
    normalized_shape, axis, eps, order, return_stats = how
    _rules.check_order(order)
    if out is not None:
        _libraries.refuse(
            "out= is given but a Dask collection has no memory to write to",
            "use the returned one, e.g. y.store(target)",
        )
    if not isinstance(x, da.Array):
        return _of_frame(op, x, weight, bias, how)
    _check_blocks(x)
    dtype = _rules.dtype_name(x.dtype)
    eps, stats = _rules.eps_of(op, eps, dtype), x._meta.astype(_rules.stats_dtype(dtype))
    asked = _axes(x, normalized_shape, axis)
    axes = tuple(sorted(asked))
    affine = [
        (None, None) if value is None else (_affine(label, value, x, asked), axes)
        for label, value in (("weight", weight), ("bias", bias))
    ]
    every = tuple(range(x.ndim))
    whole = x, every
    if all(x.numblocks[a] == 1 for a in axes):
        how = None, axes, eps, order, return_stats
        y = found = _blocks(whole_rows, op.name, x._meta, whole, *affine, op=op, how=how)
        if return_stats:  # each block of that is all three
            y = _blocks(_part, f"{op.name}-y", x._meta, (found, every), (0, None))
    else:
        token = f"{op.name}-moments"
        moments = _blocks(block_moments, token, stats, whole, ones=axes, axes=axes, op=op)
        found = _merged(op, moments, axes, eps)
        arrays = whole, (found, every), *affine
        y = _blocks(normalize_block, op.name, x._meta, *arrays, axes=axes, op=op, order=order)
    if not return_stats:
        return y
    return y, *(
        _blocks(_part, f"{op.name}-{name}", stats, (found, every), (k, None), ones=axes)
        for k, name in ((-2, "mean"), (-1, "rstd"))[not op.center :]
    )


def _merged(op: Op, parts: Any, axes: Axes, eps: float) -> Any:
    """One task per block of rows, with the moments of all its blocks in the order of their place.

    The layer is written out because Dask fuses layers that say only which block goes into which:
    each block of y would merge, and the merge compute its blocks' moments, again. No tree of
    merges: it would save no memory, as the blocks of x wait for the result anyway.
    """
    name = f"{op.name}-statistics-{tokenize(parts.name, eps)}"
    counts = [range(n) for n in parts.numblocks]
    tasks: Any = {}
    for row in itertools.product(*(range(1) if a in axes else n for a, n in enumerate(counts))):
        places = itertools.product(*(counts[a] if a in axes else (i,) for a, i in enumerate(row)))
        tasks[(name, *row)] = (statistics, [(parts.name, *place) for place in places], eps)
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[parts])
    chunks = tuple((1,) if a in axes else c for a, c in enumerate(parts.chunks))
    return da.Array(graph, name, chunks, meta=parts._meta)


def _blocks(
    task: Callable[..., Any],
    token: str,
    like: Any,
    *arrays: tuple[Any, Axes | None],
    ones: Axes = (),
    **named: Any,
) -> Any:
    """Blockwise without a probe of the task, and without a rechunk to align blocks.

    `arrays` come with their axes, `like` is what blocks of the result are like, `ones` are the axes
    along which these have length 1.
    """
    return da.blockwise(
        task,
        tuple(range(like.ndim)),
        *itertools.chain.from_iterable(arrays),
        dtype=like.dtype,
        meta=like,
        align_arrays=False,
        adjust_chunks=dict.fromkeys(ones, 1),
        token=token,
        **named,
    )


def _of_frame(op: Op, x: Any, weight: Any, bias: Any, how: How) -> Any:
    """One task per partition, which holds whole rows."""
    if "DataFrame" not in [base.__name__ for base in type(x).__mro__]:
        _libraries.refuse(
            f"x is a Dask {type(x).__name__}, which is neither a Dask array nor a DataFrame",
            "pass a Dask array, e.g. dask.array.from_array or x.to_frame() for a Series",
        )
    if how[-1]:
        _libraries.refuse(
            "return_stats=True is given, but the statistics of a Dask DataFrame have no form here",
            "normalize its array, e.g. x.to_dask_array(lengths=True)",
        )
    for label, value in (("weight", weight), ("bias", bias)):
        if hasattr(value, "dask"):
            _libraries.refuse(
                f"{label} is a Dask collection, but partitions need the values themselves",
                f"pass {label}.compute()",
            )
    named = {"op": op, "weight": weight, "bias": bias, "how": how}
    # The frame without rows that Dask keeps, through the same function: the dtypes, and every
    # error, at once and without a partition.
    meta = whole_rows(x._meta, **named)
    return x.map_partitions(whole_rows, **named, meta=meta, token=op.name)


# --- tasks --------------------------------------------------------------------------------------


def whole_rows(x: Any, weight: Any, bias: Any, op: Op, how: How) -> Any:
    """Normalize a block or a partition that holds whole rows, as one call does."""
    normalize = frames.normalize if frames.is_table(x) else _calls.normalize
    return normalize(op, x, weight, bias, None, how)


def block_moments(x: Any, axes: Axes, op: Op) -> Moments:
    """Moments of one block over `axes`; the bits go by its shape and values, not its strides."""
    xp = array_namespace(x)
    slabs = _slabs(x, axes)
    with _reference.quiet(xp):
        parts = [
            (row, _reference.merge(xp, [_reference.moments(xp, x[at], axes, op) for at in of_row]))
            for row, of_row in itertools.groupby(slabs, lambda slab: _rows_of(slab, axes))
        ]
    if len(parts) == 1:
        return parts[0][1]
    kept = _rules.stats_shape(x.shape, axes)
    whole = [np.empty_like(x, part.dtype, shape=kept, order="C") for part in parts[0][1][1:]]
    for row, (_, *values) in parts:
        for target, value in zip(whole, values, strict=True):
            target[row] = value
    return Moments(parts[0][1].terms, *whole)


def statistics(parts: Sequence[Moments], eps: float) -> Statistics:
    """Of rows, from the moments of their blocks, merged in the order given."""
    xp = array_namespace(parts[0].mean)
    with _reference.quiet(xp):
        whole = _reference.merge(xp, parts)
        mean = whole.mean if whole.terms else whole.mean + math.nan  # the mean of nothing
        return whole, mean, _reference.rstd_of(xp, whole, eps)


def normalize_block(
    x: Any, stats: Statistics, weight: Any, bias: Any, *, axes: Axes, op: Op, order: Any
) -> Any:
    """y of one block by the statistics of its rows, slab by slab; x is left alone."""
    xp = array_namespace(x)
    (terms, *moments), _, rstd = stats
    y = np.empty_like(x, order=order)
    with _reference.quiet(xp):
        for slab in _slabs(x, axes):
            row, column = _rows_of(slab, axes), tuple(slab[a] for a in axes)
            whole = Moments(terms, *(value[row] for value in moments))
            affine = (None if a is None else a[column] for a in (weight, bias))
            rows = _reference.Rows(xp, x[slab], axes, op)
            y[slab] = _reference.apply(rows, whole, rstd[row], *affine)
    return y


def _rows_of(slab: Index, axes: Axes) -> Index:
    """Where statistics lie for the rows of a slab."""
    return tuple(slice(None) if a in axes else at for a, at in enumerate(slab))


def _slabs(x: Any, axes: Axes) -> Iterator[Index]:
    """Cut a block that is too large at once, between rows before within; row by row in order."""
    limit = _SLAB if isinstance(x, np.ndarray) else _SLAB_GPU
    sizes = list(x.shape)
    by_row = sorted(range(x.ndim), key=lambda a: a in axes)
    for a in by_row:
        pieces = -(-math.prod(sizes) // limit)
        sizes[a] = max(-(-sizes[a] // max(pieces, 1)), 1)
    cuts = [
        [slice(i, i + sizes[a]) for i in range(0, max(x.shape[a], 1), sizes[a])] for a in by_row
    ]
    for found in itertools.product(*cuts):
        at = dict(zip(by_row, found, strict=True))
        yield tuple(at[a] for a in range(x.ndim))


def _part(result: tuple[Any, ...], index: int) -> Any:
    # Not operator.getitem, which Dask takes for a slice and joins with the slices that follow.
    return result[index]


# --- rules --------------------------------------------------------------------------------------


def _check_blocks(x: Any) -> None:
    meta = x._meta
    if type(meta) is not np.ndarray and library_of(meta) != "cupy":
        plain = "x.map_blocks(numpy.asarray)"
        if isinstance(meta, np.ma.MaskedArray):
            floats = "x" if meta.dtype.kind == "f" else cast_of("x", meta.data)
            plain = f"dask.array.ma.filled({floats}, numpy.nan)"
        elif hasattr(meta, "toarray"):
            block = "lambda block: block.toarray()"
            plain = f"x.map_blocks({block}, dtype=x.dtype, meta=numpy.zeros((0, 0), x.dtype))"
        _libraries.refuse(
            f"x is a Dask array of {_libraries.kind_of(meta)} blocks",
            f"layer_norm takes blocks of NumPy and of CuPy. Convert them first, e.g. {plain}",
        )
    name = _rules.dtype_name(x.dtype)
    if name not in _rules.ITEMSIZE:
        _rules.check_x_dtype(name, cast_of("x", meta))


def _axes(x: Any, normalized_shape: Any, axis: Any) -> Axes:
    """Resolve the axes to normalize, all of known length, in the order asked for."""
    shape = list(x.shape)
    if normalized_shape is not None and axis is None:
        # A length that Dask does not know contradicts nothing; it is refused below.
        wanted = _rules.integers(normalized_shape, "normalized_shape")
        for back, n in enumerate(reversed(wanted), start=1):
            if back <= len(shape) and math.isnan(shape[-back]):
                shape[-back] = n
    axes = _rules.resolve_axes(tuple(shape), normalized_shape, axis)
    unknown = [a for a in axes if math.isnan(x.shape[a])]
    if unknown:
        msg = (
            f"x has shape {x.shape}: the length of axis {unknown[0]}, which is to be normalized, "
            "is not known before x is computed. Call x.compute_chunk_sizes() first, which computes "
            "x, or normalize over axes of known length"
        )
        raise ValueError(msg)
    return axes


def _affine(label: str, value: Any, x: Any, asked: Axes) -> Any:
    """Check a weight or bias, and chunk it (never x) as x is chunked along the axes."""
    lazy = isinstance(value, da.Array)
    shape = tuple(x.shape[a] for a in asked)
    if lazy:
        check_companion(label, value._meta, x._meta)
        cast = cast_of(label, value._meta)
        _rules.check_affine_dtype(label, _rules.dtype_name(value.dtype), cast)
        _rules.check_affine_shape(label, tuple(value.shape), shape)
    else:
        value = _calls.checked_affine(label, value, x._meta, shape)
    turn = _rules.axis_order(asked)
    if turn is not None:
        value = value.transpose(turn)
    chunks = tuple(x.chunks[a] for a in sorted(asked))
    # One key per block in the graph, whichever number of tasks reads it.
    return value.rechunk(chunks) if lazy else da.from_array(value, chunks=chunks)
