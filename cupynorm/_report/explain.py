"""What a call would run, without running it: the rules, the folded memory and the plan."""

import math
from dataclasses import dataclass, replace
from typing import Any

from cupynorm import _problem
from cupynorm._arguments import Call, check_arguments, is_launchable
from cupynorm._arrays import element_strides, library_of
from cupynorm._cuda.plan import Device, Stage, choose_plan
from cupynorm._cuda.plan_bwd import choose_plan_bwd
from cupynorm._cuda.plan_column import choose_plan_column
from cupynorm._cuda.plan_column_bwd import bytes_beyond_floor, choose_plan_column_bwd
from cupynorm._display import Sections, Table
from cupynorm._layout import (
    Facts,
    column_gradient_problem_of,
    column_problem_of,
    gradient_layout_of,
    layout_of,
    result_strides,
)
from cupynorm._ops import LAYER_NORM

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

FAMILIES = {
    "warp": "K1 warp: lanes of one warp hold a row in registers",
    "block": "K2 block: the threads of a block hold a row in registers",
    "shared": "K3 shared: a block stages its row in shared memory",
    "cluster": "K4 cluster: the blocks of a cluster stage parts of a row in shared memory",
    "split": "K5 split row: chunk statistics, then merge and normalize",
    "lanes": "K6 lanes: a thread holds the few columns of its rows in registers, one sweep",
    "column": "K6 column: a tile of neighbouring rows in shared memory, one sweep",
    "panels": "K6 column: a tile of neighbouring rows in shared memory, two sweeps over {} panels",
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


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Table):
    """What `layer_norm` or its backward would run; prints as aligned text, a table in a notebook.

    Attributes
    ----------
    path : str
        'cuda', 'cpu' or 'reference'.
    kernel : str
        What does the work.
    rows, cols : int
        Rows that are normalized and elements in each.
    dtype, stats_dtype : str
        Of x and y, and of the statistics.
    launches : tuple of str
        Each kernel launch: entry, grid (and cluster), block, shared memory; empty off the GPU.
    threads_per_row, rows_per_block : int or None
        Of the plan; None off the GPU.
    bytes_floor : int
        x read once and y written once (of a backward: x and dy read, dx written), with weight,
        bias, statistics and sums, in bytes of memory.
    bytes_moved : int or None
        What this plan moves; None where a library decides.
    copies : tuple of str
        Every copy of x, y, dy or dx that the call makes, with its reason.
    source : str
        What set the plan's thresholds.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> plan = cn.explain(np.ones((64, 1000), np.float32), device="sm_90")
    >>> plan.kernel
    'K1 warp: lanes of one warp hold a row in registers'
    >>> plan.bytes_moved == plan.bytes_floor == 2 * 64 * 1000 * 4
    True
    """

    path: str
    kernel: str
    rows: int
    cols: int
    dtype: str
    stats_dtype: str
    launches: tuple[str, ...] = ()
    threads_per_row: int | None = None
    rows_per_block: int | None = None
    bytes_floor: int = 0
    bytes_moved: int | None = None
    copies: tuple[str, ...] = ()
    source: str = ""

    def _sections(self) -> Sections:
        moved = "decided by the library" if self.bytes_moved is None else _bytes(self.bytes_moved)
        if self.bytes_moved:
            moved += f", {self.bytes_moved / self.bytes_floor:.2f} of the floor"
        rows = [
            ("path", self.path),
            ("kernel", self.kernel),
            ("problem", f"{self.rows} rows of {self.cols}, {self.dtype}"),
            ("statistics", f"{self.stats_dtype}, corrected two-pass"),
        ]
        rows += [("launch", text) for text in self.launches]
        if self.threads_per_row is not None:
            rows.append(("threads per row", str(self.threads_per_row)))
            rows.append(("rows per block", str(self.rows_per_block)))
        rows += [("floor", _bytes(self.bytes_floor)), ("moved", moved)]
        rows += [("copy", text) for text in self.copies or ("none",)]
        return [("", rows + ([("plan from", self.source)] if self.source else []))]


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
    normalized_shape, weight, bias, eps, axis, order, out, return_stats : optional
        As for `layer_norm`; nothing is written to `out`.
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
    library, launchable = library_of(call.x), is_launchable(call.x)
    on_gpu = call.path == "cupy" or (launchable and call.x.device.type == "cuda")
    facts = _facts(call, order, out, return_stats, backward)
    if device is None and not on_gpu:
        if call.path == "numpy" or launchable:
            from cupynorm._cpu import arrays as _cpu
            from cupynorm._cpu import threads as _threads

            threads = f"up to {_threads.num_threads()} thread(s) over blocks of rows"
            return _explanation(facts, "cpu", f"{_cpu.describe()}, {threads}", _floor(facts))
        return _explanation(facts, "reference", f"array-API calls of {library}", None)
    gpu = _gpu(call.x, device)
    if None in facts.strides.values():
        msg = (
            f"device={device!r} needs an x with strides, not a {library} array; pass a "
            "NumPy or CuPy array, or a torch tensor, of that shape"
        )
        raise TypeError(msg)
    if not facts.size:
        return _explanation(facts, "cuda", "none: x is empty", 0)
    plan, kernel, beyond, reasons = (_plan_bwd if backward else _plan_fwd)(facts, gpu)
    moved = _floor(facts) + beyond + 2 * _x_bytes(facts) * len(reasons)
    told = _explanation(facts, "cuda", kernel, moved)
    return replace(
        told,
        launches=tuple(map(_launch, plan.stages)),
        threads_per_row=plan.threads_per_row,
        rows_per_block=plan.rows_per_block,
        copies=tuple(f"of {label}: {reason}" for label, reason in reasons),
        source=plan.source,
    )


def _facts(call: Call, order: str, out: Any, stats: bool, backward: bool) -> Facts:
    """What is settled about a call; of a backward, for a dy that lies as y does."""
    shape, x = tuple(call.x.shape), _strides(call.x)
    arrays = {"x": call.x, "weight": call.weight, "bias": call.bias}
    dtypes = {name: _problem.dtype_name(a.dtype) for name, a in arrays.items() if a is not None}
    y = None if x is None else _strides(out) or result_strides(shape, x, order)
    strides = {"x": x, "y": y}
    if backward:
        totals = dtypes.get("weight")
        dtypes.pop("bias", None)
        dtypes |= {"dweight": totals} if totals else {}
        dtypes["dbias"] = totals or _problem.stats_dtype(dtypes["x"])
        strides = {"x": x, "dy": y, "dx": None if x is None else result_strides(shape, x, "K")}
    return Facts(
        LAYER_NORM, backward, shape, call.axes, dtypes, strides, call.eps, order, out is not None,
        stats,
    )  # fmt: skip


def _strides(a: Any) -> tuple[int, ...] | None:
    if library_of(a) == "torch":
        return tuple(a.stride())
    return element_strides(a) if hasattr(a, "strides") else None


def _gpu(x: Any, name: str | None) -> Device:
    if name is None:
        from cupynorm._cuda import arrays as _cuda

        return _cuda.device_of(x.device.index if library_of(x) == "torch" else x.device.id)
    known = {f"sm_{cc}": device for cc, device in _DEVICES.items()}
    if name not in known:
        msg = f"device={name!r} is not known; choose one of {', '.join(known)}"
        raise ValueError(msg)
    return known[name]


# Plan, kernel, bytes that it moves beyond the floor, and the copies with their reasons.
Chosen = tuple[Any, str, int, tuple[tuple[str, str], ...]]


def _plan_fwd(facts: Facts, gpu: Device) -> Chosen:
    x, y = (facts.strides[name] or () for name in ("x", "y"))
    dtypes = facts.dtypes["x"], facts.dtypes.get("weight"), facts.dtypes.get("bias")
    layout = layout_of(facts.shape, facts.axes, x, y, dtypes, facts.stats)
    reasons = tuple(pair for pair in (("x", layout.copy_x), ("y", layout.copy_y)) if pair[1])
    column = column_problem_of(facts.shape, facts.axes, x, y, dtypes) if reasons else None
    if column is not None:
        tiled = choose_plan_column(column, gpu)
        if tiled.panels == 1:
            return tiled, FAMILIES[tiled.family], 0, ()
        again = _x_bytes(facts) * (tiled.panels - 1) // tiled.panels  # the last is still on chip
        return tiled, FAMILIES["panels"].format(tiled.panels), again, ()
    plan = choose_plan(layout.problem, gpu)
    # Split rows are read a second time, from L2 where they fit.
    beyond = 2 * plan.workspace_bytes + _x_bytes(facts) * (plan.family == "split")
    return plan, FAMILIES[plan.family], beyond, reasons


def _plan_bwd(facts: Facts, gpu: Device) -> Chosen:
    dy, x, dx = (facts.strides[name] or () for name in ("dy", "x", "dx"))
    weight, dweight, dbias = (facts.dtypes.get(name) for name in ("weight", "dweight", "dbias"))
    dtypes = facts.dtypes["x"], weight, dweight, dbias
    layout = gradient_layout_of(facts.shape, facts.axes, dy, x, dx, dtypes)
    if layout.copies:
        column = column_gradient_problem_of(facts.shape, facts.axes, dy, x, dx, dtypes)
        if column is not None:
            tiled, _ = choose_plan_column_bwd(column, gpu)
            return tiled, _BACKWARD[tiled.family], bytes_beyond_floor(column, tiled), ()
    plan = choose_plan_bwd(layout.problem, gpu)
    beyond = 2 * plan.workspace_bytes + _x_bytes(facts) * (plan.passes - 3)
    return plan, _BACKWARD[plan.family], beyond, layout.copies


def _x_bytes(facts: Facts) -> int:
    return facts.size * _problem.ITEMSIZE[facts.dtypes["x"]]


def _floor(facts: Facts) -> int:
    """Bytes that any way of doing it moves."""
    vectors = sum(_problem.ITEMSIZE[d] for name, d in facts.dtypes.items() if name != "x")
    stats = 2 * _problem.ITEMSIZE[_problem.stats_dtype(facts.dtypes["x"])]
    stats *= math.prod(facts.stats_shape) * (facts.stats or facts.backward)
    return len(facts.strides) * _x_bytes(facts) + facts.N * vectors + stats


def _explanation(facts: Facts, path: str, kernel: str, moved: int | None) -> Explanation:
    return Explanation(
        path=path,
        kernel=kernel,
        rows=math.prod(facts.stats_shape),
        cols=facts.N,
        dtype=facts.dtypes["x"],
        stats_dtype=_problem.stats_dtype(facts.dtypes["x"]),
        bytes_floor=_floor(facts),
        bytes_moved=moved,
    )


def _launch(stage: Stage) -> str:
    grid = f"grid {stage.grid[0]}"
    if stage.cluster > 1:
        grid += f" in clusters of {stage.cluster}"
    return f"{stage.name}, {grid}, block {stage.block[0]}, shared {stage.shared_bytes} bytes"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"
