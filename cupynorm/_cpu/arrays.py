"""NumPy arrays: what a settled call may depend on; calls that allocate, look at overlap, run."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from cupynorm import _rules
from cupynorm._cpu import blocks, engine
from cupynorm._layout import Facts, Problem, as_table, problem_of, row_major_strides
from cupynorm._libraries import check_overlap

Array = np.ndarray[Any, Any]
Call = Callable[..., Any]

_plain: ContextVar[bool] = ContextVar("cupynorm_plain_numpy", default=False)


class Door:
    """How NumPy arrays are met; ``plain``: as if numba were not there."""

    types = (np.ndarray,)
    refuses_prepared = ""

    def __init__(self, plain: bool) -> None:
        self._plain = plain
        # None, or what finds the door of a call: set while somebody is within `without_numba`.
        self.select: Callable[..., Door] | None = None

    @staticmethod
    def look(a: Array) -> Any:
        """All of one array that a settled call may depend on."""
        flags = a.flags
        return type(a), a.shape, a.dtype, flags.carray or (a.strides, flags.num)

    @staticmethod
    def strides(a: Array) -> tuple[int, ...] | None:
        """Element strides; None where memory cannot be counted in elements."""
        size = a.itemsize
        if not (a.flags.aligned and a.dtype.isnative) or any(s % size for s in a.strides):
            return None
        return tuple(s // size for s in a.strides)

    @staticmethod
    def device(a: Array) -> None:
        """Of a GPU: none."""

    def describe(self, facts: Facts) -> str:
        """Which loops would run."""
        return describe()

    def normalizer(self, facts: Facts) -> Call:
        """Give ``call(x, weight, bias, out)``: y, or (y, mean, rstd) if these are wanted."""
        new, shape, stats = _maker(facts), facts.stats_shape, facts.stats
        compute = np.dtype(engine.computed(facts.dtypes["x"]))
        small = None if self._plain else _small(facts, compute)
        # What is behind `small` is made when it is needed: a process's first small call compiles,
        # or loads, one function.
        run = _forward(facts, self._plain) if small is None else None

        def ordinary(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Any:
            nonlocal run, small
            y = new(x) if out is None else out
            mean = rstd = None
            if stats:
                mean, rstd = np.empty(shape, compute), np.empty(shape, compute)
            if small is not None:
                try:
                    if not small(x, weight, bias, y, mean, rstd):
                        return (y, mean, rstd) if stats else y
                except TypeError:  # weight or bias lies otherwise than loops take it
                    small = None
            if out is not None:
                _check_out(x, weight, bias, out)
            if run is None:
                run = _forward(facts, self._plain)
            run(x, weight, bias, y, mean, rstd)
            return (y, mean, rstd) if stats else y

        direct = None if small is None else _direct(facts, compute, ordinary)
        return direct or ordinary

    def differentiator(self, facts: Facts) -> Call:
        """Give ``call(dy, x, mean, rstd, weight)``: dx, dweight and dbias, None if not wanted."""
        dtypes, shape = facts.dtypes, facts.affine_shape
        to_weight, to_bias = (
            _rules.numpy_dtype(dtypes[k]) if k in dtypes else None for k in ("dweight", "dbias")
        )
        run, to_x = _backward(facts, self._plain), "dx" in facts.strides

        def call(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array | None) -> Any:
            dx = np.empty_like(x, order="K") if to_x else None
            dweight = None if to_weight is None else np.empty(shape, to_weight)
            dbias = None if to_bias is None else np.empty(shape, to_bias)
            run(dy, x, mean, rstd, weight, dx, dweight, dbias)
            return dx, dweight, dbias

        return call


DOOR, PLAIN = Door(plain=False), Door(plain=True)
_within, _lock = 0, threading.Lock()


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    """Within this context run as if numba were not installed."""
    global _within
    token = _plain.set(True)
    with _lock:
        _within += 1
        DOOR.select = _select
    try:
        yield
    finally:
        _plain.reset(token)
        with _lock:
            _within -= 1
            DOOR.select = _select if _within else None


def _select(*arguments: Any) -> Door:
    return PLAIN if _plain.get() else DOOR


def describe() -> str:
    """Say in words which loops NumPy arrays take."""
    return "plain NumPy blocks" if _plain.get() else engine.state()[1]


# --- forward ------------------------------------------------------------------------------------


def _maker(facts: Facts) -> Callable[[Array], Array]:
    """Make y: as `numpy.empty_like`, which costs three times as much."""
    shape, order = facts.shape, facts.order
    if facts.strides["x"] != row_major_strides(shape, ()) or order == "F":
        return functools.partial(np.empty_like, order=order)
    return lambda x: np.empty(shape, x.dtype)


def _affine(value: Array | None, compute: np.dtype[Any]) -> Array | None:
    """Weight or bias as a row in the type that the loops compute in."""
    if value is None:
        return None
    if value.dtype == compute and value.flags.carray:
        return value if value.ndim == 1 else value.reshape(-1)
    with np.errstate(all="ignore"):  # a float64 weight may be Inf in float32
        return value.astype(compute, order="C").reshape(-1)


def _small(facts: Facts, compute: np.dtype[Any]) -> Call | None:
    """``small(x, weight, bias, y, mean, rstd)``: True, and nothing is done, where y overlaps.

    None where it takes more than one table of short contiguous rows and one thread.
    """
    kind, N = facts.dtypes["x"], facts.N
    if not (0 < facts.size < engine.ALONE and engine.available(kind) and _dense(facts)):
        return None
    from cupynorm._cpu.forward import CHUNK
    from cupynorm._cpu.small import small, small_with_stats

    if N > CHUNK:
        return None
    do, none = (small_with_stats if facts.stats else small)(kind), np.empty(0, compute)
    limits = facts.eps, *engine.safe_range(compute.name, facts.eps)
    table, stored = (facts.size // N, N), _stored(kind)

    def on_arrays(x: Any, w: Any, b: Any, y: Any, *stats: Any) -> Any:
        rows = []
        for row in (w, b):
            if row is not None and not (row.dtype == compute and row.flags.c_contiguous):
                if facts.out and np.may_share_memory(row, y):  # of a copy loops could not tell
                    return True
                row = _affine(row, compute)
            rows.append(none if row is None else row.reshape(-1))
        told = [a.reshape(-1) for a in stats if a is not None]
        tables = [a.reshape(table).view(stored) for a in (x, y)]
        return do(*tables, *rows, *told, *limits)

    return on_arrays


def _direct(facts: Facts, compute: np.dtype[Any], ordinary: Call) -> Call | None:
    """The call with the least Python around the loops, where arrays are as `small` takes them."""
    kind = facts.dtypes["x"]
    rows = [facts.dtypes.get(name, compute.name) for name in ("weight", "bias")]
    alike = kind == compute.name and rows == [kind, kind]
    if facts.stats or not alike or len(facts.shape) != 2 or len(facts.axes) != 1:
        return None
    from cupynorm._cpu.small import small

    do, none, empty, shape = small(kind), np.empty(0, compute), np.empty, facts.shape
    eps, (low, high) = facts.eps, engine.safe_range(compute.name, facts.eps)
    fits = True

    def direct(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Any:
        nonlocal fits
        if fits:
            y = empty(shape, compute) if out is None else out
            w, b = none if weight is None else weight, none if bias is None else bias
            try:
                if not do(x, y, w, b, eps, low, high):
                    return y
            except TypeError:  # as in `ordinary`
                fits = False
        return ordinary(x, weight, bias, out)

    return direct


def _dense(facts: Facts) -> bool:
    """Whether all arrays are one C-ordered table of rows."""
    dense, ndim = row_major_strides(facts.shape, ()), len(facts.shape)
    trailing = facts.axes == tuple(range(ndim - len(facts.axes), ndim))
    return trailing and all(strides == dense for strides in facts.strides.values())


def _stored(kind: str) -> np.dtype[Any]:
    """What compiled code sees in the memory of x."""
    return np.dtype(np.uint16 if kind.endswith("16") else kind)


def _address(a: Array | None) -> int:
    return 0 if a is None else a.ctypes.data


def _check_out(x: Array, weight: Array | None, bias: Array | None, out: Array) -> None:
    if out is not x:
        check_overlap("x", x, out, same_allowed=True)
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            check_overlap(label, other, out, same_allowed=False)


def _copied(a: Array, turn: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """A row-major copy (M, N) in the machine's byte order."""
    copy = a.transpose(turn).astype(a.dtype.newbyteorder("="), order="C", copy=True)
    return copy.reshape(shape)


def _forward(facts: Facts, plain: bool) -> Call:
    """``run(x, weight, bias, y, mean, rstd)``, the latter two None or C-contiguous."""
    kind, axes, eps = facts.dtypes["x"], facts.axes, facts.eps
    compute = np.dtype(engine.computed(kind))
    if not facts.size:
        return _of_nothing
    if plain or not engine.available(kind):

        def in_blocks(x: Any, weight: Any, bias: Any, y: Any, mean: Any, rstd: Any) -> None:
            w, b = _affine(weight, compute), _affine(bias, compute)
            blocks.forward(x, axes, w, b, eps, (y, mean, rstd))

        return in_blocks
    problem = problem_of(facts)
    if problem is not None:
        do = engine.normalizer(problem, eps)

        def in_place(x: Any, weight: Any, bias: Any, y: Any, mean: Any, rstd: Any) -> None:
            w, b = _affine(weight, compute), _affine(bias, compute)
            do(*map(_address, (x, y, w, b, mean, rstd)))

        return in_place
    turn, table = as_table(facts)
    on_table = _forward(table, plain)

    def on_copy(x: Any, weight: Any, bias: Any, y: Any, mean: Any, rstd: Any) -> None:
        copy, to = _copied(x, turn, table.shape), y.transpose(turn)
        on_table(copy, weight, bias, copy, mean, rstd)
        np.copyto(to, copy.reshape(to.shape))

    return on_copy


def _of_nothing(x: Any, weight: Any, bias: Any, y: Any, mean: Any, rstd: Any) -> None:
    for statistic in (mean, rstd):
        if statistic is not None:
            statistic.fill(np.nan)


# --- backward -----------------------------------------------------------------------------------


def _backward(facts: Facts, plain: bool) -> Call:
    """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``, absent what is not wanted."""
    kind, axes = facts.dtypes["x"], facts.axes
    compute = np.dtype(engine.computed(kind))
    if not facts.size:
        return _sums_of_nothing
    if plain or not engine.available(kind):

        def in_blocks(dy: Any, x: Any, mean: Any, rstd: Any, w: Any, dx: Any, *to: Any) -> None:
            summed = any(total is not None for total in to)
            sums = blocks.backward((dy, x, mean, rstd), axes, _affine(w, compute), dx, summed)
            _round(sums, to)

        return in_blocks
    problem = problem_of(facts)
    if problem is None or (problem.N > engine.LONGEST and not _one_table(problem)):
        return _on_copies(facts)
    wide = any(facts.dtypes.get(k, compute.name) != compute.name for k in ("dweight", "dbias"))
    do = engine.differentiator(problem, wide_sums=wide)
    small = _small_gradients(facts, problem, compute)

    def in_place(dy: Any, x: Any, mean: Any, rstd: Any, w: Any, dx: Any, *to: Any) -> None:
        nonlocal small
        if small is not None:
            try:
                small(dy, x, mean, rstd, w, dx, *to)
                return
            except TypeError:  # weight or bias lies otherwise than loops take it
                small = None
        m, r = (np.ascontiguousarray(a, compute) for a in (mean, rstd))
        w = _affine(w, compute)
        sums = to
        if wide:
            sums = tuple(None if a is None else np.empty(facts.N) for a in to)
        do(*map(_address, (dy, x, m, r, w, dx, *sums)))
        if wide:
            _round(sums, to)

    return in_place


def _one_table(problem: Problem) -> bool:
    return problem.outer == 1 and problem.row_major


def _on_copies(facts: Facts) -> Call:
    turn, table = as_table(facts)
    do = _backward(table, False)

    def run(dy: Any, x: Any, mean: Any, rstd: Any, w: Any, dx: Any, *to: Any) -> None:
        source, gradient = (_copied(a, turn, table.shape) for a in (x, dy))
        do(gradient, source, mean, rstd, w, None if dx is None else gradient, *to)
        if dx is not None:
            target = dx.transpose(turn)
            np.copyto(target, gradient.reshape(target.shape))

    return run


def _round(sums: Any, to: tuple[Array | None, ...]) -> None:
    """Round sums in float64 once, into arrays of any of the four dtypes."""
    with np.errstate(all="ignore"):
        for i, total in enumerate(to):
            if total is not None:
                np.copyto(total, sums[i].reshape(total.shape), casting="unsafe")


def _sums_of_nothing(*arrays: Any) -> None:
    for total in arrays[-2:]:
        if total is not None:
            total.fill(0)


def _small_gradients(facts: Facts, problem: Problem, compute: np.dtype[Any]) -> Call | None:
    """As `_small`, of the backward."""
    same = all(facts.dtypes.get(k, compute.name) == compute.name for k in ("dweight", "dbias"))
    if not (same and _dense(facts) and facts.size < engine.ALONE and problem.N <= engine.LONGEST):
        return None
    from cupynorm._cpu.small import small_gradients

    record, plan = engine.gradient_record(problem)
    kind, table = facts.dtypes["x"], (problem.M, problem.N)
    do, stored = small_gradients(kind), _stored(kind)
    none, row = np.empty((0, 0), stored), np.empty(0, compute)

    def small(*arrays: Any, record: Any = record) -> None:
        dy, x, mean, rstd, w, dx, *to = arrays
        tables = [none if a is None else a.reshape(table).view(stored) for a in (dy, x, dx)]
        rows = [row if a is None else a.reshape(-1) for a in (mean, rstd, w, *to)]
        do(plan, *tables[:2], *rows[:3], tables[2], *rows[3:])

    return small


# --- columns ------------------------------------------------------------------------------------


def normalize_columns(
    columns: Sequence[tuple[Array, Array | None, int]],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    *,
    omit: bool,
) -> None:
    """Normalize the rows of N columns of length M into y (M, N), of any strides.

    A column is its values, Arrow's bitmap of what is valid, or None, and the bit of it that row 0
    has. A null counts as NaN; with ``omit``, NaN is left out of a row's statistics. Nothing is
    empty and nothing overlaps y. Statistics and their sums are float32, float64 for float64 y.
    """
    kind = y.dtype.name
    compute = np.dtype(engine.computed(kind))
    w, b = _affine(weight, compute), _affine(bias, compute)
    if _plain.get() or not engine.available(kind):
        blocks.columns(columns, w, b, eps, y, omit)
        return
    target = y if Door.strides(y) else np.empty(y.shape, y.dtype.newbyteorder("="))
    found = [(_readable(x), _address(bits), offset) for x, bits, offset in columns]
    engine.columns(found, target, _address(w), _address(b), eps, omit)
    if target is not y:
        np.copyto(y, target)


def _readable(x: Array) -> Array:
    """A column as loops can read it: what they cannot is copied, and it alone."""
    if x.dtype.name == "float16" and not engine.available("float16"):
        return x.astype(np.float32)
    if Door.strides(x) == (1,):
        return x
    return x.astype(x.dtype.newbyteorder("="), order="C", copy=True)
