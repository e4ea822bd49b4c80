"""Layer norm of Dask arrays and DataFrames, lazily; needs the extra ``dask``."""

from typing import Any

from dask.base import is_dask_collection

from cupynorm import functional
from cupynorm._ops import LayerNormResult
from cupynorm.dask import _blocks as _dask_blocks

__all__ = ["layer_norm"]


def layer_norm(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize each row of a Dask collection, without computing or rechunking it.

    What `cupynorm.layer_norm` does with a Dask collection; this function refuses everything else.

    Parameters
    ----------
    x : dask.array.Array or dask.dataframe.DataFrame
        An array of NumPy or CuPy blocks in any chunks, float16, bfloat16, float32 or float64; or a
        DataFrame of pandas or cuDF partitions, whose rows are normalized over its columns. Chunks
        may have unknown sizes, but not along the normalized axes.
    normalized_shape : int or tuple of int, optional
        Trailing dimensions of x to normalize over.
    weight, bias : array, optional
        Scale and shift, of shape `normalized_shape`, or ``tuple(x.shape[a] for a in axis)``, in
        any of the four dtypes: an array of the blocks' library, which goes into the graph once, or
        a Dask array, which is chunked as x is. A DataFrame takes no Dask arrays here.
    eps : float, default 1e-5
        Added to the variance; any finite real number.
    axis : int or tuple of int, optional
        The axes to normalize over, the other way to say it. With neither: the last axis.
    return_stats : bool, default False
        Give mean and rstd as well; arrays only.

    Returns
    -------
    collection or LayerNormResult
        y, lazy, with x's dtype, blocks' library, and chunks or partitions; with `return_stats` the
        named tuple (y, mean, rstd) of Dask arrays, the latter two float32 (float64 for float64 x)
        with length 1 on the normalized axes. Compute them together, ``dask.compute(*result)``, and
        no block is normalized twice.

    Raises
    ------
    TypeError
        If x is no Dask array or DataFrame, has blocks of another library or an integer, bool or
        complex dtype, or if both `normalized_shape` and `axis` are given.
    ValueError
        If shapes or axes do not fit, if `eps` is not finite, if the normalized axes' lengths are
        unknown, or if weight or bias live elsewhere than x's blocks.

    Notes
    -----
    Where each block holds whole rows, one task per block calls `cupynorm.layer_norm`, with the same
    bits as one call on the whole array. Where chunks split the rows, each block gives its count,
    mean and variance in the statistics' dtype; they are merged in the order of the blocks by the
    formula of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for
    computing sample variances", about a common shift; and each block is normalized with the result.
    The bits then depend on the chunks, but not on the scheduler, the workers, or who finishes
    first. There is no backward for Dask collections. The formula is that of Ba, Kiros and Hinton
    (2016), "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import cupynorm.dask
    >>> x = da.from_array(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), chunks=(1, 2))
    >>> y = cupynorm.dask.layer_norm(x, eps=0.0)
    >>> y.chunks
    ((1, 1), (2, 1))
    >>> y.compute().round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    """
    if not is_dask_collection(x):
        msg = (
            f"x is a {type(x).__module__}.{type(x).__qualname__}, no Dask collection; call "
            "cupynorm.layer_norm(x), or make it one, e.g. dask.array.from_array(x)"
        )
        raise TypeError(msg)
    y, mean, rstd = _dask_blocks.layer_norm(
        functional.layer_norm,
        x,
        normalized_shape,
        weight,
        bias,
        eps,
        axis,
        "K",
        None,
        return_stats,
    )
    return LayerNormResult(y, mean, rstd) if return_stats else y
