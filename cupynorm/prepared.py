"""A call prepared once for many arrays of one kind."""

from typing import Any

from cupynorm import dask, frames
from cupynorm._arguments import check_arguments, is_launchable
from cupynorm._prepared import PreparedLayerNorm

__all__ = ["PreparedLayerNorm", "prepare"]


def prepare(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Any = None,
    order: str = "K",
    return_stats: bool = False,
) -> PreparedLayerNorm:
    """Settle all of a `layer_norm` call that does not depend on the values of x.

    Argument rules, the plan, and the kernel, compiled if need be, are looked up here, so that a
    call of the result costs a few comparisons and a launch. ``f(x, out=y)`` allocates nothing and
    waits for nothing: it can be captured in a CUDA graph.

    Parameters
    ----------
    x : array
        An example of what will come, a NumPy or CuPy array or a torch tensor on the CPU or a CUDA
        device. Its values do not matter and it is not kept.
    normalized_shape : int or tuple of int, optional
        As for `layer_norm`.
    weight, bias : array, optional
        As for `layer_norm`, of shape `normalized_shape`. They are kept by reference: what is
        written into their memory later counts; after a torch parameter's ``.data`` was replaced,
        prepare again. If their memory cannot be used as it is (not row-major; on the CPU, another
        dtype than that of the statistics), each call makes copies of them.
    eps : float, default 1e-5
        As for `layer_norm`.
    axis : int or tuple of int, optional
        As for `layer_norm`.
    order : {'K', 'C', 'F'}, default 'K'
        As for `layer_norm`.
    return_stats : bool, default False
        As for `layer_norm`: whether each call gives mean and rstd, too.

    Returns
    -------
    PreparedLayerNorm
        ``f(x)`` or ``f(x, out=y)``, which gives what `layer_norm` gives, bit for bit, for any x of
        the same shape, strides, dtype, library and device. `out` follows the rules of
        `layer_norm`: it may be x itself, and a partial overlap is refused.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm` does for bad arguments; TypeError for an x of another library: JAX has
        ``jax.jit`` for this, Dask arrays and tables are not computed call by call. The result
        raises ValueError for an x that is not as the example was, with both values.

    Notes
    -----
    A call with `return_stats` allocates the statistics; rows so long that two kernels share one
    (see `explain`) need a workspace, which each call takes from the memory pool. CuPy arrays run on
    CuPy's current stream, tensors on torch's. Prepared calls are not differentiable: where grad
    mode is on and a tensor requires grad, and inside ``torch.compile`` or ``torch.func``, they
    raise ValueError; under ``torch.no_grad()`` a model's parameters may be passed as they are.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> weight = np.ones(3)
    >>> f = cn.prepare(x, 3, weight, eps=0.0)
    >>> y = np.empty_like(x)
    >>> f(x, out=y).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    >>> weight *= 2
    >>> f(x)[0].round(3)
    array([-2.449,  0.   ,  2.449])
    """
    if frames.is_table(x) or dask.is_collection(x):
        _refuse(x)
    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, order, None)
    if call.path == "numpy":
        from cupynorm._prepared_arrays import PreparedNumpy

        return PreparedNumpy(call, order, return_stats)
    if call.path == "cupy":
        from cupynorm._prepared_arrays import PreparedCupy

        return PreparedCupy(call, order, return_stats)
    if not is_launchable(call.x):
        _refuse(x)
    from cupynorm._prepared_torch import PreparedTorch

    return PreparedTorch(call, order, return_stats)


def _refuse(x: Any) -> None:
    kind = type(x)
    msg = (
        f"x is a {kind.__module__}.{kind.__qualname__}, for which nothing can be prepared; "
        "cupynorm.prepare takes NumPy and CuPy arrays and torch tensors on the CPU or, where CuPy "
        "is installed, a CUDA device. Call cupynorm.layer_norm(x, ...)"
    )
    raise TypeError(msg)
