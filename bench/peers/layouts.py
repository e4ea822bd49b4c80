"""What is done today for strided columns: moved to rows first, or normalized through views."""

import functools
from collections.abc import Callable
from typing import Any

import cupynorm as cn
from bench.cases import EPS
from bench.contender import Contender, refuse
from bench.data import Inputs
from bench.device import launched
from bench.peers.arrays import along
from bench.peers.tensors import Call, as_torch, compiled, on_torch, operator, tensors_of


def contiguous(inputs: Inputs) -> Contender:
    """`ascontiguousarray` or `stack`, our row kernel, and a copy where y is not row-major."""
    case, device, affine = inputs.case, inputs.device, (inputs.weight, inputs.bias)
    if case.direction != "forward":
        refuse("it is a forward")
    row_major, lib, axis = case.layout[-1] == "C", device.lib, case.axis % len(case.shape)
    if device.simulated and (inputs.columns or not row_major):
        refuse("the simulated device has no array arithmetic")
    last = (*(k for k in range(len(case.shape)) if k != axis), axis)

    def call(i: int) -> Any:
        x, y = inputs.x[i].transpose(*last), inputs.y[i].transpose(*last)
        dense = lib.ascontiguousarray(x)  # x itself for C to F
        if row_major:
            cn.layer_norm(dense, case.N, *affine, EPS, out=y)
        else:
            y[...] = cn.layer_norm(dense, case.N, *affine, EPS)
        return inputs.y[i]

    def stacked(i: int) -> Any:
        dense = lib.stack(inputs.columns[i], axis=1)
        return cn.layer_norm(dense, case.N, *affine, EPS, out=inputs.y[i])

    if inputs.columns:  # as ours: its list of addresses is made by the host in each call
        return Contender(stacked, "stack + rows", capture=launched)
    return Contender(call, "ascontiguousarray + rows")


def in_torch(
    inputs: Inputs, dense: bool = False, back: bool = False, wrap: Any = None
) -> Contender:
    """Compute with the axis moved to the end, x and dy dense or as views; back: as y lies."""
    case = inputs.case
    if inputs.columns or case.direction == "both" or (wrap and case.direction != "forward"):
        refuse("it is a forward, or a backward, of one array")

    def make(torch: Any) -> Call:
        t, axis = tensors_of(torch, inputs), case.axis
        for name in ("x", "dy", "mean", "rstd"):
            setattr(t, name, [a.movedim(axis, -1) for a in getattr(t, name)])
        ys = [as_torch(torch, y).movedim(axis, -1) for y in inputs.y] or t.x
        norm, pull = torch.nn.functional.layer_norm, operator(torch, t)
        norm = wrap(torch, norm) if wrap else norm
        taken = lambda a: a.contiguous() if dense else a  # noqa: E731

        def give(y: Any, i: int) -> Any:
            if back:
                about = {"dtype": y.dtype, "device": y.device}
                y = torch.empty_strided(ys[i].shape, ys[i].stride(), **about).copy_(y)
            return y.movedim(-1, axis)

        def forward(i: int) -> Any:
            return give(norm(taken(t.x[i]), (case.N,), t.weight, t.bias, EPS), i)

        def backward(i: int) -> Any:
            dx, *totals = pull(taken(t.dy[i]), taken(t.x[i]), t.mean[i], t.rstd[i], t.weight)
            return give(dx, i), *totals

        return forward if case.direction == "forward" else backward

    return on_torch(inputs, make, "rows")


def composed(inputs: Inputs) -> Contender:
    """Mean, variance and the rest along the axis where it is, as ConvNeXt writes it."""
    case = inputs.case
    if inputs.columns or case.direction != "forward":
        refuse("a composition has no backward but autograd's, and takes one array")

    def make(torch: Any) -> Call:
        t = tensors_of(torch, inputs)
        w, b = (along(case, a) for a in (t.weight, t.bias))

        def call(i: int) -> Any:
            d = t.x[i] - t.x[i].mean(case.axis, keepdim=True)
            y = d / torch.sqrt((d * d).mean(case.axis, keepdim=True) + EPS)
            return y if w is None else y * w + b

        return call

    return on_torch(inputs, make, "composed")


MAKERS: dict[str, Callable[[Inputs], Contender]] = {
    "torch-view": in_torch,
    "torch-contiguous": functools.partial(in_torch, dense=True),
    "torch-back": functools.partial(in_torch, dense=True, back=True),
    "torch-view-compile": functools.partial(in_torch, wrap=compiled),
    "torch-composed": composed,
    "contiguous-then-rows": contiguous,
}
