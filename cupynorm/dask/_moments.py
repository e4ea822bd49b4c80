"""What a task does where chunks split the normalized axes: moments of a block, merge, normalize."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm._cpu.blocks import CHUNK, Scratch, row_sums
from cupynorm._cpu.half import narrow, widen
from cupynorm._problem import dtype_name, stats_dtype

__all__ = ["Moments", "Statistics", "block_moments", "normalize_block", "statistics"]

# Elements that are taken at a time. NumPy: a scratch of 2 MiB of float64; 16 times the calls on 128
# KiB each took 1.5 to 3 times as long, waiting for the interpreter. A GPU: what temporaries hold.
_SLAB, _SLAB_GPU = CHUNK, 1 << 24
_HALF = ("float16", "bfloat16")
_memory = Scratch()


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

    lack: Any
    mean: Any
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
        return Statistics(lack, mean + math.nan, spread + math.nan)
    rstd = 1.0 / np.sqrt(np.square(spread.astype(np.float64)) + eps)
    return Statistics(lack, mean, rstd.astype(mean.dtype))


@_quiet
def normalize_block(
    x: Any, stats: Statistics, weight: Any, bias: Any, axes: tuple[int, ...], order: Any
) -> Any:
    """Write ((x - mean) - lack) * rstd * weight + bias, block by block of x; x is left alone."""
    dtype = stats.mean.dtype
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    w, b = (None if a is None else a.astype(dtype).reshape(shape) for a in (weight, bias))
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
    d = _scratch(x, x.shape, stats.mean.dtype)
    np.subtract(_widened(x), stats.mean, out=d)
    steps = [(np.subtract, stats.lack), (np.multiply, stats.rstd), (np.multiply, w), (np.add, b)]
    steps = [(step, value) for step, value in steps if value is not None]
    for step, value in steps[:-1]:
        step(d, value, out=d)
    step, value = steps[-1]
    if y.dtype == d.dtype:
        step(d, value, out=y)
        return
    step(d, value, out=d)
    if _as_bits(y):
        narrow(dtype_name(y.dtype), d, y.view(np.uint16))
    else:
        y[...] = d.astype(y.dtype)


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


def _widened(x: Any) -> Any:
    """x, or its values in float32 where NumPy would cast 16 bits one by one."""
    return widen(dtype_name(x.dtype), x.view(np.uint16)) if _as_bits(x) else x


def _scratch(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory of x's library for the values of one slab; NumPy's is lost with the next slab.

    Dask's workers have malloc give memory back at once (MALLOC_TRIM_THRESHOLD_), and then each
    temporary array comes as fresh pages, which costs more than the arithmetic on it.
    """
    if isinstance(x, np.ndarray):
        return _memory.memory.view(dtype)[: x.size].reshape(shape)
    return np.empty_like(x, dtype, order="C", shape=shape)


def _slab_moments(x: Any, axes: tuple[int, ...]) -> Moments:
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    n = math.prod(x.shape[a] for a in axes)
    stats = np.dtype(stats_dtype(dtype_name(x.dtype)))
    if not x.size:
        return Moments(n, *(np.zeros_like(x, stats, shape=kept) for _ in range(3)))
    turn = [a for a in range(x.ndim) if a not in axes] + list(axes)
    rows = x.transpose(turn)
    # Rows into C order: NumPy's sums go by strides, and a block may come back from another
    # worker, or from disk, with strides of its own.
    d = _scratch(x, rows.shape, np.float64)
    d[...] = _widened(rows)
    d = d.reshape(-1, n)
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
