"""Other libraries' norms as functions of torch tensors, on a CPU or a GPU.

Each follows the signature that its library documents. What it cannot do it refuses with the reason;
autograd goes through all of them but Quack's and cuDNN's.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from bench.cases import EPS
from bench.clock import Batch
from bench.contender import Contender, load, refuse
from bench.data import Inputs, numpy_dtype

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


def _quack(m: Any, torch: Any, N: int) -> Function:
    def run(x: Any, w: Any, b: Any) -> Any:
        w, b = (None if a is None else a.float() for a in (w, b))  # as it wants them
        y = m.layernorm_fwd(x, w, bias=b, eps=EPS)
        return y[0] if isinstance(y, tuple) else y

    return run


def _apex(m: Any, torch: Any, N: int) -> Function:
    def run(x: Any, w: Any, b: Any) -> Any:
        if w is None:
            return m.fused_layer_norm(x, (N,), EPS)
        mixed, same = m.mixed_dtype_fused_layer_norm_affine, m.fused_layer_norm_affine
        return (same if w.dtype == x.dtype else mixed)(x, w, b, (N,), EPS)

    return run


def _of_module(make: Callable[[Any], Any]) -> Function:
    """A module whose parameters are the very tensors that the others are given."""
    modules: list[Any] = []

    def run(x: Any, w: Any, b: Any) -> Any:
        if not modules:
            modules.append(make(w))
        # torch.func.functional_call does the same, for 20 us of the host's time at each call.
        modules[0]._parameters.update(weight=w, bias=b)
        return modules[0](x)

    return run


def _te(m: Any, torch: Any, N: int) -> Function:
    return _of_module(lambda like: m.LayerNorm(N, eps=EPS, dtype=like.dtype, device=like.device))


def _cudnn(m: Any, torch: Any, N: int) -> Function:
    """The inference phase: no statistics are kept."""
    graph = _CudnnGraph(torch, "layernorm", norm_forward_phase=m.norm_forward_phase.INFERENCE)
    eps = torch.full((1, 1, 1), EPS)

    def run(x: Any, w: Any, b: Any) -> Any:
        x, w, b = _lifted(x, w, b)
        (y,) = graph.run([x], input=x, scale=w, bias=b, epsilon=eps)
        return y.squeeze(0)

    return run


Maker = Callable[[Any, Any, int], Function]
FUNCTIONS: dict[str, tuple[str, Maker]] = {
    "torch": ("torch", _eager),
    "torch-compile": ("torch", lambda m, torch, N: compiled(torch, _eager(m, torch, N))),
    "cupynorm.torch": ("cupynorm.torch",
        lambda m, torch, N: lambda x, w, b: m.layer_norm(x, (N,), w, b, EPS)),
    "liger": ("liger_kernel.ops.layer_norm",
        lambda m, torch, N: lambda x, w, b: m.LigerLayerNormFunction.apply(x, w, b, EPS)),
    "quack": ("quack.rmsnorm", _quack),
    "flash-attn": ("flash_attn.ops.triton.layer_norm",
        lambda m, torch, N: lambda x, w, b: m.layer_norm_fn(x, w, b, eps=EPS)),
    "apex": ("apex.normalization.fused_layer_norm", _apex),
    "apex-fast": ("apex.contrib.layer_norm",
        lambda m, torch, N: _of_module(lambda like: m.FastLayerNorm(N, eps=EPS).to(like))),
    "transformer-engine": ("transformer_engine.pytorch", _te),
    "cudnn": ("cudnn", _cudnn),
}  # fmt: skip
NEEDS_WEIGHT = ("flash-attn", "apex-fast", "transformer-engine", "cudnn")
OF_ONE_DTYPE = ("apex-fast", "transformer-engine")  # its parameters' and x's
LONGEST = {"liger": 65536, "flash-attn": 32768}  # columns (of 16 bits) that a block holds
NO_BACKWARD = "its layer norm has no backward"
# Why no backward can be timed, by itself or after a forward.
REFUSED = {
    ("quack", "backward"): NO_BACKWARD,
    ("quack", "both"): NO_BACKWARD,
    ("transformer-engine", "backward"): "it cannot be repeated: it frees what its forward saved",
    ("cudnn", "both"): "its graphs are timed one by one: see forward and backward",
}


def refuse_case(name: str, case: Any) -> None:
    if (name, case.direction) in REFUSED:
        refuse(REFUSED[name, case.direction])
    if name in NEEDS_WEIGHT and not case.affine_dtype:
        refuse(f"{name} needs a weight")
    if name in OF_ONE_DTYPE and case.affine_dtype != case.dtype:
        refuse(f"{name} computes in its parameters' dtype {case.affine_dtype}, not {case.dtype}")
    most = LONGEST.get(name, case.N)
    if name == "flash-attn":  # which counts bytes
        most = 2 * most // case.itemsize
    if most < case.N:
        refuse(f"{name} takes rows of at most {most} elements, not {case.N}")


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
    refuse_case(name, case)

    def make(torch: Any) -> Call:
        t = tensors_of(torch, inputs)
        if direction == "backward" and name in ("torch", "torch-compile", "cudnn"):
            pull = _cudnn_backward(torch) if name == "cudnn" else operator(torch, t)
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


# -- cuDNN through its Python frontend -------------------------------------------------------------


class _CudnnGraph:
    """One operation on tensors of fixed shapes, built at the first run; on torch's own stream."""

    def __init__(self, torch: Any, operation: str, **options: Any) -> None:
        self.torch, self.operation, self.options = torch, operation, options
        self.cudnn, self.nodes = load("cudnn"), ()
        self.handle = self.cudnn.create_handle()

    def run(self, like: list[Any], **given: Any) -> list[Any]:
        """Results, which are like those tensors."""
        if not self.nodes:
            self._build(like, given)
        made, stream = [self.torch.empty_like(a) for a in like], self.torch.cuda.current_stream()
        self.cudnn.set_stream(handle=self.handle, stream=stream.cuda_stream)
        pack = dict(zip(self.nodes, (*given.values(), *made), strict=True))
        self.graph.execute(pack, self.workspace, handle=self.handle)
        return made

    def _build(self, like: list[Any], given: dict[str, Any]) -> None:
        wide, modes, nodes = self.cudnn.data_type.FLOAT, self.cudnn.heur_mode, {}
        types = {"intermediate_data_type": wide, "compute_data_type": wide}
        self.graph = graph = self.cudnn.pygraph(**types, handle=self.handle)
        for name, a in given.items():
            about = {"dim": a.size(), "stride": a.stride(), "data_type": a.dtype}
            nodes[name] = graph.tensor(name=name, **about, is_pass_by_value=name == "epsilon")
        made = getattr(graph, self.operation)(name=self.operation, **self.options, **nodes)
        for node, a in zip(made, like, strict=False):  # a forward's statistics are not wanted
            node.set_output(True).set_data_type(a.dtype)
        try:
            graph.build([modes.A, modes.FALLBACK])
        except self.cudnn.cudnnGraphNotSupportedError as error:
            refuse(f"cuDNN has no plan: {error}")
        about = {"dtype": self.torch.uint8, "device": like[0].device}
        self.workspace = self.torch.empty(graph.get_workspace_size(), **about)
        self.nodes = (*nodes.values(), *made[: len(like)])


def _lifted(*tensors: Any) -> list[Any]:
    """Rows as (1, M, N) and vectors as (1, 1, N): the last dimension is normalized."""
    return [t.view(1, -1, t.shape[-1]) if t.ndim == 1 else t.unsqueeze(0) for t in tensors]


def _cudnn_backward(torch: Any) -> Callable[..., Any]:
    graph, names = _CudnnGraph(torch, "layernorm_backward"), ("mean", "inv_variance")

    def run(dy: Any, x: Any, mean: Any, rstd: Any, w: Any) -> tuple[Any, ...]:
        dy, x, w, *stats = _lifted(dy, x, w, mean, rstd)
        about = dict(zip(names, stats, strict=True))
        dx, dw, db = graph.run([x, w, w], grad=dy, input=x, scale=w, **about)
        return dx.squeeze(0), dw.view(-1), db.view(-1)

    return run
