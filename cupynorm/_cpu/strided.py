"""NumPy arrays whose rows are scattered: which loops run, over strips of rows or over copies."""

from types import ModuleType
from typing import Any

import numpy as np

from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import gather as _cpu_gather
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.blocks import safe_range
from cupynorm._layout import fold

__all__ = ["ALONE", "layer_norm_fwd", "lie_of", "rows_of_strip"]

Array = np.ndarray[Any, Any]

ALONE = 1 << 17  # elements below which one thread does all

# Elements of a strip. Half as many read shorter pieces of each column, twice as many leave the L2.
_STRIP = 1 << 16
# Rows of a strip at least: a line of float32 of each column, and the line that comes with it.
_LEAST = 32
_MOST = 512


def rows_of_strip(N: int) -> int:
    """How many rows of N elements are brought together."""
    return min(_MOST, max(_LEAST, _STRIP // N // _LEAST * _LEAST))


def lie_of(axes: tuple[int, ...], *arrays: Array) -> list[int] | None:
    """Sizes (outer, M, N), the same strides of each array, and those of the statistics.

    None where the arrays do not fold that far, or compiled loops cannot read them. The rows along
    M are neighbours in memory, if any are; statistics are numbered in C order of the batch axes.
    """
    size = arrays[0].itemsize
    for a in arrays:
        if not (a.flags.aligned and a.dtype.isnative) or any(s % size for s in a.strides):
            return None
    strides = [[s // size for s in a.strides] for a in arrays]
    batch, cols = fold(arrays[0].shape, axes, *strides)
    none = (1, (0,) * len(arrays))
    if len(cols) > 1 or len(batch) > 2:
        return None
    N, steps = cols[0] if cols else none
    outer, rows = [none, none, *batch][-2:]
    stats = rows[0], 1
    if outer[0] > 1 and sum(map(abs, outer[1])) < sum(map(abs, rows[1])):
        outer, rows, stats = rows, outer, (1, rows[0])
    lie = [outer[0], rows[0], N]
    for o, m, n in zip(outer[1], rows[1], steps, strict=True):
        lie += [o, m, n]
    return [*lie, *stats]


def layer_norm_fwd(
    engine: ModuleType,
    kind: str,
    x: Array,
    axes: tuple[int, ...],
    w: Array | None,
    b: Array | None,
    eps: float,
    y: Array,
    mean: Array | None,
    rstd: Array | None,
) -> None:
    """Normalize x over ``axes`` into y; mean and rstd are rows."""
    lie = None if engine is _cpu_blocks else lie_of(axes, x, y)
    if lie is None:
        _cpu_gather.layer_norm_fwd(engine, kind, x, axes, w, b, eps, y, mean, rstd)
    else:
        _compiled(kind, x, y, lie, w, b, eps, mean, rstd)


def _compiled(
    kind: str,
    x: Array,
    y: Array,
    lie: list[int],
    w: Array | None,
    b: Array | None,
    eps: float,
    mean: Array | None,
    rstd: Array | None,
) -> None:
    from cupynorm._cpu import crew as _cpu_crew
    from cupynorm._cpu import strided_loops as loops

    outer, M, N = lie[:3]
    R = rows_of_strip(min(N, loops.CHUNK))
    walk = np.array([*lie, R])
    at = [0 if a is None else a.ctypes.data for a in (x, y, walk, w, b, mean, rstd)]
    low, high = safe_range("d" if kind == "float64" else "f", eps)
    half = int(kind == "bfloat16")
    chunks = -(-N // loops.CHUNK)
    threads = 1 if x.size < ALONE else min(_threads.num_threads(), outer * -(-M // R) * chunks)

    def share(loop: Any, *numbers: Any) -> None:
        _cpu_crew.run(loop, _cpu_crew.record(threads, *numbers), threads)

    if chunks == 1:
        share(loops.forward(kind), *at[:5], eps, low, high, *at[5:], half)
        return
    parts = np.empty((outer * M, chunks, 3))
    share(loops.chunk_moments(kind), at[0], at[2], low, high, parts.ctypes.data, half)
    share(loops.normalize_chunks(kind), *at[:5], eps, parts.ctypes.data, *at[5:], half)
