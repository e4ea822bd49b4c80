"""Runs the row kernels on given values that lie at any address, pitch and batch.

Each run also checks that no byte between the rows is written and, in the simulator, that every
element is. The argument lists are written here a second time, apart from `cupynorm._cuda.arrays`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Plan
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._problem import stats_dtype
from tests.gpu_backend import Machine
from tests.simt.launch import Traffic


@dataclass(frozen=True)
class At:
    """How rows lie in memory; all in elements."""

    offset: int = 0  # of the first row, from a 256-byte boundary
    gap: int = 0  # between rows: the pitch is N + gap
    outer_gap: int = 0  # between batches, besides that

    def strides(self, M: int, N: int) -> tuple[int, int]:
        """Of the outer step and of a row."""
        return M * (N + self.gap) + self.outer_gap, N + self.gap


class Rows:
    """The rows of one array in a machine's memory, and nothing between them."""

    def __init__(
        self, machine: Machine, name: str, dtype: Any, shape: tuple[int, int, int], at: At
    ) -> None:
        outer, M, N = shape
        self.machine, self.dtype = machine, np.dtype(dtype)
        self.strides = at.strides(M, N)
        starts = np.add.outer(np.arange(outer) * self.strides[0], np.arange(M) * self.strides[1])
        self.columns = starts.reshape(-1, 1) + np.arange(N)
        size = self.dtype.itemsize
        nbytes = (int(self.columns[-1, -1]) + 1) * size
        self.memory = machine.memory(nbytes, name, at.offset * size, size)

    @property
    def ptr(self) -> int:
        return self.memory.ptr

    def put(self, values: np.ndarray) -> None:
        for start, row in zip(self.columns[:, 0], values, strict=True):
            self.machine.put(self.memory, row, int(start) * self.dtype.itemsize)

    def get(self) -> np.ndarray:
        """The rows; every element of theirs was written, and nothing else."""
        written = self.machine.written(self.memory).reshape(-1, self.dtype.itemsize)
        if self.machine.name == "simulated":
            assert written[self.columns].all(), "a kernel left an element unwritten"
        between = np.ones(len(written), bool)
        between[self.columns] = False
        assert not written[between].any(), "a kernel wrote between the rows"
        return self.machine.get(self.memory).view(self.dtype)[self.columns]


@dataclass(frozen=True)
class Result:
    """What a plan wrote, and what each of its launches moved (nothing is counted on a GPU)."""

    y: np.ndarray  # (rows, N)
    mean: np.ndarray | None  # (rows,)
    rstd: np.ndarray | None
    plan: Plan
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)

    def bits(self) -> list[bytes]:
        """Of each row: y, mean and rstd."""
        stats = [] if self.mean is None else [self.mean[:, None], self.rstd[:, None]]
        return [b"".join(a[i].tobytes() for a in (self.y, *stats)) for i in range(len(self.y))]


def vector_at(machine: Machine, name: str, values: np.ndarray | None, offset: int) -> Rows | None:
    if values is None:
        return None
    rows = Rows(machine, name, values.dtype, (1, 1, values.size), At(offset))
    rows.put(values[None])
    rows.memory.writable = False
    return rows


def normalize(
    machine: Machine,
    x: np.ndarray,  # (rows, N)
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float = 1e-5,
    outer: int = 1,
    x_at: At = At(),
    y_at: At = At(),
    affine_offset: int = 0,
    stats: bool = True,
    in_place: bool = False,
    device: Device | None = None,
    seed: int | None = 0,
) -> Result:
    """Run the plan for the rows of x, which lie in memory as `x_at` says."""
    rows, N = x.shape
    shape = (outer, rows // outer, N)
    source = Rows(machine, "x", x.dtype, shape, x_at)
    source.put(x)
    source.memory.writable = in_place
    target = source if in_place else Rows(machine, "y", x.dtype, shape, y_at)
    w, b = (
        vector_at(machine, name, values, affine_offset)
        for name, values in (("weight", weight), ("bias", bias))
    )
    accumulator = stats_dtype(x.dtype.name)
    mean, rstd = (
        Rows(machine, name, accumulator, (1, 1, rows), At()) if stats else None
        for name in ("mean", "rstd")
    )
    names = [None if values is None else values.dtype.name for values in (weight, bias)]
    problem = problem_of((x.dtype.name, *names), shape, {"x": source.strides, "y": target.strides}, stats=stats)
    plan = choose_plan(problem, device or machine.device)
    arrays = [source, target, w, b, mean, rstd]
    memories = list({a.ptr: a.memory for a in arrays if a is not None}.values())
    pointers = [0 if a is None else a.ptr for a in arrays]
    traffic = run_plan(machine, plan, problem, pointers, memories, eps, seed)
    y = target.get()
    return Result(y, *(None if a is None else a.get()[0] for a in (mean, rstd)), plan, traffic)


def problem_of(dtypes, shape, strides, *, backward=False, **more):
    labels = ("x", "weight", "dweight", "dbias") if backward else ("x", "weight", "bias")
    named = tuple((a, d) for a, d in zip(labels, dtypes, strict=True) if d)
    steps = tuple((a, (*s[:2], 1)) for a, s in strides.items())
    return Problem(LAYER_NORM, backward, named, *shape, steps, (shape[1], 1), **more)


def run_plan(
    machine: Machine,
    plan: Plan,
    problem: Problem,
    pointers: Sequence[int],  # x, y, weight, bias, mean, rstd
    memories: list[Any],
    eps: float = 1e-5,
    seed: int | None = 0,
) -> tuple[Traffic, ...]:
    """Launch each stage of a plan."""
    rows = (problem.rows, problem.M)
    x_strides = problem.steps("x")[:2]
    arguments = (*pointers, *rows, *x_strides, *problem.steps("y")[:2], problem.N, eps)
    calls: list[tuple[Any, ...]] = [arguments]
    if plan.family == "split":
        workspace = machine.memory(plan.workspace_bytes, "workspace")
        memories = [*memories, workspace]
        sections = (plan.sections, plan.chunks_per_section)
        calls = [
            (pointers[0], workspace.ptr, *rows, *x_strides, problem.N, *sections),
            (*arguments, workspace.ptr, *sections, plan.parts),
        ]
    traffic = [
        machine.run(stage, call, memories, seed)
        for stage, call in zip(plan.stages, calls, strict=True)
    ]
    return tuple(t for t in traffic if t is not None)
