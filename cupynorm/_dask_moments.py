"""What a task does where chunks split the normalized axes: moments of a block, merge, normalize."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm._cpu_blocks import row_sums
from cupynorm._cpu_half import narrow, widen
from cupynorm._problem import dtype_name, stats_dtype

__all__ = ["Moments", "Statistics", "block_moments", "normalize_block", "statistics"]

# Elements that are taken at a time. NumPy: 512 KiB of float64, so that five passes read the cache;
# a GPU has no such cache, and only its memory for temporaries is to be bounded.
_SLAB, _SLAB_GPU = 1 << 16, 1 << 24
_HALF = ("float16", "bfloat16")


class Moments(NamedTuple):
    """Of the elements of one block that share a row; arrays in the statistics' dtype.

    They have the block's shape with length 1 on the normalized axes.
    """

    terms: int  # elements of a row
    mean: Any
    lack: Any  # what the rounded mean lacks
    spread: Any  # root of the variance: the variance of values near 1e30 is no float32


class Statistics(NamedTuple):
    """What normalizes a row; shapes and dtype as in `Moments`."""

    mean: Any
    lack: Any
    rstd: Any


def _quiet(task: Any) -> Any:
    # NaN and Inf are legal rows, and errstate belongs to the thread that runs the task.
    @functools.wraps(task)
    def run(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return task(*args, **kwargs)

    return run


@_quiet
def block_moments(x: Any, axes: tuple[int, ...]) -> Moments:
    """Moments of one block over `axes`; the bits go by its shape and values, not its strides."""
    cut = _cut(x, axes)
    if cut is None:
        return _slab_moments(x, axes)
    axis, slabs = cut
    parts = [block_moments(x[slab], axes=axes) for slab in slabs]
    if axis in axes:
        return _merged(parts)
    columns = list(zip(*parts, strict=True))[1:]
    return Moments(parts[0].terms, *(np.concatenate(c, axis=axis) for c in columns))


@_quiet
def statistics(parts: Sequence[Moments], eps: float) -> Statistics:
    """Mean and rstd of rows from the moments of their blocks, merged in the order given."""
    terms, mean, lack, spread = _merged(parts)
    if not terms:  # the mean of nothing
        return Statistics(mean + math.nan, lack, spread + math.nan)
    rstd = 1.0 / np.sqrt(np.square(spread.astype(np.float64)) + eps)
    return Statistics(mean, lack, rstd.astype(mean.dtype))


@_quiet
def normalize_block(
    x: Any, stats: Statistics, weight: Any, bias: Any, axes: tuple[int, ...], order: Any
) -> Any:
    """Write ((x - mean) - lack) * rstd * weight + bias, block by block of x; x is left alone."""
    dtype = stats.mean.dtype
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    w, b = (None if a is None else _values(a, dtype).reshape(shape) for a in (weight, bias))
    y = np.empty_like(x, order=order)
    _normalize(x, y, stats, w, b, axes)
    return y


def _normalize(x: Any, y: Any, stats: Statistics, w: Any, b: Any, axes: tuple[int, ...]) -> None:
    cut = _cut(x, axes)
    if cut is not None:
        axis, slabs = cut
        for slab in slabs:
            rows = stats if axis in axes else Statistics(*(a[slab] for a in stats))
            to_w, to_b = (a[slab] if a is not None and axis in axes else a for a in (w, b))
            _normalize(x[slab], y[slab], rows, to_w, to_b, axes)
        return
    d = _values(x, stats.mean.dtype)
    d -= stats.mean
    d -= stats.lack
    d *= stats.rstd
    if w is not None:
        d *= w
    if b is not None:
        d += b
    if _as_bits(y):
        narrow(dtype_name(y.dtype), d, y.view(np.uint16))
    else:
        y[...] = d.astype(y.dtype, copy=False)


def _cut(x: Any, axes: tuple[int, ...]) -> tuple[int, Iterator[tuple[slice, ...]]] | None:
    """Where to cut a block that is too large for one slab: an axis, and what to index with."""
    limit = _SLAB if isinstance(x, np.ndarray) else _SLAB_GPU
    if x.size <= limit:
        return None
    by_row = [a for a, n in enumerate(x.shape) if n > 1 and a not in axes]
    axis = (by_row or [a for a, n in enumerate(x.shape) if n > 1])[0]
    n = x.shape[axis]
    count = min(n, -(-x.size // limit))
    edges = [n * i // count for i in range(count + 1)]
    whole = (slice(None),) * axis
    return axis, ((*whole, slice(lo, hi)) for lo, hi in itertools.pairwise(edges))


def _as_bits(x: Any) -> bool:
    return isinstance(x, np.ndarray) and dtype_name(x.dtype) in _HALF and x.dtype.isnative


def _values(x: Any, dtype: Any) -> Any:
    """A new array of x's values in `dtype`."""
    if _as_bits(x):
        return widen(dtype_name(x.dtype), x.view(np.uint16)).astype(dtype, copy=False)
    return x.astype(dtype)


def _slab_moments(x: Any, axes: tuple[int, ...]) -> Moments:
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    n = math.prod(x.shape[a] for a in axes)
    stats = np.dtype(stats_dtype(dtype_name(x.dtype)))
    if not x.size:
        return Moments(n, *(np.zeros_like(x, stats, shape=kept) for _ in range(3)))
    turn = [a for a in range(x.ndim) if a not in axes] + list(axes)
    # Rows into C order: NumPy's sums go by strides, and a block may come back from another
    # worker, or from disk, with strides of its own.
    d = _values(x.transpose(turn), np.dtype(np.float64))
    d = np.ascontiguousarray(d).reshape(-1, n)
    # float64 rows near the maximum overflow their sum; q is exact, and at most 1/n
    q = 2.0 ** -math.ceil(math.log2(n)) if stats == np.float64 else 1.0
    s = _sums(d if q == 1 else d * q) / (n * q)
    d -= s[:, None]
    scaled = d if q == 1 else d * q
    m = _sums(scaled) / (n * q)
    v = _sums(scaled, d) / (n * q) - m * m
    return _rounded(n, s.reshape(kept), m.reshape(kept), v.reshape(kept), stats)


def _sums(d: Any, e: Any = None) -> Any:
    if isinstance(d, np.ndarray):
        return row_sums(d, e)
    return (d if e is None else d * e).sum(axis=1)


def _rounded(terms: int, s: Any, m: Any, v: Any, dtype: Any) -> Moments:
    """Moments from the mean s + m and the variance v, in float64."""
    mean = (s + m).astype(dtype)
    spread = np.sqrt(np.maximum(v, 0.0))  # rounding may leave a hair below zero; NaN passes
    return Moments(terms, mean, ((s - mean) + m).astype(dtype), spread.astype(dtype))


def _merged(parts: Sequence[Moments]) -> Moments:
    """Chan, Golub and LeVeque's merge of any number of parts about one shift, in their order."""
    some = [part for part in parts if part.terms]
    if len(some) < 2:
        return (some or parts)[0]
    terms = sum(part.terms for part in some)
    shares = [part.terms / terms for part in some]
    dtype = some[0].mean.dtype
    s = some[0].mean.astype(np.float64)  # means that share a large offset lose nothing about it
    away = [(part.mean - s) + part.lack for part in some]
    m = sum(share * a for share, a in zip(shares, away, strict=True))
    v = sum(
        share * (np.square(part.spread.astype(np.float64)) + np.square(a - m))
        for share, part, a in zip(shares, some, away, strict=True)
    )
    return _rounded(terms, s, m, v, dtype)
