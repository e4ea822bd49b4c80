"""Launches plans on a GPU; the only file that touches CuPy."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cupy

from cupynorm import _problem
from cupynorm._arrays import element_strides
from cupynorm._layout import Layout, layout_of, rows_last
from cupynorm._plan import Device, Plan, Stage, choose_plan
from cupynorm._source import source_of

__all__ = [
    "device_of",
    "empty",
    "empty_like",
    "from_exporter",
    "is_current",
    "kernel_of",
    "layer_norm_fwd",
    "warmup",
]

empty = cupy.empty
empty_like = cupy.empty_like


def is_current(x: Any) -> bool:
    """Whether CuPy allocates and launches on x's device."""
    current: bool = x.device.id == cupy.cuda.runtime.getDevice()
    return current


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


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All of a call that does not depend on its pointers."""

    layout: Layout
    plan: Plan
    functions: tuple[Any, ...]
    tail: tuple[Any, ...]  # the arguments after the pointers, but for eps
    weight_as: Callable[[Any], Any] | None  # brings weight and bias to unit stride
    bias_as: Callable[[Any], Any] | None


_prepared: dict[Any, _Prepared] = {}


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
    key = (
        index,
        x.dtype,
        x.shape,
        x.strides,
        y.strides,
        axes,
        None if weight is None else (weight.dtype, weight.strides),
        None if bias is None else (bias.dtype, bias.strides),
        mean is not None,
    )
    ready = _prepared.get(key)
    if ready is None:
        ready = _prepared[key] = _prepare(index, x, axes, weight, bias, y, mean is not None)
    _run(ready, x, axes, weight, bias, eps, y, mean, rstd)


def _prepare(
    index: int, x: Any, axes: tuple[int, ...], weight: Any, bias: Any, y: Any, stats: bool
) -> _Prepared:
    names = [None if a is None else _problem.dtype_name(a.dtype) for a in (x, weight, bias)]
    layout = layout_of(
        x.shape,
        axes,
        element_strides(x),
        element_strides(y),
        (str(names[0]), names[1], names[2]),
        stats,
    )
    p = layout.problem
    plan = choose_plan(p, device_of(index))
    functions = tuple(_load(stage, index) for stage in plan.stages)
    tail = (p.rows, p.M, p.x_strides[0], p.x_strides[1], p.y_strides[0], p.y_strides[1], p.N)
    return _Prepared(layout, plan, functions, tail, _contiguous(weight), _contiguous(bias))


def _load(stage: Stage, index: int) -> Any:
    # A launch needs no permission for up to 48 KiB; only K3's text is ever launched with more.
    return kernel_of(stage.name, source_of(stage), stage.family == "shared", index)


def _contiguous(a: Any) -> Callable[[Any], Any] | None:
    if a is None or a.flags.c_contiguous:
        return None
    contiguous: Callable[[Any], Any] = cupy.ascontiguousarray
    return contiguous  # N elements, on the same device: not worth a kernel


def _run(
    ready: _Prepared,
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    mean: Any,
    rstd: Any,
) -> None:
    if ready.weight_as is not None:
        weight = ready.weight_as(weight)
    if ready.bias_as is not None:
        bias = ready.bias_as(bias)
    layout, plan = ready.layout, ready.plan
    source, target = x, y
    if layout.copy_x:
        source = cupy.ascontiguousarray(x.transpose(rows_last(x.ndim, axes)))
    if layout.copy_y:
        order = rows_last(x.ndim, axes)
        target = cupy.empty(tuple(x.shape[a] for a in order), dtype=x.dtype)
    arguments = (
        source.data.ptr,
        target.data.ptr,
        0 if weight is None else weight.data.ptr,
        0 if bias is None else bias.data.ptr,
        0 if mean is None else mean.data.ptr,
        0 if rstd is None else rstd.data.ptr,
        *ready.tail,
        eps,
    )
    if plan.family == "split":
        _launch_split(ready, arguments)
    else:
        stage = plan.stages[0]
        ready.functions[0](stage.grid, stage.block, arguments, stage.shared_bytes)
    if layout.copy_y:
        y.transpose(rows_last(x.ndim, axes))[...] = target


def _launch_split(ready: _Prepared, arguments: tuple[Any, ...]) -> None:
    plan = ready.plan
    stats, normalize = plan.stages
    # CuPy's pool orders reuse by stream, so the workspace may be dropped before it is read.
    workspace = cupy.empty(plan.workspace_bytes, dtype="uint8")
    sections = (plan.sections, plan.chunks_per_section)
    rows, M, x_outer, x_row, _, _, N = ready.tail
    ready.functions[0](
        stats.grid,
        stats.block,
        (arguments[0], workspace.data.ptr, rows, M, x_outer, x_row, N, *sections),
        stats.shared_bytes,
    )
    ready.functions[1](
        normalize.grid,
        normalize.block,
        (*arguments, workspace.data.ptr, *sections, plan.parts),
        normalize.shared_bytes,
    )


def warmup(shape: tuple[int, ...], dtypes: Sequence[str], affine: bool) -> list[str]:
    """Compile and load, on the current device, what row-major x of these dtypes needs."""
    index = cupy.cuda.runtime.getDevice()
    N = math.prod(shape)
    names = []
    for name in dtypes:
        for rows in (1, 2**20):  # few rows may take K5
            strides = (N, 1)
            dtypes_of_call = (name, name if affine else None, name if affine else None)
            layout = layout_of((rows, N), (1,), strides, strides, dtypes_of_call, False)
            for stage in choose_plan(layout.problem, device_of(index)).stages:
                _load(stage, index)
                names.append(stage.name)
    return list(dict.fromkeys(names))
