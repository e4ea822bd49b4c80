"""Runs the backward kernels on rows that lie at any address, pitch and batch.

Like `tests.row_kernels`: nothing between the rows may be written, every element must be, and the
argument lists are written here a second time, apart from `cupynorm._cuda`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupynorm._plan import Device
from cupynorm._plan_bwd import GradientPlan, choose_plan_bwd
from cupynorm._problem import GradientProblem, stats_dtype
from tests import oracle
from tests.gpu_backend import Machine
from tests.row_kernels import At, Rows, vector_at
from tests.simt.launch import Traffic

ALL = (True, True, True)
HERE = At()


@dataclass(frozen=True)
class Gradients:
    """What a plan wrote, and what each of its launches moved (nothing is counted on a GPU)."""

    dx: np.ndarray | None  # (rows, N)
    dweight: np.ndarray | None  # (N,)
    dbias: np.ndarray | None
    plan: GradientPlan
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)

    def bits(self) -> tuple[bytes | None, ...]:
        return tuple(None if a is None else a.tobytes() for a in self[:3])

    def __getitem__(self, item: Any) -> Any:
        return (self.dx, self.dweight, self.dbias)[item]


def statistics(x: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """The mean and rstd that a forward leaves: the exact ones, rounded."""
    kind = stats_dtype(x.dtype.name)
    _, mean, rstd = oracle.layer_norm(x, (1,), None, None, eps)
    return mean[:, 0].astype(kind), rstd[:, 0].astype(kind)


def differentiate(
    machine: Machine,
    dy: np.ndarray,  # (rows, N)
    x: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    eps: float = 1e-5,
    wanted: Sequence[bool] = ALL,
    totals_dtype: str | None = None,  # of dweight and dbias; weight's, or that of the statistics
    outer: int = 1,
    dy_at: At = HERE,
    x_at: At = HERE,
    dx_at: At = HERE,
    weight_offset: int = 0,
    device: Device | None = None,
    seed: int | None = 0,
) -> Gradients:
    """Run the plan for rows that lie in memory as `dy_at`, `x_at` and `dx_at` say."""
    rows, N = x.shape
    shape = (outer, rows // outer, N)
    kind = stats_dtype(x.dtype.name)
    arrays: dict[str, Rows | None] = {}
    for name, values, at in (("dy", dy, dy_at), ("x", x, x_at)):
        arrays[name] = source = Rows(machine, name, x.dtype, shape, at)
        source.put(values)
        source.memory.writable = False
    mean, rstd = statistics(x, eps)
    arrays["mean"] = vector_at(machine, "mean", mean, 0)
    arrays["rstd"] = vector_at(machine, "rstd", rstd, 0)
    arrays["weight"] = vector_at(machine, "weight", weight, weight_offset)
    target = Rows(machine, "dx", x.dtype, shape, dx_at)
    arrays["dx"] = target if wanted[0] else None
    totals = totals_dtype or (kind if weight is None else weight.dtype.name)
    dweight, dbias = (
        Rows(machine, name, np.dtype(totals), (1, 1, N), HERE) if want else None
        for name, want in zip(("dweight", "dbias"), wanted[1:], strict=True)
    )
    problem = GradientProblem(
        x.dtype.name,
        None if weight is None else weight.dtype.name,
        *(totals if want else None for want in wanted[1:]),
        bool(wanted[0]),
        *shape,
        *((*a.strides, 1) for a in (arrays["dy"], arrays["x"], target)),
    )
    plan = choose_plan_bwd(problem, device or machine.device)
    traffic = run_plan(machine, plan, problem, arrays, dweight, dbias, seed)
    results = [arrays["dx"], dweight, dbias]
    got = [None if a is None else a.get() for a in results]
    return Gradients(got[0], *(None if a is None else a[0] for a in got[1:]), plan, traffic)


def run_plan(
    machine: Machine,
    plan: GradientPlan,
    problem: GradientProblem,
    arrays: dict[str, Rows | None],
    dweight: Rows | None,
    dbias: Rows | None,
    seed: int | None,
) -> tuple[Traffic, ...]:
    """Launch each stage of a plan."""
    workspace = machine.memory(max(plan.workspace_bytes, 16), "workspace")
    memories = [a.memory for a in (*arrays.values(), dweight, dbias) if a is not None]
    memories = [*memories, workspace]
    pointers = [0 if a is None else a.ptr for a in arrays.values()]
    strides = (problem.dy_strides, problem.x_strides, problem.dx_strides)
    steps = [step for s in strides for step in s[:2]]
    common = (*pointers, workspace.ptr, problem.rows, problem.M, *steps, problem.N)
    sums, gradients = workspace.ptr + plan.sums_at, workspace.ptr + plan.gradients_at
    sections = (plan.sections, plan.chunks_per_section)
    calls = {
        "layer_norm_bwd_split_sums": (*common, sums, *sections),
        "layer_norm_bwd_split_merge": (sums, gradients, problem.rows, plan.sections, problem.N),
        "layer_norm_bwd_split_apply": (*common, gradients, plan.partials),
        "column_totals": (
            workspace.ptr,
            plan.partials,
            plan.pitch,
            problem.N,
            *(0 if a is None else a.ptr for a in (dweight, dbias)),
        ),
    }
    traffic = [
        machine.run(stage, calls.get(stage.kernel, common), memories, seed) for stage in plan.stages
    ]
    return tuple(t for t in traffic if t is not None)
