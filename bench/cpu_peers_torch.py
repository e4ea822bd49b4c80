"""torch's own layer norm on CPU tensors, and `cupynorm.torch` beside it."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.cpu_contender import Builder, CpuContender, refuse
from bench.cpu_data import CpuInputs
from bench.gpu_grid import BWD, FWD
from bench.peers import as_torch
from cupynorm._problem import numpy_dtype

__all__ = ["torch_peers"]

Function = Callable[..., Any]  # of x (..., N), weight, bias and eps


def torch_peers(inputs: CpuInputs) -> list[Builder]:
    """On rows: the function; on a strided axis: each way that torch has to get there."""
    case = inputs.case
    ways = STRIDED if case.axis != -1 or case.order != "C" else ROWS
    return [(name, lambda way=way: way(importlib.import_module("torch"), inputs))
            for name, way in ways.items()]  # fmt: skip


def _eager(torch: Any) -> Function:
    def run(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return run


def _compiled(torch: Any) -> Function:
    """Compile for the very shapes, with nothing left of another case."""
    torch.compiler.reset()
    return functools.partial(torch.compile, dynamic=False)


def _torch(torch: Any, inputs: CpuInputs) -> CpuContender:
    return _on_rows(torch, inputs, _eager(torch))


def _torch_compile(torch: Any, inputs: CpuInputs) -> CpuContender:
    return _on_rows(torch, inputs, _eager(torch), _compiled(torch))


def _ours(torch: Any, inputs: CpuInputs) -> CpuContender:
    if inputs.case.op == BWD:
        refuse("through autograd there is no backward without a forward: see forward and backward")
    import cupynorm.torch

    def run(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return cupynorm.torch.layer_norm(x, x.shape[-1:], weight, bias, eps)

    made = _on_rows(torch, inputs, run)
    made.ours = True
    return made


def _as_numpy(result: Any) -> tuple[np.ndarray | None, ...]:
    """NumPy arrays over the memory of tensors; bfloat16 by its bits."""
    import torch

    def one(t: Any) -> Any:
        if t is None:
            return None
        t = t.detach()
        if t.dtype == torch.bfloat16:
            return t.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return t.numpy()

    return tuple(map(one, result)) if isinstance(result, tuple) else (one(result),)


def _without_gradients(torch: Any, call: Callable[[], Any]) -> CpuContender:
    """What a user has under no_grad or inference: nothing asks for gradients."""

    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return CpuContender(quiet, _as_numpy)


def _on_rows(
    torch: Any, inputs: CpuInputs, function: Function, wrap: Function = lambda f: f
) -> CpuContender:
    case, eps = inputs.case, inputs.case.eps
    x, dy, weight, bias, mean, rstd = _tensors(torch, inputs)
    if case.op == FWD:
        run = wrap(function)
        return _without_gradients(torch, lambda: run(x, weight, bias, eps))
    if case.op == BWD:
        pull = wrap(functools.partial(_operator, torch))
        return _without_gradients(torch, lambda: pull(dy, x, mean, rstd, weight, bias))
    run, leaves = wrap(function), [a.requires_grad_() for a in (x, weight, bias)]

    def both() -> tuple[Any, ...]:
        y = run(x, weight, bias, eps)
        return y, *torch.autograd.grad(y, leaves, dy)

    return CpuContender(both, _as_numpy)


def _operator(torch: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
    """What autograd calls, on given statistics."""
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(dy, x, x.shape[-1:], mean, rstd, weight, bias, [True] * 3)


def _tensors(torch: Any, inputs: CpuInputs) -> list[Any]:
    given = (inputs.x, inputs.dy, inputs.weight, inputs.bias, inputs.mean, inputs.rstd)
    return [as_torch(torch, a) for a in given]


# -- a strided axis: views put it last, and the result is seen as x is


def _last(torch: Any, inputs: CpuInputs) -> list[Any]:
    """Tensors with the axis moved to the end; the memory stays as it is."""
    axis = inputs.case.axis
    x, dy, weight, bias, mean, rstd = _tensors(torch, inputs)
    moved = [None if a is None else a.movedim(axis, -1) for a in (x, dy, mean, rstd)]
    return [*moved[:2], weight, bias, *moved[2:]]


def _strided(
    torch: Any, inputs: CpuInputs, take: Function, give: Function = lambda t: t,
    function: Function | None = None,
) -> CpuContender:  # fmt: skip
    """Move the axis to the end, `take` x and dy so, compute, and `give` what has x's shape."""
    case, run = inputs.case, function or _eager(torch)
    x, dy, weight, bias, mean, rstd = _last(torch, inputs)

    def forward() -> Any:
        return give(run(take(x), weight, bias, case.eps).movedim(-1, case.axis))

    def backward() -> Any:
        dx, *totals = _operator(torch, take(dy), take(x), mean, rstd, weight, bias)
        return give(dx.movedim(-1, case.axis)), *totals

    return _without_gradients(torch, forward if case.op == FWD else backward)


def _view(torch: Any, inputs: CpuInputs) -> CpuContender:
    return _strided(torch, inputs, lambda t: t)


def _contiguous(torch: Any, inputs: CpuInputs) -> CpuContender:
    return _strided(torch, inputs, lambda t: t.contiguous())


def _back(torch: Any, inputs: CpuInputs) -> CpuContender:
    """As above, and the result copied into the layout that x has: what order='K' gives."""
    x = as_torch(torch, inputs.x)

    def give(t: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(t)

    return _strided(torch, inputs, lambda t: t.contiguous(), give)


def _composed(torch: Any, inputs: CpuInputs) -> CpuContender:
    """Mean, variance and the rest along the axis where it is, as ConvNeXt writes it."""
    case = inputs.case
    if case.op != FWD:
        refuse("a composition has no backward but autograd's")
    x, _, weight, bias, *_ = _tensors(torch, inputs)
    shape = [1] * x.ndim
    shape[case.axis] = case.N
    weight, bias = weight.reshape(shape), bias.reshape(shape)

    def call() -> Any:
        d = x - x.mean(case.axis, keepdim=True)
        var = (d * d).mean(case.axis, keepdim=True)
        return d / torch.sqrt(var + case.eps) * weight + bias

    return _without_gradients(torch, call)


def _compiled_view(torch: Any, inputs: CpuInputs) -> CpuContender:
    if inputs.case.op != FWD:
        refuse("the compiled backward is compared on rows")
    return _strided(torch, inputs, lambda t: t, function=_compiled(torch)(_eager(torch)))


ROWS = {"torch": _torch, "torch-compile": _torch_compile, "cupynorm.torch": _ours}
STRIDED = {
    "torch-view": _view,
    "torch-contiguous": _contiguous,
    "torch-back": _back,
    "torch-composed": _composed,
    "torch-compile": _compiled_view,
}
