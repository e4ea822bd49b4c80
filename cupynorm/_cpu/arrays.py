"""Layer norm of NumPy arrays: which loops run, and which rows on which thread."""

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np

from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.half import round_into

__all__ = ["describe", "layer_norm_bwd", "layer_norm_fwd", "shared_from", "without_numba"]

Array = np.ndarray[Any, Any]

# Pieces per thread of rows that are shared, over all rows: more even out threads of unequal speed,
# but each is a hand-over between threads: 7 rows of 100000 took twice as long at 16 pieces each.
_PIECES = 8

_plain: ContextVar[bool] = ContextVar("cupynorm_plain_numpy", default=False)


@functools.cache
def _loops() -> tuple[ModuleType, str]:
    """Find the module whose loops run, and what to say about it."""
    if os.environ.get("CUPYNORM_NUMBA", "1").strip() == "0":
        return _cpu_blocks, "plain NumPy blocks (CUPYNORM_NUMBA=0)"
    try:
        import numba

        if numba.config.DISABLE_JIT:  # loops over raw vectors have no meaning in Python
            return _cpu_blocks, "plain NumPy blocks (NUMBA_DISABLE_JIT is set)"
        from cupynorm._cpu import numba as _cpu_numba
    except ImportError as error:
        return _cpu_blocks, f"plain NumPy blocks (numba cannot be imported: {error})"
    return _cpu_numba, f"numba {numba.__version__} loops"


def _engine() -> ModuleType:
    return _cpu_blocks if _plain.get() else _loops()[0]


def describe() -> str:
    """Say in words which loops NumPy arrays take."""
    return "plain NumPy blocks" if _plain.get() else _loops()[1]


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    """Within this context run as if numba were not installed."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def shared_from() -> int:
    """Elements from which a call takes more than one thread."""
    elements: int = _engine().ALONE
    return elements


@functools.lru_cache(maxsize=64)
def _kind(dtype: np.dtype[Any]) -> tuple[str, bool, np.dtype[Any], bool]:
    """Name of a dtype, whether it is native, what loops compute in, whether it has 16 bits."""
    name = dtype.name
    compute = np.dtype(np.float64 if name == "float64" else np.float32)
    return name, dtype.isnative, compute, dtype.itemsize == 2


def _affine(value: Array | None, compute: np.dtype[Any]) -> Array | None:
    """Weight or bias as a row in the type that the loops compute in."""
    if value is None:
        return None
    if value.dtype == compute and value.flags.carray:
        return value if value.ndim == 1 else value.reshape(-1)
    if _kind(value.dtype)[0] == "bfloat16":  # without ml_dtypes' cast, one element at a time
        bits = value.view(np.dtype(np.uint16).newbyteorder(value.dtype.byteorder))
        wide = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
        return wide.astype(compute, order="C", copy=False).reshape(-1)
    if value.itemsize == 2:  # which widen without a warning
        return value.astype(compute, order="C").reshape(-1)
    with np.errstate(all="ignore"):  # a float64 weight may be Inf in float32
        return value.astype(compute, order="C").reshape(-1)


def _as_rows(x: Array, axes: tuple[int, ...], M: int, N: int) -> Array | None:
    """View of x as M contiguous rows at one pitch, or None if its memory is laid out otherwise."""
    if axes[0] != x.ndim - len(axes) and x.size != N:
        return None
    flags = x.flags
    if flags.carray:  # contiguous, aligned and writable in one look
        return x if x.shape == (M, N) else x.reshape(M, N)
    if not flags.aligned:
        return None
    try:
        rows = np.reshape(x, (M, N), copy=False)
    except ValueError:
        return None
    pitch, step = rows.strides
    if N > 1 and step != x.itemsize:
        return None
    # An x whose rows are all the same one (pitch 0) can be read; nothing else may overlap.
    whole = pitch % x.itemsize == 0 and (pitch >= N * x.itemsize or pitch == 0)
    return rows if M == 1 or whole else None


def layer_norm_fwd(
    x: Array,
    axes: tuple[int, ...],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    mean: Array | None,
    rstd: Array | None,
) -> None:
    """Normalize x over ``axes`` into y; any strides, dtype and byte order, y may be x.

    ``axes`` ascend, ``weight`` and ``bias`` have the shape of these axes; ``mean`` and ``rstd``
    are C-contiguous float32 (float64 for float64 x) with length 1 on them. Nothing is empty.
    """
    kind, native, compute, half = _kind(x.dtype)
    N = 1
    for axis in axes:
        N *= x.shape[axis]
    M = x.size // N
    w, b = _affine(weight, compute), _affine(bias, compute)
    mean = None if mean is None else mean.reshape(-1)
    rstd = None if rstd is None else rstd.reshape(-1)
    x_rows = _as_rows(x, axes, M, N) if native else None
    y_rows = _as_rows(y, axes, M, N) if native else None
    if x_rows is None or y_rows is None:
        from cupynorm._cpu import strided as _cpu_strided

        _cpu_strided.layer_norm_fwd(_engine(), kind, x, axes, w, b, eps, y, mean, rstd)
        return
    if half:
        x_rows, y_rows = x_rows.view(np.uint16), y_rows.view(np.uint16)
    engine = _engine()
    threads = 1 if x.size < engine.ALONE else _threads.num_threads()
    few = 4 * threads > M and threads > 1 and N >= _cpu_blocks.LONG * _cpu_blocks.CHUNK
    if few and engine is _cpu_blocks:
        _by_chunks(kind, x_rows, y_rows, w, b, eps, mean, rstd, threads)
    else:
        engine.rows(kind, x_rows, y_rows, w, b, eps, mean, rstd, threads)


def _by_chunks(
    kind: str,
    x: Array,
    y: Array,
    w: Array | None,
    b: Array | None,
    eps: float,
    mean: Array | None,
    rstd: Array | None,
    threads: int,
) -> None:
    """Pieces of long rows over the threads: statistics of every piece, then results of every one.

    The chunks and the order in which they merge go by N alone, so the bits are those of a row
    that one thread did alone.
    """
    M, N = x.shape
    size = _cpu_blocks.CHUNK
    chunks = -(-N // size)
    pieces = min(chunks, -(-threads * _PIECES // M))
    edges = [chunks * i // pieces for i in range(pieces + 1)]
    parts = np.empty((M, chunks, 3))

    def statistics(index: int) -> None:
        piece, row = divmod(index, M)
        lo, hi = edges[piece], edges[piece + 1]
        _cpu_blocks.chunk_moments(kind, x[row, lo * size : hi * size], eps, parts[row, lo:hi])

    _threads.run(lambda: statistics, M * pieces, threads)
    merged = [_cpu_blocks.finish(parts[row], N, eps) for row in range(M)]
    for row, (s, m, r) in enumerate(merged):
        if mean is not None:
            mean[row] = s + m
        if rstd is not None:
            with np.errstate(all="ignore"):
                rstd[row] = r

    def results(index: int) -> None:
        # Backwards, as the end of x was read last; rows of a piece in turn share weight and bias.
        piece, row = divmod(M * pieces - 1 - index, M)
        part = slice(edges[piece] * size, min(edges[piece + 1] * size, N))
        to_w, to_b = (None if a is None else a[part] for a in (w, b))
        _cpu_blocks.normalize(kind, x[row, part], y[row, part], to_w, to_b, *merged[row])

    _threads.run(lambda: results, M * pieces, threads)


def _bwd_engine() -> ModuleType:
    if _engine() is _cpu_blocks:
        from cupynorm._cpu import bwd_blocks as _cpu_bwd_blocks

        return _cpu_bwd_blocks
    from cupynorm._cpu import bwd_numba as _cpu_bwd_numba

    return _cpu_bwd_numba


def layer_norm_bwd(
    dy: Array,
    x: Array,
    axes: tuple[int, ...],
    mean: Array,
    rstd: Array,
    weight: Array | None,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
) -> None:
    """Write the gradients that are not None; any strides, dtype and byte order, dx may be dy.

    ``axes`` ascend, ``weight``, ``dweight`` and ``dbias`` have the shape of these axes, the latter
    two C-contiguous; ``mean`` and ``rstd`` are float32 (float64 for float64 x) with length 1 on
    them. Nothing is empty. dweight and dbias are sums in float64, rounded once.
    """
    kind, _, compute, half = _kind(x.dtype)
    N = 1
    for axis in axes:
        N *= x.shape[axis]
    M = x.size // N
    engine, w = _bwd_engine(), _affine(weight, compute)
    sums: Any  # (2, N), or None where nobody asks
    summed = dweight is not None or dbias is not None
    arrays = (dy, x) if dx is None else (dy, x, dx)
    tables = [_as_rows(a, axes, M, N) if a.dtype.isnative else None for a in arrays]
    if any(table is None for table in tables):
        from cupynorm._cpu import bwd_strided as _cpu_bwd_strided

        sums = _cpu_bwd_strided.layer_norm_bwd(engine, kind, dy, x, axes, mean, rstd, w, dx, summed)
    else:
        if half:
            tables = [table.view(np.uint16) for table in tables if table is not None]
        stats = _affine(mean, compute), _affine(rstd, compute)
        threads = 1 if x.size < engine.ALONE else _threads.num_threads()
        dx_rows = None if dx is None else tables[2]
        sums = engine.rows(kind, *tables[:2], dx_rows, w, *stats, summed, threads)
    if dweight is not None:
        round_into(sums[0], dweight)
    if dbias is not None:
        round_into(sums[1], dbias)
