"""The public backward: documents, checks, and routes to the path that does the work."""

from collections.abc import Iterable
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
from cupynorm._arrays import library_of
from cupynorm._ops import LayerNormGradients

__all__ = ["LayerNormGradients", "layer_norm_backward"]


def layer_norm_backward(
    dy: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    axis: Any = None,
    output_mask: Any = None,
) -> LayerNormGradients:
    """Gradients of `layer_norm` from the gradient of its result.

    With ``x_hat = (x - mean) * rstd`` and ``g = dy * weight``, row by row::

        dx = rstd * (g - sum(g) / N - x_hat * sum(g * x_hat) / N)

    and over all rows ``dweight = sum(dy * x_hat)``, ``dbias = sum(dy)``.

    Parameters
    ----------
    dy : array
        Gradient with respect to y, in x's shape, dtype and library, on its device; any strides.
    x : array
        The input of the forward call: float16, bfloat16, float32 or float64.
    normalized_shape : int, tuple of int or None
        As in the forward call; None for the last axis, or with `axis`.
    mean, rstd : array
        The statistics that ``layer_norm(..., return_stats=True)`` gave for x: float32 (float64 for
        float64 x), shaped like x with the normalized axes of length 1.
    weight : array, optional
        As in the forward call; None stands for ones.
    axis : int or tuple of int, optional
        As in the forward call.
    output_mask : sequence of 3 bool, optional
        Which of dx, dweight and dbias to compute. By default dx and dbias, and dweight where
        weight is given.

    Returns
    -------
    LayerNormGradients
        The named tuple (dx, dweight, dbias). dweight and dbias have the shape of weight and its
        dtype; where weight is None, that of the normalized axes and the dtype of the statistics.

    Raises
    ------
    TypeError
        If a dtype is not one of the four floating ones, if both `normalized_shape` and `axis` are
        given, or if `output_mask` is not three bools.
    ValueError
        If dy, mean, rstd or weight do not fit x in shape, dtype, library or device.

    Notes
    -----
    The formula is that of the backward pass of Ioffe and Szegedy (2015), "Batch normalization",
    arXiv:1502.03167, with the sums taken over a row, as Ba, Kiros and Hinton (2016),
    arXiv:1607.06450, normalize. Sums are float32 (float64 for float64 x). The rounding of `mean`
    is repaired: what the deviations from it sum to is taken off x_hat, so a large common offset
    costs no accuracy. No atomics: the same call gives the same bits.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    >>> y, mean, rstd = cn.layer_norm(x, return_stats=True)
    >>> dy = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> dx, _, dbias = cn.layer_norm_backward(dy, x, 3, mean, rstd)
    >>> dx.round(3)
    array([[ 0.229, -0.344,  0.115],
           [-0.   ,  0.   ,  0.   ]])
    >>> dbias
    array([1., 1., 1.])
    """
    call = check_arguments(x, normalized_shape, weight, None, 0.0, axis, "K", None)
    mask = _mask(output_mask, weight is not None)
    dy = _like_x("dy", dy, call.x, tuple(call.x.shape), call.x.dtype)
    shape = _problem.stats_shape(tuple(call.x.shape), call.axes)
    stats = _problem.stats_dtype(_problem.dtype_name(call.x.dtype))
    mean, rstd = (
        _like_x(label, value, call.x, shape, stats)
        for label, value in (("mean", mean), ("rstd", rstd))
    )
    dtype = stats if weight is None else _problem.dtype_name(weight.dtype)
    if call.path == "namespace" and is_launchable(call.x) and _unwatched(call, dy, mean, rstd):
        dx, dweight, dbias = _torch(call, dy, mean, rstd, mask, dtype)
    elif call.path == "namespace":
        from cupynorm import _namespace

        dx, dweight, dbias = _namespace.layer_norm_backward(
            dy, call.x, call.axes, mean, rstd, call.weight, mask, dtype
        )
    else:
        dx, dweight, dbias = _strided(call, dy, mean, rstd, mask, _problem.numpy_dtype(dtype))
    if call.turn is not None:  # back to the order in which the caller named the axes
        dweight, dbias = _turned(dweight, call.turn), _turned(dbias, call.turn)
    return LayerNormGradients(dx, dweight, dbias)


def _mask(output_mask: Any, has_weight: bool) -> tuple[bool, bool, bool]:
    """Read which gradients are wanted."""
    if output_mask is None:
        return True, has_weight, True
    mask = tuple(output_mask) if isinstance(output_mask, Iterable) else ()
    if len(mask) != 3 or not all(isinstance(m, (bool, np.bool_)) for m in mask):
        msg = (
            f"output_mask={output_mask!r} is not three bools, for dx, dweight and dbias; "
            "pass e.g. output_mask=(True, True, True)"
        )
        raise TypeError(msg)
    return bool(mask[0]), bool(mask[1]), bool(mask[2])


def _like_x(label: str, value: Any, x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Check that an array lives with x and has the shape and dtype that go with it."""
    if type(value) is not np.ndarray or type(x) is not np.ndarray:
        value = companion_of(label, value, x)
    _problem.check_beside_x(label, tuple(value.shape), shape, tuple(x.shape))
    name, wanted = _problem.dtype_name(value.dtype), _problem.dtype_name(dtype)
    if name != wanted:
        _problem.refuse_dtype_beside_x(label, name, wanted, _problem.dtype_name(x.dtype))
    return value


def _strided(
    call: Call, dy: Any, mean: Any, rstd: Any, mask: tuple[bool, bool, bool], dtype: Any
) -> tuple[Any, Any, Any]:
    """NumPy and CuPy: allocate what is returned, then let the path write into it."""
    x, axes = call.x, call.axes
    do = path_of(call.path)
    if call.path == "cupy" and not do.is_current(x):
        with x.device:  # or dx would be allocated, and the kernels launched, on another GPU
            return _strided(call, dy, mean, rstd, mask, dtype)
    new = np if call.path == "numpy" else do
    dx = new.empty_like(x) if mask[0] else None
    shape = tuple(x.shape[a] for a in axes)
    dweight, dbias = (new.empty(shape, dtype=dtype) if wanted else None for wanted in mask[1:])
    if x.size and any(mask):
        do.layer_norm_bwd(dy, x, axes, mean, rstd, call.weight, dx, dweight, dbias)
    elif not x.size:
        for total in (dweight, dbias):
            if total is not None:
                total.fill(0)  # the sum over no rows
    return dx, dweight, dbias


def _unwatched(call: Call, *tensors: Any) -> bool:
    """Whether torch is not to differentiate, compile or transform this call itself."""
    from cupynorm._torch.autograd import unwatched

    return all(unwatched(t, call.weight, None) for t in (call.x, *tensors))


def _torch(
    call: Call, dy: Any, mean: Any, rstd: Any, mask: tuple[bool, bool, bool], dtype: str
) -> tuple[Any, Any, Any]:
    """Torch tensors that nobody watches: our kernels and loops."""
    import torch

    from cupynorm._torch import tensors as _torch_launch

    dtypes = (getattr(torch, dtype),) * 2
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grads: tuple[Any, Any, Any] = _torch_launch.backward(
        dy, call.x, call.axes, mean, rstd, call.weight, mask, dtypes
    )
    return grads


def _turned(total: Any, turn: tuple[int, ...]) -> Any:
    """Undo the permutation of weight's dimensions."""
    if total is None:
        return None
    back = tuple(int(i) for i in np.argsort(turn))
    if library_of(total) in ("numpy", "cupy"):
        return total.transpose(back)
    from array_api_compat import array_namespace

    return array_namespace(total).permute_dims(total, back)
