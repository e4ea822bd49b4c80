"""Compiling ahead what later calls will need."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from cupynorm import _problem


def warmup(
    normalized_shape: int | Sequence[int],
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
    *,
    affine: bool = True,
    backward: bool = False,
    device: str = "cuda",
    progress: bool | None = None,
) -> list[str]:
    """Compile ahead what later calls on row-major arrays will need.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing dimensions that later calls normalize.
    dtypes : sequence of str
        Of x: names of floating dtypes; weight and bias are taken to have x's.
    affine : bool, default True
        Compile the kernels with weight and bias; otherwise those without.
    backward : bool, default False
        Compile what `layer_norm_backward` needs as well.
    device : {'cuda', 'cpu'}
        'cuda': CuPy's current device. 'cpu': the loops that numba compiles.
    progress : bool, optional
        Whether to draw a progress bar with tqdm. Left out, one is drawn in a terminal or a
        notebook, if there is more than one thing to compile and tqdm is installed.

    Returns
    -------
    list of str
        What was compiled: kernel entries, or loop names.

    Raises
    ------
    ValueError
        If `device`, a dtype or the shape is not one that `layer_norm` takes.
    ImportError
        If `device` is 'cuda' and CuPy is not installed, or `progress` is True and tqdm is not.

    Examples
    --------
    >>> import cupynorm as cn
    >>> loops = cn.warmup(8, ["float32"], device="cpu")  # empty where numba is not installed

    On a GPU: ``cn.warmup(768, ["float16"], backward=True)`` before a training's first step.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _problem.resolve_axes((1, *shape), shape, None)
    for name in dtypes:
        _problem.check_x_dtype(name)
    if device == "cuda":
        return _of_gpu(math.prod(shape), dtypes, affine, backward, progress)
    if device == "cpu":
        names = _behind_a_bar(dtypes, "compiling loops", progress)
        return [_of_cpu(shape, name, affine, backward) for name in names]
    msg = f"device={device!r} is not 'cuda' or 'cpu'; pass one of them"
    raise ValueError(msg)


def _of_cpu(shape: tuple[int, ...], name: str, affine: bool, backward: bool) -> str:
    """Make the calls that later ones will be like: of one row, and of as many as threads share."""
    from cupynorm._cpu import arrays as _cpu
    from cupynorm.functional import layer_norm
    from cupynorm.gradient import layer_norm_backward

    dtype = _problem.numpy_dtype(name)
    weight = np.ones(shape, dtype) if affine else None
    for rows in (1, -(-_cpu.shared_from() // max(1, math.prod(shape)))):
        x = np.zeros((rows, *shape), dtype)
        layer_norm(x, shape, weight, weight)
        _, mean, rstd = layer_norm(x, shape, weight, weight, return_stats=True)
        if backward:
            layer_norm_backward(x, x, shape, mean, rstd, weight)
    return f"{_cpu.describe()}: {name}"


def _of_gpu(
    N: int, dtypes: Sequence[str], affine: bool, backward: bool, progress: bool | None
) -> list[str]:
    """Compile and load, on the current device, what row-major x of these dtypes needs."""
    from cupynorm._cuda import arrays as _cuda

    index, strides = _cuda.get_device(), (N, 1)
    names: list[str] = []
    for name in _behind_a_bar(dtypes, "compiling kernels", progress):
        affine_dtype = name if affine else None
        dtypes_of_call = (name, affine_dtype, affine_dtype)
        for rows in (1, 2**20):  # few rows may take K5
            forward = _cuda.prepared_fwd(
                index, (rows, N), (1,), strides, strides, dtypes_of_call, False
            )
            names += [stage.name for stage in forward.plan.stages]
        if backward:
            totals = (affine_dtype, affine_dtype or _problem.stats_dtype(name))
            layouts = ((2**20, N), (1,), strides, strides, strides)
            ready = _cuda.prepared_bwd(index, *layouts, (name, affine_dtype, *totals))
            names += [stage.name for stage in ready.plan.stages]
    return list(dict.fromkeys(names))


def _behind_a_bar(dtypes: Sequence[str], label: str, progress: bool | None) -> Iterable[str]:
    """Count dtypes behind tqdm's bar; unasked, only several of them, and where someone looks on."""
    if progress is False:
        return dtypes
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if progress is None:
            return dtypes
        msg = (
            f"progress=True draws a bar with tqdm, which cannot be imported ({error}); "
            "pip install 'cupynorm[notebook]', or leave progress out"
        )
        raise ImportError(msg) from error
    # None: tqdm draws in a notebook and a terminal, not into a file.
    hidden = False if progress else len(dtypes) < 2 or None
    counted: Iterable[str] = tqdm(dtypes, desc=label, leave=False, disable=hidden)
    return counted
