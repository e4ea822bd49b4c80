"""Measures the neighbours of each row of the plan tables; proposes rows with their provenance.

The only file here that names the planners: `python -m bench.gpu --only tune`. A candidate is a row
of `cupynorm/_cuda/rows.py`; one that takes less than WORTH of the time of today's, in the geometric
mean over its cases, is proposed with this run as its `source`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple
from unittest import mock

from bench.cases import BWD, EPS, FEW, FWD, ITEMSIZE, OPS, Case, sized
from bench.contender import Contender, Result, measure, refuse
from bench.device import Inputs, make_inputs
from bench.machine import ROOT
from bench.peers import copies
from bench.table import Table, rows_of

DTYPES = ("bfloat16", "float32")
SECONDS = 0.6
WORTH = 0.99
REGISTERS, OTHER_REGISTERS = 65536, 36  # of a multiprocessor; of a thread, beside its vectors
MOST_THREADS = 2048  # of a multiprocessor
# Threads per row and of a block, by family.
SHAPES = {
    "warp": ((8, 128), (16, 128), (32, 128), (32, 64), (32, 256)),
    "block": ((64, 64), (64, 128), (128, 128), (256, 256), (512, 512), (1024, 1024)),
    "shared": ((256, 256), (512, 512), (768, 768), (1024, 1024)),
}
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)  # per multiprocessor
CLUSTERS = tuple(itertools.product((2, 4, 8), ((256, 3), (256, 2), (512, 1), (768, 1))))
PARTIALS = (1, 2, 8, 16)
SHARES = (0.05, 0.25, 0.5, 1.0, 2.0)  # blocks per multiprocessor where rows are few


@dataclass(frozen=True)
class Candidate:
    """A row of a table, rows of x until a block leaves a partial sum, whether K3 and K4 copy."""

    row: Any
    rows_per_partial: int | None = None
    copies: bool = True

    @property
    def label(self) -> str:
        r = self.row
        text = f"{r.family}/{r.cluster}x{r.threads}/{r.threads_per_row}/r{r.rows_per_group}"
        text += f"/b{r.blocks_per_sm}" + (f"/v{r.chunks}" if r.chunks else "")
        text += f"/p{self.rows_per_partial}" if self.rows_per_partial else ""
        return text + ("" if self.copies else "/registers")

    def written(self, source: str) -> str:
        few = f"`ROWS_PER_PARTIAL = {self.rows_per_partial}` for " * bool(self.rows_per_partial)
        registers = "no copies of the next row for " * (not self.copies)
        return f"{few}{registers}`{replace(self.row, source=source)!r}`"


class Trial(NamedTuple):
    """Candidates, of which the first is today's, and the cases that judge them."""

    name: str
    candidates: list[Candidate]
    cases: list[Case]


def neighbours(row: Any, backward: bool, table: tuple[Any, ...]) -> list[Candidate]:
    """The row, what differs from it in one thing, and those that other families would put there."""
    made, change = [row], {"rows_per_group": 1}
    families = {"warp": ("warp", "block"), "block": ("warp", "block", "shared")}
    for family in families.get(row.family, (row.family,)):
        for lanes, threads in SHAPES.get(family, ()):
            blocks = max(1, row.threads * row.blocks_per_sm // threads) if family != "shared" else 1
            change |= {"family": family, "threads_per_row": lanes, "threads": threads}
            made.append(replace(row, **change, blocks_per_sm=blocks))
    if row.family == "cluster" and not backward:
        for count, (threads, blocks) in CLUSTERS:
            change = {"cluster": count, "threads": threads, "threads_per_row": count * threads}
            made.append(replace(row, **change, blocks_per_sm=blocks, blocks_per_sm_f64=blocks))
    elif row.family != "cluster":
        made += [replace(row, blocks_per_sm=b) for b in BLOCKS]
    if row.family == "warp" and not backward:
        made += [replace(row, rows_per_group=r) for r in (1, 2, 4)]
    if row.family in ("cluster", "shared"):
        beside = {"split", "shared", *(("cluster",) if backward else ())}
        made += [r for r in table if r.family in beside and r.max_vecs >= row.max_vecs]
    found = [Candidate(r) for r in dict.fromkeys(made) if r == row or _fits(r, backward)]
    if backward:
        found += [Candidate(row, rows_per_partial=count) for count in PARTIALS]
        found += [Candidate(row, copies=False)] if row.family in ("shared", "cluster") else []
    return list({c.label: c for c in reversed(found)}.values())[::-1]


def _fits(row: Any, backward: bool) -> bool:
    """Threads and registers that a multiprocessor has; what spills is refused once compiled."""
    threads = row.threads * row.blocks_per_sm
    if row.family in ("shared", "cluster", "split"):
        return threads <= MOST_THREADS
    vecs = -(-row.max_vecs // row.threads_per_row) * row.rows_per_group * (1 + backward)
    held = (4 * vecs + OTHER_REGISTERS) * threads
    return threads <= MOST_THREADS and row.threads % row.threads_per_row == 0 and held <= REGISTERS


def trials(device: Any) -> Iterator[Trial]:
    """A row is judged at its longest row of x and at three quarters; then where rows are few."""
    from cupynorm._cuda import rows

    for op, table in ((FWD, rows.FORWARD), (BWD, rows.BACKWARD)):
        for number, row in enumerate(table):
            if row.cluster > device.clusters or row.family == "split":
                continue
            lengths = sorted({row.max_vecs, max(1, 3 * row.max_vecs // 4)})
            cases = [sized(op, d, v * 16 // ITEMSIZE[d]) for d in DTYPES for v in lengths]
            name = f"{OPS[op].direction} row {number}: {row.family} to {row.max_vecs} vectors"
            yield Trial(name, neighbours(row, op == BWD, table), cases)
            for share in SHARES if row.family in ("shared", "cluster") else ():
                M = max(1, int(share * device.sm_count) // row.cluster)
                few = [Case(op, FEW, "bfloat16", (M, row.max_vecs * 8))]
                pair = [Candidate(row), Candidate(table[-1])]
                yield Trial(f"split: {name}, {share:g} blocks per multiprocessor", pair, few)


def launcher(inputs: Inputs, candidate: Candidate) -> Contender:
    """Contender that launches a candidate's plan, past the choice that the library would make."""
    from cupynorm._cuda import arrays, launch, rows
    from cupynorm._cuda.source import source_of
    from cupynorm._layout import Facts, kernel_problem_of
    from cupynorm._ops import LAYER_NORM

    case, cupy, empty = inputs.case, inputs.device.lib, inputs.device.lib.empty
    index, backward, weight = cupy.cuda.runtime.getDevice(), case.op == BWD, inputs.weight
    names = ("weight", "dweight", "dbias") if backward else ("weight", "bias")
    dtypes = {"x": case.dtype} | dict.fromkeys(names, case.affine_dtype)
    strides = dict.fromkeys(("x", "dy") if backward else ("x", "y"), (case.pitch, 1))
    strides |= {"dx": (case.N, 1)} if backward else {}
    problem = kernel_problem_of(Facts(LAYER_NORM, backward, case.shape, (1,), dtypes, strides))
    device, about = arrays.device_of(index), {}
    if backward:
        about = {"rows_per_partial": candidate.rows_per_partial, "copies": candidate.copies}
    plan = rows.plan_of(problem, device, candidate.row, **about)
    for stage in plan.stages:  # no row of a table may spill, so no candidate may, however fast
        if stage.shared_bytes > device.shared_bytes:
            refuse("beyond the device's shared memory")
        if not inputs.device.simulated:
            kernel = cupy.RawKernel(source_of(stage), stage.name)
            if kernel.local_size_bytes:
                refuse(f"{stage.name} keeps {kernel.local_size_bytes} bytes in local memory")
    with mock.patch.object(launch, "choose_plan", lambda *_: plan):
        ready = arrays.ready_on(index, problem)
    workspace = empty(max(16, ready.workspace_bytes), dtype="uint8")
    dtype = None if weight is None else weight.dtype
    grads = [(empty(x.shape, x.dtype), *(empty(case.N, dtype) for _ in "wb")) for x in inputs.x]

    def call(i: int) -> Any:
        if backward:
            given = inputs.dy[i], inputs.x[i], inputs.mean[i], inputs.rstd[i], weight, *grads[i]
        else:
            given = inputs.x[i], inputs.y[i], weight, inputs.bias, None, None
        pointers = [0 if a is None else a.data.ptr for a in given]
        ready.run(pointers, EPS, workspace.data.ptr)
        return grads[i] if backward else inputs.y[i]

    return Contender(call, "+".join(stage.name for stage in plan.stages), ours=True)


def tune(device: Any, table: Table, report: Path) -> str:
    """Measure trials until the deadline; write the proposals as they come."""
    from cupynorm._cuda import arrays

    gpu = arrays.device_of(device.lib.cuda.runtime.getDevice())
    here, lines, done = report.parent.resolve(), ["# Proposals for the plan tables", ""], 0
    # As the table will name the folder, once it is committed.
    inside = here.relative_to(ROOT).as_posix() if here.is_relative_to(ROOT) else ""
    folder = inside or f"bench/results/{here.name}"
    for trial in trials(gpu):
        if device.time_left() < 0 or (device.simulated and done == 2):
            break
        if device.simulated:
            few = [replace(c, dtype="float32", shape=(3, c.N)) for c in trial.cases[-1:]]
            trial = Trial(trial.name, trial.candidates[:3], few)
        results = [_measured(device, table, trial, case) for case in trial.cases]
        said = ["Simulated: every candidate ran, none was timed."]
        said = said if device.simulated else proposal(trial, results, folder)
        lines += [f"### {trial.name}", "", *said, ""]
        report.write_text("\n".join(lines), encoding="utf-8")
        done += 1
    return f"{done} thresholds; proposals in {report.name}"


def _measured(device: Any, table: Table, trial: Trial, case: Case) -> dict[str, Result]:
    inputs = make_inputs(device, case)
    builders = [(c.label, partial(launcher, inputs, c)) for c in trial.candidates]
    results = measure(device, inputs, [*builders, *copies(inputs)], SECONDS)
    for result in results:
        result.note = f"{trial.name}. {result.note}"
    table.add(rows_of(case, results))
    return {r.name: r for r in results}


def proposal(trial: Trial, results: list[dict[str, Result]], folder: str) -> list[str]:
    """A table of geometric means, and what to write if a neighbour is worth it."""
    first, means = trial.candidates[0], {}
    for candidate in trial.candidates:
        if all(times := [r[candidate.label].times for r in results]):
            means[candidate] = geometric_mean(t.median for t in times if t)
    if first not in means:
        return ["The row of today has no time here: nothing is proposed."]
    ordered = sorted(means, key=means.__getitem__)
    lines = ["| candidate | µs, geometric mean | against today's |", "|---|---|---|"]
    lines += [f"| {c.label} | {means[c]:.2f} | {means[c] / means[first]:.3f} |" for c in ordered]
    best = ordered[0] if means[ordered[0]] < WORTH * means[first] else first
    source = f"{folder}/tune.csv, {trial.name.partition(':')[0]}"
    return [*lines, "", f"{'keep' if best == first else 'change to'} {best.written(source)}"]
