"""Torch tensors on a GPU: launches on torch's current stream, scratch from torch's allocator."""

from collections.abc import Callable
from typing import Any

import torch

from cupynorm._cuda import arrays as _cuda
from cupynorm._cuda.prelaunch import launch_into, ready_from
from cupynorm._layout import rows_last
from cupynorm._problem import dtype_name

__all__ = ["layer_norm_bwd", "layer_norm_fwd", "prepared"]


class _Stream:
    """What a launch needs to know of a stream."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _stream(index: int) -> _Stream:
    """Torch's current stream on a GPU."""
    # Triton and Inductor use it too: a tenth of the cost of torch.cuda.current_stream(), which
    # makes an object that knows events.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return _Stream(torch.cuda.current_stream(index).cuda_stream if raw is None else raw(index))


def _index(x: Any) -> int:
    index: int = x.device.index
    return index


def _is_current(index: int) -> bool:
    current: bool = torch.cuda.current_device() == index
    return current


def _name(dtype: Any) -> str | None:
    return None if dtype is None else dtype_name(dtype)


# Looked up by torch's own objects: names cost more than a look. As in `_cuda`, a few thousand kept.
_MOST = 4096
_prepared: dict[Any, Any] = {}


def _prepared_fwd(
    index: int, axes: tuple[int, ...], x: Any, y: Any, weight: Any, bias: Any, stats: bool
) -> Any:
    dtypes = (
        x.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
    )
    key = (index, x.shape, axes, x.stride(), y.stride(), dtypes, stats)
    ready = _prepared.get(key)
    if ready is None:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        names = (str(_name(dtypes[0])), _name(dtypes[1]), _name(dtypes[2]))
        ready = _prepared[key] = _cuda.prepared_fwd(*key[:5], names, stats)
    return ready


def _prepared_bwd(
    index: int, axes: tuple[int, ...], dy: Any, x: Any, weight: Any, dx: Any, sums: tuple[Any, Any]
) -> Any:
    dtypes = (x.dtype, *(None if a is None else a.dtype for a in (weight, *sums)))
    dx_strides = None if dx is None else dx.stride()
    key = (index, x.shape, axes, dy.stride(), x.stride(), dx_strides, dtypes)
    ready = _prepared.get(key)
    if ready is None:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        names = tuple(map(_name, dtypes))
        ready = _prepared[key] = _cuda.prepared_bwd(*key[:6], names)
    return ready


def prepared(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, y: Any
) -> Callable[[int, int], bool] | None:
    """What writes to the address of a y like this one from that of an x like this one.

    One launch on torch's current stream; None where there is more to do. False, and nothing done,
    where the two overlap in part, y overlaps weight or bias, or another device is current. Weight
    and bias are read where they are now. A kernel that is not there yet is compiled.
    """
    index = _index(x)
    if not _is_current(index):
        with torch.cuda.device(index):
            return prepared(x, axes, weight, bias, eps, y)
    found = _prepared_fwd(index, axes, x, y, weight, bias, False)
    affine = [t for t in (weight, bias) if t is not None]
    if any(t.is_neg() or not t.is_contiguous() for t in affine) or not x.is_contiguous():
        return None
    names = tuple(_name(None if t is None else t.dtype) for t in (x, weight, bias))
    ready = ready_from(found, tuple(x.shape), axes, x.stride(), y.stride(), names, eps)
    if ready is None or x.numel() == 1:  # a negated view may be contiguous
        return None
    w, b = _pointer(weight), _pointer(bias)

    def run(source: int, target: int) -> bool:
        if not _is_current(index):
            return False
        return launch_into(ready, source, target, w, b, _stream(index))

    return run


def _pointer(tensor: Any) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(nbytes: int, x: Any) -> Any:
    """Scratch memory; torch's allocator orders its reuse by stream, so it may be dropped early."""
    return torch.empty(nbytes, dtype=torch.uint8, device=x.device) if nbytes else None


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
    """Normalize x into y; mean and rstd may be None, nothing is empty."""
    index = _index(x)
    if not _is_current(index):
        with torch.cuda.device(index):
            layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
        return
    # The names keep copies alive until they are on the stream.
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    stats = mean is not None
    ready, target = _prepared_fwd(index, axes, x, y, weight, bias, stats), y
    if ready.copies:
        order = rows_last(x.ndim, axes)
        x, y = x.permute(order), y.permute(order)  # the plan is for the copies already
        x = x.contiguous() if "x" in ready.copies else x
        target = torch.empty(y.shape, dtype=y.dtype, device=y.device) if "y" in ready.copies else y
    workspace = _workspace(ready.workspace_bytes, x)
    pointers = tuple(map(_pointer, (x, target, weight, bias, mean, rstd)))
    ready.run(pointers, eps, _pointer(workspace), _stream(index))
    if target is not y:
        y.copy_(target)


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
    """Gradients into dx, dweight and dbias, each of which may be None; nothing is empty."""
    index = _index(x)
    if not _is_current(index):
        with torch.cuda.device(index):
            layer_norm_bwd(dy, x, axes, mean, rstd, weight, dx, dweight, dbias)
        return
    weight = None if weight is None else weight.contiguous()
    sums = dweight, dbias
    ready, target = _prepared_bwd(index, axes, dy, x, weight, dx, sums), dx
    if ready.copies:
        order = rows_last(x.ndim, axes)
        dy, x = dy.permute(order), x.permute(order)
        dx = None if dx is None else dx.permute(order)
        dy = dy.contiguous() if "dy" in ready.copies else dy
        x = x.contiguous() if "x" in ready.copies else x
        target = dx
        if dx is not None and "dx" in ready.copies:
            target = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device)
    workspace = _workspace(ready.workspace_bytes, x)
    pointers = tuple(map(_pointer, (dy, x, mean, rstd, weight, target, dweight, dbias)))
    ready.run(pointers, 0.0, _pointer(workspace), _stream(index))
    if target is not dx:
        dx.copy_(target)
