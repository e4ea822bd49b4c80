"""Public calls over axes, settled anew each time: what is patched below them is seen."""

import cupynorm as cn
from cupynorm import _memo


def forward(x, axes, weight=None, bias=None, eps=1e-5, out=None):
    """y, mean and rstd."""
    _memo.settled().clear()
    return cn.layer_norm(x, None, weight, bias, eps, axis=axes, out=out, return_stats=True)


def backward(dy, x, axes, mean, rstd, weight=None):
    """dx, dweight and dbias."""
    _memo.settled().clear()
    given = dy, x, None, mean, rstd, weight
    return cn.layer_norm_backward(*given, axis=axes, output_mask=(True, True, True))
