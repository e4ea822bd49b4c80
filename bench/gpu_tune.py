"""Measures the neighbours of each row of a plan table; proposes rows with their provenance."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupynorm._cuda.plan as plans
from bench.gpu_check import EPS
from bench.gpu_contender import Contender, Result, Unavailable, measure
from bench.gpu_copy import copies
from bench.gpu_data import Inputs, make_inputs
from bench.gpu_grid import Case, case
from bench.gpu_machine import ROOT
from bench.gpu_session import Session
from bench.gpu_table import Table, rows_of
from cupynorm._cuda.launch import ready_fwd
from cupynorm._cuda.plan import TABLE, Device, Plan, Stage, TableRow
from cupynorm._cuda.plan_cluster import ClusterRow
from cupynorm._cuda.source import source_of
from cupynorm._layout import layout_of
from cupynorm._problem import ITEMSIZE

__all__ = [
    "Kind",
    "Trial",
    "candidates",
    "label",
    "launcher",
    "refuse_what_does_not_fit",
    "run_trials",
    "tune",
    "written",
]

DTYPES = ("bfloat16", "float32")
ROUNDS = 9
WORTH = 0.99  # a neighbour replaces a row when it takes less than this share of its time
REGISTERS = 65536  # of a multiprocessor; a vector takes four, and spills are not proposed
OTHER_REGISTERS = 36
WARP_SHAPES = ((8, 128), (16, 128), (32, 128), (32, 64), (32, 256))
BLOCK_SHAPES = ((64, 64), (64, 128), (128, 128), (256, 256), (512, 512), (1024, 1024))


@dataclass(frozen=True)
class Trial:
    """Candidates, of which the first is today's, and the cases that judge them."""

    name: str
    candidates: list[Any]
    cases: list[Case]


@dataclass(frozen=True)
class Kind:
    """How the candidates of a plan table are named, run, and written down."""

    label: Callable[[Any], str]
    launcher: Callable[[Session, Case, Any, Any], Contender]
    make_inputs: Callable[[Session, Case], Any]
    written: Callable[[Any, str], str]  # candidate and provenance, as the table's file has it


@dataclass(frozen=True, slots=True)
class Carried(TableRow):
    """A row of K3 whose rows go through registers, as on sm_75, not by asynchronous copies."""


def candidates(row: TableRow) -> list[TableRow]:
    """The row itself, then what differs from it in one thing, or belongs to the next family."""
    made = [row]
    change = dataclasses.replace
    if row.family == "shared":
        made += [change(row, threads_per_row=t, threads=t) for t in (256, 512, 768, 1024)]
        made += [change(row, blocks_per_sm=2), Carried(*dataclasses.astuple(row))]
    elif row.family in ("warp", "block"):
        for family, shapes in (("warp", WARP_SHAPES), ("block", BLOCK_SHAPES)):
            made += [
                change(
                    row,
                    family=family,
                    threads_per_row=t,
                    threads=n,
                    rows_per_group=1,
                    blocks_per_sm=max(1, row.threads * row.blocks_per_sm // n),
                )
                for t, n in shapes
            ]
        if row.family == "warp":
            made += [change(row, rows_per_group=r) for r in (1, 2, 4)]
        made += [change(row, blocks_per_sm=b) for b in (2, 4, 6, 8, 12, 16)]
    return [r for r in dict.fromkeys(made) if r is row or _fits(r)]


def _fits(row: TableRow) -> bool:
    if row.threads * row.blocks_per_sm > 2048:  # threads that a multiprocessor holds
        return False
    if row.family == "shared":
        return True
    vecs = -(-row.max_vecs // row.threads_per_row) * row.rows_per_group
    registers = REGISTERS // (row.threads * row.blocks_per_sm)
    return row.threads % row.threads_per_row == 0 and 4 * vecs + OTHER_REGISTERS <= registers


def plan_of(row: TableRow | ClusterRow, problem: Any, device: Device) -> Plan:
    """Plan of a problem under a table row that is not the table's."""
    if row.family == "split":
        return plans._split_plan(problem, row, device)
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // plans.VEC_BYTES)
    if isinstance(row, Carried):
        device = dataclasses.replace(device, compute_capability=75)
    return plans._row_plan(problem, row, vecs, device)


def launcher(session: Session, case: Case, inputs: Inputs, row: TableRow | ClusterRow) -> Contender:
    """Contender that launches the plan of `row`, past the choice that the library would make."""
    from cupynorm._cuda import arrays as _cuda

    strides, affine = (case.pitch, 1), case.affine_dtype
    shape = (case.rows, case.N)
    layout = layout_of(shape, (1,), strides, strides, (case.dtype, affine, affine), False)
    index = session.cupy.cuda.runtime.getDevice()
    device = _cuda.device_of(index)
    plan = plan_of(row, layout.problem, device)
    refuse_what_does_not_fit(session, plan.stages, device)
    ready = ready_fwd(layout, plan, _cuda.loaded(plan.stages, index))

    def call(i: int) -> Any:
        x, y = inputs.x[i], inputs.y[i]
        _cuda.run_fwd(ready, x, (1,), inputs.weight, inputs.bias, EPS, y, None, None)
        return y

    kernel = "+".join(stage.name for stage in plan.stages)
    return Contender(label(row), call, kernel=kernel, ours=True)


def refuse_what_does_not_fit(session: Session, stages: Iterable[Stage], device: Device) -> None:
    """No row of a table may spill, so no candidate may, however fast."""
    for stage in stages:
        if stage.shared_bytes > device.shared_bytes:
            msg = "beyond the device's shared memory"
            raise Unavailable(msg)
        if session.simulated:
            continue
        spilled = session.cupy.RawKernel(source_of(stage), stage.name).local_size_bytes
        if spilled:
            msg = f"{stage.name} keeps {spilled} bytes per thread in local memory"
            raise Unavailable(msg)


def label(row: TableRow | ClusterRow) -> str:
    """A candidate in one word."""
    if isinstance(row, ClusterRow):
        return f"cluster/{row.cluster}x{row.threads}/b{row.blocks_per_sm}"
    return (
        f"{row.family}/{row.threads_per_row}of{row.threads}/r{row.rows_per_group}"
        f"/b{row.blocks_per_sm}{'/registers' if isinstance(row, Carried) else ''}"
    )


def written(row: Any, source: str) -> str:
    """A row as its table has it."""
    shown = ", ".join(repr(v) for v in dataclasses.astuple(row)[:-1])
    carried = "no asynchronous copies for " if isinstance(row, Carried) else ""
    name = "TableRow" if isinstance(row, TableRow) else type(row).__name__
    return f"{carried}`{name}({shown}, {source!r})`"


FORWARD = Kind(label, launcher, make_inputs, written)


def trials(device: Device) -> Iterator[Trial]:
    """A table row is judged at its longest row and at three quarters of it."""
    for number, row in enumerate(TABLE[:-1]):
        vecs = [row.max_vecs, max(1, 3 * row.max_vecs // 4)]
        cases = [case(d, v * 16 // ITEMSIZE[d]) for d in DTYPES for v in vecs]
        name = f"row {number}: {row.family} up to {row.max_vecs} vectors"
        yield Trial(name, candidates(row), cases)
    for vecs in (2048 + 1, 4096, 8192, 14336):  # where a block of its own competes with K5
        shared = next(r for r in TABLE if r.family == "shared" and vecs <= r.max_vecs)
        for share in (0.05, 0.25, 0.5, 1.0, 2.0):
            rows = max(1, int(share * device.sm_count))
            few = Case("bfloat16", rows, vecs * 8, "few rows")
            name = f"split: {vecs} vectors, {share:g} rows per multiprocessor"
            yield Trial(name, [shared, TABLE[-1]], [few])


def tune(session: Session, table: Table, report: Path, limit: int | None = None) -> str:
    """Measure all trials of the forward until the deadline; write the proposals."""
    from bench.gpu_tune_cluster import cluster_trials
    from cupynorm._cuda import arrays as _cuda

    device = _cuda.device_of(session.cupy.cuda.runtime.getDevice())
    every = itertools.chain(trials(device), cluster_trials(device))
    return run_trials(session, table, report, every, FORWARD, limit)


def run_trials(
    session: Session,
    table: Table,
    report: Path,
    trials: Iterable[Trial],
    kind: Kind,
    limit: int | None,
) -> str:
    """Measure trials until the deadline, at most `limit`; write the proposals as they come."""
    lines, done = [], 0
    for trial in trials:
        if session.time_left() < 0 or done == limit:
            break
        if session.simulated:
            few = [dataclasses.replace(c, dtype="float32", rows=3) for c in trial.cases[-1:]]
            trial = Trial(trial.name, trial.candidates[:3], few)
        times = [_measured(session, table, trial, c, kind) for c in trial.cases]
        source = f"{_shown(report.parent)}/tune.csv, {trial.name.partition(':')[0]}"
        said = ["Simulated: every candidate ran, none was timed."]
        lines += [f"### {trial.name}", ""]
        lines += said if session.simulated else _proposal(trial, times, kind, source)
        lines += [""]
        text = "\n".join(["# Proposals for the plan table", "", *lines])
        report.write_text(text, encoding="utf-8")
        done += 1
    return f"{done} thresholds; proposals in {report.name}"


def _shown(folder: Path) -> str:
    """The folder as the table will name it, once it is committed."""
    here = folder.resolve()
    inside = here.is_relative_to(ROOT)
    return here.relative_to(ROOT).as_posix() if inside else f"bench/results/{here.name}"


def _measured(
    session: Session, table: Table, trial: Trial, case: Case, kind: Kind
) -> dict[str, Result]:
    inputs = kind.make_inputs(session, case)
    builders = [
        (kind.label(c), lambda c=c: kind.launcher(session, case, inputs, c))
        for c in dict.fromkeys(trial.candidates)
    ]
    results = measure(session, case, inputs, builders + copies(session, case, inputs), ROUNDS)
    for result in results:
        result.note = f"{trial.name}. {result.note}"
    table.add(rows_of(case, results))
    return {r.name: r for r in results}


def _proposal(trial: Trial, results: list[dict[str, Result]], kind: Kind, source: str) -> list[str]:
    """A table of geometric means, and what to write if a neighbour is worth it."""
    means = {}
    for candidate in trial.candidates:
        times = [r[kind.label(candidate)].times for r in results]
        if all(t is not None for t in times):
            means[candidate] = math.exp(sum(math.log(t.median) for t in times if t) / len(times))
    first = trial.candidates[0]
    if first not in means:
        return ["The row of today has no time here: nothing is proposed."]
    today = means[first]
    lines = ["| candidate | µs, geometric mean | against today's |", "|---|---|---|"]
    ordered = sorted(means, key=means.__getitem__)
    lines += [f"| {kind.label(c)} | {means[c]:.2f} | {means[c] / today:.3f} |" for c in ordered]
    best = ordered[0] if means[ordered[0]] < WORTH * today else first
    verdict = "keep" if best == first else "change to"
    shown = best.family if trial.name.startswith("split") else kind.written(best, source)
    return [*lines, "", f"{verdict} {shown}"]
