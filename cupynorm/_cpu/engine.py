"""Which compiled work does a problem, on how many threads: by the addresses of its arrays."""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu import threads
from cupynorm._layout import Problem

Array = np.ndarray[Any, Any]
Call = Callable[..., None]

# Elements below which one thread does all, and that pay for another.
ALONE, _SHARE = 1 << 19, 1 << 18
# Elements of a share of work, 6 us: none that is smaller is handed to a thread.
_BLOCK = 1 << 15
# Columns from which x and dy are read twice, since one row of both does not stay in the L2.
LONGEST = 32768
# Chunks from which a row is shared between threads where there are few of them.
_LONG = 16
# Bytes from which long rows, which are read a second time, are written past the caches.
_PAST = 1 << 24
# Sums of squares that float32 (float64) cannot hold well are taken again in float64, scaled.
_SAFE = {"float32": (2.0**-100, 2.0**126), "float64": (2.0**-960, 2.0**1020)}
# Variances so small that their digits matter only if eps is smaller still.
_EPS_HIDES_UNDERFLOW = 1e-20


def safe_range(dtype: str, eps: float) -> tuple[float, float]:
    """Between which values a variance in this dtype needs no second look."""
    low, high = _SAFE[dtype]
    return (-1.0 if abs(eps) >= _EPS_HIDES_UNDERFLOW else low), high


@functools.cache
def state() -> tuple[bool, str]:
    """Whether the compiled loops are there, and what to say about it."""
    if os.environ.get("CUPYNORM_NUMBA", "1").strip() == "0":
        return False, "plain NumPy blocks (CUPYNORM_NUMBA=0)"
    try:
        import numba

        if numba.config.DISABLE_JIT:  # loops over raw vectors have no meaning in Python
            return False, "plain NumPy blocks (NUMBA_DISABLE_JIT is set)"
        from cupynorm._cpu import jobs  # noqa: F401
    except ImportError as error:
        return False, f"plain NumPy blocks (numba cannot be imported: {error})"
    return True, f"numba {numba.__version__} loops"


def available(kind: str = "float32") -> bool:
    """Whether compiled loops take x of this dtype."""
    if not state()[0]:
        return False
    if kind != "float16":
        return True
    from cupynorm._cpu.vectors import F16C

    return F16C


def computed(kind: str) -> str:
    """Name of the dtype of weight, bias and statistics beside x of this dtype."""
    return "float64" if kind == "float64" else "float32"


def _useful(size: int, num_threads: Callable[[], int]) -> int:
    return 1 if size < ALONE else min(num_threads(), size // _SHARE)


def _filled(dtype: np.dtype[Any], names: dict[str, Any]) -> tuple[Any, int]:
    """A record, which must outlive its address."""
    record = np.zeros(1, dtype)
    for name, value in names.items():
        record[name] = value
    return record, record.ctypes.data


def _record(dtype: np.dtype[Any], problem: Problem, rows: int, **values: Any) -> tuple[Any, int]:
    """Tell of a problem in a record."""
    names = {"outer": problem.outer, "M": problem.M, "N": problem.N, "rows": rows, **values}
    names["stats_outer"], names["stats_row"] = problem.stats_strides
    for array, steps in problem.strides:
        for way, step in zip(("outer", "row", "col"), steps, strict=True):
            names[f"{array}_{way}"] = step
    return _filled(dtype, names)


def normalizer(
    problem: Problem, eps: float, num_threads: Callable[[], int] = threads.num_threads
) -> Call:
    """Give ``call(x, y, weight, bias, mean, rstd)``, which takes addresses; 0: absent.

    weight, bias, mean and rstd are contiguous, or lie by ``problem.stats_strides``, float32
    (float64 for float64 x). ``num_threads`` is asked at each call where more than one pays.
    """
    from cupynorm._cpu import jobs
    from cupynorm._cpu.forward import CHUNK
    from cupynorm._cpu.strips import rows_of_strip

    kind = problem.dtype("x") or ""
    outer, M, N = problem.outer, problem.M, problem.N
    size, chunks = outer * M * N, -(-N // CHUNK)
    low, high = safe_range(computed(kind), eps)
    limits = {"eps": eps, "low": low, "high": high}
    rows = max(1, _BLOCK // N) if problem.row_major else rows_of_strip(min(N, CHUNK))
    rows = min(M, rows)
    record, plan = _record(jobs.FORWARD, problem, rows, **limits)
    strips = outer * -(-M // rows)
    chunked = None
    if chunks > 1 and not problem.row_major:
        chunked = _by_chunks(problem, rows, limits)
    elif chunks >= _LONG:
        chunked = _by_chunks(problem, 1, limits)
    do = jobs.rows(kind)

    def alone(x: int, y: int, weight: int, bias: int, mean: int, rstd: int) -> None:
        do(plan, x, y, weight, bias, mean, rstd, 0, strips)

    def call(x: int, y: int, weight: int, bias: int, mean: int, rstd: int) -> None:
        count = _useful(size, num_threads)
        if chunked is not None and (not problem.row_major or (4 * count > outer * M and count > 1)):
            chunked(x, y, weight, bias, mean, rstd, count)
            return
        threads.run(lambda lo, hi: do(plan, x, y, weight, bias, mean, rstd, lo, hi), strips, count)

    run = alone if size < ALONE and chunked is None else call
    run.record = record  # type: ignore[attr-defined]  # which the address in `plan` is of
    return run


def _by_chunks(problem: Problem, rows: int, limits: dict[str, float]) -> Call:
    """Long rows, few of them or strided: moments of every chunk, then results of every chunk.

    The chunks and the order in which they merge go by N alone, so the bits are those of a row
    that one thread did alone.
    """
    from cupynorm._cpu import jobs
    from cupynorm._cpu.forward import CHUNK

    kind = problem.dtype("x") or ""
    count, chunks = problem.outer * problem.M, -(-problem.N // CHUNK)
    itemsize = {"float32": 4, "float64": 8}.get(kind, 0)  # 16 bits are not written past the caches
    past = int(count * problem.N * itemsize >= _PAST)
    record, plan = _record(jobs.FORWARD, problem, rows, past=past, **limits)
    items = problem.outer * -(-problem.M // rows) * chunks

    def call(x: int, y: int, weight: int, bias: int, mean: int, rstd: int, workers: int) -> None:
        parts, stats = np.empty((count, chunks, 3)), np.empty((count, 3))
        at, to = parts.ctypes.data, stats.ctypes.data
        take, give = jobs.chunk_moments(kind), jobs.chunk_results(kind)
        threads.run(lambda lo, hi: take(plan, x, at, lo, hi), items, workers)
        jobs.finish(kind)(plan, at, mean, rstd, to, 0, count)
        threads.run(lambda lo, hi: give(plan, x, y, weight, bias, to, lo, hi), items, workers)

    call.record = record  # type: ignore[attr-defined]
    return call


def gradient_record(problem: Problem) -> tuple[Any, int]:
    """What the backward's jobs are told of a problem."""
    from cupynorm._cpu import jobs
    from cupynorm._cpu.strips import rows_of_strip

    rows = problem.M if problem.row_major else min(problem.M, rows_of_strip(problem.N))
    return _record(jobs.BACKWARD, problem, rows, dx_col=1)


def differentiator(
    problem: Problem,
    num_threads: Callable[[], int] = threads.num_threads,
    *,
    wide_sums: bool = False,
) -> Call:
    """Give ``call(dy, x, mean, rstd, weight, dx, dweight, dbias)``, as `normalizer` does.

    With ``wide_sums`` dweight and dbias are float64, so that the caller can round them once.
    """
    from cupynorm._cpu import jobs
    from cupynorm._cpu.backward import block_count

    kind = problem.dtype("x") or ""
    count, N = problem.outer * problem.M, problem.N
    record, plan = gradient_record(problem)
    blocks = block_count.py_func(count)
    size, dtype = jobs.sums_size(count, N), computed(kind)
    long = problem.row_major and problem.outer == 1 and N > LONGEST

    def call(
        dy: int, x: int, mean: int, rstd: int, weight: int, dx: int, dweight: int, dbias: int
    ) -> None:
        workers = _useful(count * N, num_threads)
        sums = np.empty(size, dtype) if dweight or dbias else None
        to = 0 if sums is None else sums.ctypes.data
        if long:
            _long_gradients(problem, plan, workers, (dy, x, mean, rstd, weight, dx, to))
        else:
            do = jobs.gradients(kind)
            threads.run(
                lambda lo, hi: do(plan, dy, x, mean, rstd, weight, dx, to, lo, hi), blocks, workers
            )
        if sums is not None:
            jobs.merge(kind)(plan, to, dweight, dbias, int(wide_sums), 0)

    call.record = record  # type: ignore[attr-defined]
    return call


def _long_gradients(problem: Problem, plan: int, workers: int, at: tuple[int, ...]) -> None:
    """Long rows: sums over every chunk of each row, then the gradients of every chunk."""
    from cupynorm._cpu import jobs
    from cupynorm._cpu.backward import FIELDS, block_count
    from cupynorm._cpu.forward import CHUNK

    kind, M = problem.dtype("x") or "", problem.M
    dy, x, mean, rstd, weight, dx, sums = at
    chunks = -(-problem.N // CHUNK)
    parts, stats = np.empty((M, chunks, 3)), np.empty(FIELDS * M, computed(kind))
    found, told = parts.ctypes.data, stats.ctypes.data
    take, give = jobs.long_sums(kind), jobs.long_gradients(kind)
    threads.run(
        lambda lo, hi: take(plan, dy, x, mean, rstd, weight, found, lo, hi), M * chunks, workers
    )
    jobs.long_finish(kind)(plan, found, mean, rstd, told, 0, M)
    items = block_count.py_func(M) * chunks
    threads.run(lambda lo, hi: give(plan, dy, x, weight, told, dx, sums, lo, hi), items, workers)


def columns(found: Any, y: Array, weight: int, bias: int, eps: float, omit: bool) -> None:
    """Normalize the rows of a table into y (M, N), which is native and aligned, of any strides.

    ``found`` holds (values, address of the bitmap or 0, its bit of row 0) for each column, which
    is contiguous, of one of `strips.COLUMN_DTYPES`. With ``omit`` NaN is left out of a row's
    statistics.
    """
    from cupynorm._cpu import jobs
    from cupynorm._cpu.strips import COLUMN_DTYPES, rows_of_strip

    (M, N), kind = y.shape, y.dtype.name
    rows = min(M, rows_of_strip(N))
    low, high = safe_range(computed(kind), eps)
    y_row, y_col = (step // y.itemsize for step in y.strides)
    names = {"M": M, "N": N, "rows": rows, "y_row": y_row, "y_col": y_col, "omit": omit}
    record, plan = _filled(jobs.TABLE, names | {"eps": eps, "low": low, "high": high})
    table = np.zeros((5, N), np.int64)
    for j, (x, bitmap, bit) in enumerate(found):
        number = COLUMN_DTYPES.index(x.dtype.name)
        table[:, j] = number, x.ctypes.data, x.itemsize, bitmap, bit
    at, to, do = table.ctypes.data, y.ctypes.data, jobs.table(kind)
    workers = _useful(M * N, threads.num_threads)
    threads.run(lambda lo, hi: do(plan, at, to, weight, bias, lo, hi), -(-M // rows), workers)
    del record  # its last use
