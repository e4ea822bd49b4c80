"""Peers that work on arrays: the formula as users write it, `scale`, JAX, onnxruntime."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from bench.cases import EPS, FEW, Case
from bench.contender import Contender, load, refuse
from bench.device import Inputs, blocking, numpy_dtype
from bench.machine import threads

OPSET, IR = 17, 10  # LayerNormalization came with 17; an IR version that older runtimes read


def along(case: Case, a: Any) -> Any:
    """Weight or bias with the axes of x."""
    shape = [1] * len(case.shape)
    shape[case.axis] = case.N
    return None if a is None else a.reshape(shape)


# -- the formula, one array operation after the other ----------------------------------------------


def layer_norm(xp: Any, x: Any, weight: Any, bias: Any, axis: int) -> Any:
    """Layer norm as a user of NumPy or JAX writes it, statistics in float32 or float64."""
    wide = x.astype("float64" if x.dtype == "float64" else "float32", copy=False)
    d = wide - wide.mean(axis=axis, keepdims=True)
    y = d * (1 / xp.sqrt((d * d).mean(axis=axis, keepdims=True) + wide.dtype.type(EPS)))
    if weight is not None:
        y = y * weight.astype(wide.dtype, copy=False) + bias.astype(wide.dtype, copy=False)
    return y.astype(x.dtype, copy=False)


def formula(inputs: Inputs, fused: bool = False) -> Contender:
    """In NumPy or CuPy; `fused`: two reductions, then `cupy.fuse` for all the rest."""
    device, case = inputs.device, inputs.case
    if device.simulated:
        refuse("the simulated device has no array arithmetic")
    if case.direction != "forward" or (fused and not case.affine_dtype):
        refuse("it is written for a forward, with weight and bias if fused")
    if device.kind == "cuda" and case.group == FEW:
        refuse("CuPy reduces each row with one block: minutes for a few long rows")
    xp, w, b = device.lib, *(along(case, a) for a in (inputs.weight, inputs.bias))
    run = _fused(xp) if fused else functools.partial(layer_norm, xp)
    return Contender(lambda i: run(inputs.x[i], w, b, case.axis), "formula", fresh=device.fresh)


def _fused(xp: Any) -> Callable[..., Any]:
    @xp.fuse(kernel_name="layer_norm_apply")
    def apply(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return (x - mean) / xp.sqrt(var + EPS) * weight + bias

    def run(x: Any, weight: Any, bias: Any, axis: int) -> Any:
        wide = x.astype("float64" if x.dtype == "float64" else "float32", copy=False)
        mean, var = (f(axis=axis, keepdims=True) for f in (wide.mean, wide.var))
        weight, bias = (a.astype(wide.dtype, copy=False) for a in (weight, bias))
        return apply(wide, mean, var, weight, bias).astype(x.dtype, copy=False)

    return run


# -- `scale(axis=1)`: rows to mean 0 and variance 1, and no more -----------------------------------


def scale(inputs: Inputs) -> Contender:
    """Of scikit-learn, judged by what it computes: without eps."""
    case, x = inputs.case, inputs.x
    if case.affine_dtype or case.direction != "forward" or len(case.shape) > 2 or inputs.columns:
        refuse("scale(axis=1) takes a matrix, and has neither weight nor bias nor gradients")
    function = load("sklearn.preprocessing").scale

    def call(i: int) -> Any:
        with warnings.catch_warnings():  # that means of float32 rows were centered a second time
            warnings.simplefilter("ignore", UserWarning)
            return function(x[i], axis=1)

    about = {"fresh": inputs.device.fresh, "capture": blocking, "eps": 0.0}
    return Contender(call, "preprocessing.scale, eps 0", **about)


# -- JAX: under jit; arrays come and go through DLPack, on streams of its own ----------------------


def jax_peer(inputs: Inputs) -> Contender:
    """A compiled function per case; a call ends when its result is there."""
    device, case = inputs.device, inputs.case
    if device.simulated:
        refuse("JAX cannot see simulated memory")
    if case.layout not in ("C", "NCHW"):
        refuse("JAX arrays are row-major, aligned and have no gaps: it would take a copy")
    jax = _jax(device)
    if case.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # else DLPack's float64 becomes float32
    device.synchronize()  # the inputs were made on another stream
    call, kept = _jax_call(jax, inputs), {"arrays": lambda made: _given(device, jax, made)}
    if device.kind == "cuda":
        return Contender(call, "jit", capture=blocking, **kept)
    return Contender(lambda i: jax.block_until_ready(call(i)), "jit", fresh=True, **kept)


def _jax(device: Any) -> Any:
    """JAX, whose pool on a CPU gets a thread for each CPU that is there when it starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of a GPU
    if device.kind == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = load("jax")
    everywhere = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()
    if device.kind == "cpu" and everywhere:
        os.sched_setaffinity(0, sorted(everywhere)[: threads()])
    try:
        jax.devices("cpu" if device.kind == "cpu" else "gpu")
    except RuntimeError as error:
        refuse(f"JAX has no such device: {error}")
    finally:
        if everywhere:
            os.sched_setaffinity(0, everywhere)
    return jax


def _jax_call(jax: Any, inputs: Inputs) -> Callable[[int], Any]:
    case = inputs.case
    x, dy = ([_taken(jax, a) for a in arrays] for arrays in (inputs.x, inputs.dy))
    affine = [_taken(jax, a) for a in (inputs.weight, inputs.bias) if a is not None]

    def norm(x: Any, *affine: Any) -> Any:
        w, b = [along(case, a) for a in affine] or (None, None)
        return layer_norm(jax.numpy, x, w, b, case.axis)

    def differentiated(x: Any, dy: Any, *affine: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(norm, x, *affine)
        return y, *pull(dy)

    run, both, pull = map(jax.jit, (norm, differentiated, lambda pull, dy: pull(dy)))
    absent = () if affine else (None, None)
    if case.direction == "forward":
        return lambda i: run(x[i], *affine)
    if case.direction == "both":
        return lambda i: (*both(x[i], dy[i], *affine), *absent)
    left = [jax.vjp(norm, a, *affine)[1] for a in x]  # given, as others are statistics
    return lambda i: (*pull(left[i], dy[i]), *absent)


def _taken(jax: Any, a: Any) -> Any:
    """JAX array over the same memory; of bfloat16, which DLPack does not always know, a copy."""
    if str(a.dtype) != "bfloat16":
        return jax.numpy.from_dlpack(a)
    bits = jax.numpy.from_dlpack(a.view("int16"))
    return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16)


def _given(device: Any, jax: Any, made: Any) -> Any:
    """Arrays of the device's library of what JAX made."""
    if isinstance(made, tuple):
        return tuple(None if a is None else _given(device, jax, a) for a in made)
    made = jax.block_until_ready(made)
    if made.dtype != jax.numpy.bfloat16:
        return device.lib.from_dlpack(made)
    bits = jax.lax.bitcast_convert_type(made, jax.numpy.int16)
    return device.lib.from_dlpack(bits).view(numpy_dtype("bfloat16"))


# -- onnxruntime: as a session is run, whose arena keeps results mapped; into bound memory ---------


def onnx_peer(inputs: Inputs, bound: bool = False) -> Contender:
    """One node with weight and bias as constants."""
    case, x = inputs.case, inputs.x[0]
    if case.direction != "forward" or inputs.weight is None:
        refuse("onnxruntime's wheel has no gradients, and the operator needs a scale")
    onnx, onnxruntime = load("onnx"), load("onnxruntime")
    helper, constant = onnx.helper, load("onnx.numpy_helper").from_array
    kind, names = helper.np_dtype_to_tensor_dtype(x.dtype), ["x", "weight", "bias"]
    node = helper.make_node("LayerNormalization", names, ["y"], axis=-1, epsilon=EPS)
    ends = [[helper.make_tensor_value_info(n, kind, case.shape)] for n in "xy"]
    constants = [constant(getattr(inputs, name), name) for name in names[1:]]
    graph, opset = helper.make_graph([node], "layer_norm", *ends, constants), helper.make_opsetid
    model = helper.make_model(graph, opset_imports=[opset("", OPSET)], ir_version=IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads(), 3
    text, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(text, options, providers=providers)
    if not bound:
        return Contender(lambda i: session.run(None, {"x": x})[0], fresh=True)
    binding, out = session.io_binding(), inputs.y[0]
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, x.dtype, out.shape, out.ctypes.data)
    return Contender(lambda i: session.run_with_iobinding(binding) or out)


MAKERS: dict[str, Callable[[Inputs], Contender]] = {
    "onnxruntime": onnx_peer,
    "onnxruntime out=": functools.partial(onnx_peer, bound=True),
    "jax": jax_peer,
    "scikit-learn": scale,
    "formula": formula,
    "cupy-fuse": functools.partial(formula, fused=True),
}
