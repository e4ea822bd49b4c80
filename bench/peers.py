"""What others offer for the same forward on the same memory, as contenders."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu_clock import Batch
from bench.gpu_contender import Builder, Contender, Unavailable, load
from bench.gpu_data import Inputs
from bench.gpu_grid import Case
from bench.gpu_session import Session
from bench.peers_arrays import ARRAY_PEERS, array_peer, composition
from bench.peers_functions import torch_function
from cupynorm._problem import numpy_dtype

__all__ = ["PEERS", "as_torch", "composition", "load", "peers", "torch_contender", "torch_function"]

PEERS = (
    "torch-eager", "torch-compile", "liger", "quack", "flash-attn", "apex", "apex-fast",
    "transformer-engine", "cudnn", *ARRAY_PEERS,
)  # fmt: skip
_BITS = {2: "int16", 4: "int32", 8: "int64"}


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


def peers(session: Session, case: Case, inputs: Inputs, names: tuple[str, ...]) -> list[Builder]:
    """Builders of the peers that are asked for."""

    def builder(name: str) -> Callable[[], Contender]:
        if name in ARRAY_PEERS:
            return lambda: array_peer(session, case, inputs, name)
        return lambda: _torch_peer(session, case, inputs, name)

    return [(name, builder(name)) for name in names]
