"""cuDNN's layer norm through its Python frontend: a graph per shape, built at the first call."""

from collections.abc import Callable
from typing import Any

from bench.gpu_contender import Unavailable, load

__all__ = ["cudnn_backward", "cudnn_forward"]

Function = Callable[..., Any]


class _Graph:
    """One operation on tensors of fixed shapes; runs on torch's current stream."""

    def __init__(self, torch: Any, cudnn: Any) -> None:
        self.torch, self.cudnn = torch, cudnn
        self.handle = cudnn.create_handle()
        wide = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            intermediate_data_type=wide, compute_data_type=wide, handle=self.handle
        )
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
            msg = f"cuDNN has no plan: {error}"
            raise Unavailable(msg) from error
        self.graph.check_support()
        self.graph.build_plans()
        size = self.graph.get_workspace_size()
        self.workspace = self.torch.empty(size, device=device, dtype=self.torch.uint8)

    def run(self, pack: dict[Any, Any]) -> None:
        stream = self.torch.cuda.current_stream().cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        self.graph.execute(pack, self.workspace, handle=self.handle)


def _lifted(*tensors: Any) -> list[Any]:
    """Rows as (1, rows, N) and vectors as (1, 1, N): the last dimension is normalized."""
    return [t.view(1, -1, t.shape[-1]) if t.ndim == 1 else t.unsqueeze(0) for t in tensors]


def cudnn_forward(torch: Any, N: int, eps: float) -> Function:
    """Function of x (rows, N), weight and bias in the inference phase: no statistics are kept."""
    cudnn, made = load("cudnn"), []

    def prepare(x: Any, weight: Any, bias: Any) -> tuple[_Graph, list[Any]]:
        g, epsilon = _Graph(torch, cudnn), torch.full((1, 1, 1), eps, dtype=torch.float32)
        names = ("x", "scale", "bias")
        nodes = [g.tensor(n, t) for n, t in zip(names, (x, weight, bias), strict=True)]
        by_value = g.tensor("epsilon", epsilon, is_pass_by_value=True)
        y, *_ = g.graph.layernorm(
            name="layer_norm", norm_forward_phase=cudnn.norm_forward_phase.INFERENCE,
            input=nodes[0], scale=nodes[1], bias=nodes[2], epsilon=by_value,
        )  # fmt: skip
        g.build(x.device, {y: x.dtype})
        return g, [*nodes, by_value, epsilon, y]

    def run(x: Any, weight: Any, bias: Any) -> Any:
        if weight is None:
            msg = "cuDNN's layer norm needs scale and bias"
            raise Unavailable(msg)
        lifted = _lifted(x, weight, bias)
        if not made:
            made.append(prepare(*lifted))
        g, (*nodes, by_value, epsilon, y) = made[0]
        result = torch.empty_like(lifted[0])
        g.run(dict(zip(nodes, lifted, strict=True)) | {by_value: epsilon, y: result})
        return result.squeeze(0)

    return run


def cudnn_backward(torch: Any, N: int) -> Function:
    """Function of dy, x (rows, N), mean, rstd (rows, 1) and weight: dx, dweight and dbias."""
    cudnn, made = load("cudnn"), []

    def prepare(*tensors: Any) -> tuple[_Graph, list[Any], tuple[Any, ...]]:
        g = _Graph(torch, cudnn)
        names = ("grad", "input", "mean", "inv_variance", "scale")
        nodes = [g.tensor(n, t) for n, t in zip(names, tensors, strict=True)]
        given = dict(zip(names, nodes, strict=True))
        results = tuple(g.graph.layernorm_backward(name="layer_norm_backward", **given))
        x, weight = tensors[1], tensors[4]
        dtypes = (x.dtype, weight.dtype, weight.dtype)
        g.build(x.device, dict(zip(results, dtypes, strict=True)))
        return g, nodes, results

    def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> tuple[Any, ...]:
        if weight is None:
            msg = "cuDNN's layer norm needs a scale"
            raise Unavailable(msg)
        lifted = _lifted(dy, x, mean, rstd, weight)
        if not made:
            made.append(prepare(*lifted))
        g, nodes, results = made[0]
        grads = [torch.empty_like(lifted[1]), *(torch.empty_like(lifted[4]) for _ in "wb")]
        g.run(dict(zip((*nodes, *results), (*lifted, *grads), strict=True)))
        return (grads[0].squeeze(0), *(a.view(N) for a in grads[1:]))

    return run
