"""Launches plans on a GPU; the only file that touches CuPy."""

import functools
from collections.abc import Sequence
from typing import Any

import cupy

from cupynorm import _problem
from cupynorm._arrays import element_strides
from cupynorm._cuda.launch import (
    ReadyBackward,
    ReadyForward,
    launch_bwd,
    launch_fwd,
    ready_bwd,
    ready_column,
    ready_column_bwd,
    ready_fwd,
)
from cupynorm._cuda.plan import Device, Stage, choose_plan
from cupynorm._cuda.plan_bwd import choose_plan_bwd
from cupynorm._cuda.plan_column import choose_plan_column
from cupynorm._cuda.plan_column_bwd import choose_plan_column_bwd
from cupynorm._cuda.source import source_of
from cupynorm._layout import (
    column_gradient_problem_of,
    column_problem_of,
    gradient_layout_of,
    layout_of,
    rows_last,
)

__all__ = [
    "dense",
    "device",
    "device_of",
    "empty",
    "empty_like",
    "from_exporter",
    "get_device",
    "is_current",
    "kernel_of",
    "launch_bwd",
    "launch_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "loaded",
    "ndarray",
    "prepared_bwd",
    "prepared_fwd",
    "run_fwd",
]

ndarray = cupy.ndarray
get_device = cupy.cuda.runtime.getDevice  # index of the GPU where CuPy allocates and launches
empty = cupy.empty
empty_like = cupy.empty_like


def is_current(x: Any) -> bool:
    """Whether CuPy allocates and launches on x's device."""
    return bool(x.device.id == get_device())


def device(index: int | None) -> Any:
    """CuPy's device of that index, the current one for None; a context to allocate in."""
    return cupy.cuda.Device(index)


def from_exporter(x: Any) -> Any:
    """CuPy array over the memory of an object on a GPU that CuPy does not know."""
    if hasattr(x, "__dlpack__"):
        return cupy.from_dlpack(x)
    return cupy.asarray(x)


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


@functools.lru_cache(maxsize=4096)
def prepared_fwd(
    index: int,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    dtypes: tuple[str, str | None, str | None],
    stats: bool,
) -> ReadyForward:
    """Plan and load a forward on GPU `index`, the current one.

    Strides count elements, dtypes are the names of x's, weight's and bias's. What `copies` of the
    result names is to be passed as a row-major copy with the normalized axes last.
    """
    layout = layout_of(shape, axes, x_strides, y_strides, dtypes, stats)
    if layout.copy_x or layout.copy_y:
        column = column_problem_of(shape, axes, x_strides, y_strides, dtypes)
        if column is not None:
            tiled = choose_plan_column(column, device_of(index))
            return ready_column(column, tiled, loaded(tiled.stages, index))
    plan = choose_plan(layout.problem, device_of(index))
    return ready_fwd(layout, plan, loaded(plan.stages, index))


@functools.lru_cache(maxsize=4096)
def prepared_bwd(
    index: int,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dy_strides: tuple[int, ...],
    x_strides: tuple[int, ...],
    dx_strides: tuple[int, ...] | None,
    dtypes: tuple[str, str | None, str | None, str | None],
) -> ReadyBackward:
    """Plan and load a backward on GPU `index`, the current one.

    As `prepared_fwd`; dtypes are the names of x's, weight's, dweight's and dbias's, None for what
    is absent or not wanted, and dx is not wanted where `dx_strides` is None.
    """
    layout = gradient_layout_of(shape, axes, dy_strides, x_strides, dx_strides, dtypes)
    if layout.copies:
        column = column_gradient_problem_of(shape, axes, dy_strides, x_strides, dx_strides, dtypes)
        if column is not None:
            tiled, slots = choose_plan_column_bwd(column, device_of(index))
            return ready_column_bwd(column, tiled, slots, loaded(tiled.stages, index))
    plan = choose_plan_bwd(layout.problem, device_of(index))
    return ready_bwd(layout, plan, loaded(plan.stages, index))


def loaded(stages: Sequence[Stage], index: int) -> tuple[Any, ...]:
    """Compile and load the kernels of a plan on GPU `index`, the current one."""
    # A launch needs no permission for up to 48 KiB; only these texts are ever launched with more.
    large = ("shared", "cluster", "column", "panels")
    return tuple(
        kernel_of(stage.name, source_of(stage), stage.family.startswith(large), index)
        for stage in stages
    )


# Looked up by CuPy's own objects: turning dtypes and strides into names and elements for the caches
# above costs more than the launch.
_prepared: dict[Any, ReadyForward] = {}
_prepared_bwd: dict[Any, ReadyBackward] = {}


def _name(a: Any) -> str | None:
    return None if a is None else _problem.dtype_name(a.dtype)


def layer_norm_fwd(
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    mean: Any,
    rstd: Any,
) -> None:
    """Normalize x into y on CuPy's current stream.

    Arguments are checked, arrays not empty, and x's device is the current one.
    """
    index = x.device.id
    stats = mean is not None
    key = (
        index,
        x.dtype,
        x.shape,
        x.strides,
        y.strides,
        axes,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        stats,
    )
    ready = _prepared.get(key)
    if ready is None:
        dtypes = (str(_name(x)), _name(weight), _name(bias))
        strides = (element_strides(x), element_strides(y))
        ready = _prepared[key] = prepared_fwd(index, x.shape, axes, *strides, dtypes, stats)
    run_fwd(ready, x, axes, weight, bias, eps, y, mean, rstd)


def run_fwd(
    ready: ReadyForward,
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    mean: Any,
    rstd: Any,
) -> None:
    """Launch a plan on CuPy arrays, through the copies that it expects."""
    source = _rows_last(x, axes) if "x" in ready.copies else x
    target = _rows_last(x, axes, empty=True) if "y" in ready.copies else y
    weight, bias = dense(weight), dense(bias)  # held until the launch
    pointers = (  # written out: a loop costs as much as a plan's look-up
        source.data.ptr,
        target.data.ptr,
        0 if weight is None else weight.data.ptr,
        0 if bias is None else bias.data.ptr,
        0 if mean is None else mean.data.ptr,
        0 if rstd is None else rstd.data.ptr,
    )
    # CuPy's pool orders reuse by stream, so the workspace may be dropped before it is read.
    workspace = cupy.empty(ready.workspace_bytes, dtype="uint8") if ready.workspace_bytes else None
    launch_fwd(ready, pointers, eps, _address(workspace))
    if target is not y:
        y.transpose(rows_last(x.ndim, axes))[...] = target


def layer_norm_bwd(
    dy: Any,
    x: Any,
    axes: tuple[int, ...],
    mean: Any,
    rstd: Any,
    weight: Any,
    dx: Any,
    dweight: Any,
    dbias: Any,
) -> None:
    """Write dx, dweight and dbias (each may be None) on CuPy's current stream.

    Arguments are checked, arrays not empty, dweight and dbias contiguous, and x's device is the
    current one.
    """
    index = x.device.id
    key = (
        index,
        x.dtype,
        x.shape,
        dy.strides,
        x.strides,
        None if dx is None else dx.strides,
        axes,
        *(None if a is None else a.dtype for a in (weight, dweight, dbias)),
    )
    ready = _prepared_bwd.get(key)
    if ready is None:
        dtypes = (str(_name(x)), _name(weight), _name(dweight), _name(dbias))
        strides = (element_strides(dy), element_strides(x))
        to = None if dx is None else element_strides(dx)
        ready = _prepared_bwd[key] = prepared_bwd(index, x.shape, axes, *strides, to, dtypes)
    source = _rows_last(x, axes) if "x" in ready.copies else x
    slope = _rows_last(dy, axes) if "dy" in ready.copies else dy
    target = _rows_last(x, axes, empty=True) if "dx" in ready.copies else dx
    arrays = (slope, source, dense(mean), dense(rstd), dense(weight), target, dweight, dbias)
    workspace = cupy.empty(ready.workspace_bytes, dtype="uint8") if ready.workspace_bytes else None
    launch_bwd(ready, [_address(a) for a in arrays], _address(workspace))
    if target is not dx:
        dx.transpose(rows_last(x.ndim, axes))[...] = target


def _address(a: Any) -> int:
    return 0 if a is None else a.data.ptr


def dense(a: Any) -> Any:
    """Bring a small array to unit stride: N or M elements, on the same device."""
    return a if a is None or a.flags.c_contiguous else cupy.ascontiguousarray(a)


def _rows_last(a: Any, axes: tuple[int, ...], *, empty: bool = False) -> Any:
    """Give a row-major copy with the normalized axes last, or memory for one."""
    turned = a.transpose(rows_last(a.ndim, axes))
    return cupy.empty(turned.shape, dtype=a.dtype) if empty else cupy.ascontiguousarray(turned)
