"""Operations as torch's autograd sees them: its functions, and derivatives of the operators."""

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch

from cupynorm import _reference
from cupynorm._ops import OPS, Op
from cupynorm._reference import Rows
from cupynorm._torch import operators, tensors
from cupynorm._torch.watch import ARITHMETIC, GRADIENT, differentiable_only, watch_on

Three = tuple[Any, Any, Any]
# Of a forward: op, axes, eps and whether y keeps x's strides.
Call = tuple[Op, tuple[int, ...], float, bool]


# --- in torch's own functions, which torch can differentiate again --------------------------------


def formula(x: Any, weight: Any, bias: Any, call: Call) -> tuple[Any, ...]:
    """y and the statistics, on a sum that is there."""
    op, axes, eps, _ = call
    return _there(_reference.normalize(Rows(xp, x, axes, op), weight, bias, eps))


def _there(results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without the mean of an operation that has none."""
    return tuple(result for result in results if result is not None)


def _gradients(
    of: tuple[Any, ...], x: Any, weight: Any, call: tuple[Any, ...], wanted: tuple[bool, ...]
) -> Three:
    """dx, dweight and dbias from the gradients of y, mean and rstd, each of which may be None.

    After them comes what flows into x from elsewhere, if anything does.

    The statistics are computed from x again: those that forward gave are, to autograd, constants,
    and a second derivative taken through them would lack a term.
    """
    op, axes, eps, dtypes = call
    rows = Rows(xp, x, axes, op)
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
    ctx: Any, wanted: tuple[bool, ...], dy: Any, dstats: Any = (None,), dsum: Any = None
) -> tuple[Any, ...]:
    """dx, dweight and dbias; each gradient that comes in may be None."""
    x, weight, *stats = ctx.saved_tensors
    op, axes, _, dtypes = ctx.call
    dmean, drstd = (None, *dstats)[-2:]
    if dy is None and dmean is None and drstd is None:
        return dsum, None, None
    more = () if dsum is None else (dsum,)
    if dy is None or dmean is not None or drstd is not None or differentiable_only(dy):
        return _gradients((dy, dmean, drstd, *more), x, weight, ctx.call, wanted)
    if dy.dtype != x.dtype:  # of 16 bits, where x is a float32 sum
        dy = dy.to(x.dtype)
    watch, call = watch_on(dy, x, weight, dsum), (op, axes, wanted, dtypes)
    if watch == ARITHMETIC:
        return tensors.backward(dy, x, stats, weight, call, *more)
    if watch == GRADIENT:  # create_graph=True
        dx, dweight, dbias = _Gradients.apply(dy, x, weight, *stats, (ctx.call, wanted))
        return (dx if dx is None or dsum is None else dx + dsum), dweight, dbias
    if torch.is_grad_enabled():
        return _gradients((dy, None, None, *more), x, weight, ctx.call, wanted)
    return operators.backward(dy, x, stats, weight, call, *more)


class _Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward as a function of dy, x and weight, to be differentiated in turn.

    mean and rstd come from x, but to autograd they are constants; so its own backward computes
    everything from x again, by torch's functions, and lets torch differentiate that to any order.
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any, how: tuple[Any, Any]
    ) -> tuple[Any, ...]:
        (op, axes, _, dtypes), wanted = ctx.how = how
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        return tensors.backward(dy, x, (mean, rstd), weight, (op, axes, wanted, dtypes))

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


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """Reverse mode alone: its apply() costs a tenth of what the other one's does."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, how: tuple[Any, ...], *residual: Any
    ) -> Any:
        normalize, op, axes, eps = how
        ctx.call = op, axes, eps, _dtypes(x, weight, bias)
        if not residual:
            y, *stats = normalize(x, weight, bias, None)
            ctx.save_for_backward(x, weight, *_both(stats))
            return y
        y, total, *stats = normalize(x, weight, bias, None, *residual, None)
        ctx.save_for_backward(total, weight, *_both(stats))
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Any, dsum: Any = None) -> tuple[Any, ...]:
        to_x, to_weight, to_bias, _, *to_residual = ctx.needs_input_grad
        wanted = bool(to_x or any(to_residual)), to_weight, to_bias
        dx, dweight, dbias = _backward(ctx, wanted, dy, dsum=dsum)
        # Autograd casts dx where x and residual differ.
        return dx, dweight, dbias, None, *(dx for _ in to_residual)


# Function.apply in Python looks for torch.func's transforms, of which there are none here, and for
# what they may have left in the arguments; C++ does the rest. It takes x, weight, bias, and a
# settled call that gives y, a sum and the statistics, with the op on that sum, axes and eps; then
# residual, of an operation that adds one.
apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, _Norm).apply


def _both(stats: Any) -> tuple[Any, Any]:
    """Mean and rstd, of which the mean may not be there."""
    return (None, stats[0]) if len(stats) == 1 else tuple(stats)


def _remember(
    ctx: Any, given: Three, call: tuple[Any, ...], stats: tuple[Any, ...], x: Any = None
) -> None:
    """Keep what a backward takes; x is what was normalized, if that is not what was given."""
    ctx.save_for_backward(given[0] if x is None else x, given[1], *_both(stats))
    ctx.set_materialize_grads(False)
    ctx.call = *call, _dtypes(*given)


class _Transformable(torch.autograd.Function):  # type: ignore[misc]
    """Reverse and forward mode, torch.func's transforms, and gradients through the statistics.

    Of operations on a sum that is there.
    """

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, call: Call) -> Any:
        if watch_on(x, weight, bias) == ARITHMETIC:
            return tensors.forward(x, weight, bias, call)
        op, axes, eps, keep = call  # fake tensors, or a mode below the transform
        return tuple(operators.FORWARD[op.name](x, axes, weight, bias, eps, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, call = inputs
        _remember(ctx, (x, weight, bias), call[:3], output[1:])
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Any, *dstats: Any) -> tuple[Any, ...]:
        return *_backward(ctx, ctx.needs_input_grad[:3], dy, dstats), None

    @staticmethod
    def jvp(ctx: Any, dx: Any, dweight: Any, dbias: Any, *_: Any) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors[:2]
        op, axes, eps, _dtypes = ctx.call
        rows = Rows(xp, x, axes, op)
        x_hat, _mean, rstd = rows.standardized(eps)
        return _there(_reference.tangents(rows, (dx, dweight, dbias), weight, (x_hat, rstd)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Any, weight: Any, bias: Any, call: Call
    ) -> tuple[Any, Any]:
        """Samples become further rows; where each has its own weight, the weights come last."""
        x = x.unsqueeze(0) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        op, axes, eps, keep = call
        axes = tuple(a + 1 for a in axes)
        call = op, axes, eps, keep
        if in_dims[1] is None and in_dims[2] is None:
            found = apply_transformably(x, weight, bias, call)
            return found, (0,) * len(found)
        wide = x.to(tensors.stats_dtype(x.dtype))
        y, *stats = apply_transformably(wide, None, None, call)
        row = [n if a in axes else 1 for a, n in enumerate(x.shape)][1:]
        scale, shift = (
            None if v is None else (v.unsqueeze(0) if d is None else v.movedim(d, 0))
            for v, d in zip((weight, bias), in_dims[1:3], strict=True)
        )
        if scale is not None:
            scale = scale.to(wide.dtype).reshape(-1, *row)
            y = y * (scale + 1 if op.unit_weight else scale)
        if shift is not None:
            y = y + shift.to(wide.dtype).reshape(-1, *row)
        if in_dims[0] is None:
            stats = [a.squeeze(0) for a in stats]
            return (y.to(x.dtype), *stats), (0, *(None for _ in stats))
        return (y.to(x.dtype), *stats), (0, *(0 for _ in stats))


def apply_transformably(x: Any, weight: Any, bias: Any, call: Call) -> tuple[Any, ...]:
    """y and the statistics, all differentiable, in any mode and under any transform."""
    return tuple(_Transformable.apply(x, weight, bias, call))


# --- of the operators -----------------------------------------------------------------------------


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    msg = (
        "the operators cupynorm::*_bwd, which compiled graphs call, have no derivative of their "
        "own; take second derivatives of cupynorm.torch.layer_norm, or another function, outside "
        "torch.compile"
    )
    raise NotImplementedError(msg)


def _register(op: Op) -> None:
    """Tell how the operators of an operation are differentiated."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, axes, weight, bias, eps, *_ = inputs
        total, stats = output[1:2] if op.residual else (None,), output[1 + op.residual :]
        _remember(ctx, (x, weight, bias), (op.alone, tuple(axes), eps), stats, *total)

    def backward(ctx: Any, dy: Any, *more: Any) -> tuple[Any, ...]:
        to_x, _, to_weight, to_bias, _, _, *to_residual = ctx.needs_input_grad
        wanted = bool(to_x or any(to_residual)), to_weight, to_bias
        dsum = more[0] if op.residual else None
        dx, dweight, dbias = _backward(ctx, wanted, dy, more[op.residual :], dsum)
        return dx, None, dweight, dbias, None, None, *(dx for _ in to_residual)

    name = f"cupynorm::{op.name}"
    torch.library.register_autograd(f"{name}_fwd", backward, setup_context=remember)
    if not op.residual:
        torch.library.register_autograd(f"{name}_bwd", _no_second_derivative)


for _op in OPS.values():
    _register(_op)
