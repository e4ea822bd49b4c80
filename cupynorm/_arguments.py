"""The argument rules of a call, applied to arrays of any library; the module that does the work."""

import functools
import importlib.util
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _problem
from cupynorm._arrays import check_companion, classify, library_of

__all__ = [
    "Call",
    "axes_of",
    "check_arguments",
    "companion_of",
    "is_launchable",
    "keyable",
    "path_of",
]


class Call(NamedTuple):
    """Arguments that have passed every rule, in the form that the paths take."""

    path: str  # 'numpy', 'cupy' or 'namespace'
    x: Any
    axes: tuple[int, ...]  # ascending
    weight: Any  # dimensions in the order of `axes`
    bias: Any
    eps: float
    turn: tuple[int, ...] | None  # permutes weight's dimensions to ascending axes


def check_arguments(
    x: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    order: str,
    out: Any,
) -> Call:
    """Apply every argument rule but those of `out`'s memory, which need y's path."""
    if type(eps) is not float or eps - eps != 0.0:
        eps = _problem.check_eps(eps)
    if order != "K":
        _problem.check_order(order)
    path = "numpy"
    if type(x) is not np.ndarray:
        x, path = _take_in(x, "x")
    dtype = _problem.dtype_name(x.dtype)
    if dtype not in _problem.ITEMSIZE:
        _problem.check_x_dtype(dtype, _cast("x", x))
    axes, order_of_weight, expected = axes_of(tuple(x.shape), normalized_shape, axis)
    if weight is not None:
        weight = _affine("weight", weight, x, expected, order_of_weight)
    if bias is not None:
        bias = _affine("bias", bias, x, expected, order_of_weight)
    return Call(path, x, axes, weight, bias, eps, order_of_weight)


@functools.lru_cache(maxsize=1024)
def _resolve(
    shape: tuple[int, ...], normalized_shape: Any, axis: Any
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    axes = _problem.resolve_axes(shape, normalized_shape, axis)
    return tuple(sorted(axes)), _problem.axis_order(axes), tuple(shape[a] for a in axes)


def axes_of(
    shape: tuple[int, ...], normalized_shape: Any, axis: Any
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """Ascending axes, the permutation of weight's dimensions to them, and weight's shape."""
    if keyable(normalized_shape) and keyable(axis):
        return _resolve(shape, normalized_shape, axis)
    return _resolve.__wrapped__(shape, normalized_shape, axis)


def keyable(value: Any) -> bool:
    """Whether a look-up tells it from others: 1.0 and True equal 1 and would find its answer."""
    kind = type(value)
    return value is None or kind is int or (kind is tuple and {*map(type, value)} == _INT)


_INT = {int}


def _take_in(x: Any, label: str) -> tuple[Any, str]:
    """Classify an array; a mere exporter on a GPU becomes a CuPy array over its memory."""
    x, path = classify(x, label)
    if path != "gpu-exporter":
        return x, path
    try:
        do = path_of("cupy")
    except ImportError as error:
        msg = (
            f"{label} is on a GPU, and CuPy, which would take it, cannot be imported ({error}); "
            "pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
        )
        raise ImportError(msg) from error
    return do.from_exporter(x), "cupy"


def _cast(label: str, x: Any) -> str:
    """How x's own library spells the cast."""
    library = library_of(x)
    if library == "torch":
        return f"{label}.to(torch.float32)"
    if library in ("numpy", "cupy", "jax"):
        return f"{label}.astype('float32')"
    return f"{library}.astype({label}, {library}.float32)"


def _affine(
    label: str, value: Any, x: Any, expected: tuple[int, ...], order: tuple[int, ...] | None
) -> Any:
    """Check a weight or bias and bring its dimensions into ascending axis order."""
    if type(value) is not np.ndarray or type(x) is not np.ndarray:
        value = companion_of(label, value, x)
    dtype = _problem.dtype_name(value.dtype)
    if dtype not in _problem.ITEMSIZE:
        _problem.check_affine_dtype(label, dtype, _cast(label, value))
    _problem.check_affine_shape(label, tuple(value.shape), expected)
    if order is None:
        return value
    if library_of(value) in ("numpy", "cupy"):
        return value.transpose(order)
    from array_api_compat import array_namespace

    return array_namespace(value).permute_dims(value, order)


def companion_of(label: str, value: Any, x: Any) -> Any:
    """Take in a subclass or a mere exporter; refuse what lives elsewhere than x."""
    value, _ = _take_in(value, label)
    check_companion(label, value, x)
    return value


_cpu_path: Any = None  # an import statement costs half a microsecond even when it has nothing to do


def path_of(name: str) -> Any:
    """Import the module that does the work only when an array for it arrives."""
    global _cpu_path
    if name == "numpy":
        if _cpu_path is None:
            from cupynorm._cpu import arrays as _cpu_path
        return _cpu_path
    from cupynorm._cuda import arrays as _cuda

    return _cuda


def is_launchable(x: Any) -> bool:
    """Whether x is a torch tensor that our loops, or our kernels where CuPy is there, can take."""
    if library_of(x) != "torch" or x.layout is not _strided_layout():
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and _has_cupy())


@functools.cache
def _strided_layout() -> Any:
    import torch

    return torch.strided


@functools.cache
def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None
