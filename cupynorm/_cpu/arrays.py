"""NumPy arrays: what a settled call may depend on; calls that allocate, look at overlap, run."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _rules
from cupynorm._cpu import blocks, engine
from cupynorm._layout import Facts, as_table, row_major_strides
from cupynorm._libraries import check_apart
from cupynorm._ops import Op

Array = np.ndarray[Any, Any]
Call = Callable[..., Any]


class Door:
    """How NumPy arrays are met."""

    types = (np.ndarray,)
    select = None

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
        return engine.state()[1]

    def normalizer(self, facts: Facts) -> Call:
        """Give ``call(x, weight, bias, out)``: y, or (y, mean, rstd) if these are wanted.

        With a residual it is ``call(x, weight, bias, out, residual, sum_out)``, which gives the sum
        after y; where nothing is centred there is no mean.
        """
        if facts.op.residual:
            return _adding(facts)
        shape, stats, of_rows = facts.shape, facts.stats, facts.stats_shape
        of_means, first = (of_rows, 0) if facts.op.center else ((0, 0), 1)
        kind = facts.dtypes["x"]
        dtype, compute = _rules.numpy_dtype(kind), np.dtype(_rules.stats_dtype(kind))
        empty, like = np.empty, functools.partial(np.empty_like, order=facts.order)
        dense = facts.order != "F" and facts.strides["x"] == row_major_strides(shape, ())
        run, small = _forward(facts)
        do, at, none = small.do, small.plan and small.plan.at, np.empty(0, compute)
        absent = np.empty((0, 0), compute), np.empty((0, 0), compute)
        fits: bool | None = None  # shows at the first call

        def call(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Any:
            nonlocal fits
            if out is not None:
                y = out
            elif dense:  # a third of the time of empty_like
                y = empty(shape, dtype)
            else:
                y = like(x)
            told = (empty(of_means, compute), empty(of_rows, compute)) if stats else absent
            if fits:  # the least Python around the loops
                w = none if weight is None else weight
                b = none if bias is None else bias
                if do(at, x, y, w, b, *told):
                    check_apart(x, weight, bias, y)  # says what y shares memory with
                return (y, *told[first:]) if stats else y
            check_apart(x, weight, bias, out)
            given = x, y, weight, bias, *(told if stats else (None, None))
            run(*given)
            if fits is None:
                # Where rows are not dense the loops do not look at overlap.
                apart = out is None or (do and small.plan.dense)
                fits = do is not None and apart and small.fits(*given)
            return (y, *told[first:]) if stats else y

        return call

    def differentiator(self, facts: Facts) -> Call:
        """Give ``call(dy, x, mean, rstd, weight)``: dx, dweight and dbias, None if not wanted.

        There is no mean where nothing is centred, and dsum after weight where it is given.
        """
        kinds, shape = [facts.dtypes.get(k) for k in ("dweight", "dbias")], facts.affine_shape
        dtypes = [kind and _rules.numpy_dtype(kind) for kind in kinds]
        run, to_x = _backward(facts), "dx" in facts.strides

        def call(dy: Array, x: Array, mean: Any, rstd: Array, weight: Any, dsum: Any = None) -> Any:
            dx = np.empty_like(x, order="K") if to_x else None
            sums = [None if dtype is None else np.empty(shape, dtype) for dtype in dtypes]
            run(dy, x, mean, rstd, weight, dx, *sums, dsum)
            return dx, *sums

        return call


DOOR = Door()


def _adding(facts: Facts) -> Call:
    """The call of an operation that adds a residual first."""
    compute = np.dtype(_rules.stats_dtype(facts.dtypes["x"]))
    run, _ = _forward(facts)
    of_rows, like = facts.stats_shape, functools.partial(np.empty_like, order=facts.order)
    wanted = facts.stats and facts.op.center, facts.stats

    def call(x: Array, weight: Any, bias: Any, out: Any, residual: Array, sum_out: Any) -> Any:
        check_apart(x, weight, bias, out, residual, sum_out)
        y = like(x) if out is None else out
        total = like(x, residual.dtype) if sum_out is None else sum_out
        told = [np.empty(of_rows, compute) if want else None for want in wanted]
        run(x, y, weight, bias, *told, residual, total)
        return y, total, *(a for a in told if a is not None)

    return call


# --- what loops take ------------------------------------------------------------------------------


def _affine(value: Array | None, compute: np.dtype[Any], unit: bool = False) -> Array | None:
    """Weight, bias or a statistic as a row in the type that the loops compute in.

    Of a weight that is told from one, what it multiplies by.
    """
    if value is None:
        return None
    if unit:
        told: Array = _affine(value, compute) + compute.type(1)
        return told
    if value.dtype == compute and value.flags.c_contiguous and value.flags.aligned:
        return value if value.ndim == 1 else value.reshape(-1)
    with np.errstate(all="ignore"):  # a float64 weight may be Inf in float32
        return value.astype(compute, order="C").reshape(-1)


def _seen(a: Array, dtype: np.dtype[Any]) -> Array:
    """A table as compiled code takes it: where it begins, in two dimensions and this dtype."""
    if a.ndim != 2:
        a = a[(0,) * (a.ndim - 2) if a.ndim > 1 else None]
    return a if a.dtype == dtype and type(a) is np.ndarray else a.view(dtype, np.ndarray)


class _Small(NamedTuple):
    """A call that one compiled function does, with arrays as ``taken(*arrays)`` gives them."""

    do: Any = None
    plan: Any = None
    taken: Call = tuple

    def run(self, *given: Array | None) -> None:
        self.do(self.plan.at, *self.taken(*given))

    def fits(self, *given: Array | None) -> bool:
        """Whether arrays that look like these can be taken as they are."""
        pairs = zip(given, self.taken(*given), strict=True)
        return all(a is None or a is b for a, b in pairs)


def _stored(kind: str) -> np.dtype[Any]:
    """What compiled code sees in the memory of x."""
    return np.dtype(np.uint16 if kind.endswith("16") else kind)


def _address(a: Array | None) -> int:
    return a.ctypes.data if a is not None and a.size else 0


# --- forward ------------------------------------------------------------------------------------


def _copied(a: Array, turn: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """A row-major copy (M, N) in the machine's byte order."""
    copy = a.transpose(turn).astype(a.dtype.newbyteorder("="), order="C", copy=True)
    return copy.reshape(shape)


def _put_back(copy: Array, turn: tuple[int, ...], result: Array) -> None:
    target = result.transpose(turn)
    np.copyto(target, copy.reshape(target.shape))


def _forward_in_blocks(facts: Facts) -> Call:
    """``run(x, y, weight, bias, mean, rstd)``; None: absent, not wanted.

    Or, of an operation with these, ``run(x, y, weight, bias, mean, rstd, residual, sum)``.
    """
    compute, op = np.dtype(_rules.stats_dtype(facts.dtypes["x"])), facts.op
    rule = facts.eps, op.center

    def run(x: Array, y: Array, weight: Array | None, bias: Array | None, *more: Any) -> None:
        mean, rstd, *added = more
        if facts.size:
            w, b = _affine(weight, compute, op.unit_weight), _affine(bias, compute)
            results = y, mean if op.center else None, rstd, *added[1:]
            blocks.forward((x, *added[:1]), facts.axes, w, b, rule, results)
            return
        for statistic in (mean, rstd):
            if statistic is not None:
                statistic.fill(np.nan)

    return run


def _forward(facts: Facts) -> tuple[Call, _Small]:
    """``run``, as `_forward_in_blocks`, and what does it where the call is small."""
    kind = facts.dtypes["x"]
    compute = np.dtype(_rules.stats_dtype(kind))
    if not (facts.size and engine.available(kind)):
        return _forward_in_blocks(facts), _Small()
    problem = engine.problem_in_place(facts)
    if problem is None:
        return _forward_on_copy(facts), _Small()
    none, stat, unit = np.empty(0, compute), np.empty((0, 0), compute), facts.op.unit_weight
    stored, wide = _stored(kind), _stored(facts.dtypes.get("residual", kind))

    def taken(x: Any, y: Any, weight: Any, bias: Any, *more: Any) -> Any:
        w = none if weight is None else _affine(weight, compute, unit)
        b = none if bias is None else _affine(bias, compute)
        told = [stat if a is None else _seen(a, compute) for a in more[:2]]
        return _seen(x, stored), _seen(y, stored), w, b, *told, *[_seen(a, wide) for a in more[2:]]

    small = _Small(*engine.small_normalizer(problem, facts.eps), taken)
    if small.do:
        return small.run, small
    by_address = engine.normalizer(problem, facts.eps)

    def large(x: Any, y: Any, weight: Any, bias: Any, *more: Any) -> None:
        w, b = _affine(weight, compute, unit), _affine(bias, compute)
        by_address(*map(_address, (x, y, w, b, *more, *(None,) * (4 - len(more)))))

    return large, _Small()


def _forward_on_copy(facts: Facts) -> Call:
    turn, table = as_table(facts)
    on_table, _ = _forward(table)

    def run(x: Any, y: Any, weight: Any, bias: Any, *more: Any) -> None:
        told, added = more[:2], more[2:]
        copies = [_copied(a, turn, table.shape) for a in (x, *added[:1])]
        # Each result in the place of what goes into it.
        on_table(copies[0], copies[0], weight, bias, *told, *copies[1:], *copies[1:])
        for copy, result in zip(copies, (y, *added[1:]), strict=True):
            _put_back(copy, turn, result)

    return run


# --- backward -----------------------------------------------------------------------------------


def _round(sums: Any, to: Sequence[Array | None]) -> None:
    """Round sums in float64 once, into arrays of any of the four dtypes."""
    with np.errstate(all="ignore"):
        for i, total in enumerate(to):
            if total is not None:
                np.copyto(total, sums[i].reshape(total.shape), casting="unsafe")


def _backward_in_blocks(facts: Facts) -> Call:
    """``run(dy, x, mean, rstd, weight, dx, dweight, dbias, dsum)``; None: absent, not wanted."""
    compute, unit = np.dtype(_rules.stats_dtype(facts.dtypes["x"])), facts.op.unit_weight

    def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *more: Any) -> None:
        dx, *to, dsum = more
        sums: Any = np.zeros((2, facts.N))
        if facts.size:
            w, summed = _affine(weight, compute, unit), any(total is not None for total in to)
            sums = blocks.backward((dy, x, mean, rstd, dsum), facts.axes, w, dx, summed)
        _round(sums, to)

    return run


def _backward(facts: Facts) -> Call:
    """As `_backward_in_blocks`."""
    kind, dtypes = facts.dtypes["x"], facts.dtypes
    compute = np.dtype(_rules.stats_dtype(kind))
    if not (facts.size and engine.available(kind)):
        return _backward_in_blocks(facts)
    problem = engine.problem_in_place(facts)
    if problem is None:
        return _backward_on_copies(facts)
    wide = any(dtypes.get(k, compute.name) != compute.name for k in ("dweight", "dbias"))
    row, unit = np.empty(0, compute), facts.op.unit_weight
    table, stat, stored = np.empty((0, 0), _stored(kind)), np.empty((0, 0), compute), _stored(kind)

    def taken(dy: Any, x: Any, *more: Any) -> Any:
        mean, rstd, weight, dx, *to, dsum = more
        stats = [
            stat if a is None else _seen(np.ascontiguousarray(a, compute), compute)
            for a in (mean, rstd)
        ]
        w = row if weight is None else _affine(weight, compute, unit)
        sums = (row if a is None else _affine(a, compute) for a in to)
        tables = (table if a is None else _seen(a, stored) for a in (dsum, dx))
        return _seen(dy, stored), _seen(x, stored), *stats, w, *tables, *sums

    if not wide:
        small = _Small(*engine.small_differentiator(problem), taken)
        if small.do:
            return small.run
    by_address = engine.differentiator(problem, wide_sums=wide)

    def large(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *more: Any) -> None:
        (m, r), w = (_affine(a, compute) for a in (mean, rstd)), _affine(weight, compute, unit)
        dx, *to, dsum = more
        sums = [None if a is None else np.empty(facts.N) for a in to] if wide else to
        by_address(*map(_address, (dy, x, m, r, w, dx, *sums, dsum)))
        if wide:
            _round(sums, to)

    return large


def _backward_on_copies(facts: Facts) -> Call:
    turn, table = as_table(facts)
    on_tables = _backward(table)

    def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *more: Any) -> None:
        dx, *to, dsum = more
        source, gradient = (_copied(a, turn, table.shape) for a in (x, dy))
        added = None if dsum is None else _copied(dsum, turn, table.shape)
        # dx may take the place of dy, but where it holds first what it is added to.
        held = gradient if added is None else added
        place = None if dx is None else held
        on_tables(gradient, source, mean, rstd, weight, place, *to, added)
        if dx is not None:
            _put_back(held, turn, dx)

    return run


# --- columns ------------------------------------------------------------------------------------


def normalize_columns(
    op: Op,
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
    compute = np.dtype(_rules.stats_dtype(kind))
    w, b = _affine(weight, compute, op.unit_weight), _affine(bias, compute)
    rule = eps, op.center
    if not engine.available(kind):
        blocks.columns(columns, w, b, rule, y, omit)
        return
    target = y if Door.strides(y) else np.empty(y.shape, y.dtype.newbyteorder("="))
    found = [(_readable(x), _address(bits), offset) for x, bits, offset in columns]
    engine.columns(found, target, _address(w), _address(b), rule, omit)
    if target is not y:
        np.copyto(y, target)


def _readable(x: Array) -> Array:
    """A column as loops can read it: what they cannot is copied, and it alone."""
    if x.dtype.name == "float16" and not engine.available("float16"):
        return x.astype(np.float32)
    if Door.strides(x) == (1,):
        return x
    return x.astype(x.dtype.newbyteorder("="), order="C", copy=True)
