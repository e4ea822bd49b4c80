"""Other libraries' norms as functions of torch tensors, on a CPU or a GPU.

Each follows the signature that its library documents. What it cannot do it refuses with the reason;
autograd goes through all of them but Quack's and cuDNN's.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.cases import EPS, OPS
from bench.clock import Batch
from bench.contender import Contender, load, refuse
from bench.data import Inputs, numpy_dtype

BITS = {2: "int16", 4: "int32", 8: "int64"}
LONGEST = 65536  # elements of a row in Liger's block, bytes of one in flash-attn's
Function = Callable[[Any, Any, Any], Any]  # of x (..., N), weight and bias

# -- a library a line, which gives its function for rows of N -----------------------------------------


def _eager(torch: Any, N: int) -> Function:
    return lambda x, w, b: torch.nn.functional.layer_norm(x, (N,), w, b, EPS)


def compiled(torch: Any, function: Any) -> Any:
    """Compile for the very shapes, with nothing left of another case."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _cupynorm(torch: Any, N: int) -> Function:
    function = load("cupynorm.torch").layer_norm
    return lambda x, w, b: function(x, (N,), w, b, EPS)


def _liger(torch: Any, N: int) -> Function:
    if N > LONGEST:
        refuse(f"Liger takes rows of at most {LONGEST} elements, not {N}")
    function = load("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, w, b: function.apply(x, w, b, EPS)


def _quack(torch: Any, N: int) -> Function:
    function = load("quack.rmsnorm").layernorm_fwd

    def run(x: Any, w: Any, b: Any) -> Any:
        w, b = (None if a is None else a.float() for a in (w, b))  # as it wants them
        y = function(x, w, bias=b, eps=EPS)
        return y[0] if isinstance(y, tuple) else y

    return run


def _flash(torch: Any, N: int) -> Function:
    function = load("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def run(x: Any, w: Any, b: Any) -> Any:
        if w is None:
            refuse("flash-attn's layer_norm_fn needs a weight")
        if N * x.element_size() > LONGEST:
            refuse(f"flash-attn takes rows of at most {LONGEST} bytes, not {N} elements")
        return function(x, w, b, eps=EPS)

    return run


def _apex(torch: Any, N: int) -> Function:
    norms = load("apex.normalization.fused_layer_norm")

    def run(x: Any, w: Any, b: Any) -> Any:
        if w is None:
            return norms.fused_layer_norm(x, (N,), EPS)
        if w.dtype != x.dtype:
            return norms.mixed_dtype_fused_layer_norm_affine(x, w, b, (N,), EPS)
        return norms.fused_layer_norm_affine(x, w, b, (N,), EPS)

    return run


def _apex_fast(torch: Any, N: int) -> Function:
    made = load("apex.contrib.layer_norm").FastLayerNorm
    return _of_module("Apex's FastLayerNorm", lambda like: made(N, eps=EPS).to(like))


def _transformer_engine(torch: Any, N: int) -> Function:
    made = load("transformer_engine.pytorch").LayerNorm
    return _of_module(
        "TransformerEngine", lambda like: made(N, eps=EPS, dtype=like.dtype, device=like.device)
    )


def _of_module(name: str, make: Callable[[Any], Any]) -> Function:
    """A module whose parameters are the very tensors that the others are given."""
    modules: list[Any] = []

    def run(x: Any, w: Any, b: Any) -> Any:
        if w is None:
            refuse(f"{name} always has a weight")
        if w.dtype != x.dtype:
            refuse(f"{name} computes in its parameters' dtype {w.dtype}, not x's {x.dtype}")
        if not modules:
            modules.append(make(w))
        # torch.func.functional_call does the same, for 20 us of the host's time at each call.
        modules[0]._parameters.update(weight=w, bias=b)
        return modules[0](x)

    return run


def _cudnn(torch: Any, N: int) -> Function:
    """The inference phase: no statistics are kept."""
    cudnn, made = load("cudnn"), []

    def prepare(x: Any, w: Any, b: Any) -> tuple[_Graph, list[Any]]:
        g, eps = _Graph(torch, cudnn), torch.full((1, 1, 1), EPS, dtype=torch.float32)
        nodes = [g.tensor(n, t) for n, t in zip(("x", "scale", "bias"), (x, w, b), strict=True)]
        by_value = g.tensor("epsilon", eps, is_pass_by_value=True)
        y, *_ = g.graph.layernorm(
            name="layer_norm", norm_forward_phase=cudnn.norm_forward_phase.INFERENCE,
            input=nodes[0], scale=nodes[1], bias=nodes[2], epsilon=by_value,
        )  # fmt: skip
        g.build(x.device, {y: x.dtype})
        return g, [*nodes, by_value, eps, y]

    def run(x: Any, w: Any, b: Any) -> Any:
        if w is None:
            refuse("cuDNN's layer norm needs scale and bias")
        lifted = _lifted(x, w, b)
        if not made:
            made.append(prepare(*lifted))
        g, (*nodes, by_value, eps, y) = made[0]
        result = torch.empty_like(lifted[0])
        g.run(dict(zip(nodes, lifted, strict=True)) | {by_value: eps, y: result})
        return result.squeeze(0)

    return run


FUNCTIONS: dict[str, dict[str, Callable[[Any, int], Function]]] = {
    "layer_norm": {
        "torch": _eager,
        "torch-compile": lambda torch, N: compiled(torch, _eager(torch, N)),
        "cupynorm.torch": _cupynorm,
        "liger": _liger,
        "quack": _quack,
        "flash-attn": _flash,
        "apex": _apex,
        "apex-fast": _apex_fast,
        "transformer-engine": _transformer_engine,
        "cudnn": _cudnn,
    }
}
# Why no backward can be timed, by itself or at all.
NO_BACKWARD = {
    "quack": ("both", "backward"),
    "transformer-engine": ("backward",),
    "cudnn": ("both",),
}
WHY = {
    "quack": "its layer norm has no backward",
    "transformer-engine": "its backward frees what its forward saved, so it cannot be repeated: see both",
    "cudnn": "its graphs are timed one by one: see forward and backward",
}


# -- from a function to a contender -----------------------------------------------------------------


@dataclass
class Tensors:
    """The inputs of a case as torch sees them: the same memory."""

    x: list[Any]
    dy: list[Any]
    mean: list[Any]
    rstd: list[Any]
    weight: Any
    bias: Any

    @classmethod
    def of(cls, torch: Any, inputs: Inputs) -> "Tensors":
        lists = (inputs.x, inputs.dy, inputs.mean, inputs.rstd)
        made = ([as_torch(torch, a) for a in arrays] for arrays in lists)
        return cls(*made, *(as_torch(torch, a) for a in (inputs.weight, inputs.bias)))

    @property
    def wanted(self) -> list[bool]:
        return [True, self.weight is not None, self.bias is not None]


def as_torch(torch: Any, a: Any) -> Any:
    """Tensor over an array's memory; as integers, which DLPack always knows."""
    if a is None:
        return None
    bits = torch.from_dlpack(a.view(BITS[a.dtype.itemsize]))
    return bits.view(getattr(torch, str(a.dtype)))


def from_torch(device: Any, result: Any) -> Any:
    """Arrays over the memory of a tensor, or of a tuple of tensors and None."""
    if isinstance(result, tuple):
        return tuple(None if t is None else from_torch(device, t) for t in result)
    torch, dtype = load("torch"), numpy_dtype(str(result.dtype).removeprefix("torch."))
    bits = result.detach().view(getattr(torch, BITS[dtype.itemsize]))
    return device.lib.from_dlpack(bits).view(dtype)


def on_torch(
    inputs: Inputs, make: Callable[[Any], Callable[[int], Any]], kernel: str = ""
) -> Contender:
    """Contender of a function of torch, which `make` gives; on a GPU on the run's own stream."""
    device = inputs.device
    if device.simulated:
        refuse("torch cannot see simulated memory")
    torch = load("torch")
    # What a user has under no_grad or inference: nothing asks for gradients.
    grads = torch.enable_grad if inputs.case.direction == "both" else torch.no_grad
    if device.kind == "cpu":
        with grads():
            call = make(torch)
        return Contender(call, fresh=True, scope=grads, arrays=lambda r: from_torch(device, r))
    if not torch.cuda.is_available():
        refuse("torch sees no CUDA device")
    side = torch.cuda.ExternalStream(device.stream.ptr)

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with grads(), torch.cuda.stream(side):
            yield

    def capture(device: Any, body: Callable[[], None], calls: int) -> Batch:
        graph = torch.cuda.CUDAGraph()
        # torch's own capture gives the graph a private pool: nobody else is handed its memory.
        capturing = torch.cuda.graph(graph, stream=side, capture_error_mode="relaxed")
        with grads(), capturing:
            body()

        def replay() -> None:
            with torch.cuda.stream(side):
                graph.replay()

        return Batch(replay, calls, "graph", [graph])

    device.synchronize()  # the inputs were made on another stream
    with scope():  # what a forward leaves for its backward is remembered with its stream
        call = make(torch)
    return Contender(
        call, kernel, capture=capture, scope=scope, arrays=lambda r: from_torch(device, r)
    )


def contender(inputs: Inputs, name: str) -> Contender:
    """A library's norm on the rows of a case, forward, backward or both."""
    case = inputs.case
    if case.direction in NO_BACKWARD.get(name, ()):
        refuse(WHY[name])

    def make(torch: Any) -> Callable[[int], Any]:
        t = Tensors.of(torch, inputs)
        if case.direction == "backward" and name in ("torch", "torch-compile"):
            function = operator(torch, t)
            function = compiled(torch, function) if name == "torch-compile" else function
            return lambda i: function(t.dy[i], t.x[i], t.mean[i], t.rstd[i])
        if case.direction == "backward" and name == "cudnn":
            function = cudnn_backward(torch)
            return lambda i: function(t.dy[i], t.x[i], t.mean[i], t.rstd[i], t.weight)
        function = FUNCTIONS[OPS[case.op].norm][name](torch, case.N)
        if case.direction == "forward":
            return lambda i: function(t.x[i], t.weight, t.bias)
        return _through_autograd(torch, t, function, case.direction == "both")

    made = on_torch(inputs, make, name)
    made.ours = name.startswith("cupynorm")
    return made


def operator(torch: Any, t: Tensors) -> Callable[..., Any]:
    """What autograd calls, on given statistics: of dy, x, mean and rstd."""

    def run(dy: Any, x: Any, mean: Any, rstd: Any) -> tuple[Any, ...]:
        backward = torch.ops.aten.native_layer_norm_backward
        made = backward(dy, x, x.shape[-1:], mean, rstd, t.weight, t.bias, t.wanted)
        # What is not wanted comes back as None or as an empty tensor, as the version has it.
        return tuple(g if want else None for g, want in zip(made, t.wanted, strict=True))

    return run


def _through_autograd(
    torch: Any, t: Tensors, function: Function, both: bool
) -> Callable[[int], Any]:
    """Both passes; or the backward alone, whose forward ran before and whose graph is kept."""
    leaves = [[a.requires_grad_() for a in (x, t.weight, t.bias) if a is not None] for x in t.x]
    kept = []
    if not both:
        with torch.enable_grad():
            kept = [function(x, t.weight, t.bias) for x in t.x]

    def padded(grads: tuple[Any, ...]) -> tuple[Any, ...]:
        given = iter(grads)
        return tuple(next(given) if want else None for want in t.wanted)

    def backward(i: int) -> tuple[Any, ...]:
        return padded(torch.autograd.grad(kept[i], leaves[i], t.dy[i], retain_graph=True))

    def forward_and_backward(i: int) -> tuple[Any, ...]:
        y = function(t.x[i], t.weight, t.bias)
        return y.detach(), *padded(torch.autograd.grad(y, leaves[i], t.dy[i]))

    return forward_and_backward if both else backward


# -- cuDNN through its Python frontend: a graph per shape, built at the first call -------------------


class _Graph:
    """One operation on tensors of fixed shapes; runs on torch's current stream."""

    def __init__(self, torch: Any, cudnn: Any) -> None:
        self.torch, self.cudnn, self.handle = torch, cudnn, cudnn.create_handle()
        wide = cudnn.data_type.FLOAT
        about = {"intermediate_data_type": wide, "compute_data_type": wide}
        self.graph = cudnn.pygraph(**about, handle=self.handle)
        self.workspace: Any = None

    def tensor(self, name: str, like: Any, **options: Any) -> Any:
        about = {"dim": like.size(), "stride": like.stride(), "data_type": like.dtype}
        return self.graph.tensor(name=name, **about, **options)

    def build(self, device: Any, results: dict[Any, Any]) -> None:
        """Results: what the graph gives, and its dtype."""
        for result, dtype in results.items():
            result.set_output(True).set_data_type(dtype)
        self.graph.validate()
        self.graph.build_operation_graph()
        modes = self.cudnn.heur_mode
        try:
            self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        except self.cudnn.cudnnGraphNotSupportedError as error:
            refuse(f"cuDNN has no plan: {error}")
        self.graph.check_support()
        self.graph.build_plans()
        size = self.graph.get_workspace_size()
        self.workspace = self.torch.empty(size, device=device, dtype=self.torch.uint8)

    def run(self, pack: dict[Any, Any]) -> None:
        stream = self.torch.cuda.current_stream().cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        self.graph.execute(pack, self.workspace, handle=self.handle)


def _lifted(*tensors: Any) -> list[Any]:
    """Rows as (1, M, N) and vectors as (1, 1, N): the last dimension is normalized."""
    return [t.view(1, -1, t.shape[-1]) if t.ndim == 1 else t.unsqueeze(0) for t in tensors]


def cudnn_backward(torch: Any) -> Callable[..., Any]:
    """Function of dy, x (M, N), mean, rstd (M, 1) and weight: dx, dweight and dbias."""
    cudnn, made = load("cudnn"), []

    def prepare(*tensors: Any) -> tuple[_Graph, list[Any], tuple[Any, ...]]:
        g, names = _Graph(torch, cudnn), ("grad", "input", "mean", "inv_variance", "scale")
        nodes = [g.tensor(n, t) for n, t in zip(names, tensors, strict=True)]
        given = dict(zip(names, nodes, strict=True))
        results = tuple(g.graph.layernorm_backward(name="layer_norm_backward", **given))
        dtypes = (tensors[1].dtype, tensors[4].dtype, tensors[4].dtype)
        g.build(tensors[1].device, dict(zip(results, dtypes, strict=True)))
        return g, nodes, results

    def run(dy: Any, x: Any, mean: Any, rstd: Any, w: Any) -> tuple[Any, ...]:
        if w is None:
            refuse("cuDNN's layer norm needs a scale")
        lifted = _lifted(dy, x, mean, rstd, w)
        if not made:
            made.append(prepare(*lifted))
        g, nodes, results = made[0]
        grads = [torch.empty_like(lifted[1]), *(torch.empty_like(lifted[4]) for _ in "wb")]
        g.run(dict(zip((*nodes, *results), (*lifted, *grads), strict=True)))
        return (grads[0].squeeze(0), *(a.view(-1) for a in grads[1:]))

    return run
