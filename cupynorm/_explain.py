"""What a call would run, without running it."""

import html
from dataclasses import dataclass
from typing import Any

from cupynorm import _problem
from cupynorm._arrays import element_strides, library_of
from cupynorm._layout import Layout, layout_of, result_strides
from cupynorm._plan import Device, Plan, choose_plan

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
    "split": "K5 split row: chunk statistics, then merge and normalize",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `layer_norm` would run for a call; prints as aligned text, a table in a notebook.

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
        Each kernel launch: entry, grid, block, shared memory; empty off the GPU.
    threads_per_row, rows_per_block : int or None
        Of the plan; None off the GPU.
    bytes_floor : int
        x read once and y written once, with weight, bias and statistics, in bytes of memory.
    bytes_moved : int or None
        What this plan moves; None where a library decides.
    copies : tuple of str
        Every copy of x or y that the call makes, with its reason.
    source : str
        What set the plan's thresholds.
    """

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

    def _rows(self) -> list[tuple[str, str]]:
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
        return rows + ([("plan from", self.source)] if self.source else [])

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:{width}}  {value}" for key, value in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in self._rows()
        )
        return f"<table>{cells}</table>"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"


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
) -> Explanation:
    """Tell what `layer_norm` would run for the same arguments, without running it.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, axis, order, out, return_stats
        As for `layer_norm`.
    device : str, optional
        A GPU to plan for, such as 'sm_90', when x is not on one: what would run were x and the
        others CuPy arrays of the same shape, strides and dtype there.

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
    from cupynorm._arguments import check_arguments

    call = check_arguments(x, normalized_shape, weight, bias, eps, axis, order, out)
    shape = tuple(call.x.shape)
    rows, cols = _problem.rows_and_cols(shape, call.axes)
    dtypes = tuple(
        None if a is None else _problem.dtype_name(a.dtype)
        for a in (call.x, call.weight, call.bias)
    )
    facts = _Facts(shape, call.axes, rows, cols, dtypes, return_stats)
    if device is not None or call.path == "cupy":
        gpu = _gpu(call.x, device)
        strides = element_strides(call.x) if hasattr(call.x, "strides") else None
        if strides is None:
            msg = f"device={device!r} needs an x with strides, not a {library_of(x)} array"
            raise TypeError(msg)
        to = result_strides(shape, strides, order) if out is None else element_strides(out)
        return _explain_cuda(facts, strides, to, gpu)
    if call.path == "numpy":
        from cupynorm import _cpu, _threads

        kernel = f"{_cpu.describe()}, up to {_threads.num_threads()} thread(s) over blocks of rows"
        return facts.explanation("cpu", kernel, facts.floor())
    kernel = f"array-API calls of {library_of(x)}"
    return facts.explanation("reference", kernel, None)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What every path's explanation states."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rows: int
    cols: int
    dtypes: tuple[str | None, ...]  # of x, weight, bias
    stats: bool

    @property
    def x_bytes(self) -> int:
        return self.rows * self.cols * _problem.ITEMSIZE[str(self.dtypes[0])]

    def floor(self) -> int:
        affine = sum(self.cols * _problem.ITEMSIZE[d] for d in self.dtypes[1:] if d)
        width = _problem.ITEMSIZE[_problem.stats_dtype(str(self.dtypes[0]))]
        return 2 * self.x_bytes + affine + 2 * width * self.rows * self.stats

    def explanation(
        self,
        path: str,
        kernel: str,
        moved: int | None,
        plan: Plan | None = None,
        copies: tuple[str, ...] = (),
    ) -> Explanation:
        return Explanation(
            path=path,
            kernel=kernel,
            rows=self.rows,
            cols=self.cols,
            dtype=str(self.dtypes[0]),
            stats_dtype=_problem.stats_dtype(str(self.dtypes[0])),
            launches=tuple(
                f"{s.name}, grid {s.grid[0]}, block {s.block[0]}, shared {s.shared_bytes} bytes"
                for s in (plan.stages if plan else ())
            ),
            threads_per_row=plan.threads_per_row if plan else None,
            rows_per_block=plan.rows_per_block if plan else None,
            bytes_floor=self.floor(),
            bytes_moved=moved,
            copies=copies,
            source=plan.source if plan else "",
        )


def _gpu(x: Any, name: str | None) -> Device:
    if name is None:
        from cupynorm import _cuda

        return _cuda.device_of(x.device.id)
    known = {f"sm_{cc}": device for cc, device in _DEVICES.items()}
    if name not in known:
        msg = f"device={name!r} is not known; choose one of {', '.join(known)}"
        raise ValueError(msg)
    return known[name]


def _explain_cuda(
    facts: _Facts, x_strides: tuple[int, ...], y_strides: tuple[int, ...], gpu: Device
) -> Explanation:
    if not facts.rows * facts.cols:
        return facts.explanation("cuda", "none: x is empty", 0)
    x_dtype, weight_dtype, bias_dtype = facts.dtypes
    layout = layout_of(
        facts.shape,
        facts.axes,
        x_strides,
        y_strides,
        (str(x_dtype), weight_dtype, bias_dtype),
        facts.stats,
    )
    plan = choose_plan(layout.problem, gpu)
    moved = facts.floor() + plan.workspace_bytes * 2
    moved += facts.x_bytes * (plan.family == "split")  # the second read, from L2 where it fits
    copies = _copies(layout)
    moved += 2 * facts.x_bytes * len(copies)
    return facts.explanation("cuda", _FAMILIES[plan.family], moved, plan, copies)


def _copies(layout: Layout) -> tuple[str, ...]:
    reasons = (("x", layout.copy_x), ("y", layout.copy_y))
    return tuple(f"of {label}: {reason}" for label, reason in reasons if reason)
