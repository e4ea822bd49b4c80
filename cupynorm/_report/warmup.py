"""Compiling ahead what later calls will need."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from cupynorm import _calls, _rules
from cupynorm._layout import Facts, kernel_problem_of
from cupynorm._ops import Op
from cupynorm._report.explain import of_backward


def warmup(
    normalized_shape: int | Sequence[int],
    dtypes: Sequence[str] = ("float16", "bfloat16", "float32"),
    *,
    affine: bool = True,
    backward: bool = False,
    op: str = "layer_norm",
    device: str = "cuda",
    progress: bool | None = None,
) -> list[str]:
    """Compile ahead what later calls on row-major arrays will need.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing dimensions that later calls normalize.
    dtypes : sequence of str
        Of x, weight and bias.
    affine : bool, default True
        Whether there are weight and bias.
    backward : bool, default False
        Compile what the backward needs as well.
    op : str, default 'layer_norm'
        The operation, as `explain` names it; x and a residual have one dtype.
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
        If `device`, `op`, a dtype or the shape is not one that there is.
    ImportError
        If CuPy or tqdm is needed and not installed.

    Examples
    --------
    >>> import cupynorm as cn
    >>> loops = cn.warmup(8, ["float32"], device="cpu")  # empty where numba is not installed

    On a GPU: ``cn.warmup(768, ["float16"], backward=True)`` before a training's first step.
    """
    shape = _rules.read_shape(normalized_shape)
    dtypes = [_rules.read_dtype(d) for d in ([dtypes] if isinstance(dtypes, str) else dtypes)]
    if device not in ("cuda", "cpu"):
        msg = f"device={device!r} is not 'cuda' or 'cpu'; pass one of them"
        raise ValueError(msg)
    compiled, label = (_of_gpu, "kernels") if device == "cuda" else (_of_cpu, "loops")
    operation, made = _rules.resolve_op(op), dict[str, None]()
    for name in _behind_a_bar(dtypes, f"compiling {label}", progress):
        made |= dict.fromkeys(compiled(operation, shape, name, affine, backward))
    return list(made)


def _of_cpu(op: Op, shape: tuple[int, ...], name: str, affine: bool, backward: bool) -> list[str]:
    """Make the calls that later ones will be like: of one row, and of as many as threads share."""
    from cupynorm._cpu import engine

    dtype = _rules.numpy_dtype(name)
    weight = np.ones(shape, dtype) if affine else None
    for rows in (1, -(-engine.ALONE // max(1, math.prod(shape)))):
        x = np.zeros((rows, *shape), dtype)
        given = op, x, weight, weight if op.center else None, None
        added = (x, None) if op.residual else ()
        *_, mean, rstd = _calls.normalize(*given, (shape, None, 1e-5, "K", True), *added)
        if backward:
            parts = x, x, mean if op.center else None, rstd, weight, *added[:1]
            _calls.differentiate(op.alone, parts, (shape, None, None))
    return [f"{engine.state()[1]}: {name}"]


def _of_gpu(op: Op, shape: tuple[int, ...], name: str, affine: bool, backward: bool) -> list[str]:
    """Compile and load, on the current device, what row-major x of a dtype needs."""
    with _calls.gpu("device='cuda'") as _cuda:
        N, index = math.prod(shape), _cuda.get_device()
    small = ("weight", "bias")[: 1 + op.center] if affine else ()
    shaped = ("x", "y", *(("residual", "sum") if op.residual else ()))
    dtypes = dict.fromkeys(("x", *small, *shaped[2:]), name)
    few, many = (  # few rows may take K5
        Facts(op, False, (rows, N), (1,), dtypes, dict.fromkeys(shaped, (N, 1)))
        for rows in (1, 2**20)
    )
    calls = (few, many, of_backward(many)) if backward else (few, many)
    ready = [_cuda.ready_on(index, kernel_problem_of(facts)) for facts in calls]
    for settled in ready:
        if settled.skewed is not None:  # a view may begin at any address
            settled.skewed()
    return [stage.name for settled in ready for stage in settled.plan.stages]


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
