"""What the tests of the torch adapter share: tensors, the oracle's answers, torch's own noise."""

import ml_dtypes
import numpy as np
import torch

from tests import oracle

# torch warns of its own deprecated parts when forward-mode derivatives or tracing are first used.
TORCHSCRIPT = "ignore:`torch.jit.*` is deprecated:DeprecationWarning"

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# torch's own samples of layer_norm: shape, how many trailing dimensions.
SHAPES = (((1, 2, 3), 3), ((2, 2, 3), 2), ((1,), 1), ((1, 2), 1), ((0, 1), 1), ((7, 65), 1))


def name_of(dtype):
    return str(dtype).rpartition(".")[2]


def numpy_of(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def numbers(*shape, dtype=torch.float32, seed=0, grad=False):
    """Normal deviates about 3, the same in every run."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 3
    return values.to(dtype).requires_grad_(grad)


def affine(*shape, dtype=torch.float32, grad=False):
    """A weight near 1 and a bias near 0."""
    weight = (numbers(*shape, seed=1) - 2).to(dtype).detach()
    bias = (numbers(*shape, seed=2) - 3).to(dtype).detach()
    return weight.requires_grad_(grad), bias.requires_grad_(grad)


def expected(x, n, weight=None, bias=None, eps=1e-5, center=True):
    """The oracle's y, mean and rstd, normalized over the last n dimensions."""
    w, b = (None if a is None else numpy_of(a) for a in (weight, bias))
    return oracle.layer_norm(numpy_of(x), tuple(range(x.ndim - n, x.ndim)), w, b, eps, center)


def check(y, x, n, weight=None, bias=None, eps=1e-5, center=True):
    """Compare y with the oracle under its one tolerance rule."""
    want = expected(x, n, weight, bias, eps, center)[0]
    oracle.assert_close(numpy_of(y), want, int(np.prod(x.shape[x.ndim - n :])))


def check_gradients(grads, dy, x, n, weight=None, eps=1e-5, center=True):
    """Compare dx, dweight and dbias, of which some may be None, with the oracle."""
    dy, x, weight, *grads = (None if a is None else numpy_of(a) for a in (dy, x, weight, *grads))
    oracle.assert_gradients(grads, dy, x, tuple(range(x.ndim - n, x.ndim)), weight, eps, center)


class Scaled(torch.nn.Module):
    """An RMS norm as another library writes it."""

    def __init__(self, N):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(N)), 1e-6

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * rstd).to(x.dtype)


LAYOUTS = {
    "permuted": lambda: numbers(6, 4, 9).permute(1, 0, 2),
    "transposed": lambda: numbers(9, 7).T,
    "stepped": lambda: numbers(8, 18)[::2, ::2],
    "flipped": lambda: numbers(8, 9).flip(0)[1:],
    "expanded": lambda: numbers(9).expand(4, 9),
    "padded": lambda: numbers(5, 12)[:, :9],
    "offset": lambda: numbers(46)[1:].view(5, 9),
    "channels last": lambda: numbers(2, 3, 4, 9).to(memory_format=torch.channels_last),
}
