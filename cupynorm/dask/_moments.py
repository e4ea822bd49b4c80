"""Tasks where chunks split the normalized axes: moments of a block, their merge, its result."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from cupynorm import _reference
from cupynorm._reference import Moments

# Elements that are taken at a time. NumPy: 1 MiB of float64; a quarter of that took twice as long,
# in calls of the interpreter. A GPU: what temporaries may hold.
_SLAB, _SLAB_GPU = 1 << 17, 1 << 24

Axes = tuple[int, ...]
Index = tuple[slice, ...]
Statistics = tuple[Moments, Any, Any]  # of whole rows, with mean and rstd as they are given out


def block_moments(x: Any, axes: Axes) -> Moments:
    """Moments of one block over `axes`; the bits go by its shape and values, not its strides."""
    xp = array_namespace(x)
    slabs = _slabs(x, axes)
    with _reference.quiet(xp):
        parts = [
            (row, _reference.merge(xp, [_reference.moments(xp, x[slab], axes) for slab in of_row]))
            for row, of_row in itertools.groupby(slabs, lambda slab: _rows_of(slab, axes))
        ]
    if len(parts) == 1:
        return parts[0][1]
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
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
    x: Any, stats: Statistics, weight: Any, bias: Any, axes: Axes, order: Any
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
            rows = _reference.Rows(xp, x[slab], axes)
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
