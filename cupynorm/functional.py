"""The public functions: each documents, then makes one call down."""

from typing import Any

from cupynorm import _calls, dask, frames
from cupynorm._ops import LAYER_NORM, LayerNormGradients, LayerNormResult, Op

__all__ = ["layer_norm", "layer_norm_backward"]


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
    bit for bit, but for JAX, whose compiler chooses the order of sums, for tensors where Numba is
    not installed, and for Dask arrays whose chunks split rows.
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
    how = normalized_shape, axis, eps, order, return_stats
    found = _forward(LAYER_NORM, x, weight, bias, out, how)
    return LayerNormResult(*found) if return_stats else found


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
    arrays = dy, x, mean, rstd, weight
    found = _calls.differentiate(LAYER_NORM, arrays, (normalized_shape, axis, output_mask))
    return LayerNormGradients(*found)


def _forward(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: _calls.How) -> Any:
    """An array goes to the memo; a table or a Dask collection to those who call it by blocks."""
    door = _calls.doors.get(type(x))
    if door is None or door.look is None:
        if dask.is_collection(x):
            return dask.normalize(op, x, weight, bias, out, how)
        if frames.is_table(x):
            return frames.normalize(op, x, weight, bias, out, how)
    return _calls.normalize(op, x, weight, bias, out, how)
