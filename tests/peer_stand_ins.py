"""Small stand-ins for GPU libraries, with the signatures that they document, computing with torch.

They let the adapters of `bench/peers/` run where the libraries cannot. `scale_error` makes all
of them wrong by that factor.
"""

import sys
import types
from types import SimpleNamespace

import torch


def modules(scale_error=1.0):
    """Name -> module, as they would lie in sys.modules."""

    def norm(x, weight, bias, eps):
        wide = [None if a is None else a.float() for a in (weight, bias)]
        y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], *wide, eps)
        return (y * scale_error).to(x.dtype)

    def layer_norm_fn(
        x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6,
        dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, is_rms_norm=False,
        return_dropout_mask=False, out=None, residual_out=None,
    ):  # fmt: skip
        return norm(x, weight.contiguous(), bias, eps)

    def fused_layer_norm_affine(
        input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False
    ):
        assert weight.dtype == input.dtype
        return norm(input, weight, bias, eps)

    def mixed(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        assert weight.dtype != input.dtype
        return norm(input, weight, bias, eps)

    def fused_layer_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
        return norm(input, None, None, eps)

    class FastLayerNorm(torch.nn.Module):
        def __init__(self, hidden_size, eps=1e-5):
            super().__init__()
            self.epsilon = eps
            self.weight = torch.nn.Parameter(torch.ones(hidden_size))
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

        def forward(self, x):
            return norm(x, self.weight, self.bias, self.epsilon)

    class TELayerNorm(torch.nn.Module):
        def __init__(self, normalized_shape, *, eps=1e-5, device=None, dtype=None,
                     zero_centered_gamma=False, sm_margin=0):  # fmt: skip
            super().__init__()
            self.eps, about = eps, {"device": device, "dtype": dtype}
            self.weight = torch.nn.Parameter(torch.ones(normalized_shape, **about))
            self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, **about))

        def forward(self, x):
            return norm(x, self.weight, self.bias, self.eps).to(self.weight.dtype)

    def scale(X, *, axis=0, with_mean=True, with_std=True, copy=True):
        std = X.std(axis, keepdims=True)
        return ((X - X.mean(axis, keepdims=True)) / std * scale_error).astype(X.dtype)

    flash, apex, te = "flash_attn.ops.triton.layer_norm", "apex.normalization", "transformer_engine"
    fused = {
        "fused_layer_norm_affine": fused_layer_norm_affine,
        "mixed_dtype_fused_layer_norm_affine": mixed,
        "fused_layer_norm": fused_layer_norm,
    }
    return {
        flash: _module(flash, layer_norm_fn=layer_norm_fn),
        f"{apex}.fused_layer_norm": _module(f"{apex}.fused_layer_norm", **fused),
        "apex.contrib.layer_norm": _module("apex.contrib.layer_norm", FastLayerNorm=FastLayerNorm),
        f"{te}.pytorch": _module(f"{te}.pytorch", LayerNorm=TELayerNorm),
        "cuml.preprocessing": _module("cuml.preprocessing", scale=scale),
        "cudnn": _cudnn(norm),
    }


def _module(name, **attributes):
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


def install(monkeypatch, scale_error=1.0):
    """Put the stand-ins, and the packages above them, where `import` finds them."""
    for name, module in modules(scale_error).items():
        parts = name.split(".")
        for k in range(1, len(parts)):
            package = ".".join(parts[:k])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, _module(package, __path__=[]))
        monkeypatch.setitem(sys.modules, name, module)


class _Node:
    """A tensor of a cuDNN graph: its meaning comes from the operation that gave it."""

    def __init__(self, name, **about):
        self.name, self.about, self.output = name, about, False

    def set_output(self, value):
        self.output = value
        return self

    def set_data_type(self, dtype):
        self.about["data_type"] = dtype
        return self


def _cudnn(norm):
    class NotSupported(Exception):
        pass

    class Pygraph:
        def __init__(self, *, intermediate_data_type, compute_data_type, handle):
            self.steps, self.operation = [], None

        def tensor(self, name, dim, stride, data_type, is_pass_by_value=False):
            assert len(dim) == len(stride) == 3
            return _Node(name, dim=tuple(dim), data_type=data_type)

        def layernorm(self, name, norm_forward_phase, input, scale, bias, epsilon):
            assert norm_forward_phase == "inference"
            assert scale.about["dim"] == bias.about["dim"] == (1, 1, input.about["dim"][-1])
            y = _Node("y")

            def run(pack):
                eps = float(pack[epsilon])
                vectors = (pack[a].reshape(-1) for a in (scale, bias))
                pack[y].copy_(norm(pack[input], *vectors, eps))

            self.operation = run
            return y, None, None

        def layernorm_backward(self, name, grad, input, scale, mean, inv_variance):
            nodes = [_Node(n) for n in ("dx", "dscale", "dbias")]

            def run(pack):
                dy, x, w = pack[grad][0], pack[input][0], pack[scale].reshape(-1)
                stats = pack[mean][0], pack[inv_variance][0]
                operator = torch.ops.aten.native_layer_norm_backward
                made = operator(dy, x, x.shape[-1:], *stats, w, w, [True] * 3)
                for node, value in zip(nodes, made, strict=True):
                    pack[node].copy_(norm.__closure__[0].cell_contents * value)

            self.operation = run
            return nodes

        def create_execution_plans(self, modes):
            self.steps.append("plans")

        def validate(self):
            self.steps.append("validate")

        def build_operation_graph(self):
            self.steps.append("graph")

        def check_support(self):
            self.steps.append("support")

        def build_plans(self):
            self.steps.append("build")

        def get_workspace_size(self):
            return 16

        def execute(self, pack, workspace, handle):
            assert self.steps == ["validate", "graph", "plans", "support", "build"]
            assert workspace.numel() == 16
            self.operation(pack)

    return _module(
        "cudnn",
        pygraph=Pygraph,
        cudnnGraphNotSupportedError=NotSupported,
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        data_type=SimpleNamespace(FLOAT="float"),
        norm_forward_phase=SimpleNamespace(INFERENCE="inference"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
    )
