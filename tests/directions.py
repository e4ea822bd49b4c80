"""Forward and backward seen as one thing: called alike, compared with the oracle alike."""

import math

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle

EVERY = (True, True, True)
# Of layer norm, and of RMS norm.
each_direction = pytest.mark.parametrize(
    "direction", ["forward", "backward", "rms forward", "rms backward"]
)


def stats_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def axes_of(ndim, normalized_shape=None, axis=None):
    """In the caller's order, as NumPy counts them."""
    if axis is not None:
        return tuple(int(a) % ndim for a in (axis if isinstance(axis, (tuple, list)) else [axis]))
    return tuple(range(ndim))[-(1 if normalized_shape is None else np.size(normalized_shape)) :]


def backward(dy, x, normalized_shape=None, weight=None, *, axis=None, eps=1e-5, output_mask=None):
    """The gradients with the statistics that the forward returns."""
    named = {"axis": axis, "eps": eps, "return_stats": True}
    _, mean, rstd = cn.layer_norm(x, normalized_shape, weight, **named)
    return cn.layer_norm_backward(
        dy, x, normalized_shape, mean, rstd, weight, axis=axis, output_mask=output_mask
    )


def run(direction, dy, x, weight=None, bias=None, eps=1e-5, **how):
    """(y, mean, rstd), or (dx, dweight, dbias); of RMS norm without mean and dbias."""
    if direction == "backward":
        return backward(dy, x, weight=weight, eps=eps, output_mask=EVERY, **how)
    if direction == "forward":
        return cn.layer_norm(x, weight=weight, bias=bias, eps=eps, return_stats=True, **how)
    found = cn.rms_norm(x, weight=weight, eps=eps, return_stats=True, **how)
    if direction == "rms forward":
        return found
    given = dy, x, how.pop("normalized_shape", None), found.rstd, weight
    return cn.rms_norm_backward(*given, output_mask=EVERY[:2], **how)


def check(lib, found, dy, x, weight=None, bias=None, eps=1e-5, **how):
    """Compare with the definition, which takes ascending axes: y alone, or all of a result."""
    named = axes_of(x.ndim, **how)
    axes, turn = tuple(sorted(named)), np.argsort(named)
    arrays = found if isinstance(found, tuple) else (found,)
    host = (None if a is None else np.asarray(lib.to_numpy(a)) for a in (dy, x, weight, bias))
    dy, x, *affine = host
    weight, bias = (None if a is None else a.transpose(turn) for a in affine)
    got = [None if a is None else np.asarray(lib.to_numpy(a)) for a in arrays]
    center = "rms" not in type(found).__name__.lower()
    if type(found).__name__.endswith("Gradients"):
        sums = [None if a is None else a.transpose(turn) for a in got[1:]]
        sums += [None] * (not center)
        oracle.assert_gradients([got[0], *sums], dy, x, axes, weight, float(eps), center)
        return
    n = math.prod(x.shape[a] for a in axes)
    wanted = oracle.layer_norm(x, axes, weight, bias if center else None, float(eps), center)
    if not center:  # there is no mean
        wanted = wanted[::2]
    for a, want in zip(got, wanted, strict=isinstance(found, tuple)):
        oracle.assert_close(a, want, n)


def laid_out(lib, values, layout, dtype="float32"):
    """The same values in memory of another order."""
    if layout == "sliced":
        return lib.array(np.repeat(values, 2, axis=2), dtype)[:, :, ::2]
    if layout == "turned":
        turned = lib.array(np.ascontiguousarray(values.transpose(1, 2, 0)), dtype)
        return turned.permute(2, 0, 1) if hasattr(turned, "permute") else turned.transpose(2, 0, 1)
    return lib.array(np.asarray(values, order=layout), dtype)
