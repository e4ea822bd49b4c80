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

    def layer_norm_fn(x, weight, bias, residual=None, *, eps=1e-6, is_rms_norm=False):
        return norm(x, weight.contiguous(), bias, eps)

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
        assert weight.dtype == input.dtype
        return norm(input, weight, bias, eps)

    def mixed(input, weight, bias, normalized_shape, eps=1e-6):
        assert weight.dtype != input.dtype
        return norm(input, weight, bias, eps)

    def fused_layer_norm(input, normalized_shape, eps=1e-6):
        return norm(input, None, None, eps)

    class LayerNorm(torch.nn.Module):
        def __init__(self, hidden_size, *, eps=1e-5, device=None, dtype=None):
            super().__init__()
            self.epsilon, about = eps, {"device": device, "dtype": dtype}
            self.weight = torch.nn.Parameter(torch.ones(hidden_size, **about))
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **about))

        def forward(self, x):
            return norm(x, self.weight, self.bias, self.epsilon).to(self.weight.dtype)

    def scale(X, *, axis=0, with_mean=True, with_std=True, copy=True):
        std = X.std(axis, keepdims=True)
        return ((X - X.mean(axis, keepdims=True)) / std * scale_error).astype(X.dtype)

    fused = {
        "fused_layer_norm_affine": fused_layer_norm_affine,
        "mixed_dtype_fused_layer_norm_affine": mixed,
        "fused_layer_norm": fused_layer_norm,
    }
    return {
        "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
        "apex.normalization.fused_layer_norm": fused,
        "apex.contrib.layer_norm": {"FastLayerNorm": LayerNorm},
        "transformer_engine.pytorch": {"LayerNorm": LayerNorm},
        "cuml.preprocessing": {"scale": scale},
        "cudnn": _cudnn(norm, scale_error),
    }


def install(monkeypatch, scale_error=1.0):
    """Put the stand-ins, and the packages above them, where `import` finds them."""
    for name, attributes in modules(scale_error).items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            package = ".".join(parts[:k])
            if k == len(parts) or package not in sys.modules:
                made = types.ModuleType(package)
                vars(made).update(attributes if k == len(parts) else {"__path__": []})
                monkeypatch.setitem(sys.modules, package, made)


def _cudnn(norm, scale_error):
    class Node:
        """A tensor of a graph: its meaning comes from the operation that gave it."""

        def __init__(self, name, dim=None, stride=None, data_type=None, is_pass_by_value=False):
            self.name, self.dim, self.by_value = name, dim, is_pass_by_value
            self.dtype, self.output = data_type, False

        def set_output(self, value):
            self.output = value
            return self

        def set_data_type(self, dtype):
            self.dtype = dtype
            return self

    class Pygraph:
        def __init__(self, *, intermediate_data_type, compute_data_type, handle):
            self.operation = self.modes = None

        def tensor(self, name, dim, stride, data_type, is_pass_by_value):
            assert len(dim) == len(stride) == 3
            return Node(name, tuple(dim), stride, data_type, is_pass_by_value)

        def layernorm(self, name, norm_forward_phase, input, scale, bias, epsilon):
            assert norm_forward_phase == "inference" and epsilon.by_value
            assert scale.dim == bias.dim == (1, 1, input.dim[-1])
            y = Node("y")

            def run(pack):
                vectors = (pack[a].reshape(-1) for a in (scale, bias))
                pack[y].copy_(norm(pack[input], *vectors, float(pack[epsilon])))

            self.operation = run
            return y, None, None

        def layernorm_backward(self, name, grad, input, scale, mean, inv_variance):
            nodes = [Node(n) for n in ("dx", "dscale", "dbias")]

            def run(pack):
                dy, x, w = pack[grad][0], pack[input][0], pack[scale].reshape(-1)
                stats = pack[mean][0], pack[inv_variance][0]
                operator = torch.ops.aten.native_layer_norm_backward
                made = operator(dy, x, x.shape[-1:], *stats, w, w, [True] * 3)
                for node, value in zip(nodes, made, strict=True):
                    assert node.output and node.dtype == value.dtype
                    pack[node].copy_(scale_error * value)

            self.operation = run
            return nodes

        def build(self, modes):
            self.modes = modes

        def get_workspace_size(self):
            return 16

        def execute(self, pack, workspace, handle):
            assert self.modes == ["a", "fallback"] and workspace.numel() == 16
            self.operation(pack)

    return {
        "pygraph": Pygraph,
        "cudnnGraphNotSupportedError": type("NotSupported", (Exception,), {}),
        "create_handle": lambda: "handle",
        "set_stream": lambda handle, stream: None,
        "data_type": SimpleNamespace(FLOAT="float"),
        "norm_forward_phase": SimpleNamespace(INFERENCE="inference"),
        "heur_mode": SimpleNamespace(A="a", FALLBACK="fallback"),
    }
