"""Other libraries' norms as functions of torch tensors, on a CPU or a GPU.

What one cannot do it refuses with the reason; autograd goes through all of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cupynorm as cn
from bench.cases import EPS
from bench.contender import Batch, Contender, load, refuse
from bench.device import Inputs, launched, numpy_dtype
from bench.peers.arrays import along

BITS = {2: "int16", 4: "int32", 8: "int64"}
Function = Callable[[Any, Any, Any], Any]  # of x (..., N), weight and bias
Call = Callable[[int], Any]

# -- a library a line of FUNCTIONS: its module, and from module, torch and N its function ----------


def compiled(torch: Any, function: Any) -> Any:
    """Compile for the very shapes, with nothing left of another case."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _eager(m: Any, torch: Any, N: int) -> Function:
    return lambda x, w, b: torch.nn.functional.layer_norm(x, (N,), w, b, EPS)


Maker = Callable[[Any, Any, int], Function]
FUNCTIONS: dict[str, tuple[str, Maker]] = {
    "torch": ("torch", _eager),
    "torch-compile": ("torch", lambda m, torch, N: compiled(torch, _eager(m, torch, N))),
    "cupynorm.torch": ("cupynorm.torch",
        lambda m, torch, N: lambda x, w, b: m.layer_norm(x, (N,), w, b, EPS)),
    "liger": ("liger_kernel.ops.layer_norm",
        lambda m, torch, N: lambda x, w, b: m.LigerLayerNormFunction.apply(x, w, b, EPS)),
}  # fmt: skip
LIGERS = 65536  # columns that a block holds


# -- from a function to a contender ---------------------------------------------------------------


def tensors_of(torch: Any, inputs: Inputs) -> Any:
    """The inputs of a case as torch sees them, over the same memory; which gradients are wanted."""
    t = SimpleNamespace(**{n: as_torch(torch, getattr(inputs, n)) for n in ("weight", "bias")})
    for name in ("x", "dy", "mean", "rstd"):
        setattr(t, name, [as_torch(torch, a) for a in getattr(inputs, name)])
    t.wanted = [True, t.weight is not None, t.bias is not None]
    return t


def as_torch(torch: Any, a: Any) -> Any:
    """Tensor over an array's memory; as integers, which DLPack always knows."""
    if a is None:
        return None
    return torch.from_dlpack(a.view(BITS[a.dtype.itemsize])).view(getattr(torch, str(a.dtype)))


def from_torch(device: Any, result: Any) -> Any:
    """Arrays over the memory of a tensor, or of a tuple of tensors and None."""
    if isinstance(result, tuple):
        return tuple(None if t is None else from_torch(device, t) for t in result)
    torch, dtype = load("torch"), numpy_dtype(str(result.dtype).removeprefix("torch."))
    bits = result.detach().view(getattr(torch, BITS[dtype.itemsize]))
    return device.lib.from_dlpack(bits).view(dtype)


def on_torch(inputs: Inputs, make: Callable[[Any], Call], kernel: str = "") -> Contender:
    """Contender of a function of torch, which `make` gives; on a GPU on the run's own stream."""
    device = inputs.device
    if device.simulated:
        refuse("torch cannot see simulated memory")
    torch = load("torch")
    # What a user has under no_grad or inference: nothing asks for gradients.
    grads = torch.enable_grad if inputs.case.direction == "both" else torch.no_grad
    made = Contender(lambda i: None, kernel, scope=grads, arrays=lambda r: from_torch(device, r))
    if device.kind == "cpu":
        made.fresh = True
    else:
        if not torch.cuda.is_available():
            refuse("torch sees no CUDA device")
        made.scope, made.capture = _on_stream(torch, device, grads)
        device.synchronize()  # the inputs were made on another stream
    with made.scope():  # what a forward leaves for its backward is remembered with its stream
        made.call = make(torch)
    return made


def _on_stream(torch: Any, device: Any, grads: Any) -> tuple[Any, Any]:
    side = torch.cuda.ExternalStream(device.stream.ptr)

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with grads(), torch.cuda.stream(side):
            yield

    def capture(device: Any, body: Callable[[], None], calls: int) -> Batch:
        graph = torch.cuda.CUDAGraph()
        # torch's own capture gives the graph a private pool: nobody else is handed its memory.
        with grads(), torch.cuda.graph(graph, stream=side, capture_error_mode="relaxed"):
            body()

        def replay() -> None:
            with torch.cuda.stream(side):
                graph.replay()

        return Batch(replay, calls, "graph", [graph])

    return scope, capture


def contender(inputs: Inputs, name: str) -> Contender:
    """A library's norm on the rows of a case: forward, backward or both."""
    case, direction = inputs.case, inputs.case.direction
    if name == "liger" and case.N > LIGERS:
        refuse(f"{name} takes rows of at most {LIGERS} elements, not {case.N}")

    def make(torch: Any) -> Call:
        t = tensors_of(torch, inputs)
        if direction == "backward" and name in ("torch", "torch-compile"):
            pull = operator(torch, t)
            pull = compiled(torch, pull) if name == "torch-compile" else pull
            return lambda i: pull(t.dy[i], t.x[i], t.mean[i], t.rstd[i], t.weight)
        module, maker = FUNCTIONS[name]
        function = maker(load(module), torch, case.N)
        if direction == "forward":
            return lambda i: function(t.x[i], t.weight, t.bias)
        return _through_autograd(torch, t, function, direction == "both")

    made = on_torch(inputs, make, name)
    made.ours = name.startswith("cupynorm")
    return made


def operator(torch: Any, t: Any) -> Callable[..., Any]:
    """What autograd calls, on given statistics: of dy, x, mean, rstd and weight."""

    def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, ...]:
        backward = torch.ops.aten.native_layer_norm_backward
        made = backward(dy, x, x.shape[-1:], mean, rstd, weight, t.bias, t.wanted)
        # What is not wanted comes back as None or as an empty tensor, as the version has it.
        return tuple(g if want else None for g, want in zip(made, t.wanted, strict=True))

    return run


def _through_autograd(torch: Any, t: Any, function: Function, both: bool) -> Call:
    """Both passes; or the backward alone, whose forward ran before and whose graph is kept."""
    leaves = [[a.requires_grad_() for a in (x, t.weight, t.bias) if a is not None] for x in t.x]
    with torch.enable_grad():
        kept = [] if both else [function(x, t.weight, t.bias) for x in t.x]

    def call(i: int) -> tuple[Any, ...]:
        y = function(t.x[i], t.weight, t.bias) if both else kept[i]
        given = iter(torch.autograd.grad(y, leaves[i], t.dy[i], retain_graph=not both))
        grads = tuple(next(given) if want else None for want in t.wanted)
        return (y.detach(), *grads) if both else grads

    return call


# -- strided columns as they are taken today: moved to rows first, or normalized through views ----


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


STRIDED: dict[str, Callable[[Inputs], Contender]] = {
    "torch-view": in_torch,
    "torch-contiguous": functools.partial(in_torch, dense=True),
    "torch-back": functools.partial(in_torch, dense=True, back=True),
    "torch-view-compile": functools.partial(in_torch, wrap=compiled),
    "torch-composed": composed,
    "contiguous-then-rows": contiguous,
}
