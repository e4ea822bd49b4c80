"""Layer norm of NumPy columns: which loops run, and on how many threads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import threads as _threads

__all__ = ["Column", "as_matrix", "layer_norm_fwd"]

Array = np.ndarray[Any, Any]


class Column(NamedTuple):
    """One column of a table."""

    values: Any  # (M,)
    validity: Any = None  # Arrow's bitmap: 1 is valid, least significant bit first; None: all are
    offset: int = 0  # its bit that row 0 has


def as_matrix(columns: Sequence[Column]) -> Array | None:
    """View NumPy columns that are those of one row-major matrix as this matrix."""
    first = columns[0].values
    pitch, N = first.strides[0], len(columns)
    # A pitch that a matrix of N columns may have: elsewhere the rows would overlap.
    if first.size < 2 or pitch < N * first.itemsize or pitch % first.itemsize:
        return None
    at = first.ctypes.data
    for j, (x, validity, _) in enumerate(columns):
        here = x.ctypes.data == at + j * first.itemsize and x.strides[0] == pitch
        if validity is not None or x.dtype != first.dtype or not here:
            return None
    shape, strides = (first.size, N), (pitch, first.itemsize)
    return np.lib.stride_tricks.as_strided(first, shape, strides, writeable=False)


def layer_norm_fwd(
    columns: Sequence[Column],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    omit: bool,
) -> None:
    """Normalize the rows of N columns of length M into y (M, N), native, of any strides.

    A null counts as NaN; with ``omit``, NaN is left out of a row's statistics. Nothing is empty
    and nothing overlaps y. Statistics and their sums are float32, float64 for float64 y.
    """
    matrix = None if omit else as_matrix(columns)
    if matrix is not None and matrix.dtype == y.dtype:
        _cpu.layer_norm_fwd(matrix, (1,), weight, bias, eps, y, None, None)
        return
    by_row = _pitch(y) is not None
    target = y
    if not by_row and _pitch(y.T) is None:
        target, by_row = np.empty(y.shape, y.dtype.newbyteorder("=")), True
    compute = np.dtype(np.float64 if y.dtype.name == "float64" else np.float32)
    w, b = _cpu._affine(weight, compute), _cpu._affine(bias, compute)
    ready = [column._replace(values=_readable(column.values)) for column in columns]
    if _cpu._engine() is _cpu_blocks:
        from cupynorm._cpu import columns_blocks as _cpu_columns_blocks

        _cpu_columns_blocks.rows(ready, target, w, b, eps, omit)
    else:
        _compiled(ready, target, by_row, compute, w, b, eps, omit)
    if target is not y:
        np.copyto(y, target)


def _pitch(y: Array) -> int | None:  # y: (M, N)
    """Elements from one row to the next if rows are contiguous and apart, or None."""
    M, N = y.shape
    if not (y.flags.aligned and y.dtype.isnative) or (N > 1 and y.strides[1] != y.itemsize):
        return None
    pitch: int = N if M == 1 else y.strides[0] // y.itemsize
    return pitch if pitch >= N and (M == 1 or y.strides[0] % y.itemsize == 0) else None


def _readable(x: Array) -> Array:
    """A column as loops can read it: what is swapped or unaligned is copied, and it alone."""
    if x.dtype.isnative and x.flags.aligned and x.strides[0] % x.itemsize == 0:
        return x
    return x.astype(x.dtype.newbyteorder("="), order="C", copy=True)


def _compiled(
    columns: Sequence[Column],
    y: Array,
    by_row: bool,
    compute: np.dtype[Any],
    w: Array | None,
    b: Array | None,
    eps: float,
    omit: bool,
) -> None:
    from cupynorm._cpu import columns_loops as loops
    from cupynorm._cpu import crew as _cpu_crew
    from cupynorm._cpu.columns_loaders import loader

    table = np.zeros((5, len(columns)), np.int64)
    for j, (x, validity, offset) in enumerate(columns):
        table[:3, j] = loader(x.dtype.name, compute.name), x.ctypes.data, x.strides[0]
        if validity is not None:
            table[3:, j] = validity.ctypes.data, offset
    M, N = y.shape
    rows = y if by_row else y.T
    pitch = rows.strides[0] // y.itemsize if rows.shape[0] > 1 else rows.shape[1]
    w_at, b_at = (0 if a is None else a.ctypes.data for a in (w, b))
    R = loops.rows_of_block(M, N)
    limits = eps, *_cpu_blocks.safe_range(compute.char, eps)
    flags = int(omit), int(y.dtype.name == "bfloat16")
    threads = 1 if M * N < loops.ALONE else min(_threads.num_threads(), -(-M // R))
    sizes = M, N, R, y.ctypes.data, pitch, int(by_row)
    job = _cpu_crew.record(threads, table.ctypes.data, *sizes, w_at, b_at, *limits, *flags)
    stored = np.uint16 if y.itemsize == 2 else y.dtype.type
    _cpu_crew.run(loops.normalize((stored, compute.type)), job, threads)
