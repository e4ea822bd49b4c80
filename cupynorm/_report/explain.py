"""What a call would run, without running it."""

from typing import Any

from cupynorm import _layout, _problem
from cupynorm._arguments import check_arguments, is_launchable
from cupynorm._arrays import element_strides, library_of
from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Plan
from cupynorm._cuda.tiles import bytes_beyond_floor
from cupynorm._layout import Problem, kernel_problem_of, result_strides
from cupynorm._ops import LAYER_NORM
from cupynorm._report.explanation import Explanation, Facts

__all__ = ["Explanation", "explain"]

# One example per compute capability, for asking what a GPU would run that is not at hand:
# multiprocessors, and shared memory that a block may opt in to, from the CUDA programming guide's
# table of technical specifications and the data sheets of T4, A100, A10, L40S, H100 SXM, B200 and
# RTX 5090.
_DEVICES = {
    75: Device(75, 40, 64 * 1024),
    80: Device(80, 108, 163 * 1024),
    86: Device(86, 72, 99 * 1024),
    89: Device(89, 142, 99 * 1024),
    90: Device(90, 132, 227 * 1024),
    100: Device(100, 148, 227 * 1024),
    120: Device(120, 170, 99 * 1024),
}

_FAMILIES = {
    "warp": "K1 warp: lanes of one warp hold a row in registers",
    "block": "K2 block: the threads of a block hold a row in registers",
    "shared": "K3 shared: a block stages its row in shared memory",
    "cluster": "K4 cluster: the blocks of a cluster stage parts of a row in shared memory",
    "split": "K5 split row: chunk statistics, then merge and normalize",
}
_BACKWARD = {
    "warp": "K1 warp backward: rows, dweight and dbias in registers; 3 passes",
    "block": "K2 block backward: rows, dweight and dbias in registers; 3 passes",
    "shared": "K3 shared backward: rows in registers, dweight and dbias in shared memory; 3 passes",
    "cluster": "K4 cluster backward: each block has a part of the row and its sums; 3 passes",
    "column": "K6 column backward: tiles of x and dy in shared memory; 3 passes",
    "panels": "K6 column backward: rows longer than two tiles, so two sweeps over panels; 5 passes",
    "split": "K5 split backward: sums fit no block, so x and dy are read twice; 5 passes",
}


def explain(
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
    device: str | None = None,
    backward: bool = False,
) -> Explanation:
    """Tell what `layer_norm`, or its backward, would run for the same arguments.

    Nothing is run.

    Parameters
    ----------
    x : array
        As for `layer_norm`: any array that it takes; only shape, strides and dtype are looked at.
    normalized_shape : int or tuple of int, optional
        As for `layer_norm`.
    weight, bias : array, optional
        As for `layer_norm`.
    eps : float, default 1e-5
        As for `layer_norm`.
    axis : int or tuple of int, optional
        As for `layer_norm`.
    order : {'K', 'C', 'F'}, default 'K'
        As for `layer_norm`.
    out : array, optional
        As for `layer_norm`; nothing is written to it.
    return_stats : bool, default False
        As for `layer_norm`: whether mean and rstd are written, too.
    device : str, optional
        A GPU to plan for, such as 'sm_90', when x is not on one: what would run were x and the
        others CuPy arrays of the same shape, strides and dtype there.
    backward : bool, default False
        Explain `layer_norm_backward` instead, for a dy that lies in memory as y does.

    Returns
    -------
    Explanation
        Path, kernel, launch, bytes moved against the floor, copies and their reasons.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm` does for bad arguments; also for an unknown `device`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> cn.explain(np.ones((64, 1000), np.float32), device="sm_90").threads_per_row
    32
    """
    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, order, out)
    shape = tuple(call.x.shape)
    rows, cols = _problem.rows_and_cols(shape, call.axes)
    dtypes = tuple(
        None if a is None else _problem.dtype_name(a.dtype)
        for a in (call.x, call.weight, call.bias)
    )
    facts = Facts(shape, call.axes, rows, cols, dtypes, return_stats, backward)
    launchable = is_launchable(call.x)
    if device is not None or call.path == "cupy" or (launchable and call.x.device.type == "cuda"):
        gpu = _gpu(call.x, device)
        strides = _element_strides(call.x)
        if strides is None:
            msg = (
                f"device={device!r} needs an x with strides, not a {library_of(x)} array; pass a "
                "NumPy or CuPy array, or a torch tensor, of that shape"
            )
            raise TypeError(msg)
        to = _element_strides(out) or result_strides(shape, strides, order)
        return _explain_on_gpu(facts, strides, to, gpu)
    if call.path == "numpy" or launchable:
        from cupynorm._cpu import arrays as _cpu
        from cupynorm._cpu import threads as _threads

        kernel = f"{_cpu.describe()}, up to {_threads.num_threads()} thread(s) over blocks of rows"
        return facts.explanation("cpu", kernel, facts.floor())
    kernel = f"array-API calls of {library_of(x)}"
    return facts.explanation("reference", kernel, None)


def _element_strides(x: Any) -> tuple[int, ...] | None:
    if library_of(x) == "torch":
        return tuple(x.stride())
    return element_strides(x) if hasattr(x, "strides") else None


def _gpu(x: Any, name: str | None) -> Device:
    if name is None:
        from cupynorm._cuda import arrays as _cuda

        return _cuda.device_of(x.device.index if library_of(x) == "torch" else x.device.id)
    known = {f"sm_{cc}": device for cc, device in _DEVICES.items()}
    if name not in known:
        msg = f"device={name!r} is not known; choose one of {', '.join(known)}"
        raise ValueError(msg)
    return known[name]


def _explain_on_gpu(
    facts: Facts, x_strides: tuple[int, ...], y_strides: tuple[int, ...], gpu: Device
) -> Explanation:
    if not facts.rows * facts.cols:
        return facts.explanation("cuda", "none: x is empty", 0)
    labels, strides = ("x", "weight", "bias"), {"x": x_strides, "y": y_strides}
    named = zip(labels, facts.dtypes, strict=True)
    if facts.backward:
        named = zip(
            ("x", "weight", "dweight", "dbias"), (*facts.dtypes[:2], *facts.totals), strict=True
        )
        to = result_strides(facts.shape, x_strides, "K")
        strides = {"x": x_strides, "dy": y_strides, "dx": to}
    settled = _layout.Facts(
        LAYER_NORM,
        facts.backward,
        facts.shape,
        facts.axes,
        {label: dtype for label, dtype in named if dtype},
        dict(strides),
        stats=facts.stats,
    )
    problem = kernel_problem_of(settled)
    plan = choose_plan(problem, gpu)
    kernel, moved = (_backward if facts.backward else _forward)(facts, problem, plan)
    copies = tuple(f"of {label}: {reason}" for label, reason in problem.copies)
    moved += 2 * facts.x_bytes * len(copies)
    return facts.explanation("cuda", kernel, facts.floor() + moved, plan, copies)


def _forward(facts: Facts, problem: Problem, plan: Plan) -> tuple[str, int]:
    """What runs, and the bytes that it moves beyond the floor, without copies."""
    if plan.family == "lanes":
        return "K6 lanes: a thread holds the few columns of its rows in registers, one sweep", 0
    if plan.family == "column":
        again = facts.x_bytes * (plan.panels - 1) // plan.panels  # the last panel is still on chip
        sweeps = "one sweep" if plan.panels == 1 else f"two sweeps over {plan.panels} panels"
        return f"K6 column: a tile of neighbouring rows in shared memory, {sweeps}", again
    again = facts.x_bytes * (plan.family == "split")  # the second read, from L2 where it fits
    return _FAMILIES[plan.family], plan.workspace_bytes * 2 + again


def _backward(facts: Facts, problem: Problem, plan: Plan) -> tuple[str, int]:
    if plan.family in ("column", "panels"):
        return _BACKWARD[plan.family], bytes_beyond_floor(problem, plan)
    again = facts.x_bytes * (plan.passes - 3)
    return _BACKWARD[plan.family], plan.workspace_bytes * 2 + again
