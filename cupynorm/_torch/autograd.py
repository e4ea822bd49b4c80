"""Layer norm as torch's autograd sees it: its functions, and the derivatives of the operators."""

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch

from cupynorm import _reference
from cupynorm._reference import Rows
from cupynorm._torch import operators, tensors
from cupynorm._torch.watch import ARITHMETIC, GRADIENT, differentiable_only, watch_on

Three = tuple[Any, Any, Any]


# --- in torch's own functions, which torch can differentiate again --------------------------------


def formula(x: Any, weight: Any, bias: Any, call: Three) -> Three:
    """y, mean and rstd; `call` is axes, eps and whether y keeps x's strides."""
    axes, eps, _ = call
    return _reference.normalize(Rows(xp, x, axes), weight, bias, eps)


def _gradients(of: Three, x: Any, weight: Any, call: Three, wanted: tuple[bool, ...]) -> Three:
    """dx, dweight and dbias from the gradients of y, mean and rstd, each of which may be None.

    The statistics are computed from x again: those that forward gave are, to autograd, constants,
    and a second derivative taken through them would lack a term.
    """
    axes, eps, dtypes = call
    rows = Rows(xp, x, axes)
    x_hat, _, rstd = rows.standardized(eps)
    hat, which = (x_hat, rstd), (wanted[0], wanted[1], wanted[2])
    dx, *sums = _reference.gradients(rows, of, weight, hat, which)
    dweight, dbias = (
        total if total is None else total.to(dtype)
        for total, dtype in zip(sums, dtypes, strict=True)
    )
    return dx, dweight, dbias


# --- by kernels, where there is one for what is asked ---------------------------------------------


def _backward(
    ctx: Any, wanted: tuple[bool, bool, bool], dy: Any, dmean: Any = None, drstd: Any = None
) -> tuple[Any, ...]:
    x, weight, *stats = ctx.saved_tensors
    axes, _, dtypes = ctx.call
    if dy is None or dmean is not None or drstd is not None or differentiable_only(dy):
        if dy is None and dmean is None and drstd is None:
            return None, None, None
        return _gradients((dy, dmean, drstd), x, weight, ctx.call, wanted)
    watch = watch_on(dy, x, weight)
    if watch == ARITHMETIC:
        return tensors.backward(dy, x, stats, weight, (axes, wanted, dtypes))
    if watch == GRADIENT:  # create_graph=True
        gradients: tuple[Any, ...] = _Gradients.apply(dy, x, weight, *stats, (ctx.call, wanted))
        return gradients
    if torch.is_grad_enabled():
        return _gradients((dy, None, None), x, weight, ctx.call, wanted)
    return operators.layer_norm_bwd(dy, x, stats, weight, (axes, wanted, dtypes))


class _Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward as a function of dy, x and weight, to be differentiated in turn.

    mean and rstd come from x, but to autograd they are constants; so its own backward computes
    everything from x again, by torch's functions, and lets torch differentiate that to any order.
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, how: tuple[Any, Any]
    ) -> tuple[Any, ...]:
        (axes, _, dtypes), wanted = ctx.how = how
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        return tensors.backward(dy, x, (mean, rstd), weight, (axes, wanted, dtypes))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        needs, again = ctx.needs_input_grad[:3], torch.is_grad_enabled()
        with torch.enable_grad():
            # dy came from y and so from x: views cut that path, which the engine follows itself.
            dy, x, weight = (
                None if t is None else t.view_as(t) if again else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            )
            results = _gradients((dy, None, None), x, weight, *ctx.how)
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
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, how: tuple[Any, Any, Any]) -> Any:
        normalize, axes, eps = how
        y, mean, rstd = normalize(x, weight, bias, None)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = axes, eps, _dtypes(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        return *_backward(ctx, ctx.needs_input_grad[:3], dy), None


# Function.apply in Python looks for torch.func's transforms, of which there are none here, and for
# what they may have left in the arguments; C++ does the rest. It takes x, weight, bias, and a
# settled call that gives y, mean and rstd, with axes and eps.
apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, _LayerNorm).apply


def _remember(ctx: Any, given: Three, call: tuple[Any, Any], stats: tuple[Any, ...]) -> None:
    x, weight, bias = given
    ctx.save_for_backward(x, weight, *stats)
    ctx.set_materialize_grads(False)
    ctx.call = *call, _dtypes(x, weight, bias)


class _Transformable(torch.autograd.Function):  # type: ignore[misc]
    """Reverse and forward mode, torch.func's transforms, and gradients through mean and rstd."""

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, call: Three) -> Three:
        if watch_on(x, weight, bias) == ARITHMETIC:
            return tensors.forward(x, weight, bias, call)
        axes, eps, keep = call  # fake tensors, or a mode below the transform
        y, mean, rstd = operators.layer_norm_fwd(x, axes, weight, bias, eps, keep)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, (axes, eps, _) = inputs
        _remember(ctx, (x, weight, bias), (axes, eps), output[1:])
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Any, dmean: Any, drstd: Any) -> tuple[Any, ...]:
        return *_backward(ctx, ctx.needs_input_grad[:3], dy, dmean, drstd), None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *_: Any) -> Three:
        x, weight = ctx.saved_tensors[:2]
        axes, eps, _dtypes = ctx.call
        rows = Rows(xp, x, axes)
        x_hat, _mean, rstd = rows.standardized(eps)
        return _reference.tangents(rows, (dx, dweight, dbias), weight, (x_hat, rstd))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Any, weight: Any, bias: Any, call: Three
    ) -> tuple[Any, Any]:
        """Samples become further rows; where each has its own weight, the weights come last."""
        x = x.unsqueeze(0) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        axes = tuple(a + 1 for a in call[0])
        call = axes, *call[1:]
        if in_dims[1] is None and in_dims[2] is None:
            return apply_transformably(x, weight, bias, call), (0, 0, 0)
        wide = x.to(tensors.stats_dtype(x.dtype))
        y, mean, rstd = apply_transformably(wide, None, None, call)
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


def apply_transformably(x: Any, weight: Any, bias: Any, call: Three) -> Three:
    """y, mean and rstd, all differentiable, in any mode and under any transform."""
    y, mean, rstd = _Transformable.apply(x, weight, bias, call)
    return y, mean, rstd


# --- of the operators -----------------------------------------------------------------------------


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, axes, weight, bias, eps, _ = inputs
    _remember(ctx, (x, weight, bias), (tuple(axes), eps), output[1:])


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
