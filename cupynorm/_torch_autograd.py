"""Which way a call on torch tensors takes, and how torch differentiates it."""

from typing import Any

import torch
from torch.autograd import forward_ad

from cupynorm import _torch_formula, _torch_launch, _torch_ops

__all__ = ["layer_norm", "layer_norm_with_stats", "unwatched"]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))

# Private names of torch; without one of them a call takes the slower way that is always right.
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_of_batched_grads = torch._C._functorch.is_legacy_batchedtensor


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation watches what is computed."""
    return bool(_transforms_active()) or forward_ad._current_level >= 0


def _watched() -> bool:
    """Whether anything but reverse-mode autograd must see an operator rather than an address."""
    return _transformed() or bool(_modes_active()) or _tracing() is not None


def unwatched(x: Any, weight: Any, bias: Any) -> bool:
    """Whether a call is mere arithmetic: no compiler, no autograd, no mode is to hear of it."""
    if _is_compiling() or type(x) is not torch.Tensor:
        return False
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN:
        return False
    if torch.is_grad_enabled() and _requires_grad(x, weight, bias):
        return False
    if _transforms_active() or forward_ad._current_level >= 0 or _modes_active():
        return False
    return _tracing() is None


def layer_norm(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool = True
) -> Any:
    """Layer norm of a tensor, differentiable.

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
    keep : bool, default True
        Whether y keeps x's strides; row-major otherwise.
    """
    if _is_compiling():
        return _traced(x, axes, weight, bias, eps, keep)[0]
    plain = type(x) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN
    if not plain or _watched():
        return _watched_layer_norm(x, axes, weight, bias, eps, keep)[0]
    x, weight, bias = _resolved(x), _resolved(weight), _resolved(bias)
    if torch.is_grad_enabled() and _requires_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, axes, eps, keep)
    return _torch_launch.forward(x, axes, weight, bias, eps, False, keep)[0]


def layer_norm_with_stats(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool = True
) -> tuple[Any, Any, Any]:
    """As `layer_norm`, with mean and rstd, which are differentiable too."""
    if _is_compiling():
        return _traced(x, axes, weight, bias, eps, keep)
    plain = type(x) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN
    if not plain or _watched():
        return _watched_layer_norm(x, axes, weight, bias, eps, keep)
    x, weight, bias = _resolved(x), _resolved(weight), _resolved(bias)
    return _of_transforms(x, axes, weight, bias, eps, keep)


def _requires_grad(x: Any, weight: Any, bias: Any) -> bool:
    return bool(
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def _resolved(tensor: Any) -> Any:
    """The tensor with its own values in memory, which conj().imag, for one, has not."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def _traced(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    """In torch.compile and torch.export: the operator, or what a transform can be taken of."""
    if _transformed():
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
    own = getattr(kind, "__torch_dispatch__", None)
    inherited = own is None or own is torch.Tensor.__torch_dispatch__
    return not inherited and not kind.__module__.startswith("torch._subclasses.")


def _of_transforms(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    y, mean, rstd = _TransformableLayerNorm.apply(x, weight, bias, axes, eps, keep)
    return y, mean, rstd


# --- derivatives --------------------------------------------------------------------------------


def _remember(ctx: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.set_materialize_grads(False)
    stats = _torch_formula.stats_dtype(x.dtype)
    ctx.dtypes = tuple(stats if a is None else a.dtype for a in (weight, bias))


def _backward(
    ctx: Any, wanted: tuple[bool, bool, bool], dy: Any, dmean: Any, drstd: Any
) -> tuple[Any, ...]:
    """Gradients by a kernel; by torch's functions where they may be differentiated in turn."""
    if dy is None and dmean is None and drstd is None:
        return None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    axes, eps, dtypes = ctx.axes, ctx.eps, ctx.dtypes
    by_kernel = dy is not None and dmean is None and drstd is None
    if not by_kernel or torch.is_grad_enabled() or _transformed() or _of_batched_grads(dy):
        return _torch_formula.backward(dy, dmean, drstd, x, axes, weight, eps, wanted, dtypes)
    args = axes, mean, rstd, weight, wanted, dtypes
    if _is_compiling() or _watched() or type(dy) not in _PLAIN or type(x) not in _PLAIN:
        return _torch_ops.layer_norm_bwd(dy, x, *args)
    return _torch_launch.backward(_resolved(dy), x, *args)


class _LayerNorm(torch.autograd.Function):  # type: ignore[misc]
    """Reverse mode alone: its apply() costs a tenth of what the other one's does."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, keep: bool
    ) -> Any:
        y, mean, rstd = _torch_launch.forward(x, axes, weight, bias, eps, True, keep)
        _remember(ctx, x, weight, bias, mean, rstd)
        ctx.axes, ctx.eps = axes, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        return *_backward(ctx, wanted, dy, None, None), None, None, None


class _TransformableLayerNorm(torch.autograd.Function):  # type: ignore[misc]
    """Reverse and forward mode, torch.func's transforms, and gradients through mean and rstd."""

    @staticmethod
    def forward(
        x: Any, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, keep: bool
    ) -> tuple[Any, Any, Any]:
        if type(x) not in _PLAIN or _watched():
            y, mean, rstd = _torch_ops.layer_norm_fwd(x, axes, weight, bias, eps, keep)
            return y, mean, rstd
        return _torch_launch.forward(x, axes, weight, bias, eps, True, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, ctx.axes, ctx.eps, _ = inputs
        _remember(ctx, x, weight, bias, *output[1:])
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Any, dmean: Any, drstd: Any) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        return *_backward(ctx, wanted, dy, dmean, drstd), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *_: Any) -> tuple[Any, Any, Any]:
        x, weight = ctx.saved_tensors[:2]
        return _torch_formula.tangents(dx, dweight, dbias, x, ctx.axes, weight, ctx.eps)

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
    x, axes, weight, bias, ctx.eps, _ = inputs
    ctx.axes = tuple(axes)
    _remember(ctx, x, weight, bias, *output[1:])


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
