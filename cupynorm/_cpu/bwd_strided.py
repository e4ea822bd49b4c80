"""Backward of NumPy arrays whose rows are scattered: over strips of rows, or over copies."""

from types import ModuleType
from typing import Any

import numpy as np

from cupynorm._cpu import bwd_blocks as _cpu_bwd_blocks
from cupynorm._cpu import bwd_gather as _cpu_bwd_gather
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.strided import ALONE, lie_of, rows_of_strip

__all__ = ["layer_norm_bwd"]

Array = np.ndarray[Any, Any]


def layer_norm_bwd(
    engine: ModuleType,
    kind: str,
    dy: Array,
    x: Array,
    axes: tuple[int, ...],
    mean: Array,
    rstd: Array,
    w: Array | None,
    dx: Array | None,
    summed: bool,
) -> Array | None:  # (2, N)
    """Write dx and give the column sums, as the engine's rows() does, for any layout."""
    if engine is not _cpu_bwd_blocks:
        lie = lie_of(axes, dy, x, x if dx is None else dx)
        if lie is not None and lie[2] <= engine.LONGEST:
            return _compiled(kind, dy, x, dx, lie, w, mean, rstd, summed)
    return _cpu_bwd_gather.layer_norm_bwd(engine, kind, dy, x, axes, mean, rstd, w, dx, summed)


def _compiled(
    kind: str,
    dy: Array,
    x: Array,
    dx: Array | None,
    lie: list[int],
    w: Array | None,
    mean: Array,
    rstd: Array,
    summed: bool,
) -> Array | None:
    from cupynorm._cpu import bwd_strided_loops as loops
    from cupynorm._cpu import crew as _cpu_crew
    from cupynorm._cpu import entries as _cpu_entries

    outer, M, N = lie[:3]
    rows = outer * M
    walk = np.array([*lie, min(M, rows_of_strip(N))])
    dtype = np.dtype(np.float64 if kind == "float64" else np.float32)
    stats = [np.asarray(a, dtype, order="C") for a in (mean, rstd)]
    blocks, pitch = loops.sizes(rows, N)
    sums = np.empty(2 * blocks * pitch, dtype) if summed else None
    arrays = (dy, x, dx, walk, w, *stats, sums)
    at = [0 if a is None else a.ctypes.data for a in arrays]
    threads = 1 if x.size < ALONE else min(_threads.num_threads(), blocks)
    job = _cpu_crew.record(threads, *at, int(kind == "bfloat16"))
    _cpu_crew.run(loops.backward(kind), job, threads)
    if sums is None:
        return None
    totals = np.empty((2, N))
    _cpu_entries.merge_wide(kind)(at[-1], rows, N, totals.ctypes.data)
    return totals
