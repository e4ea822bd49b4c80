"""Which way a call on torch tensors takes, by who watches it."""

from typing import Any

from cupynorm._torch import formula as _torch_formula
from cupynorm._torch import operators as _torch_ops
from cupynorm._torch import tensors as _torch_launch
from cupynorm._torch.functions import apply_eagerly, apply_transformably
from cupynorm._torch.tensors import into
from cupynorm._torch.watch import (
    ARITHMETIC,
    COMPILED,
    GRADIENT,
    WATCHED,
    functionalized,
    has_own_dispatch,
    transformed,
    watch_on,
)

__all__ = [
    "ARITHMETIC",
    "dispatched",
    "into",
    "layer_norm",
    "layer_norm_with_stats",
    "unwatched",
    "watch_on",
]


def unwatched(x: Any, weight: Any, bias: Any) -> bool:
    """Whether a call is mere arithmetic."""
    return watch_on(x, weight, bias) == ARITHMETIC


def layer_norm(x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float) -> Any:
    """Layer norm of a tensor with x's strides, differentiable.

    Parameters
    ----------
    x : tensor
        One of the four floating dtypes, with at least one axis.
    axes : tuple of int
        Axes to normalize, ascending and non-negative.
    weight, bias : tensor or None
        Shape of these axes, x's device.
    eps : float
        Added to the variance.
    """
    return dispatched(watch_on(x, weight, bias), x, axes, weight, bias, eps, True)


def dispatched(
    watch: int, x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> Any:
    """y by the cheapest way that whoever watches allows; ``keep``: with x's strides."""
    if watch == GRADIENT:
        return apply_eagerly(x, weight, bias, (axes, eps, keep))
    if watch == ARITHMETIC:
        return _torch_launch.forward(x, axes, weight, bias, eps, False, keep)[0]
    if watch == COMPILED:
        return _traced(x, axes, weight, bias, eps, keep)[0]
    return _watched_layer_norm(x, axes, weight, bias, eps, keep)[0]


def layer_norm_with_stats(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Any]:
    """As `layer_norm`, with mean and rstd, which are differentiable too."""
    watch = watch_on(x, weight, bias)
    if watch == ARITHMETIC:
        return _torch_launch.forward(x, axes, weight, bias, eps, True, True)
    if watch == COMPILED:
        return _traced(x, axes, weight, bias, eps, True)
    if watch == WATCHED:
        return _watched_layer_norm(x, axes, weight, bias, eps, True)
    return apply_transformably(x, axes, weight, bias, eps, True)


def _traced(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    """In torch.compile and torch.export: the operator, or what a transform can be taken of."""
    if transformed() or any(has_own_dispatch(t) for t in (x, weight, bias)):
        return _torch_formula.forward(x, axes, weight, bias, eps)
    y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
    return y, mean, rstd


def _watched_layer_norm(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    if any(has_own_dispatch(t) for t in (x, weight, bias)):
        return _torch_formula.forward(x, axes, weight, bias, eps)
    if transformed() and not functionalized():
        return apply_transformably(x, axes, weight, bias, eps, keep)
    y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
    return y, mean, rstd
