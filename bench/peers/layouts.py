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
from bench.peers.tensors import Tensors, as_torch, compiled, on_torch, operator


def contiguous(inputs: Inputs) -> Contender:
    """`ascontiguousarray`, our row kernel, and a copy where y is not row-major."""
    case, device, weight, bias = inputs.case, inputs.device, inputs.weight, inputs.bias
    if inputs.columns or case.direction != "forward":
        refuse("it is the forward of one array")
    row_major = case.layout[-1] == "C"
    if device.simulated and not row_major:
        refuse("the simulated device has no array arithmetic")
    lib, last = device.lib, case.axis % len(case.shape)

    def call(i: int) -> Any:
        x, y = (_last(a, last) for a in (inputs.x[i], inputs.y[i]))
        dense = lib.ascontiguousarray(x)  # x itself for C to F
        if row_major:
            cn.layer_norm(dense, case.N, weight, bias, EPS, out=y)
            return inputs.y[i]
        y[...] = cn.layer_norm(dense, case.N, weight, bias, EPS)
        return inputs.y[i]

    return Contender(call, "ascontiguousarray + rows")


def _last(a: Any, axis: int) -> Any:
    """View with the axis at the end."""
    return a.transpose(*(k for k in range(a.ndim) if k != axis), axis)


def stacked(inputs: Inputs) -> Contender:
    """`stack` of a list of columns, and our row kernel."""
    if not inputs.columns:
        refuse("x is one array")
    lib, case = inputs.device.lib, inputs.case
    if inputs.device.simulated:
        refuse("the simulated device has no array arithmetic")

    def call(i: int) -> Any:
        dense = lib.stack(inputs.columns[i], axis=1)
        return cn.layer_norm(dense, case.N, inputs.weight, inputs.bias, EPS, out=inputs.y[i])

    # As ours: its list of addresses is made by the host in each call.
    return Contender(call, "stack + rows", capture=launched)


Way = Callable[[Any], Any]  # of a tensor


def in_torch(
    inputs: Inputs, take: Way = lambda t: t, back: bool = False, wrap: Any = None
) -> Contender:
    """Move the axis to the end, `take` x and dy so, compute; `back`: into the layout of y."""
    case = inputs.case
    if inputs.columns or case.direction == "both" or (wrap and case.direction != "forward"):
        refuse("it is a forward, or a backward, of one array")

    def make(torch: Any) -> Callable[[int], Any]:
        t, axis = Tensors.of(torch, inputs), case.axis
        for name in ("x", "dy", "mean", "rstd"):
            setattr(t, name, [a.movedim(axis, -1) for a in getattr(t, name)])
        like = t.x if not inputs.y else [as_torch(torch, y).movedim(axis, -1) for y in inputs.y]
        norm: Any = torch.nn.functional.layer_norm
        norm = wrap(torch, norm) if wrap else norm
        pull = operator(torch, t)

        def give(y: Any, i: int) -> Any:
            if back:
                to = torch.empty_strided(
                    like[i].shape, like[i].stride(), dtype=y.dtype, device=y.device
                )
                y = to.copy_(y)
            return y.movedim(-1, axis)

        def forward(i: int) -> Any:
            return give(norm(take(t.x[i]), (case.N,), t.weight, t.bias, EPS), i)

        def backward(i: int) -> Any:
            dx, *totals = pull(take(t.dy[i]), take(t.x[i]), t.mean[i], t.rstd[i])
            return give(dx, i), *totals

        return forward if case.direction == "forward" else backward

    return on_torch(inputs, make, "rows")


def composed(inputs: Inputs) -> Contender:
    """Mean, variance and the rest along the axis where it is, as ConvNeXt writes it."""
    case = inputs.case
    if inputs.columns or case.direction != "forward":
        refuse("a composition has no backward but autograd's, and takes one array")

    def make(torch: Any) -> Callable[[int], Any]:
        t = Tensors.of(torch, inputs)
        w, b = (None if a is None else along(case, a) for a in (t.weight, t.bias))

        def call(i: int) -> Any:
            x = t.x[i]
            d = x - x.mean(case.axis, keepdim=True)
            y = d / torch.sqrt((d * d).mean(case.axis, keepdim=True) + EPS)
            return y if w is None else y * w + b

        return call

    return on_torch(inputs, make, "composed")


MAKERS: dict[str, Callable[[Inputs], Contender]] = {
    "torch-view": in_torch,
    "torch-contiguous": functools.partial(in_torch, take=lambda t: t.contiguous()),
    "torch-back": functools.partial(in_torch, take=lambda t: t.contiguous(), back=True),
    "torch-view-compile": functools.partial(in_torch, wrap=compiled),
    "torch-composed": composed,
    "contiguous-then-rows": contiguous,
    "stack-then-rows": stacked,
}
