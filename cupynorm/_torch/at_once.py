"""Calls of `cupynorm.layer_norm` on CPU tensors that nobody watches: one look at each argument."""

from typing import Any

import torch

from cupynorm._arguments import keyable
from cupynorm._torch import cpu as _torch_cpu
from cupynorm._torch.watch import ARITHMETIC, watch_on

__all__ = ["at_once"]

_LAST = (None, -1, (-1,))  # ways to name the last axis


def at_once(
    x: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    out: Any,
    return_stats: bool,
) -> Any:
    """y of a small call that has nothing special about it; None for any other, faulty or not."""
    if watch_on(x, weight, bias) != ARITHMETIC or return_stats or not x.is_cpu or x.ndim == 0:
        return None
    if normalized_shape is None:
        if not keyable(axis) or axis not in _LAST:
            return None
        normalized_shape = (x.shape[-1],)
    elif axis is not None:
        return None
    elif type(normalized_shape) is int:
        normalized_shape = (normalized_shape,)
    if out is not None and (
        type(out) is not torch.Tensor
        or not out.is_cpu
        or out.dtype is not x.dtype
        or out.shape != x.shape
        or (out.requires_grad and torch.is_grad_enabled())
    ):
        return None
    return _torch_cpu.at_once(x, normalized_shape, weight, bias, eps, out)
