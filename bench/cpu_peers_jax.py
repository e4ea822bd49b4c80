"""JAX on the CPU: the formula under jit, and its gradients."""

import os
from typing import Any

import numpy as np

from bench.cpu_contender import CpuContender, refuse
from bench.cpu_data import CpuInputs
from bench.cpu_machine import physical_cores, threads
from bench.gpu_grid import BWD, FWD

__all__ = ["jax_peer"]


def jax_peer(inputs: CpuInputs) -> CpuContender:
    """One compiled function per case; a call ends when its result is there."""
    case = inputs.case
    if case.order != "C":
        refuse("JAX arrays are row-major: they could not be handed over without a copy")
    jax = _jax()
    if case.dtype == "float64" and not jax.config.jax_enable_x64:
        jax.config.update("jax_enable_x64", True)
    function, given = (
        _function(jax, inputs),
        [
            None if a is None else jax.numpy.asarray(a)
            for a in (inputs.x, inputs.weight, inputs.bias, inputs.dy)
        ],
    )
    x, weight, bias, dy = given
    if case.op == FWD:
        run, arguments = jax.jit(function), (x, weight, bias)
    elif case.op == BWD:
        # The residuals are arguments: what the forward left, as the others are given statistics.
        _, pull = jax.vjp(function, x, weight, bias)
        run, arguments = jax.jit(lambda f, dy: f(dy)), (pull, dy)
    else:
        run, arguments = jax.jit(_both(jax, function)), (x, weight, bias, dy)
    return CpuContender(lambda: jax.block_until_ready(run(*arguments)), _arrays)


def _arrays(result: Any) -> tuple[np.ndarray, ...]:
    return tuple(map(np.asarray, result if isinstance(result, tuple) else (result,)))


def _both(jax: Any, function: Any) -> Any:
    def run(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        y, pull = jax.vjp(function, x, weight, bias)
        return y, *pull(dy)

    return run


def _function(jax: Any, inputs: CpuInputs) -> Any:
    case, xp = inputs.case, jax.numpy
    shape = [1] * inputs.x.ndim
    shape[case.axis] = case.N
    wide = xp.float64 if case.dtype == "float64" else xp.float32

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        values = x.astype(wide)
        d = values - values.mean(case.axis, keepdims=True)
        y = d * jax.lax.rsqrt((d * d).mean(case.axis, keepdims=True) + case.eps)
        if weight is not None:
            y = y * weight.astype(wide).reshape(shape) + bias.astype(wide).reshape(shape)
        return y.astype(x.dtype)

    return layer_norm


def _jax() -> Any:
    """JAX, whose pool gets a thread for each CPU that is there when it starts."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    cores = physical_cores()
    if len(cores) <= threads():
        jax.devices("cpu")
        return jax
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[: threads()])
    try:
        jax.devices("cpu")
    finally:
        os.sched_setaffinity(0, everywhere)
    return jax
