"""The public functions: each documents, then makes one call down."""

from typing import Any

from cupynorm import _calls, _ops, dask, frames

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]


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
    found = _forward(_ops.LAYER_NORM, x, weight, bias, out, how)
    return _ops.LayerNormResult(*found) if return_stats else found


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
    dsum: Any = None,
) -> _ops.LayerNormGradients:
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
    dsum : array, optional
        What flows into x from elsewhere, as into the sum of `add_layer_norm`: of dy's shape and
        dtype. It is added to dx, before that is rounded.

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
    arrays = (dy, x, mean, rstd, weight) if dsum is None else (dy, x, mean, rstd, weight, dsum)
    found = _calls.differentiate(_ops.LAYER_NORM, arrays, (normalized_shape, axis, output_mask))
    return _ops.LayerNormGradients(*found)


def rms_norm(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    order: str = "K",
    out: Any = None,
    return_stats: bool = False,
    zero_centered_weight: bool = False,
) -> Any:
    """Divide each row of x by its root mean square, then scale it.

    ``y = x / sqrt(mean(x * x) + eps) * weight`` over the normalized axes of each sample; nothing
    is subtracted, and there is no bias. Semantics of ``torch.nn.functional.rms_norm``.

    Parameters
    ----------
    x : array
        As for `layer_norm`.
    normalized_shape, weight : optional
        As for `layer_norm`.
    eps : float, optional
        Added to the mean square. By default what torch takes: the epsilon of the dtype of the
        statistics, 2**-23, or 2**-52 for float64 x.
    axis, order, out, return_stats : optional
        As for `layer_norm`; there is no mean.
    zero_centered_weight : bool, default False
        Multiply by ``1 + weight``, as Gemma and TransformerEngine do.

    Returns
    -------
    array or named tuple
        y, in x's library, dtype and device; with `return_stats` (y, rstd).

    Notes
    -----
    Statistics are float32 (float64 for float64 x). The formula is that of Zhang and Sennrich
    (2019), "Root Mean Square Layer Normalization", arXiv:1910.07467. Errors, and what a row's bits
    depend on: as for `layer_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> cn.rms_norm(np.array([[1.0, 1.0, 2.0], [10.0, 10.0, 20.0]]), eps=0.0).round(3)
    array([[0.707, 0.707, 1.414],
           [0.707, 0.707, 1.414]])
    """
    op = _ops.ZERO_CENTERED[_ops.RMS_NORM] if zero_centered_weight else _ops.RMS_NORM
    how = normalized_shape, axis, eps, order, return_stats
    return _ops.named(op, return_stats, _forward(op, x, weight, None, out, how))


def rms_norm_backward(
    dy: Any,
    x: Any,
    normalized_shape: Any,
    rstd: Any,
    weight: Any = None,
    *,
    axis: Any = None,
    output_mask: Any = None,
    dsum: Any = None,
    zero_centered_weight: bool = False,
) -> _ops.RMSNormGradients:
    """Gradients of `rms_norm` from the gradient of its result.

    With ``x_hat = x * rstd`` and ``g = dy * weight``, row by row
    ``dx = rstd * (g - x_hat * sum(g * x_hat) / N)``, and ``dweight = sum(dy * x_hat)`` over all.

    Parameters
    ----------
    dy, x, normalized_shape, rstd, weight, axis : array or optional
        As for `layer_norm_backward`; x is the sum of an `add_rms_norm`.
    output_mask : sequence of 2 bool, optional
        Which of dx and dweight to compute. By default dx, and dweight where weight is given.
    dsum : array, optional
        As for `layer_norm_backward`.
    zero_centered_weight : bool, default False
        As in the forward call.

    Returns
    -------
    named tuple
        (dx, dweight), as of `layer_norm_backward`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[3.0, 4.0]])
    >>> y, rstd = cn.rms_norm(x, eps=0.0, return_stats=True)
    >>> cn.rms_norm_backward(np.array([[1.0, 0.0]]), x, 2, rstd).dx.round(3)
    array([[ 0.181, -0.136]])
    """
    op = _ops.ZERO_CENTERED[_ops.RMS_NORM] if zero_centered_weight else _ops.RMS_NORM
    arrays = (dy, x, None, rstd, weight) if dsum is None else (dy, x, None, rstd, weight, dsum)
    found = _calls.differentiate(op, arrays, (normalized_shape, axis, output_mask))
    return _ops.RMSNormGradients(*found[:2])


def add_layer_norm(
    x: Any,
    residual: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Any = None,
    order: str = "K",
    out: Any = None,
    sum_out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Add residual to x and normalize the sum, in one pass over memory.

    ``sum = x + residual``, rounded to residual's dtype; ``y = layer_norm(sum)``, rounded to x's:
    the bits of the two calls.

    Parameters
    ----------
    x : array
        As for `layer_norm`, but for tables and Dask collections.
    residual : array
        What is added: of x's shape, library and device, and of x's dtype, or float32 beside 16-bit
        x.
    normalized_shape, weight, bias, eps, axis, order : optional
        As for `layer_norm`; `order` is that of y and of the sum.
    out, sum_out : array, optional
        Where to write y and the sum. Each may be x or residual itself, where dtypes are the same,
        and they share no memory with each other.
    return_stats : bool, default False
        As for `layer_norm`.

    Returns
    -------
    named tuple
        (y, sum); with `return_stats` (y, sum, mean, rstd).

    Notes
    -----
    The gradient of x, and of residual, is the dx of `layer_norm_backward` for the sum, whose `dsum`
    is what flows into the sum from elsewhere. The formula is that of Ba, Kiros and Hinton (2016),
    arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x, residual = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 1.0]])
    >>> y, total = cn.add_layer_norm(x, residual, sum_out=residual)
    >>> residual
    array([[2., 2., 4.]])
    """
    how = normalized_shape, axis, eps, order, return_stats
    found = _calls.normalize(_ops.ADD_LAYER_NORM, x, weight, bias, out, how, residual, sum_out)
    return _ops.named(_ops.ADD_LAYER_NORM, return_stats, found)


def add_rms_norm(
    x: Any,
    residual: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    order: str = "K",
    out: Any = None,
    sum_out: Any = None,
    return_stats: bool = False,
    zero_centered_weight: bool = False,
) -> Any:
    """Add residual to x and divide the sum by its root mean square, in one pass over memory.

    ``sum = x + residual``, rounded to residual's dtype; ``y = rms_norm(sum)``, rounded to x's: the
    bits of the two calls.

    Parameters
    ----------
    x, residual, normalized_shape, weight : array or optional
        As for `add_layer_norm`.
    eps : float, optional
        As for `rms_norm`.
    axis, order, out, sum_out, return_stats : optional
        As for `add_layer_norm`; there is no mean.
    zero_centered_weight : bool, default False
        As for `rms_norm`.

    Returns
    -------
    named tuple
        (y, sum); with `return_stats` (y, sum, rstd).

    Notes
    -----
    Gradients are those of `rms_norm_backward`, as for `add_layer_norm`. The formula is that of
    Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> y, total = cn.add_rms_norm(np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]]), eps=0.0)
    >>> y.round(3)
    array([[0.849, 1.131]])
    """
    op = _ops.ZERO_CENTERED[_ops.ADD_RMS_NORM] if zero_centered_weight else _ops.ADD_RMS_NORM
    how = normalized_shape, axis, eps, order, return_stats
    found = _calls.normalize(op, x, weight, None, out, how, residual, sum_out)
    return _ops.named(op, return_stats, found)


def _forward(op: _ops.Op, x: Any, weight: Any, bias: Any, out: Any, how: _calls.How) -> Any:
    """An array goes to the memo; a table or a Dask collection to those who call it by blocks."""
    door = _calls.doors.get(type(x))
    if door is None or door.look is None:
        if dask.is_collection(x):
            return dask.normalize(op, x, weight, bias, out, how)
        if frames.is_table(x):
            return frames.normalize(op, x, weight, bias, out, how)
    return _calls.normalize(op, x, weight, bias, out, how)
