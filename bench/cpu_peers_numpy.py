"""Without a framework: the formula as users write it, scikit-learn's `scale`, and plain copies."""

import warnings
from typing import Any

import numpy as np

from bench.cpu_contender import Builder, CpuContender, refuse
from bench.cpu_data import CpuInputs
from bench.gpu_grid import BWD, FWD
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["copies", "formula", "scale"]

Array = np.ndarray[Any, Any]


def formula(inputs: CpuInputs) -> CpuContender:
    """Six lines of NumPy; 16-bit arrays are widened first, as their users must."""
    case = inputs.case
    shape = [1] * inputs.x.ndim
    shape[case.axis] = case.N
    compute = stats_dtype(case.dtype)
    w, b = (
        default if a is None else a.reshape(shape)
        for a, default in ((inputs.weight, 1), (inputs.bias, 0))
    )
    given = inputs.x, inputs.dy, w, b, case.axis, case.eps

    def wide() -> tuple[Any, ...]:
        return tuple(a.astype(compute, copy=False) if isinstance(a, np.ndarray) else a
                     for a in given)  # fmt: skip

    def narrow(made: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a.astype(case.dtype, copy=False) for a in made)

    def forward() -> tuple[Array, ...]:
        return narrow((_forward(*wide())[0],))

    def backward() -> tuple[Array, ...]:
        x, dy, w, _, axis, _ = wide()
        return narrow(_backward(x, dy, w, axis, inputs.mean, inputs.rstd))

    def both() -> tuple[Array, ...]:
        x, dy, w, b, axis, eps = wide()
        y, mean, rstd = _forward(x, dy, w, b, axis, eps)
        return narrow((y, *_backward(x, dy, w, axis, mean, rstd)))

    return CpuContender({FWD: forward, BWD: backward}.get(case.op, both))


def _forward(x: Any, dy: Any, weight: Any, bias: Any, axis: int, eps: float) -> tuple[Any, ...]:
    mean = x.mean(axis=axis, keepdims=True)
    var = x.var(axis=axis, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    x_hat = (x - mean) * rstd
    y = x_hat * weight + bias
    return y, mean, rstd


def _backward(x: Any, dy: Any, weight: Any, axis: int, mean: Any, rstd: Any) -> tuple[Any, ...]:
    x_hat = (x - mean) * rstd
    g = dy * weight
    c1 = g.mean(axis=axis, keepdims=True)
    c2 = (g * x_hat).mean(axis=axis, keepdims=True)
    dx = rstd * (g - c1 - x_hat * c2)
    batch = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return dx, (dy * x_hat).sum(axis=batch), dy.sum(axis=batch)


def scale(inputs: CpuInputs) -> CpuContender:
    """`sklearn.preprocessing.scale(x, axis=1)`: rows to mean 0 and variance 1, and no more."""
    case = inputs.case
    if case.op != FWD or case.affine or case.eps:
        refuse("scale has no weight, bias, eps or backward: see the group scale")
    from sklearn.preprocessing import scale as function

    x = inputs.x

    def call() -> Array:
        with warnings.catch_warnings():  # that means of float32 rows were centered a second time
            warnings.simplefilter("ignore", UserWarning)
            return function(x, axis=1)

    return CpuContender(call)


def copies(inputs: CpuInputs) -> list[Builder]:
    """`numpy.copyto` of as many bytes as the case must move: the roof, and with fresh memory."""
    case = inputs.case

    def made(fresh: bool) -> CpuContender:
        source = inputs.x
        if case.op != FWD:  # half of the bytes is read, half is written
            length = case.copy_bytes // 2 // ITEMSIZE[case.dtype]
            source = np.resize(inputs.x.reshape(-1, order="A"), length)
        if fresh:
            return CpuContender(lambda: _fresh(source), source=source)
        out = np.empty_like(source)

        def into() -> Array:
            np.copyto(out, source)
            return out

        return CpuContender(into, kept=out, source=source)

    return [("copyto", lambda: made(False)), ("copyto fresh", lambda: made(True))]


def _fresh(source: Array) -> Array:
    out = np.empty_like(source)
    np.copyto(out, source)
    return out
