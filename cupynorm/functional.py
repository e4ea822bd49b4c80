"""The public functions: each documents, checks, and routes to the path that does the work."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import (
    Call,
    check_arguments,
    companion_of,
    is_launchable,
    path_of,
)
from cupynorm._arrays import check_overlap, check_writable, library_of
from cupynorm._ops import LayerNormResult
from cupynorm.frames import _tables

__all__ = ["LayerNormResult", "layer_norm", "strided"]


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
        NumPy, CuPy, torch, JAX or any array-API array, a Dask array (lazily), or an object that
        exports ``__dlpack__`` or ``__cuda_array_interface__``; float16, bfloat16, float32 or
        float64, any shape with at least one axis, any strides. A pandas, polars, cuDF or Dask
        DataFrame gives a DataFrame, each row normalized over its columns (see
        `cupynorm.frames.layer_norm` for nulls and dtypes). No units are assumed: y is a pure
        number before `weight` and `bias`, and `eps` is in units of x squared.
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
        If x has an integer, bool or complex dtype or is no array, or if both
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
    bit for bit, but for JAX, whose compiler chooses the order of sums, and for Dask arrays whose
    chunks split rows.
    The formula is that of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450.
    A NumPy result of 128 KiB or more lies in memory that a later result takes over once no array
    refers to it, so that its pages are not made anew (``CUPYNORM_KEPT_MIB``, 256 by default).

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> cn.layer_norm(x, eps=0.0).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    """
    if order == "K":
        at_once = _at_once.get(type(x))
        if at_once is not None:
            y = at_once(x, normalized_shape, weight, bias, eps, axis, out, return_stats)
            if y is not None:
                return LayerNormResult(*y) if return_stats else y
    if type(x) is not np.ndarray:
        if library_of(x).startswith("dask"):
            return _dask(x, normalized_shape, weight, bias, eps, axis, order, out, return_stats)
        if _tables.library(x) is not None:
            from cupynorm import frames

            return frames.from_call(
                x, normalized_shape, weight, bias, eps, axis, order, out, return_stats
            )
    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, order, out)
    if call.path != "namespace":
        y, mean, rstd = strided(call, order, out, return_stats)
    elif is_launchable(call.x):
        y, mean, rstd = _torch(call, order, out, return_stats)
    else:
        from cupynorm import _namespace

        y, mean, rstd = _namespace.layer_norm(
            call.x, call.axes, call.weight, call.bias, call.eps, order, out
        )
    return LayerNormResult(y, mean, rstd) if return_stats else y


def _first_of_cupy(do: Any) -> None:
    from cupynorm._cuda import small as _cuda_small

    for kind, way in list(_at_once.items()):
        if isinstance(getattr(way, "__self__", None), _cuda_small.Calls):
            _at_once.pop(kind, None)  # of a CuPy that was there before: tests have a new one each
    calls = _cuda_small.Calls(do)
    _at_once[calls.array_type] = calls.at_once


def _first_of_torch(torch: Any) -> None:
    from cupynorm._torch import at_once as _torch_at_once

    if not torch.compiler.is_compiling():  # to which the table must stay as it found it
        _at_once[torch.Tensor] = _torch_at_once.at_once


# By exact type of x: calls with nothing special about them, which cost what they must alone.
_at_once: dict[type, Callable[..., Any]] = {}


def _dask(x: Any, *arguments: Any) -> Any:
    """Dask arrays and DataFrames, lazily: each task calls `layer_norm` on a block of its own."""
    from cupynorm.dask import _blocks as _dask_blocks

    y, mean, rstd = _dask_blocks.layer_norm(layer_norm, x, *arguments)
    return LayerNormResult(y, mean, rstd) if arguments[-1] else y


def strided(call: Call, order: str, out: Any, return_stats: bool) -> tuple[Any, Any, Any]:
    """NumPy and CuPy: allocate what is returned, then let the path write into it."""
    path, x, axes, weight, bias, eps, _ = call
    do = path_of(path)
    if path == "cupy" and do.ndarray not in _at_once:
        _first_of_cupy(do)
    if path == "cupy" and not do.is_current(x):
        with x.device:  # or y would be allocated, and the kernel launched, on another GPU
            return strided(call, order, out, return_stats)
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


def _torch(call: Call, order: str, out: Any, return_stats: bool) -> tuple[Any, Any, Any]:
    """Torch tensors: our kernels and loops, differentiable."""
    import torch

    from cupynorm import _namespace
    from cupynorm._torch import autograd as _torch_autograd

    if torch.Tensor not in _at_once:
        _first_of_torch(torch)
    _, x, axes, weight, bias, eps, _ = call
    if out is not None:
        _namespace.check_out(x, weight, bias, order, out)
        if _torch_autograd.unwatched(x, weight, bias) and _torch_autograd.unwatched(
            out, None, None
        ):
            return out, *_torch_autograd.into(x, axes, weight, bias, eps, out, return_stats)
    mean = rstd = None
    if return_stats:
        y, mean, rstd = _torch_autograd.layer_norm_with_stats(x, axes, weight, bias, eps)
    else:
        y = _torch_autograd.layer_norm(x, axes, weight, bias, eps)
    if out is None:
        return _namespace.ordered(y, order), mean, rstd
    out[...] = y
    return out, mean, rstd


def _out(out: Any, x: Any, weight: Any, bias: Any, order: str) -> Any:
    """Check `out` whole before anything is written to it."""
    y = companion_of("out", out, x)
    _problem.check_out(y.shape, y.dtype, x.shape, x.dtype, order)
    check_writable(y)
    check_overlap("x", x, y, same_allowed=True)
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            check_overlap(label, other, y, same_allowed=False)
    return y
