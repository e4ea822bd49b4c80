"""The compiled loops on raw addresses, for callers that hold no NumPy array."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm import _cpu, _cpu_blocks, _threads
from cupynorm._cpu_blocks import safe_range

__all__ = ["available", "layer_norm_fwd"]

_STORED = {
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float32": np.float32,
    "float64": np.float64,
}
_GONE = 1 << 62  # more than any count of blocks
_fwd: dict[str, tuple[Callable[..., None], str, int, Any]] = {}


def available() -> bool:
    """Whether the loops can be called: numba is there, and not turned off."""
    return _cpu._engine() is not _cpu_blocks


def _prepare(kind: str) -> tuple[Callable[..., None], str, int, Any]:
    from cupynorm import _cpu_entries, _cpu_numba

    char = "d" if kind == "float64" else "f"
    _fwd[kind] = found = _cpu_entries.rows_fwd(kind), char, int(kind == "bfloat16"), _cpu_numba
    return found


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
) -> None:
    """Normalize M rows of N elements of dtype ``kind`` at address x into those at y.

    ``weight``, ``bias``, ``mean`` and ``rstd`` are addresses of float32 (float64 for float64 x),
    0 where absent. Nothing is empty, every address is aligned to its elements. The bits are those
    of ``_cpu.layer_norm_fwd``.
    """
    entry, char, bfloat16, engine = _fwd.get(kind) or _prepare(kind)
    low, high = safe_range(char, eps)
    if M * N < engine.ALONE:
        entry(x, y, M, N, weight, bias, eps, low, high, mean, rstd, bfloat16, 0, 0)
        return
    threads = _threads.num_threads()
    if 4 * threads <= M or threads == 1 or engine.LONG * engine.CHUNK > N:
        args = x, y, M, N, weight, bias, eps, low, high, mean, rstd, bfloat16
        _claimed(entry, args, min(M, -(-M * N // engine.BLOCK)), threads)
        return
    x_rows, y_rows = (_view(a, (M, N), _STORED[kind]) for a in (x, y))
    w, b = (_view(a, (N,), char) if a else None for a in (weight, bias))
    means, rstds = (_view(a, (M,), char) if a else None for a in (mean, rstd))
    _cpu._by_chunks(engine, kind, x_rows, y_rows, w, b, eps, means, rstds, threads)


def _claimed(entry: Callable[..., None], args: tuple[Any, ...], count: int, threads: int) -> None:
    """Run the entry on each thread; together the calls do ``count`` blocks."""
    if threads == 1:
        entry(*args, 0, 0)
        return
    counter, busy = np.zeros(1, np.int64), []

    def task(ticket: int) -> None:
        busy.append(ticket)
        try:
            entry(*args, counter.ctypes.data, count)
        finally:
            busy.pop()

    try:
        _threads.run(lambda: task, threads, threads)
    except BaseException:
        # An interrupt must not return while a helper still writes to memory that the caller,
        # whose arrays nobody here holds, is about to free.
        counter[0] = _GONE
        while busy:
            time.sleep(1e-4)
        raise


class _Memory:
    """Elements at an address, for NumPy to look at."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: Any) -> None:
        typestr = np.dtype(dtype).str
        self.__array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
        }


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.asarray(_Memory(address, shape, dtype))
