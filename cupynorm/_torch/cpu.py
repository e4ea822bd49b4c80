"""Torch tensors on the CPU: by their addresses where memory is row-major, else as NumPy views."""

import importlib.util
import math
import os
from typing import Any

import numpy as np
import torch

from cupynorm import _reference
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import raw as _cpu_raw
from cupynorm._cpu import threads as _threads
from cupynorm._cpu.arrays import _plain
from cupynorm._cpu.pages import prefer_huge

__all__ = ["KINDS", "at_once", "layer_norm_bwd", "layer_norm_fwd"]

KINDS = {
    torch.float32: ("float32", torch.float32),
    torch.bfloat16: ("bfloat16", torch.float32),
    torch.float16: ("float16", torch.float32),
    torch.float64: ("float64", torch.float64),
}


def _as_row(value: Any, compute: Any) -> Any:
    """Weight or bias as contiguous memory of the type that the loops compute in."""
    if value.dtype is compute and value.is_contiguous():
        return value
    return value.detach().to(compute).contiguous()


def at_once(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, out: Any = None
) -> Any:
    """y of a small call that has nothing special about it; None for any other, faulty or not.

    ``out`` is None or a tensor of x's shape and dtype on the CPU, to be y.

    A small call costs as much as the Python around it: this is every check that a tensor on the
    CPU needs in one place, each in its cheapest form. The caller knows that neither autograd nor
    anything else watches.
    """
    try:
        ready = _ready.get((x.dtype, normalized_shape, eps))
        if ready is None:
            ready = _prepare(x.dtype, normalized_shape, eps)
        N, compute, call, low, high, bfloat16, limit = ready
        count, source = x.numel(), x.data_ptr()
        if x.shape[-1] != N or not 0 < count < limit or not x.is_contiguous() or _plain.get():
            return None
        # (64.0,) finds what (64,) put there, and True what 1.0 did.
        if type(normalized_shape[0]) is not int or type(eps) is not float:
            return None
        w = b = 0
        if weight is not None:
            if weight.shape != normalized_shape or not weight.is_cpu:
                return None
            if weight.dtype is not compute and weight.dtype in KINDS:
                if out is not None and _meet(weight, out):  # as its copy would not
                    return None
                weight = weight.to(compute)
            if weight.dtype is not compute or not weight.is_contiguous():
                return None
            w = weight.data_ptr()
        if bias is not None:
            if bias.shape != normalized_shape or not bias.is_cpu:
                return None
            if bias.dtype is not compute and bias.dtype in KINDS:
                if out is not None and _meet(bias, out):
                    return None
                bias = bias.to(compute)
            if bias.dtype is not compute or not bias.is_contiguous():
                return None
            b = bias.data_ptr()
        y = torch.empty_like(x) if out is None else out
        to = y.data_ptr()
        if out is not None and not (out.is_contiguous() and _apart(to, x, source, w, b, N)):
            return None
    except (IndexError, RuntimeError, TypeError):
        # No dimension; sparse or nested, without an address; a list, which cannot be a key.
        return None
    call(source, to, count // N, N, w, b, eps, low, high, 0, 0, bfloat16)
    return y


def _meet(row: Any, out: Any) -> bool:
    """Whether a weight or bias may share memory with out."""
    at, to = row.data_ptr(), out.data_ptr()
    return not row.is_contiguous() or (at < to + out.nbytes and to < at + row.nbytes)


def _apart(to: int, x: Any, source: int, w: int, b: int, N: int) -> bool:
    """Whether a result at ``to`` meets neither weight nor bias, nor a part of x."""
    end, row = to + x.nbytes, N * max(4, x.itemsize)
    if source != to and source < end and to < source + x.nbytes:
        return False
    return not (w < end and to < w + row and w) and not (b < end and to < b + row and b)


_ready: dict[Any, tuple[Any, ...]] = {}
_NEVER = (-1, None, None, 0.0, 0.0, 0, 0)


def _prepare(dtype: Any, normalized_shape: Any, eps: Any) -> tuple[Any, ...]:
    """What `at_once` needs for rows of this kind; of use to no call where it takes none."""
    if not _cpu_raw.available():
        return _NEVER  # not kept: within `without_numba` that is so for a while
    ready: tuple[Any, ...] = _NEVER
    one = type(normalized_shape) is tuple and len(normalized_shape) == 1
    number = type(eps) is float and eps - eps == 0.0
    # A negated view (z.conj().imag) steps by 2, so none is contiguous unless it has one element.
    if one and number and normalized_shape[0] > 1 and dtype in KINDS:
        kind, compute = KINDS[dtype]
        call, fixed, limit = _cpu_raw.forward_alone(kind, eps)
        ready = (normalized_shape[0], compute, call, *fixed, limit)
    if len(_ready) >= 1024:
        _ready.clear()
    _ready[dtype, normalized_shape, eps] = ready
    return ready


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
    first = axes[0]
    if not (
        x.is_contiguous()
        and y.is_contiguous()
        and first + len(axes) == x.ndim
        and _cpu_raw.available()
    ):
        _forward_of_views(x, axes, weight, bias, eps, y, mean, rstd)
        return
    kind, compute = KINDS[x.dtype]
    N = math.prod(x.shape[first:]) if weight is None else weight.numel()
    w = b = 0
    if weight is not None:
        weight = _as_row(weight, compute)  # the name keeps a converted copy alive for the call
        w = weight.data_ptr()
    if bias is not None:
        bias = _as_row(bias, compute)
        b = bias.data_ptr()
    prefer_huge(y.data_ptr(), y.nbytes)
    m = 0 if mean is None else mean.data_ptr()
    r = 0 if rstd is None else rstd.data_ptr()
    _cpu_raw.layer_norm_fwd(
        kind, x.data_ptr(), y.data_ptr(), x.numel() // N, N, w, b, eps, m, r, _num_threads
    )


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
    if not (x.is_contiguous() and axes[0] + len(axes) == x.ndim and _cpu_raw.available()):
        _backward_of_views(dy, x, axes, mean, rstd, weight, dx, dweight, dbias)
        return
    kind, compute = KINDS[x.dtype]
    N = math.prod(x.shape[axes[0] :])
    if dx is not None:
        prefer_huge(dx.data_ptr(), dx.nbytes)
    dy = dy.contiguous()  # that of y.sum() is one number seen from everywhere
    w = 0
    if weight is not None:
        weight = _as_row(weight, compute)
        w = weight.data_ptr()
    to_weight, to_bias = _summed(dweight, compute), _summed(dbias, compute)
    # dx, dweight and dbias were made here, and mean and rstd by forward: all of them contiguous.
    _cpu_raw.layer_norm_bwd(
        kind,
        dy.data_ptr(),
        x.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        x.numel() // N,
        N,
        mean.data_ptr(),
        rstd.data_ptr(),
        w,
        0 if to_weight is None else to_weight.data_ptr(),
        0 if to_bias is None else to_bias.data_ptr(),
        _num_threads,
    )
    if to_weight is not dweight:
        dweight.copy_(to_weight)
    if to_bias is not dbias:
        dbias.copy_(to_bias)


def _summed(grad: Any, compute: Any) -> Any:
    """Where the loops write a sum: into the gradient itself, if it has their dtype."""
    return grad if grad is None or grad.dtype is compute else grad.to(compute)


def _num_threads() -> int:
    """``CUPYNORM_NUM_THREADS`` where it is set, else what torch.set_num_threads() says.

    In a worker of a DataLoader, for one, that is 1.
    """
    if os.environ.get("CUPYNORM_NUM_THREADS", "").strip():
        return _threads.num_threads()
    count: int = torch.get_num_threads()
    return count


# --- NumPy views --------------------------------------------------------------------------------


def _numpy(tensor: Any) -> Any:
    """NumPy's view of a tensor's memory."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16))


def _viewable(*tensors: Any) -> bool:
    """Whether NumPy has a dtype for each: ml_dtypes brings bfloat16, and need not be there."""
    half = any(t is not None and t.dtype is torch.bfloat16 for t in tensors)
    return not half or importlib.util.find_spec("ml_dtypes") is not None


def _forward_of_views(
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    y: Any,
    mean: Any,
    rstd: Any,
) -> None:
    if _viewable(x, weight, bias):
        x, weight, bias, y, mean, rstd = map(_numpy, (x, weight, bias, y, mean, rstd))
        _cpu.layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
        return
    import array_api_compat.torch as xp

    with torch.no_grad():
        results = _reference.layer_norm_fwd(xp, x, axes, weight, bias, eps)
        _store(results, (y, mean, rstd))


def _backward_of_views(
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
    if _viewable(x, weight, dweight, dbias):
        dy, x, mean, rstd, weight = map(_numpy, (dy, x, mean, rstd, weight))
        dx, dweight, dbias = map(_numpy, (dx, dweight, dbias))
        _cpu.layer_norm_bwd(dy, x, axes, mean, rstd, weight, dx, dweight, dbias)
        return
    import array_api_compat.torch as xp

    with torch.no_grad():
        results = _reference.layer_norm_bwd(xp, dy, x, axes, mean, rstd, weight)
        _store(results, (dx, dweight, dbias))


def _store(results: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
    for result, target in zip(results, targets, strict=True):
        if target is not None:
            target.copy_(result)
