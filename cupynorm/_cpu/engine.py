"""Which compiled work does a problem, on how many threads: by the addresses of its arrays."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np

from cupynorm import _memo
from cupynorm._cpu import threads
from cupynorm._layout import Facts, Problem, problem_of
from cupynorm._rules import stats_dtype

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
# Bytes of y from which it is written past the caches, so that no line of it is read first: for
# 8192x4096 it takes 0.7 of the time with out=, 0.95 in fresh memory. In place it would take 1.2.
_PAST = 1 << 24
# Sums of squares that float32 (float64) cannot hold well are taken again in float64, scaled.
_SAFE = {"float32": (2.0**-100, 2.0**126), "float64": (2.0**-960, 2.0**1020)}
# Variances so small that their digits matter only if eps is smaller still.
_EPS_HIDES_UNDERFLOW = 1e-20


def safe_range(dtype: str, eps: float) -> tuple[float, float]:
    """Between which values a variance in this dtype needs no second look."""
    low, high = _SAFE[dtype]
    return (-1.0 if abs(eps) >= _EPS_HIDES_UNDERFLOW else low), high


_without: ContextVar[bool] = ContextVar("cupynorm_without_numba", default=False)


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    """Within this context calls are settled, apart from others, as if numba were not installed."""
    without, apart = _without.set(True), _memo.kept.set({})
    try:
        yield
    finally:
        _without.reset(without)
        _memo.kept.reset(apart)


def state() -> tuple[bool, str]:
    """Whether the compiled loops are to be taken, and what to say about it."""
    return (False, "plain NumPy blocks") if _without.get() else _installed()


@functools.cache
def _installed() -> tuple[bool, str]:
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


def _useful(size: int, num_threads: Callable[[], int]) -> int:
    return 1 if size < ALONE else min(num_threads(), size // _SHARE)


def problem_in_place(facts: Facts) -> Problem | None:
    """Fold a call for the loops; None where they take copies of its arrays as tables."""
    problem = problem_of(facts)
    if problem is None or (facts.backward and problem.N > LONGEST and not one_table(problem)):
        return None
    return problem


class Plan:
    """What jobs are told of a problem: a record, which lives as long as this, and its address."""

    __slots__ = "_record", "at", "dense"

    def __init__(self, dense: bool, **values: Any) -> None:
        from cupynorm._cpu.jobs import PLAN

        self.dense, self._record = dense, np.zeros(1, PLAN)
        for name, value in values.items():
            self._record[name] = value
        self.at: int = self._record.ctypes.data


def _plan(problem: Problem, rows: int, eps: float = 0.0) -> Plan:
    """Tell of a problem; so many rows of it go together."""
    names = {f: getattr(problem, f) for f in ("outer", "M", "N")}
    names |= dict(zip(("stats_outer", "stats_row"), problem.stats_strides, strict=True))
    for array, steps in problem.strides:
        for way, step in zip(("outer", "row", "col"), steps, strict=True):
            names[f"{array}_{way}"] = step
    # Arrays that may need a tile: y takes that of x, the sum that of residual, dx that of dy.
    read = [name for name, _ in problem.strides if name in ("x", "residual", "dy", "dsum")]
    names["tiles"] = 0 if problem.row_major else len(read)
    past = _past(_kind(problem), problem.rows * problem.N, names.get("y_col", 0))
    names |= {"rows": rows, "past": past, **_limits(_kind(problem), eps)}
    # Each array is one block of memory, row after row.
    pitches = {steps[1] for _, steps in problem.strides}
    return Plan(one_table(problem) and (problem.M == 1 or pitches == {problem.N}), **names)


def _past(kind: str, size: int, col: int) -> bool:
    """Whether y is written past the caches: not through a tile, and not in 16 bits."""
    return col == 1 and size * {"float32": 4, "float64": 8}.get(kind, 0) >= _PAST


def one_table(problem: Problem) -> bool:
    """Whether each array's rows are contiguous, and all the same step apart."""
    return problem.outer == 1 and problem.row_major


def _limits(kind: str, eps: float) -> dict[str, float]:
    low, high = safe_range(stats_dtype(kind), eps)
    return {"eps": eps, "low": low, "high": high}


def _kind(problem: Problem) -> str:
    return problem.dtype("x") or ""


def _rows_of_block(problem: Problem) -> int:
    from cupynorm._cpu.forward import CHUNK
    from cupynorm._cpu.strips import rows_of_strip

    N = problem.N
    rows = max(1, _BLOCK // N) if problem.row_major else rows_of_strip(min(N, CHUNK))
    return min(problem.M, rows)


def small_normalizer(problem: Problem, eps: float) -> tuple[Any, Any]:
    """Give ``do`` and ``plan``: one thread does all by ``do(plan.at, x, y, weight, bias, ...)``.

    It takes arrays, as `jobs.small` says. None twice where it would not pay.
    """
    from cupynorm._cpu import forward, jobs

    if problem.rows * problem.N >= ALONE or problem.N > forward.CHUNK:
        return None, None
    rows, kind, center = _rows_of_block(problem), _kind(problem), problem.op.center
    plan = _plan(problem, rows, eps)
    if problem.op.residual:
        do = jobs.rows(kind, center, problem.dtype("residual"), True)
        strips = _strips(problem, rows)
        return lambda at, *arrays: do(at, 0, strips, *arrays), plan
    return jobs.small(kind, plan.dense, center), plan


def _strips(problem: Problem, rows: int) -> int:
    """Count the strips of so many rows."""
    return problem.outer * -(-problem.M // rows)


def normalizer(
    problem: Problem, eps: float, num_threads: Callable[[], int] = threads.num_threads
) -> Call:
    """Give ``call(x, y, weight, bias, mean, rstd, residual, sum)``: addresses; 0: absent.

    weight, bias, mean and rstd are
    contiguous, or lie by ``problem.stats_strides``, float32 (float64 for float64 x).
    ``num_threads`` is asked at each call where more than one pays.
    """
    from cupynorm._cpu import forward, jobs

    kind, size, chunks = _kind(problem), problem.rows * problem.N, -(-problem.N // forward.CHUNK)
    rows, scattered = _rows_of_block(problem), not problem.row_major and chunks > 1
    plan, strips = _plan(problem, rows, eps), _strips(problem, rows)
    do = jobs.rows(kind, problem.op.center, problem.dtype("residual") or "")
    by_chunks = _by_chunks(problem, eps) if scattered or chunks >= _LONG else None

    alone = functools.partial(do, plan.at, 0, strips)
    alone.plan = plan  # type: ignore[attr-defined]  # whose record is at that address

    def call(*given: int) -> None:
        count = _useful(size, num_threads)
        if by_chunks is not None and (scattered or (4 * count > problem.rows and count > 1)):
            by_chunks(count, *given)
        else:
            threads.run(lambda lo, hi: do(plan.at, lo, hi, *given), strips, count)

    return alone if size < ALONE and by_chunks is None else call


def _by_chunks(problem: Problem, eps: float) -> Call:
    """Long rows, few of them or strided: moments of every chunk, then results of every chunk.

    The chunks and the order in which they merge go by N alone, so the bits are those of a row
    that one thread did alone.
    """
    from cupynorm._cpu import forward, jobs

    kind, chunks = _kind(problem), -(-problem.N // forward.CHUNK)
    rows = 1 if problem.row_major else _rows_of_block(problem)
    plan, items = _plan(problem, rows, eps), _strips(problem, rows) * chunks
    met, op, wide = plan, problem.op, problem.dtype("residual") or ""
    if op.residual:  # whose results are those of the sum
        strides = {"x": problem.steps("sum"), "y": problem.steps("y")}
        met = _plan(replace(problem, strides=tuple(strides.items())), rows, eps)

    def call(count: int, x: int, y: int, *more: int) -> None:
        weight, bias, mean, rstd, residual, total = more
        parts, stats = np.empty((problem.rows, chunks, 3)), np.empty((problem.rows, 3))
        at, to = parts.ctypes.data, stats.ctypes.data
        take, give = jobs.chunk_moments(kind, op.center, wide), jobs.chunk_results(kind, wide)
        threads.run(lambda lo, hi: take(plan.at, lo, hi, x, residual, total, at), items, count)
        jobs.finish(kind)(plan.at, at, mean, rstd, to)
        source = total or x
        threads.run(lambda lo, hi: give(met.at, lo, hi, source, y, weight, bias, to), items, count)

    return call


def _gradient_plan(problem: Problem) -> Plan:
    from cupynorm._cpu.strips import rows_of_strip

    rows = problem.M if problem.row_major else min(problem.M, rows_of_strip(problem.N))
    return _plan(problem, rows)


def small_differentiator(problem: Problem) -> tuple[Any, Any]:
    """As `small_normalizer`; `jobs.small_gradients` says which arrays it takes."""
    from cupynorm._cpu import jobs

    if problem.rows * problem.N >= ALONE or problem.N > LONGEST:
        return None, None
    return jobs.small_gradients(_kind(problem)), _gradient_plan(problem)


def differentiator(
    problem: Problem,
    num_threads: Callable[[], int] = threads.num_threads,
    *,
    wide_sums: bool = False,
) -> Call:
    """Give ``call(dy, x, mean, rstd, weight, dx, dweight, dbias)``, as `normalizer` does.

    What is added to dx may come last. With ``wide_sums`` dweight and dbias are float64, so that the
    caller can round them once.
    """
    from cupynorm._cpu import backward, jobs

    kind, plan = _kind(problem), _gradient_plan(problem)
    made = "float64" if wide_sums else stats_dtype(kind)
    rows, size = problem.rows, problem.rows * problem.N
    blocks, long = backward.block_count(rows), one_table(problem) and problem.N > LONGEST

    def call(*given: int) -> None:
        dweight, dbias = given[6:8]
        arrays = *given[:5], *(given[8:] or (0,)), given[5]
        count = _useful(size, num_threads)
        summed = bool(dweight or dbias)
        sums = np.empty(backward.sums_size(rows, problem.N) if summed else 0, stats_dtype(kind))
        to = sums.ctypes.data if summed else 0
        if long:
            _long_gradients(problem, plan.at, count, (*arrays, to))
        else:
            do = jobs.gradients(kind)
            threads.run(lambda lo, hi: do(plan.at, lo, hi, *arrays, to), blocks, count)
        if summed:
            jobs.merge(kind, made)(plan.at, to, dweight, dbias)

    return call


def _long_gradients(problem: Problem, plan: int, count: int, at: tuple[int, ...]) -> None:
    """Long rows: sums over every chunk of each row, then the gradients of every chunk."""
    from cupynorm._cpu import backward, forward, jobs

    kind, M, chunks = _kind(problem), problem.M, -(-problem.N // forward.CHUNK)
    dy, x, mean, rstd, weight, dsum, dx, sums = at
    parts, stats = np.empty((M, chunks, 3)), np.empty(backward.FIELDS * M, stats_dtype(kind))
    found, told = parts.ctypes.data, stats.ctypes.data
    take, give = jobs.long_sums(kind), jobs.long_gradients(kind)
    threads.run(
        lambda lo, hi: take(plan, lo, hi, dy, x, mean, rstd, weight, found), M * chunks, count
    )
    jobs.long_finish(kind)(plan, found, mean, rstd, told)
    items = backward.block_count(M) * chunks
    threads.run(
        lambda lo, hi: give(plan, lo, hi, dy, x, weight, told, dsum, dx, sums), items, count
    )


def columns(
    found: Any, y: Array, weight: int, bias: int, rule: tuple[float, bool], omit: bool
) -> None:
    """Normalize the rows of a table into y (M, N), which is native and aligned, of any strides.

    ``found``: (values, address of the bitmap or 0, its bit of row 0) of each column, contiguous, of
    one of `strips.COLUMN_DTYPES`. ``rule``: eps, and whether rows are centred. With ``omit``
    NaN is left out of a row's statistics.
    """
    from cupynorm._cpu import jobs, strips

    (M, N), kind, (eps, center) = y.shape, y.dtype.name, rule
    rows = min(M, strips.rows_of_strip(N))
    y_row, y_col = (step // y.itemsize for step in y.strides)
    names = {"outer": 1, "M": M, "N": N, "rows": rows, "y_row": y_row, "y_col": y_col}
    names |= {"omit": omit, "tiles": 1, "past": _past(kind, M * N, y_col)}
    plan = Plan(False, **names, **_limits(kind, eps))
    table = np.zeros((5, N), np.int64)
    for j, (x, bitmap, bit) in enumerate(found):
        number = strips.COLUMN_DTYPES.index(x.dtype.name)
        table[:, j] = number, x.ctypes.data, x.itemsize, bitmap, bit
    at, to, do = table.ctypes.data, y.ctypes.data, jobs.table(kind, center)
    count = _useful(M * N, threads.num_threads)
    threads.run(lambda lo, hi: do(plan.at, lo, hi, at, to, weight, bias), -(-M // rows), count)
