"""CuPy arrays: look, allocate, launch; the only file that touches CuPy."""

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any

import cupy
import numpy as np

from cupynorm import _memo
from cupynorm._cuda.launch import (
    BACKWARD,
    COLUMN_TYPES,
    COLUMNS,
    FORWARD,
    Ready,
    check_aligned,
    choose_plan,
    ready,
)
from cupynorm._cuda.plan import Device, Stage
from cupynorm._cuda.source import source_of
from cupynorm._layout import (
    Facts,
    Problem,
    kernel_problem_of,
    row_major_strides,
    rows_last,
)
from cupynorm._libraries import check_apart, element_strides
from cupynorm._ops import Op
from cupynorm._rules import ITEMSIZE, dtype_name, numpy_dtype, stats_dtype

ndarray = cupy.ndarray
get_device = cupy.cuda.runtime.getDevice  # index of the GPU where CuPy allocates and launches
empty = cupy.empty
empty_like = cupy.empty_like


def from_exporter(x: Any) -> Any:
    """CuPy array over the memory of an object on a GPU that CuPy does not know."""
    if hasattr(x, "__dlpack__"):
        return cupy.from_dlpack(x)
    return cupy.asarray(x)


def device(index: int | None) -> Any:
    """CuPy's device of that index, the current one for None; a context to allocate in."""
    return cupy.cuda.Device(index)


@functools.cache
def device_of(index: int) -> Device:
    """Read what a plan needs to know of GPU `index`."""
    device = cupy.cuda.Device(index)
    attributes = device.attributes
    return Device(
        compute_capability=int(device.compute_capability),
        sm_count=attributes["MultiProcessorCount"],
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
    )


# --- kernels ------------------------------------------------------------------------------------


@functools.cache
def kernel_of(name: str, source: str, opt_in: bool, index: int) -> Any:
    """Compile and load a kernel on GPU `index`, which must be the current one.

    `RawKernel.__call__` looks the device's function up on every call; its result is kept instead.
    """
    kernel = cupy.RawKernel(source, name)
    function = kernel.kernel
    if opt_in:
        # The most the device has, not what this call needs: CuPy hands out one function for one
        # text, so a shorter row's limit would forbid a longer row's launch.
        kernel.max_dynamic_shared_size_bytes = device_of(index).shared_bytes
    return function


def ready_on(index: int, problem: Problem) -> Ready:
    """Plan a problem and load its kernels on GPU `index`."""
    if get_device() != index:
        with cupy.cuda.Device(index):
            return ready_on(index, problem)

    def load(stage: Stage) -> Any:
        # A launch needs no permission for up to 48 KiB; only these are ever launched with more.
        large = ("shared", "cluster", "column")
        return kernel_of(stage.name, source_of(stage), stage.family.startswith(large), index)

    return ready(problem, device_of(index), load, packed)


def packed(numbers: Iterable[float]) -> tuple[Any, ...]:
    """Numbers in the form that CuPy hands to a launch.

    It makes such an object of every Python number at each launch, 100 ns apiece. Those that are the
    same each time are made once, where this CuPy lets us: the type is CuPy's own affair.
    """
    plain = tuple(numbers)
    try:
        from cupy._core._scalar import CScalar

        made = tuple(CScalar(n) for n in plain)
        if all(_held(c, n) for c, n in zip(made, plain, strict=True)):
            return made
    except (ImportError, AttributeError, TypeError):
        pass
    return plain


def _held(scalar: Any, number: float) -> bool:
    """Whether a launch that reads 8 bytes there reads this number."""
    kind = ctypes.c_double if type(number) is float else ctypes.c_int64
    return bool(scalar.ptr) and kind.from_address(scalar.ptr).value == number


# --- the door -----------------------------------------------------------------------------------


class Door:
    """How CuPy arrays come in: `_calls` asks it for calls that are settled once for each look."""

    select = None
    types = (ndarray,)

    def look(self, a: Any) -> Any:
        """All of one array that a settled call may depend on."""
        return type(a), a.shape, a.strides, a.dtype, a.data.device_id

    def strides(self, a: Any) -> tuple[int, ...]:
        """Element strides."""
        return element_strides(a)

    def device(self, a: Any) -> int:
        """Index of its GPU."""
        return int(a.data.device_id)

    def describe(self, facts: Facts) -> str:
        """Names of the kernels that would run."""
        if not facts.size:
            return "nothing to run: x is empty"
        plan = choose_plan(kernel_problem_of(facts), device_of(facts.device or 0))
        return " then ".join(stage.name for stage in plan.stages)

    def normalizer(self, facts: Facts) -> Callable[[Any, Any, Any, Any], Any]:
        """``call(x, weight, bias, out)`` gives y, or (y, mean, rstd) where the facts say so.

        With a residual it is ``call(x, weight, bias, out, residual, sum_out)``, which gives the sum
        after y; where nothing is centred there is no mean. All arrays that come look like the first
        ones.
        """
        index, shape, order = facts.device or 0, facts.shape, facts.order
        settled = ready_on(index, kernel_problem_of(facts)) if facts.size else None
        if settled is None or facts.op.residual or facts.stats:
            return _by_names(facts, settled)
        (eps,) = packed((facts.eps,))
        dense = facts.strides["y"] == row_major_strides(shape, ())
        x_low, x_high = _reach(facts, "x")
        y_low, y_high = _reach(facts, "y")
        same = facts.strides["x"] == facts.strides["y"]
        w_bytes, b_bytes = (
            facts.N * ITEMSIZE[facts.dtypes[name]] if name in facts.dtypes else 0
            for name in ("weight", "bias")
        )
        as_they_lie: bool | None = None  # whether weight and bias are row-major
        function, grid, block, shared_bytes, _ = settled.launches[0]
        more = 0, 0, *settled.before, eps, *settled.after
        alone = settled.alone and not settled.copies
        low_bits = settled.low_bits

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            nonlocal as_they_lie
            if get_device() != index:
                # Or y would be allocated, and the kernel launched, on another GPU.
                with cupy.cuda.Device(index):
                    return call(x, weight, bias, out)
            if as_they_lie is None:
                as_they_lie = all(a is None or a.flags.c_contiguous for a in (weight, bias))
            if out is not None:
                y = out
            elif dense:
                y = ndarray(shape, x.dtype)  # empty_like finds out the order, for twice as much
            else:
                y = empty_like(x, order=order)
            at, to = x.data.ptr, y.data.ptr
            w = 0 if weight is None else weight.data.ptr
            b = 0 if bias is None else bias.data.ptr
            if out is not None:
                low, high = to + y_low, to + y_high
                if (
                    not as_they_lie
                    or (low < at + x_high and at + x_low < high and not (same and at == to))
                    or (w < high and low < w + w_bytes)
                    or (b < high and low < b + b_bytes)
                ):  # perhaps; the exact rule decides
                    check_apart(x, weight, bias, out)
            if alone and as_they_lie and not (at | to | w | b) & low_bits:
                function(grid, block, (at, to, w, b, *more), shared_bytes)
                return y
            _launch(settled, FORWARD, facts.axes, (x, y, weight, bias, None, None), eps)
            return y

        return call

    def differentiator(self, facts: Facts) -> Callable[..., Any]:
        """``call(dy, x, mean, rstd, weight)`` gives (dx, dweight, dbias), None for the unwanted.

        A dsum comes after these.
        """
        index, affine_shape = facts.device or 0, facts.affine_shape
        to_x, kinds = "dx" in facts.strides, [facts.dtypes.get(k) for k in ("dweight", "dbias")]
        dtypes = [kind and numpy_dtype(kind) for kind in kinds]
        some = facts.size and (to_x or any(kinds))
        settled = ready_on(index, kernel_problem_of(facts)) if some else None

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *dsum: Any) -> Any:
            if get_device() != index:
                with cupy.cuda.Device(index):
                    return call(dy, x, mean, rstd, weight, *dsum)
            new = empty if facts.size else cupy.zeros  # the sum over no rows
            sums = (None if d is None else new(affine_shape, dtype=d) for d in dtypes)
            results = empty_like(x) if to_x else None, *sums
            if settled is not None:
                given = dy, x, mean, rstd, weight, *results, *dsum
                _launch(settled, (*BACKWARD, "dsum"), facts.axes, given)
            return results

        return call


DOOR = Door()


def _by_names(facts: Facts, settled: Ready | None) -> Callable[..., Any]:
    """The call of any operation; the mean and rstd of nothing are NaN."""
    index, adds, order = facts.device or 0, facts.op.residual, facts.order
    wanted, stats = (facts.stats and facts.op.center, facts.stats), stats_dtype(facts.dtypes["x"])
    new = empty if facts.size else functools.partial(cupy.full, fill_value=np.nan)
    (eps,) = packed((facts.eps,))

    def call(x: Any, weight: Any, bias: Any, out: Any, *added: Any) -> Any:
        if get_device() != index:
            with cupy.cuda.Device(index):
                return call(x, weight, bias, out, *added)
        check_apart(x, weight, bias, out, *added)
        y = empty_like(x, order=order) if out is None else out
        told = [new(facts.stats_shape, dtype=stats) if want else None for want in wanted]
        if adds:
            residual, total = added
            if total is None:
                total = empty_like(x, dtype=residual.dtype, order=order)
            added = residual, total
        if settled is not None:
            given = x, y, weight, bias, *told, *added
            _launch(settled, (*FORWARD, "residual", "sum"), facts.axes, given, eps)
        found = y, *added[1:], *(a for a in told if a is not None)
        return found if len(found) > 1 else y

    return call


def _reach(facts: Facts, name: str) -> tuple[int, int]:
    """First byte of an array of x's shape and the one after its last, counted from its address."""
    size, strides = ITEMSIZE[facts.dtypes["x"]], facts.strides[name] or ()
    ends = [size * s * (n - 1) for s, n in zip(strides, facts.shape, strict=True)]
    return sum(e for e in ends if e < 0), sum(e for e in ends if e > 0) + size


# What launches use that a graph has captured: a replay writes there as long as the graph lives, of
# which we know nothing.
_captured: list[Any] = []

_WRITTEN = ("y", "dx", "sum")
_SHAPED_AS_X = ("x", "dy", "residual", "dsum", *_WRITTEN)


def _launch(
    settled: Ready,
    names: tuple[str, ...],
    axes: tuple[int, ...],
    arrays: tuple[Any, ...],
    eps: Any = 0.0,
) -> None:
    """Launch on arrays in the order of their names, through the copies that the kernels expect."""
    dtype = numpy_dtype(settled.dtype) if settled.copies else None

    def met(name: str, a: Any) -> Any:
        if a is None:
            return None
        if name in settled.copies or not (name in _SHAPED_AS_X or a.flags.c_contiguous):
            check_aligned(name, a.data.ptr, a.itemsize)  # the copy is made by a kernel, too
        if name in settled.copies:
            turned = a.transpose(rows_last(a.ndim, axes))
            if name in _WRITTEN:
                return empty(turned.shape, dtype=dtype)
            return cupy.ascontiguousarray(turned, dtype=dtype)
        # The small ones have N or rows elements, and are met with unit stride.
        return a if name in _SHAPED_AS_X else cupy.ascontiguousarray(a)

    # Held until the launch; after that CuPy's pool orders reuse by stream.
    pairs = tuple(zip(names, arrays, strict=False))  # a dsum may lack
    held = [met(name, a) for name, a in pairs]
    nbytes = settled.workspace_bytes
    workspace = empty(nbytes, dtype="uint8") if nbytes else None
    at = 0 if workspace is None else workspace.data.ptr
    settled.run((0 if a is None else a.data.ptr for a in held), eps, at)
    own = [copy for copy, (_, a) in zip(held, pairs, strict=True) if copy is not a]
    if own or nbytes:
        stream = cupy.cuda.get_current_stream()
        if stream.ptr and stream.is_capturing():  # the null stream is never captured
            _captured.append((workspace, own))
    if settled.copies:
        for (name, a), copy in zip(pairs, held, strict=True):
            if name in _WRITTEN and name in settled.copies:
                a.transpose(rows_last(a.ndim, axes))[...] = copy


# --- columns ------------------------------------------------------------------------------------


def normalize_columns(
    op: Op,
    columns: list[Any],
    validities: list[Any],
    affine: tuple[Any, Any],
    y: Any,
    *,
    eps: float,
    omit: bool,
) -> None:
    """Normalize the rows over the columns into y (M, N) on CuPy's current stream.

    Arguments are checked, y is not empty, and its device is the current one. A validity is None, or
    the bytes of Arrow's bitmap from row 0 on.
    """
    index, (M, N), (row, col) = y.data.device_id, y.shape, element_strides(y)
    weight, bias = affine
    given = {"x": y, "weight": weight, "bias": bias}
    dtypes = tuple((name, dtype_name(a.dtype)) for name, a in given.items() if a is not None)
    steps = (("y", (0, row, col)),)
    problem = Problem(op, False, dtypes, 1, M, N, steps, (M, 1), omit=omit)
    key = DOOR, index, problem
    launch = _memo.settled().get(key) or _memo.keep(
        key, functools.partial(_launch, ready_on(index, problem), COLUMNS, (1,))
    )
    for i, column in enumerate(columns):
        check_aligned(f"column {i}", column.data.ptr, column.itemsize)
    host = [
        (
            column.data.ptr,
            0 if validity is None else validity.data.ptr,
            column.strides[0] // column.itemsize,
            COLUMN_TYPES.index(dtype_name(column.dtype)),
        )
        for column, validity in zip(columns, validities, strict=True)
    ]
    table = empty((N, 4), dtype="int64")
    table.set(np.array(host, dtype=np.int64))  # from pageable memory: copied away when it returns
    launch((table, y, weight, bias), eps)
