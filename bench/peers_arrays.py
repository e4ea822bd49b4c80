"""Peers that work on arrays, not on tensors: what CuPy users write, cuML's `scale`, and JAX."""

import functools
from collections.abc import Callable
from typing import Any

from bench.gpu_check import EPS, largest_error, limit
from bench.gpu_clock import Batch
from bench.gpu_contender import Contender, Unavailable, load
from bench.gpu_data import Inputs
from bench.gpu_grid import BOTH, BWD, FEW, FWD, Case
from bench.gpu_session import Session
from cupynorm._problem import numpy_dtype

__all__ = ["ARRAY_PEERS", "BLOCKING", "array_peer", "composition", "formula"]

BLOCKING = "blocking"  # method: the host starts every call of a batch, then waits for the last


def composition(xp: Any, x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    """Layer norm as a NumPy user writes it, statistics in float32 or float64."""
    wide = x.astype("float64" if x.dtype == "float64" else "float32", copy=False)
    d = wide - wide.mean(axis=-1, keepdims=True)
    x_hat = d / xp.sqrt((d * d).mean(axis=-1, keepdims=True) + wide.dtype.type(eps))
    if weight is not None:
        x_hat = x_hat * weight.astype(wide.dtype) + bias.astype(wide.dtype)
    return x_hat.astype(x.dtype, copy=False)


def _fused(xp: Any, eps: float = EPS) -> Callable[[Any, Any, Any], Any]:
    """The same with `cupy.fuse`: two reductions, then one kernel for all the rest."""

    @xp.fuse(kernel_name="layer_norm_apply")
    def apply(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return (x - mean) / xp.sqrt(var + eps) * weight + bias

    @xp.fuse(kernel_name="layer_norm_plain")
    def plain(x: Any, mean: Any, var: Any) -> Any:
        return (x - mean) / xp.sqrt(var + eps)

    def run(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype("float64" if x.dtype == "float64" else "float32", copy=False)
        mean, var = (f(axis=-1, keepdims=True) for f in (wide.mean, wide.var))
        if weight is None:
            return plain(wide, mean, var).astype(x.dtype, copy=False)
        weight, bias = (a.astype(wide.dtype, copy=False) for a in (weight, bias))
        return apply(wide, mean, var, weight, bias).astype(x.dtype, copy=False)

    return run


def _cupy(session: Session, case: Case, inputs: Inputs, fuse: bool = False) -> Contender:
    if session.simulated:
        msg = "the simulated device has no array arithmetic"
        raise Unavailable(msg)
    if case.group == FEW:
        msg = "CuPy reduces each row with one block: minutes for a few long rows"
        raise Unavailable(msg)
    cupy, weight, bias = session.cupy, inputs.weight, inputs.bias
    run = _fused(cupy) if fuse else functools.partial(composition, cupy)
    name = "cupy-fuse" if fuse else "cupy"
    return Contender(name, lambda i: run(inputs.x[i], weight, bias), kernel="composition")


def _blocking(session: Session, body: Callable[[], None], calls: int) -> Batch:
    """For libraries with streams of their own: their work is over when the device is idle."""

    def replay() -> None:
        body()
        session.synchronize()

    return Batch(replay, calls, BLOCKING)


def _cuml(session: Session, case: Case, inputs: Inputs) -> Contender:
    if case.affine_dtype:
        msg = "cuML's scale has neither weight nor bias"
        raise Unavailable(msg)
    function, xp = load("cuml.preprocessing").scale, session.xp

    def judge(i: int, y: Any) -> tuple[float, float]:
        x, y = session.plain(inputs.x[i]), session.plain(y)
        return largest_error(xp, x, None, None, y, 0.0), limit(case.dtype, case.N, False)

    return Contender(
        "cuml", lambda i: function(inputs.x[i], axis=1), kernel="preprocessing.scale, eps 0",
        capture=_blocking, judge=judge,
    )  # fmt: skip


# -- JAX: arrays come and go through DLPack, on streams of its own


def formula(jax: Any, eps: float = EPS) -> Callable[[Any, Any, Any], Any]:
    """Layer norm of x (rows, N) in `jax.numpy`, statistics in float32 or float64."""
    xp = jax.numpy

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(xp.float64 if x.dtype == xp.float64 else xp.float32)
        d = wide - wide.mean(-1, keepdims=True)
        y = d * jax.lax.rsqrt((d * d).mean(-1, keepdims=True) + eps)
        if weight is not None:
            y = y * weight.astype(wide.dtype) + bias.astype(wide.dtype)
        return y.astype(x.dtype)

    return layer_norm


def _jax_on_gpu() -> Any:
    jax = load("jax")
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        msg = f"JAX has no GPU: {error}"
        raise Unavailable(msg) from error
    return jax


def _jax(session: Session, case: Case, inputs: Any) -> Contender:
    if session.simulated:
        msg = "JAX cannot see simulated memory"
        raise Unavailable(msg)
    jax = _jax_on_gpu()
    if case.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # else DLPack's float64 becomes float32
    x, weight, bias, dy = _taken(jax, session, case, inputs)
    call = _jax_call(jax, case.op, x, weight, bias, dy)
    return Contender(
        "jax", call, kernel="jit", capture=_blocking,
        to_cupy=lambda made: _given(session, jax, made),
    )  # fmt: skip


def _taken(jax: Any, session: Session, case: Case, inputs: Any) -> tuple[Any, ...]:
    """JAX arrays over the same memory; of bfloat16, which DLPack does not always know, copies."""
    if case.layout != "C":
        msg = "JAX arrays are aligned and have no gaps"
        raise Unavailable(msg)
    session.synchronize()  # they were made on another stream

    def one(a: Any) -> Any:
        if a is None or str(a.dtype) != "bfloat16":
            return None if a is None else jax.numpy.from_dlpack(a)
        bits = jax.numpy.from_dlpack(a.view("int16"))
        return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16)

    dy = None if case.op == FWD else [one(a) for a in inputs.dy]
    return [one(a) for a in inputs.x], one(inputs.weight), one(inputs.bias), dy


def _jax_call(
    jax: Any, op: str, x: list[Any], weight: Any, bias: Any, dy: list[Any] | None
) -> Callable[[int], Any]:
    """Call i; without weight and bias their gradients are None."""
    function = formula(jax)
    given = (weight, bias) if weight is not None else ()

    def layer_norm(x: Any, *affine: Any) -> Any:
        return function(x, *(affine or (None, None)))

    def padded(grads: Any) -> tuple[Any, ...]:
        return tuple(grads) if given else (grads[0], None, None)

    if op == FWD:
        run = jax.jit(layer_norm)
        return lambda i: run(x[i], *given)
    pull = jax.jit(lambda f, dy: f(dy))
    if op == BWD:  # what the forward left is an argument, as statistics are of the others
        left = [jax.vjp(layer_norm, a, *given)[1] for a in x]
        return lambda i: padded(pull(left[i], dy[i]))

    @jax.jit
    def both(x: Any, dy: Any, *affine: Any) -> tuple[Any, ...]:
        y, f = jax.vjp(layer_norm, x, *affine)
        return y, f(dy)

    def call(i: int) -> tuple[Any, ...]:
        y, grads = both(x[i], dy[i], *given)
        return y, *padded(grads)

    return call


def _given(session: Session, jax: Any, made: Any) -> Any:
    """CuPy arrays of what JAX made."""
    if isinstance(made, tuple):
        return tuple(_given(session, jax, a) for a in made)
    if made is None:
        return None
    made = jax.block_until_ready(made)
    if made.dtype != jax.numpy.bfloat16:
        return session.cupy.from_dlpack(made)
    bits = jax.lax.bitcast_convert_type(made, jax.numpy.int16)
    return session.cupy.from_dlpack(bits).view(numpy_dtype("bfloat16"))


_MAKERS: dict[str, Callable[[Session, Case, Any], Contender]] = {
    "cupy": _cupy,
    "cupy-fuse": functools.partial(_cupy, fuse=True),
    "cuml": _cuml,
    "jax": _jax,
}
ARRAY_PEERS = tuple(_MAKERS)
GRADIENTS = ("jax",)  # of which there are gradients


def array_peer(session: Session, case: Case, inputs: Any, name: str) -> Contender:
    """Contender of a library that takes arrays."""
    if case.op in (BWD, BOTH) and name not in GRADIENTS:
        msg = f"{name} has no gradients"
        raise Unavailable(msg)
    return _MAKERS[name](session, case, inputs)
