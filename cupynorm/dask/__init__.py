"""Layer norm of Dask arrays and DataFrames, lazily; needs the extra ``dask``.

Lays graphs out and runs nothing. Dask itself is imported when a collection has come.
"""

from typing import Any

from cupynorm._calls import How
from cupynorm._libraries import kind_of, library_of
from cupynorm._ops import LAYER_NORM, LayerNormResult, Op

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
    normalized_shape, weight, bias, eps, axis : optional
        As for `cupynorm.layer_norm`; weight and bias of the blocks' library, each once in the
        graph, or Dask arrays, which are chunked as x is. A DataFrame takes no Dask arrays here.
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
        As `cupynorm.layer_norm`; if x is no Dask array or DataFrame, or of other blocks.
    ValueError
        As `cupynorm.layer_norm`; if the normalized axes' lengths are unknown.

    Notes
    -----
    Where each block holds whole rows, one task per block calls `cupynorm.layer_norm`, with the same
    bits as one call on the whole array. Where chunks split the rows, the blocks' moments are merged
    in the order of the blocks by the formula of Chan, Golub and LeVeque (1979), about a common
    shift. The bits then depend on the chunks, but not on the scheduler, the workers, or who
    finishes first. There is no backward for Dask collections. The formula is that of Ba, Kiros and
    Hinton (2016), arXiv:1607.06450.

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
    from dask.base import is_dask_collection

    if not is_dask_collection(x):
        msg = (
            f"x is a {kind_of(x)}, no Dask collection; call "
            "cupynorm.layer_norm(x), or make it one, e.g. dask.array.from_array(x)"
        )
        raise TypeError(msg)
    how = normalized_shape, axis, eps, "K", return_stats
    found = normalize(LAYER_NORM, x, weight, bias, None, how)
    return LayerNormResult(*found) if return_stats else found


def is_collection(x: Any) -> bool:
    """Whether x is one of Dask's collections; asked of its type."""
    return library_of(x).startswith("dask")


def normalize(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Any:
    """Serve `layer_norm(x, ...)`: y, or (y, mean, rstd) where `how` asks for them."""
    from cupynorm.dask import _blocks

    return _blocks.normalize(op, x, weight, bias, out, how)
