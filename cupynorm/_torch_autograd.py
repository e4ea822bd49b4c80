"""Which way a call on torch tensors takes, and how torch differentiates it."""

from typing import Any

import torch
from torch.autograd import forward_ad

from cupynorm import _torch_formula, _torch_launch, _torch_ops

__all__ = [
    "ARITHMETIC",
    "dispatched",
    "layer_norm",
    "layer_norm_with_stats",
    "unwatched",
    "watch_on",
]

# Who watches a call: nobody; reverse-mode autograd; something that must see an operator or a
# function of torch's rather than an address; a compiler.
ARITHMETIC, GRADIENT, WATCHED, COMPILED = range(4)

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {type(None)}

# Private names of torch, each with a public one that costs ten times as much or none at all.
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_of_batched_grads = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_compiling


def watch_on(x: Any, weight: Any, bias: Any) -> int:
    """Who is to hear of a call on these tensors."""
    if _is_compiling():
        return COMPILED
    if type(x) not in _TENSORS or type(weight) not in _PLAIN or type(bias) not in _PLAIN:
        return WATCHED
    if _transformed() or _modes_active() or _tracing() is not None:
        return WATCHED
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return GRADIENT
    return ARITHMETIC


def unwatched(x: Any, weight: Any, bias: Any) -> bool:
    """Whether a call is mere arithmetic."""
    return watch_on(x, weight, bias) == ARITHMETIC


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation watches what is computed."""
    return bool(_transforms_active()) or forward_ad._current_level >= 0


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
        return _apply(x, weight, bias, (axes, eps, keep))
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
    return _of_transforms(x, axes, weight, bias, eps, True)


def _traced(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    """In torch.compile and torch.export: the operator, or what a transform can be taken of."""
    if _transformed() or any(_has_own_dispatch(t) for t in (x, weight, bias)):
        return _torch_formula.forward(x, axes, weight, bias, eps)
    y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
    return y, mean, rstd


def _watched_layer_norm(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    if any(_has_own_dispatch(t) for t in (x, weight, bias)):
        return _torch_formula.forward(x, axes, weight, bias, eps)
    if _transformed():
        return _of_transforms(x, axes, weight, bias, eps, keep)
    y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
    return y, mean, rstd


def _has_own_dispatch(tensor: Any) -> bool:
    """Whether a subclass decides about operators and may know torch's only, as DTensor does.

    Torch's own fake and functional tensors know any operator that has a fake.
    """
    kind = type(tensor)
    if kind in _PLAIN:
        return False
    own = getattr(kind, "__torch_dispatch__", None)
    inherited = own is None or own is torch.Tensor.__torch_dispatch__
    return not inherited and not kind.__module__.startswith("torch._subclasses.")


def _of_transforms(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    y, mean, rstd = _TransformableLayerNorm.apply(x, weight, bias, axes, eps, keep)
    return y, mean, rstd


# --- derivatives --------------------------------------------------------------------------------


def _backward(
    ctx: Any, wanted: tuple[bool, bool, bool], dy: Any, dmean: Any = None, drstd: Any = None
) -> tuple[Any, ...]:
    """Gradients by a kernel; by torch's functions where they may be differentiated in turn."""
    x, weight, mean, rstd = ctx.saved_tensors
    axes, eps, dtypes = ctx.call
    if (
        torch.is_grad_enabled()
        or _transformed()
        or dy is None
        or dmean is not None
        or drstd is not None
        or _of_batched_grads(dy)
    ):
        if dy is None and dmean is None and drstd is None:
            return None, None, None
        return _torch_formula.backward(dy, dmean, drstd, x, axes, weight, eps, wanted, dtypes)
    args = axes, mean, rstd, weight, wanted, dtypes
    plain = type(dy) in _TENSORS and type(x) in _TENSORS
    if not plain or _is_compiling() or _modes_active() or _tracing() is not None:
        return _torch_ops.layer_norm_bwd(dy, x, *args)
    return _torch_launch.backward(dy, x, *args)


def _dtypes(x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Dtypes of dweight and dbias; nobody asks for that of what is absent."""
    return (x if weight is None else weight).dtype, (x if bias is None else bias).dtype


class _LayerNorm(torch.autograd.Function):  # type: ignore[misc]
    """Reverse mode alone: its apply() costs a tenth of what the other one's does."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, call: tuple[Any, ...]) -> Any:
        axes, eps, keep = call
        y, mean, rstd = _torch_launch.forward(x, axes, weight, bias, eps, True, keep)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = axes, eps, _dtypes(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        dx, dweight, dbias = _backward(ctx, ctx.needs_input_grad[:3], dy)
        return dx, dweight, dbias, None


# Function.apply in Python looks for torch.func's transforms, of which there are none here, and for
# what they may have left in the arguments; C++ does the rest.
_apply = super(torch.autograd.Function, _LayerNorm).apply


def _remember(
    ctx: Any,
    x: Any,
    weight: Any,
    bias: Any,
    axes: tuple[int, ...],
    eps: float,
    mean: Any,
    rstd: Any,
) -> None:
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.call = axes, eps, _dtypes(x, weight, bias)


class _TransformableLayerNorm(torch.autograd.Function):  # type: ignore[misc]
    """Reverse and forward mode, torch.func's transforms, and gradients through mean and rstd."""

    @staticmethod
    def forward(
        x: Any, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, keep: bool
    ) -> tuple[Any, Any, Any]:
        if watch_on(x, weight, bias) != ARITHMETIC:  # fake tensors, or a mode below the transform
            y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
            return y, mean, rstd
        return _torch_launch.forward(x, axes, weight, bias, eps, True, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _remember(ctx, *inputs[:5], *output[1:])
        ctx.save_for_forward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Any, dmean: Any, drstd: Any) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        return *_backward(ctx, wanted, dy, dmean, drstd), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *_: Any) -> tuple[Any, Any, Any]:
        x, weight = ctx.saved_tensors[:2]
        axes, eps, _ = ctx.call
        return _torch_formula.tangents(dx, dweight, dbias, x, axes, weight, eps)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Any,
        weight: Any,
        bias: Any,
        axes: tuple[int, ...],
        eps: float,
        keep: bool,
    ) -> tuple[Any, Any]:
        """Samples become further rows; where each has its own weight, the weights come last."""
        x = x.unsqueeze(0) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        axes = tuple(a + 1 for a in axes)
        if in_dims[1] is None and in_dims[2] is None:
            return _of_transforms(x, axes, weight, bias, eps, keep), (0, 0, 0)
        wide = x.to(_torch_formula.stats_dtype(x.dtype))
        y, mean, rstd = _of_transforms(wide, axes, None, None, eps, keep)
        row = [n if a in axes else 1 for a, n in enumerate(x.shape)][1:]
        scale, shift = (
            None if v is None else (v.unsqueeze(0) if d is None else v.movedim(d, 0))
            for v, d in zip((weight, bias), in_dims[1:3], strict=True)
        )
        if scale is not None:
            y = y * scale.to(wide.dtype).reshape(-1, *row)
        if shift is not None:
            y = y + shift.to(wide.dtype).reshape(-1, *row)
        if in_dims[0] is None:
            return (y.to(x.dtype), mean.squeeze(0), rstd.squeeze(0)), (0, None, None)
        return (y.to(x.dtype), mean, rstd), (0, 0, 0)


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, axes, weight, bias, eps, _ = inputs
    _remember(ctx, x, weight, bias, tuple(axes), eps, *output[1:])


def _backward_of_operator(ctx: Any, dy: Any, dmean: Any, drstd: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    dx, dweight, dbias = _backward(ctx, (needs[0], needs[2], needs[3]), dy, dmean, drstd)
    return dx, None, dweight, dbias, None, None


torch.library.register_autograd(
    "cupynorm::layer_norm_fwd", _backward_of_operator, setup_context=_setup_operator
)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    msg = (
        "the operator cupynorm::layer_norm_bwd, which compiled graphs call, has no derivative of "
        "its own; take second derivatives of cupynorm.torch.layer_norm outside torch.compile"
    )
    raise NotImplementedError(msg)


torch.library.register_autograd("cupynorm::layer_norm_bwd", _no_second_derivative)
