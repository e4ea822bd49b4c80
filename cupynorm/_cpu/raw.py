"""The compiled loops on raw addresses, for callers that hold no NumPy array."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks as _cpu_blocks
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.blocks import safe_range

__all__ = ["available", "forward_alone", "layer_norm_bwd", "layer_norm_fwd"]


def available() -> bool:
    """Whether the loops can be called: numba is there, and not turned off."""
    return _cpu._engine() is not _cpu_blocks


def forward_alone(kind: str, eps: float) -> tuple[Callable[..., None], tuple[Any, ...], int]:
    """What `layer_norm_fwd` calls for small x, for callers who count the microseconds of its own.

    The compiled function, its arguments (low, high, bfloat16), and the size below which it is
    called, on one thread: ``call(x, y, M, N, weight, bias, eps, low, high, mean, rstd, bfloat16)``.
    """
    from cupynorm._cpu import entries as _cpu_entries
    from cupynorm._cpu import shared as _cpu_shared

    limits = safe_range("d" if kind == "float64" else "f", eps)
    return _cpu_entries.forward(kind), (*limits, int(kind == "bfloat16")), _cpu_shared.ALONE


def layer_norm_fwd(
    kind: str,
    x: int,  # (M, N), contiguous
    y: int,  # (M, N), contiguous; may be x
    M: int,
    N: int,
    weight: int,  # (N,)
    bias: int,  # (N,)
    eps: float,
    mean: int,  # (M,)
    rstd: int,  # (M,)
    num_threads: Callable[[], int] = _threads.num_threads,
) -> None:
    """Normalize M rows of N elements of dtype ``kind`` at address x into those at y.

    ``weight``, ``bias``, ``mean`` and ``rstd`` are addresses of float32 (float64 for float64 x),
    0 where absent. Nothing is empty, every address is aligned to its elements. ``num_threads`` is
    asked where more than one pays. The bits are those of ``_cpu.layer_norm_fwd``.
    """
    from cupynorm._cpu import entries as _cpu_entries
    from cupynorm._cpu import shared as _cpu_shared

    wb, stats = (weight, bias), (mean, rstd)
    threads = 1 if M * N < _cpu_shared.ALONE else num_threads()
    if threads == 1:
        low, high = safe_range("d" if kind == "float64" else "f", eps)
        half = int(kind == "bfloat16")
        _cpu_entries.forward(kind)(x, y, M, N, *wb, eps, low, high, *stats, half)
    else:
        _cpu_shared.forward(kind, x, N, y, N, M, N, *wb, eps, *stats, threads)


def layer_norm_bwd(
    kind: str,
    dy: int,  # (M, N), contiguous
    x: int,  # (M, N), contiguous
    dx: int,  # (M, N), contiguous; may be dy
    M: int,
    N: int,
    mean: int,  # (M,)
    rstd: int,  # (M,)
    weight: int,  # (N,)
    dweight: int,  # (N,)
    dbias: int,  # (N,)
    num_threads: Callable[[], int] = _threads.num_threads,
) -> None:
    """Write the gradients whose addresses are not 0; the bits are ``_cpu.layer_norm_bwd``'s.

    dy, x and dx are of dtype ``kind``, the others float32 (float64 for float64 x); ``weight`` may
    be 0. Nothing is empty, every address is aligned to its elements.
    """
    from cupynorm._cpu import bwd_shared as _cpu_bwd_shared
    from cupynorm._cpu import entries as _cpu_entries

    threads = 1 if M * N < _cpu_bwd_shared.ALONE else num_threads()
    if threads == 1 and N <= _cpu_bwd_shared.LONGEST:
        half = int(kind == "bfloat16")
        call = _cpu_entries.backward(kind)
        call(dy, x, dx, M, N, mean, rstd, weight, dweight, dbias, half)
        return
    summed = dweight or dbias
    sums = np.empty(_cpu_entries.sums_size(M, N) if summed else 0, _DTYPES[kind])
    at = sums.ctypes.data if summed else 0
    _cpu_bwd_shared.backward(kind, dy, N, x, N, dx, N, M, N, weight, mean, rstd, at, threads)
    if summed:
        _cpu_entries.merge(kind)(at, M, N, dweight, dbias)


# Of column sums.
_DTYPES = {
    "float16": np.float32,
    "bfloat16": np.float32,
    "float32": np.float32,
    "float64": np.float64,
}
