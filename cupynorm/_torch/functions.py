"""Layer norm as torch's autograd sees it: its functions, and the formulas of the operators."""

from typing import Any

import torch

from cupynorm._torch import formula as _torch_formula
from cupynorm._torch import operators as _torch_ops
from cupynorm._torch import tensors as _torch_launch
from cupynorm._torch.watch import ARITHMETIC, GRADIENT, differentiable_only, watch_on

__all__ = ["apply_eagerly", "apply_transformably"]


def _backward(
    ctx: Any, wanted: tuple[bool, bool, bool], dy: Any, dmean: Any = None, drstd: Any = None
) -> tuple[Any, ...]:
    """Gradients by a kernel, or by torch's functions where there is none for what is asked."""
    x, weight, mean, rstd = ctx.saved_tensors
    axes, eps, dtypes = ctx.call
    if dy is None or dmean is not None or drstd is not None or differentiable_only(dy):
        if dy is None and dmean is None and drstd is None:
            return None, None, None
        return _torch_formula.backward(dy, dmean, drstd, x, axes, weight, eps, wanted, dtypes)
    watch = watch_on(dy, x, weight)
    if watch == ARITHMETIC:
        return _torch_launch.backward(dy, x, axes, mean, rstd, weight, wanted, dtypes)
    if watch == GRADIENT:  # create_graph=True
        gradients: tuple[Any, ...] = _Gradients.apply(
            dy, x, weight, mean, rstd, (axes, eps, wanted, dtypes)
        )
        return gradients
    if torch.is_grad_enabled():
        return _torch_formula.backward(dy, None, None, x, axes, weight, eps, wanted, dtypes)
    return _torch_ops.layer_norm_bwd(dy, x, axes, mean, rstd, weight, wanted, dtypes)


class _Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward as a function of dy, x and weight, to be differentiated in turn.

    mean and rstd come from x, but to autograd they are constants; so its own backward computes
    everything from x again, by torch's functions, and lets torch differentiate that to any order.
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, call: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        axes, _, wanted, dtypes = ctx.call = call
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        return _torch_launch.backward(dy, x, axes, mean, rstd, weight, wanted, dtypes)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        axes, eps, wanted, dtypes = ctx.call
        needs, again = ctx.needs_input_grad[:3], torch.is_grad_enabled()
        with torch.enable_grad():
            # dy came from y and so from x: views cut that path, which the engine follows itself.
            dy, x, weight = (
                None if t is None else t.view_as(t) if again else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            )
            results = _torch_formula.backward(dy, None, None, x, axes, weight, eps, wanted, dtypes)
            pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None]
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                [t for t, need in zip((dy, x, weight), needs, strict=True) if need],
                [cotangent for _, cotangent in pairs],
                create_graph=again,
                allow_unused=True,
            )
        partial = iter(found)
        return *(next(partial) if need else None for need in needs), None, None, None


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
apply_eagerly = super(torch.autograd.Function, _LayerNorm).apply


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


class _Transformable(torch.autograd.Function):  # type: ignore[misc]
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
            return apply_transformably(x, axes, weight, bias, eps, keep), (0, 0, 0)
        wide = x.to(_torch_formula.stats_dtype(x.dtype))
        y, mean, rstd = apply_transformably(wide, axes, None, None, eps, keep)
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


def apply_transformably(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    y, mean, rstd = _Transformable.apply(x, weight, bias, axes, eps, keep)
    return y, mean, rstd


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
