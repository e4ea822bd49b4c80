"""Calls through the door of NumPy arrays, settled anew each time."""

import numpy as np

from cupynorm._cpu.arrays import DOOR
from cupynorm._layout import Facts, result_strides
from cupynorm._ops import LAYER_NORM


def facts_of(x, axes, weight=None, bias=None, eps=1e-5, order="K", out=None, stats=True):
    given = {"x": x, "weight": weight, "bias": bias}
    strides = DOOR.strides(x)
    y = strides and result_strides(x.shape, strides, order) if out is None else DOOR.strides(out)
    return Facts(
        LAYER_NORM,
        False,
        x.shape,
        axes,
        {name: a.dtype.name for name, a in given.items() if a is not None},
        {"x": strides, "y": y or strides},
        eps,
        order,
        out is not None,
        stats,
    )


def forward(x, axes, weight=None, bias=None, eps=1e-5, *, order="K", out=None, stats=True):
    """y, mean and rstd, or y alone."""
    call = DOOR.normalizer(facts_of(x, axes, weight, bias, eps, order, out, stats))
    return call(x, weight, bias, out)


def gradient_facts(dy, x, axes, weight=None, mask=(True, True, True), dtype=None):
    own = "float64" if x.dtype.name == "float64" else "float32"
    dtypes = {"x": x.dtype.name}
    if weight is not None:
        dtypes["weight"] = own = weight.dtype.name
    sums = np.dtype(dtype or own).name
    dtypes |= {
        name: sums for name, wanted in zip(("dweight", "dbias"), mask[1:], strict=True) if wanted
    }
    arrays = {"x": x, "dy": dy}
    strides = {name: DOOR.strides(a) for name, a in arrays.items()}
    if mask[0]:
        strides["dx"] = strides["x"] and result_strides(x.shape, strides["x"], "K")
    return Facts(LAYER_NORM, True, x.shape, axes, dtypes, strides)


def backward(dy, x, axes, mean, rstd, weight=None, *, mask=(True, True, True), dtype=None):
    """dx, dweight and dbias."""
    call = DOOR.differentiator(gradient_facts(dy, x, axes, weight, mask, dtype))
    return call(dy, x, mean, rstd, weight)
