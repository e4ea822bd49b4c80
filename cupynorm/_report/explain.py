"""What a call would run, without running it: the rules, the folded memory and the plan."""

import math
from dataclasses import dataclass
from typing import Any

from cupynorm import _calls
from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Plan, Stage
from cupynorm._cuda.tiles import bytes_beyond_floor
from cupynorm._display import Sections, Table
from cupynorm._layout import Facts, Problem, kernel_problem_of, result_strides
from cupynorm._libraries import check_layout, library_of
from cupynorm._rules import ITEMSIZE, default_eps, resolve_op, stats_dtype

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
    "lanes": "K6 lanes: a thread holds the few columns of its rows in registers, one sweep",
    "column": "K6 column: a tile of neighbouring rows in shared memory, one sweep",
}
_BACKWARD = {
    "warp": "K1 warp backward: rows, dweight and dbias in registers; 3 passes",
    "block": "K2 block backward: rows, dweight and dbias in registers; 3 passes",
    "shared": "K3 shared backward: rows in registers, dweight and dbias in shared memory; 3 passes",
    "cluster": "K4 cluster backward: each block has a part of the row and its sums; 3 passes",
    "column": "K6 column backward: tiles of x and dy in shared memory; 3 passes",
    "split": "K5 split backward: sums fit no block, so x and dy are read twice; 5 passes",
}


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Table):
    """What `layer_norm` or its backward would run; prints as aligned text, a table in a notebook.

    Attributes
    ----------
    op : str
        Name of the operation.
    path, kernel : str
        'cuda', 'cpu' or 'reference', and what does the work.
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
    >>> cn.explain(np.ones((64, 1000), np.float32), device="sm_90").kernel
    'K1 warp: lanes of one warp hold a row in registers'
    """

    op: str
    path: str
    kernel: str
    rows: int
    cols: int
    dtype: str
    stats_dtype: str
    launches: tuple[str, ...]
    threads_per_row: int | None
    rows_per_block: int | None
    bytes_floor: int
    bytes_moved: int | None
    copies: tuple[str, ...]
    source: str

    def _sections(self) -> Sections:
        moved = "decided by the library" if self.bytes_moved is None else _bytes(self.bytes_moved)
        if self.bytes_moved:
            moved += f", {self.bytes_moved / self.bytes_floor:.2f} of the floor"
        statistics = "corrected two-pass" if resolve_op(self.op).center else "mean of squares"
        rows = [
            ("path", self.path),
            ("kernel", self.kernel),
            ("problem", f"{self.rows} rows of {self.cols}, {self.dtype}"),
            ("statistics", f"{self.stats_dtype}, {statistics}"),
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
    eps: float | None = None,
    *,
    axis: Any = None,
    order: str = "K",
    out: Any = None,
    return_stats: bool = False,
    device: str | None = None,
    backward: bool = False,
    op: str = "layer_norm",
    residual: Any = None,
    sum_out: Any = None,
) -> Explanation:
    """Tell what `layer_norm`, or its backward, would run for the same arguments.

    Or another operation, which `op` names. Nothing is run.

    Parameters
    ----------
    x : array
        As for `layer_norm`; only shape, strides and dtype are looked at.
    normalized_shape, weight, bias, eps, axis, order, out, return_stats : optional
        As for `layer_norm`; nothing is written to `out`.
    device : str, optional
        A GPU to plan for, such as 'sm_90', when x is not on one: what would run were x and the
        others CuPy arrays of the same shape, strides and dtype there.
    backward : bool, default False
        Explain `layer_norm_backward` instead, for a dy that lies in memory as y does.
    op : str, default 'layer_norm'
        As for `prepare`.
    residual, sum_out : array, optional
        As for `add_layer_norm`, of an operation that adds.

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
    operation = resolve_op(op)
    how = normalized_shape, axis, default_eps(operation, eps), order, return_stats
    added = (residual, sum_out) if operation.residual else ()
    checked = _calls.check(operation, x, weight, bias, out, how, *added)
    if hasattr(checked.x, "is_nested"):
        check_layout("x", checked.x, jagged=False)
    facts, path = checked.facts, _path(checked)
    if backward:
        facts = of_backward(facts)
    plan: Plan | None = None
    copies: tuple[tuple[str, str], ...] = ()
    floor = _floor(facts)
    moved: int | None = floor if path == "cpu" else None
    if device is None and path != "cuda":
        kernel = _in_words(checked, path)
    else:
        if None in facts.strides.values():
            msg = (
                f"device={device!r} needs an x with strides, not a {library_of(checked.x)} array; "
                "pass a NumPy or CuPy array, or a torch tensor, of that shape"
            )
            raise TypeError(msg)
        path, gpu, kernel, moved = "cuda", _gpu(facts, device), "none: x is empty", 0
        if facts.size:
            problem = kernel_problem_of(facts)
            plan, copies = choose_plan(problem, gpu), problem.copies
            kernel, beyond = _kernel(facts, problem, plan)
            moved = floor + beyond + 2 * _x_bytes(facts) * len(copies)
    return Explanation(
        op=op,
        path=path,
        kernel=kernel,
        rows=math.prod(facts.stats_shape),
        cols=facts.N,
        dtype=facts.dtypes["x"],
        stats_dtype=stats_dtype(facts.dtypes["x"]),
        launches=tuple(map(_launch, plan.stages)) if plan else (),
        threads_per_row=plan.threads_per_row if plan else None,
        rows_per_block=plan.rows_per_block if plan else None,
        bytes_floor=floor,
        bytes_moved=moved,
        copies=tuple(f"of {label}: {reason}" for label, reason in copies),
        source=plan.source if plan else "",
    )


def _path(checked: _calls.Checked) -> str:
    library = library_of(checked.x)
    if library == "torch" and checked.facts.strides["x"] is not None:
        library = checked.x.device.type
    return {"numpy": "cpu", "cpu": "cpu", "cupy": "cuda", "cuda": "cuda"}.get(library, "reference")


def _in_words(checked: _calls.Checked, path: str) -> str:
    """What does the work off a GPU."""
    if path == "reference":
        return f"array-API calls of {library_of(checked.x)}"
    from cupynorm._cpu import engine, threads

    return f"{engine.state()[1]}, up to {threads.num_threads()} thread(s) over blocks of rows"


def of_backward(facts: Facts) -> Facts:
    """Those of a backward for a dy, and a dsum where there is a sum, that lies as y does."""
    dtypes = {name: d for name, d in facts.dtypes.items() if name in ("x", "weight")}
    if "weight" in dtypes:
        dtypes["dweight"] = dtypes["weight"]
    if facts.op.center:
        dtypes["dbias"] = dtypes.get("weight") or stats_dtype(dtypes["x"])
    dx = result_strides(facts.shape, facts.strides["x"], "K")
    strides = {"x": facts.strides["x"], "dy": facts.strides["y"], "dx": dx}
    if facts.op.residual:
        strides["dsum"] = facts.strides["y"]
    return facts._replace(op=facts.op.alone, backward=True, dtypes=dtypes, strides=strides)


def _gpu(facts: Facts, name: str | None) -> Device:
    if name is None:
        from cupynorm._cuda import arrays as _cuda

        return _cuda.device_of(getattr(facts.device, "index", facts.device) or 0)
    known = {f"sm_{cc}": device for cc, device in _DEVICES.items()}
    if name not in known:
        msg = f"device={name!r} is not known; choose one of {', '.join(known)}"
        raise ValueError(msg)
    return known[name]


def _kernel(facts: Facts, problem: Problem, plan: Plan) -> tuple[str, int]:
    """What runs, and the bytes that it moves beyond the floor, without copies."""
    beyond = 2 * plan.workspace_bytes
    if facts.backward:
        if plan.family == "column":
            kernel, beyond = _BACKWARD["column"], bytes_beyond_floor(problem, plan)
            if plan.panels > 1:
                kernel = kernel.replace("; 3", f", two sweeps over {plan.panels} panels; 5")
            return kernel, beyond
        return _BACKWARD[plan.family], beyond + _x_bytes(facts) * (plan.passes - 3)
    kernel = _FAMILIES[plan.family]
    if plan.family == "split":  # reads x a second time, from L2 where it fits
        beyond += _x_bytes(facts)
    elif plan.panels > 1:  # the last of which is still on chip
        kernel = kernel.replace("one sweep", f"two sweeps over {plan.panels} panels")
        beyond += _x_bytes(facts) * (plan.panels - 1) // plan.panels
    return kernel, beyond


def _x_bytes(facts: Facts) -> int:
    return facts.size * ITEMSIZE[facts.dtypes["x"]]


def _floor(facts: Facts) -> int:
    """Bytes that any way of doing it moves."""
    dtypes = facts.dtypes
    vectors = sum(ITEMSIZE[d] for name, d in dtypes.items() if name not in ("x", "residual"))
    stats = (
        (1 + facts.op.center) * ITEMSIZE[stats_dtype(dtypes["x"])] * math.prod(facts.stats_shape)
    )
    stats *= facts.stats or facts.backward
    arrays = sum(
        ITEMSIZE[dtypes["residual" if name in ("residual", "sum") else "x"]]
        for name in facts.strides
    )
    return facts.size * arrays + facts.N * vectors + stats


def _launch(stage: Stage) -> str:
    clusters = f" in clusters of {stage.cluster}" if stage.cluster > 1 else ""
    geometry = f"grid {stage.grid[0]}{clusters}, block {stage.block[0]}"
    return f"{stage.name}, {geometry}, shared {stage.shared_bytes} bytes"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"
