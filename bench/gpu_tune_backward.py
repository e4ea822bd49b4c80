"""Measures the neighbours of each row of the backward's plan table."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupynorm._cuda.plan_bwd as plans
from bench import gpu_tune
from bench.gpu_backward import gradient_layout
from bench.gpu_contender import Contender
from bench.gpu_data_backward import GradientInputs, make_gradient_inputs
from bench.gpu_grid import BWD, Case, case
from bench.gpu_session import Session
from bench.gpu_table import Table
from bench.gpu_tune import Kind, Trial, refuse_what_does_not_fit, run_trials
from cupynorm._cuda.launch import launch_bwd, ready_bwd
from cupynorm._cuda.plan import VEC_BYTES, Device, TableRow
from cupynorm._cuda.plan_bwd import BWD_TABLE, ROWS_PER_PARTIAL, GradientPlan
from cupynorm._cuda.plan_cluster import ClusterBwdRow
from cupynorm._problem import ITEMSIZE

__all__ = ["Candidate", "candidates", "tune_backward"]

SHAPES = {
    "warp": ((8, 128), (16, 128), (32, 128), (32, 64), (32, 256)),
    "block": ((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024)),
    "shared": ((256, 256), (512, 512), (1024, 1024)),
}
BLOCKS_PER_SM = (1, 2, 3, 4, 6, 8)
ROWS_OF_A_PARTIAL = (1, 2, 4, 8, 16)
MOST_VECS = 4  # of x, and as many of dy: more cannot stay in registers beside the totals


@dataclass(frozen=True)
class Candidate:
    """A row of the table, after how many rows of x a block leaves a partial sum, how K3 stages."""

    row: TableRow | ClusterBwdRow
    rows_per_partial: int = ROWS_PER_PARTIAL
    copies: bool = True  # of the next row to shared memory, where they fit

    @property
    def family(self) -> str:
        return self.row.family


def candidates(row: TableRow) -> list[Candidate]:
    """The row itself, then what differs from it in one thing, or belongs to the next family."""
    change = dataclasses.replace
    rows = [row]
    families = {"warp": ("warp", "block"), "block": ("warp", "block", "shared")}
    for family in families.get(row.family, (row.family,)):
        for threads_per_row, threads in SHAPES.get(family, ()):
            blocks = max(1, row.threads * row.blocks_per_sm // threads)
            rows.append(
                change(
                    row,
                    family=family,
                    threads_per_row=threads_per_row,
                    threads=threads,
                    blocks_per_sm=1 if family == "shared" else blocks,
                )
            )
    if row.family != "split":
        rows += [change(row, blocks_per_sm=b) for b in BLOCKS_PER_SM]
    made = [Candidate(r) for r in dict.fromkeys(rows) if r == row or _fits(r)]
    made += [Candidate(row, count) for count in ROWS_OF_A_PARTIAL]
    made += [Candidate(row, copies=False)] if row.family == "shared" else []
    return list(dict.fromkeys(made))


def _fits(row: TableRow) -> bool:
    """Threads that a multiprocessor holds; what spills is refused when it is compiled."""
    if row.threads * row.blocks_per_sm > 2048 or row.threads % row.threads_per_row:
        return False
    return row.family == "shared" or -(-row.max_vecs // row.threads_per_row) <= MOST_VECS


def plan_of(candidate: Candidate, problem: Any, device: Device) -> GradientPlan:
    """Plan of a problem under a table row that is not the table's."""
    row, count = candidate.row, candidate.rows_per_partial
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    if row.family == "split":
        return plans._split_plan(problem, row, vecs, device, count)
    return plans._row_plan(problem, row, vecs, device, count, candidate.copies)


def launcher(
    session: Session, case: Case, inputs: GradientInputs, candidate: Candidate
) -> Contender:
    """Contender that launches the plan of a candidate, past the choice that the library makes."""
    from cupynorm._cuda import arrays as _cuda

    layout, index = gradient_layout(case), session.cupy.cuda.runtime.getDevice()
    device = _cuda.device_of(index)
    plan = plan_of(candidate, layout.problem, device)
    refuse_what_does_not_fit(session, plan.stages, device)
    ready = ready_bwd(layout, plan, _cuda.loaded(plan.stages, index))
    empty, weight = session.cupy.empty, inputs.weight
    workspace = empty(max(1, ready.workspace_bytes), dtype="uint8")
    made = [
        (empty(x.shape, x.dtype), *(empty(case.N, weight.dtype) for _ in range(2)))
        for x in inputs.x
    ]

    def call(i: int) -> tuple[Any, ...]:
        arrays = inputs.dy[i], inputs.x[i], inputs.mean[i], inputs.rstd[i], weight, *made[i]
        launch_bwd(ready, [a.data.ptr for a in arrays], workspace.data.ptr)
        return made[i]

    kernel = "+".join(stage.name for stage in plan.stages)
    return Contender(label(candidate), call, kernel=kernel, ours=True)


def label(candidate: Candidate) -> str:
    """A candidate in one word."""
    row = candidate.row
    if isinstance(row, ClusterBwdRow):
        held = f"v{4 * row.chunks}{'+' if row.ahead else ''}"
        return f"cluster/{row.cluster}x{row.threads}/{held}/p{candidate.rows_per_partial}"
    threads = f"{row.threads_per_row}of{row.threads}"
    copies = "" if candidate.copies else "/registers"
    return f"{row.family}/{threads}/b{row.blocks_per_sm}/p{candidate.rows_per_partial}{copies}"


def written(candidate: Candidate, source: str) -> str:
    """What to write into `cupynorm/_plan_bwd.py`."""
    row = gpu_tune.written(candidate.row, source)
    if not candidate.copies:
        return f"no copies of the next row for {row}"
    if candidate.rows_per_partial == ROWS_PER_PARTIAL:
        return row
    return f"`ROWS_PER_PARTIAL = {candidate.rows_per_partial}` for {row}"


BACKWARD = Kind(label, launcher, make_gradient_inputs, written)


def trials() -> Iterator[Trial]:
    """A table row is judged at its longest row and at three quarters of it; K5 at two lengths."""
    for number, row in enumerate(BWD_TABLE):
        most = row.max_vecs if row.family != "split" else 8192
        cases = [
            case(dtype, vecs * VEC_BYTES // ITEMSIZE[dtype], op=BWD)
            for dtype in gpu_tune.DTYPES
            for vecs in (most, max(1, 3 * most // 4))
        ]
        name = f"backward row {number}: {row.family} up to {most} vectors"
        yield Trial(name, candidates(row), cases)
    shared, split = (next(r for r in BWD_TABLE if r.family == f) for f in ("shared", "split"))
    for vecs in (1025, 2048, 3072, 4096):  # three passes of a block alone against K5's five
        cases = [case("bfloat16", vecs * 8, op=BWD), case("float32", vecs * 4, op=BWD)]
        yield Trial(
            f"split: backward, {vecs} vectors", [Candidate(shared), Candidate(split)], cases
        )


def tune_backward(session: Session, table: Table, report: Path, limit: int | None = None) -> str:
    """Measure all trials of the backward until the deadline; write the proposals."""
    from bench.gpu_tune_cluster import cluster_bwd_trials
    from cupynorm._cuda import arrays as _cuda

    device = _cuda.device_of(session.cupy.cuda.runtime.getDevice())
    every = itertools.chain(trials(), cluster_bwd_trials(device))
    return run_trials(session, table, report, every, BACKWARD, limit)
