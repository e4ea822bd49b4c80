"""The library on NumPy arrays, as a user calls it."""

from collections.abc import Callable
from typing import Any

import numpy as np

import cupynorm as cn
from bench.cpu_contender import Builder, CpuContender
from bench.cpu_data import CpuInputs
from bench.gpu_grid import BWD, FWD
from cupynorm._cpu import arrays as _cpu

__all__ = ["ours"]


def ours(inputs: CpuInputs) -> list[Builder]:
    """Compiled loops, plain NumPy blocks, and the variants that a forward has."""
    call = _call(inputs)

    def plain() -> Any:
        with _cpu.without_numba():
            return call()

    made: dict[str, Callable[[], CpuContender]] = {
        "cupynorm": lambda: CpuContender(call, ours=True),
        "cupynorm numpy": lambda: CpuContender(plain, ours=True),
    }
    if inputs.case.op == FWD:
        made["cupynorm out="] = lambda: _into(inputs)
        if inputs.case.order == "F":
            made["cupynorm C"] = lambda: CpuContender(_call(inputs, order="C"), ours=True)
    return list(made.items())


def _call(inputs: CpuInputs, **options: Any) -> Callable[[], Any]:
    case, x, dy, weight, bias = inputs.case, inputs.x, inputs.dy, inputs.weight, inputs.bias
    where, eps = {"axis": case.axis}, case.eps

    def forward() -> Any:
        return cn.layer_norm(x, None, weight, bias, eps, **where, **options)

    def backward() -> Any:
        return cn.layer_norm_backward(dy, x, None, inputs.mean, inputs.rstd, weight, **where)

    def both() -> Any:
        y, mean, rstd = cn.layer_norm(x, None, weight, bias, eps, return_stats=True, **where)
        return y, *cn.layer_norm_backward(dy, x, None, mean, rstd, weight, **where)

    return {FWD: forward, BWD: backward}.get(case.op, both)


def _into(inputs: CpuInputs) -> CpuContender:
    out = np.empty_like(inputs.x)
    return CpuContender(_call(inputs, out=out), ours=True, kept=out)
