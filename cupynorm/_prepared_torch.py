"""Prepared calls on torch tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch

from cupynorm import _namespace
from cupynorm._arguments import Call
from cupynorm._cpu import raw as _cpu_raw
from cupynorm._prepared import PreparedLayerNorm
from cupynorm._torch import cpu as _torch_cpu
from cupynorm._torch import tensors as _torch_launch
from cupynorm._torch.watch import ARITHMETIC, GRADIENT, watch_on
from cupynorm.functional import LayerNormResult

__all__ = ["PreparedTorch"]


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


class PreparedTorch(PreparedLayerNorm):
    """On torch tensors: addresses go to the loops, or to a launch on torch's current stream."""

    __slots__ = ("_affine", "_run", "_y_strides")

    def __init__(self, call: Call, order: str, return_stats: bool) -> None:
        x = call.x
        for label in ("x", "weight", "bias"):
            kind = type(getattr(call, label))
            if kind not in _PLAIN:
                msg = (
                    f"{label} is a {kind.__module__}.{kind.__qualname__}, and prepared calls know "
                    "plain tensors alone; call cupynorm.torch.layer_norm"
                )
                raise TypeError(msg)
        # Their memory stays even if a parameter's .data is replaced: it is read by address.
        self._affine: Any = [None if t is None else t.detach() for t in (call.weight, call.bias)]
        y = _namespace.ordered(torch.empty_like(x), order)
        self._y_strides = y.stride()
        self._run: Any = None
        if not return_stats and call.turn is None and x.numel():
            find = _on_cpu if x.is_cpu else _torch_launch.path_of(x).prepared
            weight, bias = self._affine
            self._run = find(x, call.axes, weight, bias, call.eps, y)
        path = "compiled loops" if x.is_cpu else "kernels on torch's current stream"
        super().__init__(call, order, return_stats, path)
        self._type = torch.Tensor  # of an example that is a Parameter, too

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x, into `out` if that is given."""
        call = self._given
        watch = watch_on(x, call.weight, call.bias)
        if watch != ARITHMETIC:
            self._refuse_watched(x, watch)
        if x.shape != self._shape or x.stride() != self._strides or x.dtype is not self._dtype:
            self._admit(x)
        if x.device != self._device:
            self._admit(x)
        if out is None:
            y = self._new()
        elif (
            type(out) is torch.Tensor
            and out.shape == self._shape
            and out.stride() == self._y_strides
            and out.dtype is self._dtype
            and out.device == self._device
            and not out.requires_grad
        ):
            y = out
        else:
            return self._ordinary(x, out)
        run = self._run
        if run is not None and run(x.data_ptr(), y.data_ptr()):
            return y
        return self._ordinary(x, out)

    def _new(self) -> Any:
        return torch.empty_strided(
            self._shape, self._y_strides, dtype=self._dtype, device=self._device
        )

    def _ordinary(self, x: Any, out: Any) -> Any:
        """As `cupynorm.layer_norm` does it once the argument rules are through, into `out`."""
        axes, eps, (weight, bias) = self._given.axes, self._given.eps, self._affine
        if out is not None:
            _namespace.check_out(x, weight, bias, self._order, out)
        y = self._new() if out is None else out
        mean, rstd = _torch_launch.into(x, axes, weight, bias, eps, y, self._stats)
        return LayerNormResult(y, mean, rstd) if self._stats else y

    def _refuse_watched(self, x: Any, watch: int) -> None:
        if not isinstance(x, torch.Tensor):
            self._admit(x)
        if watch == GRADIENT:
            msg = (
                "x, weight or bias requires grad, and autograd cannot follow a prepared call; call "
                "it inside torch.no_grad(), prepare it with detached tensors, or call "
                "cupynorm.torch.layer_norm"
            )
        else:
            msg = (
                "torch.compile, torch.func, a tracer, a mode or a tensor subclass watches the "
                "call, and a prepared call has addresses alone to show them; call "
                "cupynorm.torch.layer_norm there"
            )
        raise ValueError(msg)

    @staticmethod
    def _strides_of(x: Any) -> tuple[int, ...]:
        return tuple(x.stride())


def _on_cpu(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, y: Any
) -> Callable[[int, int], bool] | None:
    """What writes to the address of a y like this one from that of an x like this one.

    None where that takes more than one call of the loops; False, and nothing done, where the two
    overlap in part or y overlaps weight or bias. Weight and bias are read where they are now.
    """
    compute = _torch_cpu.KINDS[x.dtype][1]
    affine = [t for t in (weight, bias) if t is not None]
    fitting = all(t.dtype is compute and t.is_contiguous() for t in affine)
    if not (fitting and x.is_contiguous() and y.is_contiguous() and axes[0] + len(axes) == x.ndim):
        return None
    if not _cpu_raw.available() or _negatable(x, *affine):
        return None
    call, (low, high, bfloat16), limit = _cpu_raw.forward_alone(_torch_cpu.KINDS[x.dtype][0], eps)
    N, size = math.prod(x.shape[axes[0] :]), x.nbytes
    if x.numel() >= limit:
        return None
    M, room = x.numel() // N, N * compute.itemsize
    w, b = (0 if t is None else t.data_ptr() for t in (weight, bias))

    def run(source: int, target: int) -> bool:
        if source != target and source < target + size and target < source + size:
            return False
        end = target + size
        if (w < end and target < w + room * (w > 0)) or (b < end and target < b + room * (b > 0)):
            return False
        call(source, target, M, N, w, b, eps, low, high, 0, 0, bfloat16)
        return True

    return run


def _negatable(*tensors: Any) -> bool:
    """Whether a tensor of this shape and these strides may hold the negative of its memory."""
    return any(t.numel() == 1 or t.is_neg() for t in tensors)
