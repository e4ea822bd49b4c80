"""What others offer for the same work on the same memory: eager torch, torch.compile, Liger, ..."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu_check import EPS
from bench.gpu_clock import Batch
from bench.gpu_contender import Builder, Contender, Unavailable
from bench.gpu_data import Inputs
from bench.gpu_grid import FEW, Case
from bench.gpu_session import Session
from cupynorm._problem import numpy_dtype

__all__ = ["PEERS", "as_torch", "composition", "load", "peers", "torch_contender", "torch_function"]

PEERS = ("torch-eager", "torch-compile", "liger", "quack", "cupy")
LIGER_BYTES = 65536  # its block holds a whole row of at most this many elements
_BITS = {2: "int16", 4: "int32", 8: "int64"}


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # not installed, or installed and broken
        msg = f"{name} cannot be imported: {error}"
        raise Unavailable(msg) from error


def torch_function(
    name: str, torch: Any, N: int, eps: float = EPS
) -> Callable[[Any, Any, Any], Any]:
    """The peer as a function of tensors x (rows, N), weight and bias."""
    if name in ("torch-eager", "torch-compile"):

        def eager(x: Any, weight: Any, bias: Any) -> Any:
            return torch.nn.functional.layer_norm(x, (N,), weight, bias, eps)

        if name == "torch-eager":
            return eager
        # Static shapes and a fresh cache per case: the best kernel that it has for this one.
        torch.compiler.reset()
        return torch.compile(eager, dynamic=False)
    if name == "cupynorm.torch":
        ours = load("cupynorm.torch").layer_norm
        return lambda x, weight, bias: ours(x, (N,), weight, bias, eps)
    if name == "liger":
        if N > LIGER_BYTES:
            msg = f"Liger takes rows of at most {LIGER_BYTES} elements, not {N}"
            raise Unavailable(msg)
        function = load("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda x, weight, bias: function.apply(x, weight, bias, eps)
    quack = load("quack.rmsnorm")

    def run_quack(x: Any, weight: Any, bias: Any) -> Any:
        y = quack.layernorm_fwd(x, weight, bias=bias, eps=eps)
        return y[0] if isinstance(y, tuple) else y

    return run_quack


def composition(xp: Any, x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    """Layer norm as a NumPy user writes it, statistics in float32 or float64."""
    wide = x.astype("float64" if x.dtype == "float64" else "float32")
    d = wide - wide.mean(axis=-1, keepdims=True)
    x_hat = d / xp.sqrt((d * d).mean(axis=-1, keepdims=True) + wide.dtype.type(eps))
    if weight is not None:
        x_hat = x_hat * weight.astype(wide.dtype) + bias.astype(wide.dtype)
    return x_hat.astype(x.dtype)


def as_torch(torch: Any, a: Any) -> Any:
    """Tensor over a CuPy (or NumPy) array's memory; as integers, which DLPack always knows."""
    if a is None:
        return None
    bits = torch.from_dlpack(a.view(_BITS[a.dtype.itemsize]))
    return bits.view(getattr(torch, str(a.dtype)))


def _from_torch(session: Session, result: Any) -> Any:
    """CuPy arrays over the memory of a tensor, or of a tuple of tensors and None."""
    if isinstance(result, tuple):
        return tuple(None if t is None else _from_torch(session, t) for t in result)
    torch, dtype = load("torch"), numpy_dtype(str(result.dtype).removeprefix("torch."))
    bits = result.detach().view(getattr(torch, _BITS[dtype.itemsize]))
    return session.cupy.from_dlpack(bits).view(dtype)


def torch_contender(
    session: Session, name: str, make: Callable[[Any], Callable[[int], Any]]
) -> Contender:
    """Contender of a function of torch, which `make` gives; it runs on the session's stream."""
    if session.simulated:
        msg = "torch cannot see simulated memory"
        raise Unavailable(msg)
    torch = load("torch")
    if not torch.cuda.is_available():
        msg = "torch sees no CUDA device"
        raise Unavailable(msg)
    side = torch.cuda.ExternalStream(session.stream.ptr)

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with torch.no_grad(), torch.cuda.stream(side):
            yield

    def capture(session: Session, body: Callable[[], None], calls: int) -> Batch:
        graph = torch.cuda.CUDAGraph()
        # torch's own capture gives the graph a private pool: nobody else is handed its memory.
        capturing = torch.cuda.graph(graph, stream=side, capture_error_mode="relaxed")
        with torch.no_grad(), capturing:
            body()

        def replay() -> None:
            with torch.cuda.stream(side):
                graph.replay()

        return Batch(replay, calls, "graph", [graph])

    session.synchronize()  # the inputs were made on another stream
    with scope():  # what a forward leaves for its backward is remembered with its stream
        call = make(torch)
    return Contender(
        name,
        call,
        kernel=name,
        capture=capture,
        scope=scope,
        to_cupy=lambda result: _from_torch(session, result),
    )


def _torch_peer(session: Session, case: Case, inputs: Inputs, name: str) -> Contender:
    def call(torch: Any) -> Callable[[int], Any]:
        function = torch_function(name, torch, case.N)
        x = [as_torch(torch, a) for a in inputs.x]
        weight, bias = as_torch(torch, inputs.weight), as_torch(torch, inputs.bias)
        if name == "quack":
            weight, bias = (None if a is None else a.float() for a in (weight, bias))
        return lambda i: function(x[i], weight, bias)

    return torch_contender(session, name, call)


def _cupy_peer(session: Session, case: Case, inputs: Inputs) -> Contender:
    if session.simulated:
        msg = "the simulated device has no array arithmetic"
        raise Unavailable(msg)
    if case.group == FEW:
        msg = "CuPy reduces each row with one block: minutes for a few long rows"
        raise Unavailable(msg)
    cupy, weight, bias = session.cupy, inputs.weight, inputs.bias
    return Contender(
        "cupy", lambda i: composition(cupy, inputs.x[i], weight, bias), kernel="composition"
    )


def peers(session: Session, case: Case, inputs: Inputs, names: tuple[str, ...]) -> list[Builder]:
    """Builders of the peers that are asked for."""

    def builder(name: str) -> Callable[[], Contender]:
        if name == "cupy":
            return lambda: _cupy_peer(session, case, inputs)
        return lambda: _torch_peer(session, case, inputs, name)

    return [(name, builder(name)) for name in names]
