"""Other libraries' layer norm as functions of torch tensors: x (rows, N), weight and bias.

Each follows the signature that its library documents. What it cannot do it refuses with the
reason; autograd goes through all of them but Quack's and cuDNN's.
"""

from collections.abc import Callable
from typing import Any

from bench.gpu_check import EPS
from bench.gpu_contender import Unavailable, load
from bench.peers_cudnn import cudnn_forward

__all__ = ["FUNCTIONS", "KEEPS_NO_GRAPH", "torch_function"]

LIGER_BYTES = 65536  # its block holds a whole row of at most this many elements
FLASH_BYTES = 65536  # of a row: its Triton kernel holds one in a block

Function = Callable[[Any, Any, Any], Any]

# Why no backward can be timed by itself: it runs again and again on the graph of one forward.
KEEPS_NO_GRAPH = {
    "transformer-engine": "its backward frees what its forward saved, so it cannot be repeated: "
    "see forward and backward"
}


def torch_function(name: str, torch: Any, N: int, eps: float = EPS) -> Function:
    """The peer as a function of tensors x (rows, N), weight and bias."""
    return FUNCTIONS[name](torch, N, eps)


def _refuse(why: str) -> None:
    raise Unavailable(why)


def _eager(torch: Any, N: int, eps: float) -> Function:
    def run(x: Any, weight: Any, bias: Any) -> Any:
        return torch.nn.functional.layer_norm(x, (N,), weight, bias, eps)

    return run


def _compiled(torch: Any, N: int, eps: float) -> Function:
    # Static shapes and a fresh cache per case: the best kernel that it has for this one.
    torch.compiler.reset()
    return torch.compile(_eager(torch, N, eps), dynamic=False)


def _cupynorm(torch: Any, N: int, eps: float) -> Function:
    ours = load("cupynorm.torch").layer_norm
    return lambda x, weight, bias: ours(x, (N,), weight, bias, eps)


def _liger(torch: Any, N: int, eps: float) -> Function:
    if N > LIGER_BYTES:
        _refuse(f"Liger takes rows of at most {LIGER_BYTES} elements, not {N}")
    function = load("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: function.apply(x, weight, bias, eps)


def _quack(torch: Any, N: int, eps: float) -> Function:
    quack = load("quack.rmsnorm")

    def run(x: Any, weight: Any, bias: Any) -> Any:
        y = quack.layernorm_fwd(x, weight, bias=bias, eps=eps)
        return y[0] if isinstance(y, tuple) else y

    return run


def _flash(torch: Any, N: int, eps: float) -> Function:
    function = load("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def run(x: Any, weight: Any, bias: Any) -> Any:
        if weight is None:
            _refuse("flash-attn's layer_norm_fn needs a weight")
        if N * x.element_size() > FLASH_BYTES:
            _refuse(f"flash-attn takes rows of at most {FLASH_BYTES} bytes, not {N} elements")
        return function(x, weight, bias, eps=eps)

    return run


def _apex(torch: Any, N: int, eps: float) -> Function:
    norms = load("apex.normalization.fused_layer_norm")

    def run(x: Any, weight: Any, bias: Any) -> Any:
        if weight is None:
            return norms.fused_layer_norm(x, (N,), eps)
        if weight.dtype != x.dtype:
            return norms.mixed_dtype_fused_layer_norm_affine(x, weight, bias, (N,), eps)
        return norms.fused_layer_norm_affine(x, weight, bias, (N,), eps)

    return run


def _apex_fast(torch: Any, N: int, eps: float) -> Function:
    made = load("apex.contrib.layer_norm").FastLayerNorm
    return _of_module("Apex's FastLayerNorm", lambda like: made(N, eps=eps).to(like))


def _transformer_engine(torch: Any, N: int, eps: float) -> Function:
    made = load("transformer_engine.pytorch").LayerNorm
    return _of_module(
        "TransformerEngine", lambda like: made(N, eps=eps, dtype=like.dtype, device=like.device)
    )


def _of_module(name: str, make: Callable[[Any], Any]) -> Function:
    """A module whose parameters are the very tensors that the others are given."""
    modules: list[Any] = []

    def run(x: Any, weight: Any, bias: Any) -> Any:
        if weight is None:
            _refuse(f"{name} always has a weight")
        if weight.dtype != x.dtype:
            _refuse(f"{name} computes in its parameters' dtype {weight.dtype}, not x's {x.dtype}")
        if not modules:
            modules.append(make(weight))
        # torch.func.functional_call does the same, for 20 us of the host's time at each call.
        modules[0]._parameters.update(weight=weight, bias=bias)
        return modules[0](x)

    return run


FUNCTIONS: dict[str, Callable[[Any, int, float], Function]] = {
    "torch-eager": _eager,
    "torch-compile": _compiled,
    "cupynorm.torch": _cupynorm,
    "liger": _liger,
    "quack": _quack,
    "flash-attn": _flash,
    "apex": _apex,
    "apex-fast": _apex_fast,
    "transformer-engine": _transformer_engine,
    "cudnn": cudnn_forward,
}
