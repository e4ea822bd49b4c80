"""CuPy arrays: look, allocate, launch; the only file that touches CuPy."""

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any

import cupy

from cupynorm import _rules
from cupynorm._cuda.launch import (
    BACKWARD,
    FORWARD,
    Ready,
    choose_plan,
    column_table,
    ready,
)
from cupynorm._cuda.plan import Device, Stage
from cupynorm._cuda.source import source_of
from cupynorm._layout import Facts, Problem, kernel_problem_of, row_major_strides, rows_last
from cupynorm._libraries import check_overlap, element_strides
from cupynorm._ops import LAYER_NORM

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
        large = ("shared", "cluster", "column", "panels")
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
        """``call(x, weight, bias, out)`` gives y, or (y, mean, rstd) where the facts say so."""
        if not facts.size:
            return functools.partial(_of_nothing, facts)
        settled, (eps,) = (
            ready_on(facts.device or 0, kernel_problem_of(facts)),
            packed((facts.eps,)),
        )
        alone = None if facts.stats or settled.copies else settled.alone
        shape, order, index = facts.shape, facts.order, facts.device
        dense = facts.strides["y"] == row_major_strides(shape, ())
        w_strides, b_strides = (_dense_strides(facts, name) for name in ("weight", "bias"))
        check_apart = _apart(facts) if facts.out else None

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            if get_device() != index:
                # Or y would be allocated, and the kernel launched, on another GPU.
                with cupy.cuda.Device(index):
                    return call(x, weight, bias, out)
            if check_apart is not None:
                check_apart(x, weight, bias, out)
                y = out
            elif dense:
                y = ndarray(shape, x.dtype)  # empty_like finds out the order, for twice as much
            else:
                y = empty_like(x, order=order)
            if (
                alone is None
                or (weight is not None and weight.strides != w_strides)
                or (bias is not None and bias.strides != b_strides)
            ):
                return _run(settled, facts, (x, weight, bias, y), eps)
            function, grid, block, shared_bytes, numbers, after = alone
            w = 0 if weight is None else weight.data.ptr
            b = 0 if bias is None else bias.data.ptr
            arguments = (x.data.ptr, y.data.ptr, w, b, 0, 0, *numbers, eps, *after)
            function(grid, block, arguments, shared_bytes)
            return y

        return call

    def differentiator(self, facts: Facts) -> Callable[[Any, Any, Any, Any, Any], Any]:
        """``call(dy, x, mean, rstd, weight)`` gives (dx, dweight, dbias), None for the unwanted."""
        dtypes = {
            name: _rules.numpy_dtype(facts.dtypes[name])
            for name in ("dweight", "dbias")
            if name in facts.dtypes
        }
        index, settled = facts.device, None
        if facts.size and ("dx" in facts.strides or dtypes):
            settled = ready_on(index or 0, kernel_problem_of(facts))

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            if get_device() != index:
                with cupy.cuda.Device(index):
                    return call(dy, x, mean, rstd, weight)
            dx = empty_like(x) if "dx" in facts.strides else None
            sums = {name: empty(facts.affine_shape, dtype=dtypes[name]) for name in dtypes}
            results = dx, sums.get("dweight"), sums.get("dbias")
            if not facts.size:
                for total in sums.values():
                    total.fill(0)  # the sum over no rows
            elif settled is not None:
                given = (dy, x, mean, rstd, weight, *results)
                _launch(settled, facts.axes, dict(zip(BACKWARD, given, strict=True)))
            return results

        return call


DOOR = Door()


def _of_nothing(facts: Facts, x: Any, weight: Any, bias: Any, out: Any) -> Any:
    """A call on an empty x."""
    with cupy.cuda.Device(x.data.device_id):
        y = empty_like(x, order=facts.order) if out is None else out
        if not facts.stats:
            return y
        mean, rstd = _statistics(facts)
        for array in (mean, rstd):
            array.fill(float("nan"))  # the mean of nothing
        return y, mean, rstd


def _statistics(facts: Facts) -> tuple[Any, Any]:
    """Memory for mean and rstd."""
    dtype = _rules.stats_dtype(facts.dtypes["x"])
    return empty(facts.stats_shape, dtype=dtype), empty(facts.stats_shape, dtype=dtype)


def _run(settled: Ready, facts: Facts, arrays: tuple[Any, Any, Any, Any], eps: Any) -> Any:
    x, weight, bias, y = arrays
    mean, rstd = _statistics(facts) if facts.stats else (None, None)
    given = (x, y, weight, bias, mean, rstd)
    _launch(settled, facts.axes, dict(zip(FORWARD, given, strict=True)), eps)
    return (y, mean, rstd) if facts.stats else y


def _launch(settled: Ready, axes: tuple[int, ...], arrays: dict[str, Any], eps: Any = 0.0) -> None:
    """Launch on arrays by name, in the order of their addresses, through the copies it expects."""
    held = {name: _met(name, a, axes, settled.copies) for name, a in arrays.items()}
    nbytes = settled.workspace_bytes
    # Held until the launch; after that CuPy's pool orders reuse by stream.
    workspace = empty(nbytes, dtype="uint8") if nbytes else None
    pointers = [0 if a is None else a.data.ptr for a in held.values()]
    settled.run(pointers, eps, 0 if workspace is None else workspace.data.ptr)
    for name in settled.copies:
        if name in _WRITTEN:
            result = arrays[name]
            result.transpose(rows_last(result.ndim, axes))[...] = held[name]


_WRITTEN = ("y", "dx")
_SHAPED_AS_X = ("x", "y", "dy", "dx")


def _met(name: str, a: Any, axes: tuple[int, ...], copies: tuple[str, ...]) -> Any:
    """An array as the kernels meet it: as it lies, or memory of its own with the rows last."""
    if name in copies:
        turned = a.transpose(rows_last(a.ndim, axes))
        if name in _WRITTEN:
            return empty(turned.shape, dtype=a.dtype)
        return cupy.ascontiguousarray(turned)
    # The others have N or rows elements, and unit stride.
    if a is None or name in _SHAPED_AS_X or a.flags.c_contiguous:
        return a
    return cupy.ascontiguousarray(a)


def _dense_strides(facts: Facts, name: str) -> tuple[int, ...]:
    """Byte strides of a row-major weight or bias; of one that is absent nothing is asked."""
    size = _rules.ITEMSIZE[facts.dtypes.get(name, "float32")]
    return tuple(size * s for s in row_major_strides(facts.affine_shape, ()))


def _apart(facts: Facts) -> Callable[[Any, Any, Any, Any], None]:
    """Look by address whether `out` may overlap an input; the exact rule decides where it may."""
    size = _rules.ITEMSIZE[facts.dtypes["x"]]
    x_low, x_high, y_low, y_high = (
        size * end for name in ("x", "y") for end in _ends(facts.shape, facts.strides[name] or ())
    )
    same = facts.strides["x"] == facts.strides["y"]
    affine = []
    for name in ("weight", "bias"):
        strides = _dense_strides(facts, name)
        affine.append((name, strides, facts.N * _rules.ITEMSIZE[facts.dtypes.get(name, "float32")]))

    def check(x: Any, weight: Any, bias: Any, out: Any) -> None:
        source, target = x.data.ptr, out.data.ptr
        low, high = target + y_low, target + y_high
        if not (same and source == target) and low < source + x_high and source + x_low < high:
            check_overlap("x", x, out, same_allowed=True)
        for (name, strides, nbytes), other in zip(affine, (weight, bias), strict=True):
            if other is None:
                continue
            at = other.data.ptr
            if other.strides != strides or (low < at + nbytes and at < high):
                check_overlap(name, other, out, same_allowed=False)

    return check


def _ends(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """First element of an array and the one after its last, counted from its address."""
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 1


# --- columns ------------------------------------------------------------------------------------


def layer_norm_columns(
    columns: list[Any],
    validities: list[Any],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    *,
    omit: bool,
) -> None:
    """Normalize the rows over the columns into y (M, N) on CuPy's current stream.

    Arguments are checked, y is not empty, and its device is the current one. A validity is None, or
    the bytes of Arrow's bitmap from row 0 on.
    """
    dtypes = [("x", _rules.dtype_name(y.dtype))]
    for name, a in (("weight", weight), ("bias", bias)):
        dtypes += [] if a is None else [(name, _rules.dtype_name(a.dtype))]
    M, N = y.shape
    row, col = element_strides(y)
    steps = (("y", (0, row, col)),)
    problem = Problem(LAYER_NORM, False, tuple(dtypes), 1, M, N, steps, (M, 1), omit=omit)
    settled = ready_on(y.data.device_id, problem)
    host = column_table(
        (
            column.data.ptr,
            0 if validity is None else validity.data.ptr,
            column.strides[0] // column.itemsize,
            _rules.dtype_name(column.dtype),
        )
        for column, validity in zip(columns, validities, strict=True)
    )
    table = empty(host.shape, dtype="int64")
    table.set(host)  # from pageable memory, so it is copied away before set() returns
    _launch(settled, (1,), {"table": table, "y": y, "weight": weight, "bias": bias}, eps)
