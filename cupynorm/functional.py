"""The public functions: each documents, checks, and routes to the path that does the work."""

import functools
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _problem
from cupynorm._arrays import (
    check_companion,
    check_overlap,
    check_writable,
    classify,
    library_of,
)

__all__ = ["Call", "LayerNormResult", "check_arguments", "layer_norm"]


class LayerNormResult(NamedTuple):
    """What `layer_norm(..., return_stats=True)` gives.

    Attributes
    ----------
    y : array
        Normalized x: its shape, dtype, library and device.
    mean : array
        Mean over the normalized axes, float32 (float64 for float64 x), shaped like x with the
        normalized axes of length 1.
    rstd : array
        1 / sqrt(var + eps), dtype and shape as `mean`.
    """

    y: Any
    mean: Any
    rstd: Any


def layer_norm(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Any = None,
    order: str = "K",
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize each row of x to mean 0 and variance 1, then scale and shift it.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, with the biased variance, over the
    normalized axes of each sample; there are no running statistics. Semantics of
    ``torch.nn.functional.layer_norm``.

    Parameters
    ----------
    x : array
        NumPy, CuPy, torch, JAX or any array-API array, or an object that exports ``__dlpack__``
        or ``__cuda_array_interface__``; float16, bfloat16, float32 or float64, any shape with at
        least one axis, any strides. No units are assumed: y is a pure number before `weight` and
        `bias`, and `eps` is in units of x squared.
    normalized_shape : int or tuple of int, optional
        Trailing dimensions of x to normalize over.
    weight, bias : array, optional
        Scale and shift, of shape `normalized_shape`, or ``tuple(x.shape[a] for a in axis)``, in
        any of the four dtypes, in x's library and on its device.
    eps : float, default 1e-5
        Added to the variance; any finite real number.
    axis : int or tuple of int, optional
        The axes to normalize over, the other way to say it. With neither: the last axis.
    order : {'K', 'C', 'F'}, default 'K'
        Memory layout of y: x's own, row-major, or column-major.
    out : array, optional
        Where to write y: x's shape, dtype and device. It may be x itself.
    return_stats : bool, default False
        Give mean and rstd as well.

    Returns
    -------
    array or LayerNormResult
        y, in x's library, dtype and device; with `return_stats` the named tuple (y, mean, rstd).

    Raises
    ------
    TypeError
        If x has an integer, bool or complex dtype, is a table or no array, or if both
        `normalized_shape` and `axis` are given.
    ValueError
        If shapes or axes do not fit, if `eps` is not finite, if arrays live on different devices,
        or if `out` overlaps an input in part.

    Notes
    -----
    Statistics are computed in float32 (float64 for float64 x) by the corrected two-pass algorithm
    of Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", so a large
    common offset costs no accuracy; Numba's loops take the first pass over a row's first elements
    only, and again over all where that mean is far off. A row's result depends on that row alone,
    bit for bit, but for JAX and Dask, whose compilers choose the order of sums.
    The formula is that of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> cn.layer_norm(x, eps=0.0).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    """
    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, order, out)
    if call.path == "namespace":
        from cupynorm import _namespace

        y, mean, rstd = _namespace.layer_norm(
            call.x, call.axes, call.weight, call.bias, call.eps, order, out
        )
    else:
        y, mean, rstd = _strided(call, order, out, return_stats)
    return LayerNormResult(y, mean, rstd) if return_stats else y


class Call(NamedTuple):
    """Arguments that have passed every rule, in the form that the paths take."""

    path: str  # 'numpy', 'cupy' or 'namespace'
    x: Any
    axes: tuple[int, ...]  # ascending
    weight: Any  # dimensions in the order of `axes`
    bias: Any
    eps: float


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
    axes, order_of_weight, expected = _axes(tuple(x.shape), normalized_shape, axis)
    if weight is not None:
        weight = _affine("weight", weight, x, expected, order_of_weight)
    if bias is not None:
        bias = _affine("bias", bias, x, expected, order_of_weight)
    return Call(path, x, axes, weight, bias, eps)


@functools.lru_cache(maxsize=1024)
def _resolve(
    shape: tuple[int, ...], normalized_shape: Any, axis: Any
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """Ascending axes, the permutation of weight's dimensions to them, and weight's shape."""
    axes = _problem.resolve_axes(shape, normalized_shape, axis)
    return tuple(sorted(axes)), _problem.axis_order(axes), tuple(shape[a] for a in axes)


def _axes(
    shape: tuple[int, ...], normalized_shape: Any, axis: Any
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    try:
        return _resolve(shape, normalized_shape, axis)
    except TypeError:  # a list is not hashable; an error of ours is raised again by the direct call
        return _resolve.__wrapped__(shape, normalized_shape, axis)


def _take_in(x: Any, label: str) -> tuple[Any, str]:
    """Classify an array; a mere exporter on a GPU becomes a CuPy array over its memory."""
    x, path = classify(x, label)
    if path != "gpu-exporter":
        return x, path
    try:
        do = _path("cupy")
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
        value = _companion(label, value, x)
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


def _companion(label: str, value: Any, x: Any) -> Any:
    """Take in a subclass or a mere exporter; refuse what lives elsewhere than x."""
    value, _ = _take_in(value, label)
    check_companion(label, value, x)
    return value


_cpu_path: Any = None  # an import statement costs half a microsecond even when it has nothing to do


def _path(name: str) -> Any:
    """Import the module that does the work only when an array for it arrives."""
    global _cpu_path
    if name == "numpy":
        if _cpu_path is None:
            from cupynorm import _cpu as _cpu_path
        return _cpu_path
    from cupynorm import _cuda

    return _cuda


def _strided(call: Call, order: str, out: Any, return_stats: bool) -> tuple[Any, Any, Any]:
    """NumPy and CuPy: allocate what is returned, then let the path write into it."""
    path, x, axes, weight, bias, eps = call
    do = _path(path)
    if path == "cupy" and not do.is_current(x):
        with x.device:  # or y would be allocated, and the kernel launched, on another GPU
            return _strided(call, order, out, return_stats)
    new = np if path == "numpy" else do
    y = new.empty_like(x, order=order) if out is None else _out(out, x, weight, bias, order)
    mean = rstd = None
    if return_stats:
        shape = _problem.stats_shape(x.shape, axes)
        dtype = _problem.stats_dtype(_problem.dtype_name(x.dtype))
        mean, rstd = new.empty(shape, dtype=dtype), new.empty(shape, dtype=dtype)
        if not x.size:  # the mean of nothing
            mean.fill(np.nan)
            rstd.fill(np.nan)
    if x.size:
        do.layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
    return y if out is None else out, mean, rstd


def _out(out: Any, x: Any, weight: Any, bias: Any, order: str) -> Any:
    """Check `out` whole before anything is written to it."""
    y = _companion("out", out, x)
    _problem.check_out(y.shape, y.dtype, x.shape, x.dtype, order)
    check_writable(y)
    check_overlap("x", x, y, same_allowed=True)
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            check_overlap(label, other, y, same_allowed=False)
    return y
