"""Runs the backward kernels on rows that lie at any address, pitch and batch.

Like `tests.row_kernels`: nothing between the rows may be written, every element must be, and the
argument lists are written here a second time, apart from `cupynorm._cuda.arrays`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device
from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Plan
from cupynorm._layout import Problem
from cupynorm._problem import ITEMSIZE, stats_dtype
from tests import oracle
from tests.conftest import np_dtype
from tests.gpu_backend import Machine
from tests.row_cases import values
from tests.row_kernels import At, Rows, problem_of, vector_at
from tests.simt.launch import Traffic

ALL = (True, True, True)
HERE = At()


@dataclass(frozen=True)
class Gradients:
    """What a plan wrote, and what each of its launches moved (nothing is counted on a GPU)."""

    dx: np.ndarray | None  # (rows, N)
    dweight: np.ndarray | None  # (N,)
    dbias: np.ndarray | None
    plan: Plan
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.dx, self.dweight, self.dbias

    def bits(self) -> tuple[bytes | None, ...]:
        """Of dx, dweight and dbias."""
        return tuple(None if a is None else a.tobytes() for a in self.arrays)

    def row_bits(self) -> list[bytes]:
        """Of each row of dx."""
        assert self.dx is not None
        return [row.tobytes() for row in self.dx]


def length(family: str, dtype: str) -> int:
    """A row of the family whose columns fill neither its vectors nor its lanes.

    K3's and K5's are among the shortest, because a block of 1024 threads adds up 32 columns.
    """
    vecs = {"warp": 40, "block": 300, "shared": CHUNK_VECS + 60, "split": CHUNK_VECS + 60}
    vecs["cluster"] = 2 * CHUNK_VECS + 60
    return vecs[family] * VEC_BYTES // ITEMSIZE[dtype] - 1


def device_for(machine: Machine, family: str, sm_count: int | None = None) -> Device:
    """A device on which a row of that length takes the family."""
    device = machine.device
    if family == "split":  # K3 and K4 hold nothing
        device = dataclasses.replace(device, shared_bytes=0)
    if family == "cluster" and device.compute_capability < 90:
        pytest.skip("clusters need sm_90 or newer")
    return device if sm_count is None else dataclasses.replace(device, sm_count=sm_count)


def pair(rows: int, N: int, dtype: str = "float32", **x: float) -> tuple[np.ndarray, np.ndarray]:
    """dy, of mean 1/2, and x: independent of each other, the same for the same shape."""
    slope = np.random.default_rng((N, rows, 2)).standard_normal((rows, N)) + 0.5
    return slope.astype(np_dtype(dtype)), values(rows, N, dtype, **x)


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
    totals: Sequence[str] = (),  # dtypes of dweight and dbias; weight's, or the statistics'
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
    for name, rows_of, at in (("dy", dy, dy_at), ("x", x, x_at)):
        arrays[name] = source = Rows(machine, name, x.dtype, shape, at)
        source.put(rows_of)
        source.memory.writable = False
    mean, rstd = statistics(x, eps)
    arrays["mean"] = vector_at(machine, "mean", mean, 0)
    arrays["rstd"] = vector_at(machine, "rstd", rstd, 0)
    arrays["weight"] = vector_at(machine, "weight", weight, weight_offset)
    target = Rows(machine, "dx", x.dtype, shape, dx_at)
    arrays["dx"] = target if wanted[0] else None
    totals = totals or (kind if weight is None else weight.dtype.name,) * 2
    kept = [name if want else None for name, want in zip(totals, wanted[1:], strict=True)]
    for name, dtype in zip(("dweight", "dbias"), kept, strict=True):
        arrays[name] = (
            None if dtype is None else Rows(machine, name, np_dtype(dtype), (1, 1, N), HERE)
        )
    strides = {n: arrays[n].strides for n in ("dy", "x")}
    if wanted[0]:
        strides["dx"] = target.strides
    names = (x.dtype.name, None if weight is None else weight.dtype.name, *kept)
    problem = problem_of(names, shape, strides, backward=True)
    plan = choose_plan(problem, device or machine.device)
    pointers = [0 if a is None else a.ptr for a in arrays.values()]
    memories = [a.memory for a in arrays.values() if a is not None]
    traffic = run_plan(machine, plan, problem, pointers, memories, seed)
    got = [None if a is None else a.get() for a in (arrays[n] for n in ("dx", "dweight", "dbias"))]
    return Gradients(got[0], *(None if a is None else a[0] for a in got[1:]), plan, traffic)


def run_plan(
    machine: Machine,
    plan: Plan,
    problem: Problem,
    pointers: Sequence[int],  # dy, x, mean, rstd, weight, dx, dweight, dbias
    memories: Sequence[Any],
    seed: int | None = 0,
) -> tuple[Traffic, ...]:
    """Launch each stage of a plan."""
    workspace = machine.memory(max(plan.workspace_bytes, 16), "workspace")
    memories = [*memories, workspace]
    *inputs, dweight, dbias = pointers
    strides = [problem.steps(n if problem.has(n) else "x") for n in ("dy", "x", "dx")]
    steps = [step for s in strides for step in s[:2]]
    common = (*inputs, workspace.ptr, problem.rows, problem.M, *steps, problem.N)
    at = dict(plan.workspace)
    sums_at, gradients_at = at.get("sums", 0), at.get("gradients", 0)
    sums, gradients = workspace.ptr + sums_at, workspace.ptr + gradients_at
    sections = (plan.sections, plan.chunks_per_section)
    calls = {
        "layer_norm_bwd_split_sums": (*common, sums, *sections),
        "layer_norm_bwd_split_merge": (sums, gradients, problem.rows, plan.sections, problem.N),
        "layer_norm_bwd_split_apply": (*common, gradients, plan.partials),
        "column_totals": (
            workspace.ptr, plan.partials, plan.pitch, problem.N, dweight, dbias,
        ),
    }  # fmt: skip
    traffic = [
        machine.run(stage, calls.get(stage.kernel, common), memories, seed) for stage in plan.stages
    ]
    return tuple(t for t in traffic if t is not None)


def run(
    machine: Machine, family: str, dy: np.ndarray, x: np.ndarray, *args: Any, **options: Any
) -> Gradients:
    """As `differentiate`, with K4 or K5 by force where `family` is one of them."""
    device = device_for(machine, family, options.pop("sm_count", None))
    result = differentiate(machine, dy, x, *args, device=device, **options)
    assert result.plan.family == family
    return result


def check(
    result: Gradients,
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None = None,
    eps: float = 1e-5,
) -> None:
    oracle.assert_gradients(result.arrays, dy, x, (1,), weight, eps)
