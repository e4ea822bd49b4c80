"""Compiling ahead what later calls will need."""

from collections.abc import Sequence

from cupynorm import _problem

__all__ = ["warmup"]


def warmup(
    normalized_shape: int | Sequence[int],
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
    *,
    affine: bool = True,
    backward: bool = False,
    device: str = "cuda",
) -> list[str]:
    """Compile ahead what later calls on row-major arrays will need.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing dimensions that later calls normalize.
    dtypes : sequence of str
        dtypes of x; weight and bias are taken to have x's.
    affine : bool, default True
        Compile the kernels with weight and bias; otherwise those without.
    backward : bool, default False
        Compile what `layer_norm_backward` needs as well.
    device : {'cuda', 'cpu'}
        'cuda': CuPy's current device. 'cpu': the loops that numba compiles.

    Returns
    -------
    list of str
        What was compiled: kernel entries, or loop names.

    Raises
    ------
    ValueError
        If `device`, a dtype or the shape is not one that `layer_norm` takes.
    ImportError
        If `device` is 'cuda' and CuPy is not installed.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _problem.resolve_axes((1, *shape), shape, None)
    for name in dtypes:
        _problem.check_x_dtype(name)
    if device == "cuda":
        from cupynorm import _cuda

        compiled: list[str] = _cuda.warmup(shape, dtypes, affine, backward)
        return compiled
    if device == "cpu":
        from cupynorm import _cpu

        compiled = _cpu.warmup(shape, dtypes, affine, backward)
        return compiled
    msg = f"device={device!r} is not 'cuda' or 'cpu'"
    raise ValueError(msg)
