"""Layer norm over rows of NumPy arrays in numba's loops, by the addresses of their memory."""

from typing import Any

import numpy as np

from cupynorm._cpu import shared as _cpu_shared
from cupynorm._cpu.loops import CHUNK
from cupynorm._cpu.shared import ALONE

__all__ = ["ALONE", "CHUNK", "address", "pitch", "rows"]

Array = np.ndarray[Any, Any]


def address(a: Array | None) -> int:
    """Where an array begins; 0 for none."""
    return 0 if a is None else a.ctypes.data


def pitch(a: Array) -> int:
    """Elements from one row to the next of a table (M, N) of contiguous rows."""
    return a.strides[0] // a.itemsize if a.shape[0] > 1 else a.shape[1]


def rows(
    kind: str,
    x: Array,  # (M, N), each row contiguous
    y: Array,  # (M, N), each row contiguous
    w: Array | None,  # (N,)
    b: Array | None,  # (N,)
    eps: float,
    mean: Array | None,  # (M,)
    rstd: Array | None,  # (M,)
    threads: int = 1,
) -> None:
    """Normalize every row of x into y."""
    M, N = x.shape
    tables = address(x), pitch(x), address(y), pitch(y)
    wb, stats = (address(w), address(b)), (address(mean), address(rstd))
    _cpu_shared.forward(kind, *tables, M, N, *wb, eps, *stats, threads)
