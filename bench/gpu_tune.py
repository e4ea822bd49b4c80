"""Measures the neighbours of each row of the plan table; proposes rows with their provenance."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupynorm._plan as plans
from bench.gpu_check import EPS
from bench.gpu_contender import Contender, Result, Unavailable, measure
from bench.gpu_copy import copies
from bench.gpu_data import Inputs, make_inputs
from bench.gpu_grid import Case, case
from bench.gpu_session import Session
from bench.gpu_table import Table, rows_of
from cupynorm._launches import ready_fwd
from cupynorm._layout import layout_of
from cupynorm._plan import TABLE, Device, Plan, TableRow
from cupynorm._problem import ITEMSIZE
from cupynorm._source import source_of

__all__ = ["candidates", "launcher", "tune"]

DTYPES = ("bfloat16", "float32")
ROUNDS = 9
WORTH = 0.99  # a neighbour replaces a row when it takes less than this share of its time
REGISTERS = 65536  # of a multiprocessor; a vector takes four, and spills are not proposed
OTHER_REGISTERS = 36
WARP_SHAPES = ((8, 128), (16, 128), (32, 128), (32, 64), (32, 256))
BLOCK_SHAPES = ((64, 64), (64, 128), (128, 128), (256, 256), (512, 512), (1024, 1024))


def candidates(row: TableRow) -> list[TableRow]:
    """The row itself, then what differs from it in one thing, or belongs to the next family."""
    made = [row]
    change = dataclasses.replace
    if row.family == "shared":
        made += [change(row, threads_per_row=t, threads=t) for t in (256, 512, 768, 1024)]
        made += [change(row, blocks_per_sm=2)]
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


def plan_of(row: TableRow, problem: Any, device: Device) -> Plan:
    """Plan of a problem under a table row that is not the table's."""
    if row.family == "split":
        return plans._split_plan(problem, row, device)
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // plans.VEC_BYTES)
    return plans._row_plan(problem, row, vecs)


def launcher(session: Session, case: Case, inputs: Inputs, row: TableRow) -> Contender:
    """Contender that launches the plan of `row`, past the choice that the library would make."""
    from cupynorm import _cuda

    strides, affine = (case.pitch, 1), case.affine_dtype
    shape = (case.rows, case.N)
    layout = layout_of(shape, (1,), strides, strides, (case.dtype, affine, affine), False)
    index = session.cupy.cuda.runtime.getDevice()
    device = _cuda.device_of(index)
    plan = plan_of(row, layout.problem, device)
    if max(s.shared_bytes for s in plan.stages) > device.shared_bytes:
        msg = "beyond the device's shared memory"
        raise Unavailable(msg)
    _refuse_spills(session, plan)
    ready = ready_fwd(layout, plan, _cuda.loaded(plan.stages, index))

    def call(i: int) -> Any:
        x, y = inputs.x[i], inputs.y[i]
        _cuda.run_fwd(ready, x, (1,), inputs.weight, inputs.bias, EPS, y, None, None)
        return y

    kernel = "+".join(stage.name for stage in plan.stages)
    return Contender(label(row), call, kernel=kernel, ours=True)


def _refuse_spills(session: Session, plan: Plan) -> None:
    """No row of the table may spill, so no candidate may, however fast."""
    if session.simulated:
        return
    for stage in plan.stages:
        spilled = session.cupy.RawKernel(source_of(stage), stage.name).local_size_bytes
        if spilled:
            msg = f"{stage.name} keeps {spilled} bytes per thread in local memory"
            raise Unavailable(msg)


def label(row: TableRow) -> str:
    """A candidate in one word."""
    return (
        f"{row.family}/{row.threads_per_row}of{row.threads}/r{row.rows_per_group}"
        f"/b{row.blocks_per_sm}"
    )


def trials(device: Device) -> Iterator[tuple[str, list[TableRow], list[Case]]]:
    """Name of each threshold, its candidates, and the cases that judge them.

    A table row is judged at its longest row and at three quarters of it.
    """
    for number, row in enumerate(TABLE[:-1]):
        vecs = [row.max_vecs, max(1, 3 * row.max_vecs // 4)]
        cases = [case(d, v * 16 // ITEMSIZE[d]) for d in DTYPES for v in vecs]
        yield f"row {number}: {row.family} up to {row.max_vecs} vectors", candidates(row), cases
    for vecs in (2048 + 1, 4096, 8192, 14336):  # where a block of its own competes with K5
        shared = next(r for r in TABLE if r.family == "shared" and vecs <= r.max_vecs)
        for share in (0.05, 0.25, 0.5, 1.0, 2.0):
            rows = max(1, int(share * device.sm_count))
            few = Case("bfloat16", rows, vecs * 8, "few rows")
            name = f"split: {vecs} vectors, {share:g} rows per multiprocessor"
            yield name, [shared, TABLE[-1]], [few]


def tune(session: Session, table: Table, report: Path, limit: int | None = None) -> str:
    """Measure all trials until the deadline; write the proposals next to the table."""
    from cupynorm import _cuda

    device = _cuda.device_of(session.cupy.cuda.runtime.getDevice())
    lines, done = [], 0
    for name, rows, cases in trials(device):
        if session.time_left() < 0 or done == limit:
            break
        if session.simulated:
            rows, cases = rows[:3], [Case("float32", 3, c.N, c.group) for c in cases[-1:]]
        times = [_trial(session, table, rows, c, name) for c in cases]
        if session.simulated:
            lines += [f"### {name}", "", "Simulated: every candidate ran, none was timed.", ""]
        else:
            lines += [f"### {name}", "", *_proposal(rows, times, report.parent.name, name), ""]
        report.write_text(
            "\n".join(["# Proposals for the plan table", "", *lines]), encoding="utf-8"
        )
        done += 1
    return f"{done} thresholds; proposals in {report.name}"


def _trial(
    session: Session, table: Table, rows: list[TableRow], case: Case, name: str
) -> dict[str, Result]:
    inputs = make_inputs(session, case)
    builders = [
        (label(r), lambda r=r: launcher(session, case, inputs, r)) for r in dict.fromkeys(rows)
    ]
    results = measure(session, case, inputs, builders + copies(session, case, inputs), ROUNDS)
    for result in results:
        result.note = f"{name}. {result.note}"
    table.add(rows_of(case, results))
    return {r.name: r for r in results}


def _proposal(
    rows: list[TableRow], trials: list[dict[str, Result]], folder: str, name: str
) -> list[str]:
    """A table of geometric means, and the row to write if a neighbour is worth it."""
    means = {}
    for row in rows:
        times = [t[label(row)].times for t in trials]
        if all(t is not None for t in times):
            means[row] = math.exp(sum(math.log(t.median) for t in times if t) / len(times))
    if rows[0] not in means:
        return ["The row of today has no time here: nothing is proposed."]
    today = means[rows[0]]
    lines = ["| candidate | µs, geometric mean | against today's |", "|---|---|---|"]
    ordered = sorted(means, key=means.__getitem__)
    lines += [f"| {label(r)} | {means[r]:.2f} | {means[r] / today:.3f} |" for r in ordered]
    best = ordered[0] if means[ordered[0]] < WORTH * today else rows[0]
    source = f"bench/results/{folder}/tune.csv, {name.partition(':')[0]}"
    verdict = "keep" if best is rows[0] else "change to"
    if name.startswith("split"):
        return [*lines, "", f"{verdict} {best.family}"]
    shown = ", ".join(repr(v) for v in dataclasses.astuple(best)[:-1])
    return [*lines, "", f"{verdict} `TableRow({shown}, {source!r})`"]
