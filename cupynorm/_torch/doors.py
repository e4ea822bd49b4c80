"""Which way a call on torch tensors takes, by who watches it and where the tensors are."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from cupynorm import _reference
from cupynorm._layout import Facts
from cupynorm._torch import autograd, operators
from cupynorm._torch.tensors import Tensors
from cupynorm._torch.watch import (
    COMPILED,
    WATCHED,
    answer,
    functionalized,
    has_own_dispatch,
    transformed,
    watch_on,
)


class Door(Tensors):
    """The door that tensors come to, which is that of plain ones."""

    @staticmethod
    def describe(facts: Facts) -> str:
        """What would run, in words."""
        return (
            "compiled loops" if facts.device.type != "cuda" else "kernels on torch's current stream"
        )


class Differentiable(Tensors):
    """The door of calls that reverse-mode autograd alone is to hear of."""

    refuses_prepared = (
        "x, weight or bias requires grad, and autograd cannot follow a prepared call; call "
        "it inside torch.no_grad(), prepare it with detached tensors, or call "
        "cupynorm.torch.layer_norm"
    )

    def normalizer(self, facts: Facts) -> Callable[..., Any]:
        """The settled forward, which autograd remembers."""
        if facts.out:
            _refuse_out()
        if facts.stats:  # which are differentiable too
            return SHOWN.normalizer(facts)
        plain = super().normalizer(facts._replace(stats=True))
        how, apply = (plain, facts.op.alone, facts.axes, facts.eps), autograd.apply_eagerly

        def call(x: Any, weight: Any, bias: Any, out: None) -> Any:
            return apply(x, weight, bias, how)

        def adding(x: Any, weight: Any, bias: Any, *more: Any) -> Any:
            _, residual, sum_out = more
            if sum_out is not None:
                _refuse_out()
            return apply(x, weight, bias, how, residual)

        return adding if facts.op.residual else call

    def differentiator(self, facts: Facts) -> Callable[..., Any]:
        """The backward in torch's own functions, which it can differentiate in turn."""
        return SHOWN.differentiator(facts)


class Shown:
    """The door of calls that something watches which must see operators or torch's functions."""

    look = None
    select = None
    refuses_prepared = (
        "torch.compile, torch.func, a tracer, a mode or a tensor subclass watches the "
        "call, and a prepared call has addresses alone to show them; call "
        "cupynorm.torch.layer_norm there"
    )

    @staticmethod
    def strides(_: Any) -> None:
        """None: there may be no memory behind what a tracer shows."""

    @staticmethod
    def device(_: Any) -> None:
        """None: nothing here depends on it."""

    def normalizer(self, facts: Facts) -> Callable[..., Any]:
        """The forward, with nothing settled but the arguments."""
        order = facts.order
        how: autograd.Call = facts.op, facts.axes, facts.eps, order != "C"

        def call(x: Any, weight: Any, bias: Any, out: Any, *added: Any) -> Any:
            targets = out, *added[1:]
            tensors = [t for t in (x, weight, bias, out, *added) if t is not None]
            watched = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            if watched and any(target is not None for target in targets):
                _refuse_out()
            found = list(self._forward(x, weight, bias, how, *added[:1]))
            for i, target in enumerate(targets):
                if target is not None:
                    target[...] = found[i]
                    found[i] = target
                elif order != "K":
                    found[i] = _ordered(found[i], order)
            if not facts.stats:
                found = found[: len(targets)]
            return tuple(found) if len(found) > 1 else found[0]

        return call

    def _forward(
        self, x: Any, weight: Any, bias: Any, call: autograd.Call, *residual: Any
    ) -> tuple[Any, ...]:
        """y, the sum of an operation that has one, and the statistics."""
        given = x, weight, bias, *residual
        own = any(map(has_own_dispatch, given)) or not _has_operators(x)
        watch, (op, axes, eps, keep) = watch_on(*given), call
        by_formula = own or (watch == COMPILED and transformed())
        operator = watch == COMPILED or (
            watch == WATCHED and (not transformed() or functionalized())
        )
        if operator and not by_formula:
            return tuple(operators.FORWARD[op.name](x, axes, weight, bias, eps, keep, *residual))
        if residual:
            total = x.to(residual[0].dtype) + residual[0]
            y, *stats = self._forward(total, weight, bias, (op.alone, axes, eps, keep))
            return y.to(x.dtype), total, *stats
        by = autograd.formula if by_formula else autograd.apply_transformably
        return by(x, weight, bias, call)

    @staticmethod
    def differentiator(facts: Facts) -> Callable[..., Any]:
        """The backward in torch's own functions."""
        return _reference.Door.differentiator(facts)


def _has_operators(x: Any) -> bool:
    """Whether our operators know x's device and layout."""
    return x.layout is torch.strided and x.device.type in ("cpu", "cuda", "meta")


def _ordered(y: Any, order: str) -> Any:
    """Give y the layout asked for."""
    if order == "C":
        return y.contiguous()
    back = tuple(range(y.ndim))[::-1]
    return y.permute(back).contiguous().permute(back)


def _refuse_out() -> None:
    msg = (
        "out= is given but an argument requires grad, and autograd cannot follow a write "
        "to out; call without out=, or inside torch.no_grad() on detached tensors"
    )
    raise ValueError(msg)


DOOR, DIFFERENTIABLE, SHOWN = Door(), Differentiable(), Shown()
# Each small call asks; a partial function costs a third of one in Python.
DOOR.select = functools.partial(answer, (DOOR, DIFFERENTIABLE, SHOWN, SHOWN))
