"""What others, and cupynorm.torch, offer for the backward on the same memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu_contender import Builder, Contender, Unavailable
from bench.gpu_data_backward import GradientInputs
from bench.gpu_grid import BOTH, Case
from bench.gpu_session import Session
from bench.peers import as_torch, torch_contender, torch_function
from bench.peers_arrays import ARRAY_PEERS, array_peer
from bench.peers_cudnn import cudnn_backward
from bench.peers_functions import KEEPS_NO_GRAPH

__all__ = ["BACKWARD_PEERS", "Tensors", "backward_call", "backward_peers"]

BACKWARD_PEERS = (
    "cupynorm.torch", "torch-eager", "torch-compile", "liger", "flash-attn", "apex", "apex-fast",
    "transformer-engine", "cudnn", "jax",
)  # fmt: skip

Gradients = tuple[Any, ...]


@dataclass(frozen=True)
class Tensors:
    """The inputs of a case as torch sees them: the same memory."""

    N: int
    x: list[Any]
    dy: list[Any]
    mean: list[Any]
    rstd: list[Any]
    weight: Any
    bias: Any

    @property
    def wanted(self) -> list[bool]:
        return [True, self.weight is not None, self.bias is not None]


def backward_call(name: str, torch: Any, t: Tensors, both: bool) -> Callable[[int], Gradients]:
    """Call i: dx, dweight and dbias, None for what was not wanted; behind y where `both`."""
    if name == "cudnn":
        return _of_cudnn(torch, t, both)
    if both:
        return _forward_and_backward(name, torch, t)
    if name in KEEPS_NO_GRAPH:
        raise Unavailable(KEEPS_NO_GRAPH[name])
    if name in ("torch-eager", "torch-compile"):
        return _operator(name, torch, t)
    return _kept_graph(name, torch, t)


def _operator(name: str, torch: Any, t: Tensors) -> Callable[[int], Gradients]:
    """The operator that autograd would call, on given statistics; compiled, its decomposition."""

    def eager(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Gradients:
        operator = torch.ops.aten.native_layer_norm_backward
        made = operator(dy, x, [t.N], mean, rstd, weight, bias, t.wanted)
        # What is not wanted comes back as None or as an empty tensor, as the version has it.
        return tuple(g if want else None for g, want in zip(made, t.wanted, strict=True))

    function = eager
    if name == "torch-compile":
        torch.compiler.reset()
        function = torch.compile(eager, dynamic=False)
    weight, bias = (None if a is None else a.detach() for a in (t.weight, t.bias))
    return lambda i: function(t.dy[i], t.x[i], t.mean[i], t.rstd[i], weight, bias)


def _of_cudnn(torch: Any, t: Tensors, both: bool) -> Callable[[int], Gradients]:
    """Without autograd; its training phase, which keeps the statistics, is not asked for."""
    if both:
        msg = "cuDNN's graphs are timed one by one: see forward and backward"
        raise Unavailable(msg)
    function = cudnn_backward(torch, t.N)
    return lambda i: function(t.dy[i], t.x[i], t.mean[i], t.rstd[i], t.weight)


def _leaves(t: Tensors, i: int) -> list[Any]:
    return [a.requires_grad_() for a in (t.x[i], t.weight, t.bias) if a is not None]


def _padded(t: Tensors, grads: Gradients) -> Gradients:
    given = iter(grads)
    return tuple(next(given) if want else None for want in t.wanted)


def _kept_graph(name: str, torch: Any, t: Tensors) -> Callable[[int], Gradients]:
    """Backward through autograd alone: the forward ran before, and its graph is kept."""
    function = torch_function(name, torch, t.N)
    with torch.enable_grad():
        leaves = [_leaves(t, i) for i in range(len(t.x))]
        y = [function(x, t.weight, t.bias) for x in t.x]

    def call(i: int) -> Gradients:
        return _padded(t, torch.autograd.grad(y[i], leaves[i], t.dy[i], retain_graph=True))

    return call


def _forward_and_backward(name: str, torch: Any, t: Tensors) -> Callable[[int], Gradients]:
    function = torch_function(name, torch, t.N)
    leaves = [_leaves(t, i) for i in range(len(t.x))]

    def call(i: int) -> Gradients:
        with torch.enable_grad():
            y = function(t.x[i], t.weight, t.bias)
        return (y.detach(), *_padded(t, torch.autograd.grad(y, leaves[i], t.dy[i])))

    return call


def _contender(session: Session, case: Case, inputs: GradientInputs, name: str) -> Contender:
    def call(torch: Any) -> Callable[[int], Gradients]:
        lists = (inputs.x, inputs.dy, inputs.mean, inputs.rstd)
        tensors = ([as_torch(torch, a) for a in arrays] for arrays in lists)
        affine = (as_torch(torch, a) for a in (inputs.weight, inputs.bias))
        return backward_call(name, torch, Tensors(case.N, *tensors, *affine), case.op == BOTH)

    made = torch_contender(session, name, call)
    made.ours = name.startswith("cupynorm")
    return made


def backward_peers(
    session: Session, case: Case, inputs: GradientInputs, names: tuple[str, ...]
) -> list[Builder]:
    """Builders of the peers that are asked for."""

    def builder(name: str) -> Callable[[], Contender]:
        if name in ARRAY_PEERS:
            return lambda: array_peer(session, case, inputs, name)
        return lambda: _contender(session, case, inputs, name)

    return [(name, builder(name)) for name in names if name in BACKWARD_PEERS]
