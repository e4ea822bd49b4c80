"""Layer norm's backward over rows of NumPy arrays in numba's loops, by addresses."""

from typing import Any

import numpy as np

from cupynorm._cpu import bwd_shared as _cpu_bwd_shared
from cupynorm._cpu import entries as _cpu_entries
from cupynorm._cpu.bwd_shared import ALONE, LONGEST
from cupynorm._cpu.numba import address, pitch

__all__ = ["ALONE", "LONGEST", "rows"]

Array = np.ndarray[Any, Any]


def rows(
    kind: str,
    dy: Array,  # (M, N), each row contiguous
    x: Array,  # (M, N), each row contiguous
    dx: Array | None,  # (M, N), each row contiguous; may be dy
    w: Array | None,  # (N,)
    mean: Array,  # (M,)
    rstd: Array,  # (M,)
    summed: bool,
    threads: int = 1,
) -> Array | None:  # (2, N)
    """Write dx; if ``summed``, give the sums over rows of dy * x_hat and of dy in float64."""
    M, N = x.shape
    sums = np.empty(_cpu_entries.sums_size(M, N), mean.dtype) if summed else None
    tables = address(dy), pitch(dy), address(x), pitch(x)
    target = (0, 0) if dx is None else (address(dx), pitch(dx))
    rest = address(w), address(mean), address(rstd), address(sums)
    _cpu_bwd_shared.backward(kind, *tables, *target, M, N, *rest, threads)
    if sums is None:
        return None
    totals = np.empty((2, N))
    _cpu_entries.merge_wide(kind)(address(sums), M, N, address(totals))
    return totals
