"""The compiled loops on raw addresses, for callers that hold no NumPy array."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _cpu, _cpu_blocks, _threads
from cupynorm._cpu_blocks import safe_range
from cupynorm._cpu_half import round_into

__all__ = ["available", "forward_alone", "layer_norm_bwd", "layer_norm_fwd"]

Array = np.ndarray[Any, Any]

_STORED = {
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float32": np.float32,
    "float64": np.float64,
}
_GONE = 1 << 40  # more than any count of blocks; times the rows of one it is no overflow


class _Loops(NamedTuple):
    """Compiled code for one kind of x."""

    call: Callable[..., None]
    bfloat16: int
    char: str  # of the dtype that they compute in
    engine: Any  # the same loops on arrays, and their limits


_fwd: dict[str, _Loops] = {}
_bwd: dict[str, _Loops] = {}


def available() -> bool:
    """Whether the loops can be called: numba is there, and not turned off."""
    return _cpu._engine() is not _cpu_blocks


def _prepare(table: dict[str, _Loops], kind: str) -> _Loops:
    from cupynorm import _cpu_bwd_numba, _cpu_entries, _cpu_numba

    forward = table is _fwd
    call = _cpu_entries.forward(kind) if forward else _cpu_entries.backward(kind)
    char = "d" if kind == "float64" else "f"
    engine = _cpu_numba if forward else _cpu_bwd_numba
    table[kind] = _Loops(call, int(kind == "bfloat16"), char, engine)
    return table[kind]


def forward_alone(kind: str, eps: float) -> tuple[Callable[..., None], tuple[Any, ...], int]:
    """What `layer_norm_fwd` calls for small x, for callers who count the microseconds of its own.

    The compiled function, its arguments (low, high, bfloat16), and the size below which it is
    called, on one thread: ``call(x, y, M, N, weight, bias, eps, low, high, mean, rstd, bfloat16,
    0, 0)``.
    """
    call, bfloat16, char, engine = _fwd.get(kind) or _prepare(_fwd, kind)
    return call, (*safe_range(char, eps), bfloat16), engine.ALONE


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
    call, bfloat16, char, engine = _fwd.get(kind) or _prepare(_fwd, kind)
    low, high = safe_range(char, eps)
    args = x, y, M, N, weight, bias, eps, low, high, mean, rstd, bfloat16
    if engine.ALONE > M * N:
        call(*args, 0, 0)
        return
    threads = num_threads()
    if threads == 1:
        call(*args, 0, 0)
    elif 4 * threads <= M or engine.LONG * engine.CHUNK > N:
        blocks = min(M, -(-M * N // engine.BLOCK))
        _claimed(lambda counter: call(*args, counter, blocks), threads)
    else:
        x_rows, y_rows = (_view(a, (M, N), _STORED[kind]) for a in (x, y))
        w, b = (_view(a, (N,), char) if a else None for a in (weight, bias))
        means, rstds = (_view(a, (M,), char) if a else None for a in (mean, rstd))
        _cpu._by_chunks(engine, kind, x_rows, y_rows, w, b, eps, means, rstds, threads)


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
    call, bfloat16, char, engine = _bwd.get(kind) or _prepare(_bwd, kind)
    threads = 1 if engine.ALONE > M * N else num_threads()
    args = dy, x, dx, M, N, mean, rstd, weight, dweight, dbias
    if engine.LONGEST < N:
        _bwd_of_long_rows(engine, kind, char, *args, threads)
    elif threads == 1:
        call(*args, bfloat16, 0, 0)
    else:
        from cupynorm import _cpu_entries

        size = _cpu_entries.sums_size(M, N) if dweight or dbias else 0
        sums = np.empty(size, char)
        at = sums.ctypes.data if size else 0
        _claimed(lambda counter: call(*args, bfloat16, at, counter), threads)
        if at:
            _cpu_entries.merge(kind)(at, M, N, dweight, dbias)


def _bwd_of_long_rows(
    engine: Any,
    kind: str,
    char: str,
    dy: int,
    x: int,
    dx: int,
    M: int,
    N: int,
    mean: int,
    rstd: int,
    weight: int,
    dweight: int,
    dbias: int,
    threads: int,
) -> None:
    dy_rows, x_rows = (_view(a, (M, N), _STORED[kind]) for a in (dy, x))
    dx_rows = _view(dx, (M, N), _STORED[kind]) if dx else None
    w = _view(weight, (N,), char) if weight else None
    means, rstds = (_view(a, (M,), char) for a in (mean, rstd))
    summed = bool(dweight or dbias)
    sums = engine.rows(kind, dy_rows, x_rows, dx_rows, w, means, rstds, summed, threads)
    for i, address in enumerate((dweight, dbias)):
        if address:
            round_into(sums[i], _view(address, (N,), char))


def _claimed(work: Callable[[int], None], threads: int) -> None:
    """Work on our threads; each claims blocks from the counter whose address it is given."""
    counter = np.zeros(1, np.int64)
    busy: list[int] = []

    def task(ticket: int) -> None:
        busy.append(ticket)
        try:
            work(counter.ctypes.data)
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
        self.__array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "version": 3,
        }


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> Array:
    return np.asarray(_Memory(address, shape, dtype))
