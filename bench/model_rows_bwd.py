"""The backward of rows with unit stride: K1, K2, K3, K5, and the sums over rows that all leave."""

import math
from typing import Any

from bench.model_gpus import Gpu
from bench.model_launches import (
    BARRIER,
    CLUSTER_BARRIER,
    ISSUE,
    NEAR,
    SHUFFLE,
    Launch,
    Moved,
    accumulator,
    cluster_of,
    family,
    group_run,
    vector_bytes,
    work,
)
from cupynorm._cuda.plan import CHUNK_THREADS, CHUNK_VECS, VEC_BYTES, Stage
from cupynorm._cuda.plan_bwd import APPLY_VECS, GradientPlan
from cupynorm._problem import ITEMSIZE, GradientProblem

__all__ = ["totals_launch"]

CHUNK_LANE_VECS = CHUNK_VECS // CHUNK_THREADS
TOTALS_PER_ELEMENT = 8  # instructions: address, load, addition, loop; an estimate


def _arrays(problem: GradientProblem) -> tuple[int, int]:
    """Bytes of x, and of mean."""
    x = problem.rows * problem.N * ITEMSIZE[problem.x_dtype]
    return x, problem.rows * accumulator(problem)


def _wanted(problem: Any) -> int:
    return (problem.dweight_dtype is not None) + (problem.dbias_dtype is not None)


def _partials(problem: GradientProblem, plan: GradientPlan, pitch: int) -> int:
    return _wanted(problem) * plan.partials * pitch * accumulator(problem)


def totals_launch(problem: Any, plan: GradientPlan, stage: Stage) -> Launch:
    """`column_totals`: reads the partials, 32 columns a block."""
    read = _wanted(problem) * plan.partials * problem.N * accumulator(problem)
    per_lane = TOTALS_PER_ELEMENT * -(-plan.partials // 32)
    return Launch(
        stage=stage,
        moved=Moved(written=vector_bytes(problem, "dweight", "dbias"), again={"workspace": read}),
        units=stage.grid[0],
        blocks=stage.grid[0],
        trips=1 + plan.partials / 32 / 4,  # the loop has about four loads on their way
        cycles=ISSUE * per_lane + 5 * SHUFFLE + BARRIER,
        instructions=per_lane * stage.block[0] * stage.grid[0],
    )


@family(GradientProblem, "warp", "block", "shared", "cluster")
def persistent(problem: GradientProblem, plan: GradientPlan, gpu: Gpu) -> list[Launch]:
    """K1 to K4: a block, or a cluster, goes from row to row; most fetch the next one meanwhile."""
    main, *totals = plan.stages
    x, stats = _arrays(problem)
    held = plan.vecs_per_thread * VEC_BYTES // ITEMSIZE[problem.x_dtype]
    per_lane = work(gpu, problem.x_dtype, "bwd", held)
    blocks = cluster_of(main)
    if plan.family in ("shared", "cluster"):  # sums over rows are read and written, not held
        per_lane += 2 * held
    units = -(-problem.rows // plan.rows_per_block) * blocks
    lanes, warps = min(32, plan.threads_per_row), plan.threads_per_row // 32
    steps = math.log2(lanes) + (math.log2(warps) if warps > 1 else 0)
    weight = vector_bytes(problem, "weight")
    # K3's and K4's constants between their sizes and what is wanted: whether and how.
    sizes = 2 if blocks == 1 else 3
    ahead = plan.family in ("warp", "block") or any(main.constants[sizes:-3])
    # Of a cluster each block reads mean and rstd.
    shared = {"mean": blocks * stats, "rstd": blocks * stats} if blocks > 1 else {}
    return [
        Launch(
            stage=main,
            moved=Moved(
                read={"dy": x, "x": x, "mean": stats, "rstd": stats} | weight,
                written={"dx": x if problem.dx else 0}
                | {"workspace": _partials(problem, plan, plan.pitch)},
                near={n: plan.partials * b for n, b in weight.items()} | shared,
            ),
            units=units,
            blocks=main.grid[0],
            trips=1,
            cycles=ISSUE * per_lane
            + 1.5 * steps * SHUFFLE
            + BARRIER * (warps > 1)
            + CLUSTER_BARRIER * (blocks > 1)
            + NEAR,
            instructions=per_lane * main.block[0] * units,
            ahead=ahead,
            read_run=group_run(lanes, plan.vecs_per_thread),
            write_run=group_run(lanes, plan.vecs_per_thread),
        ),
        *(totals_launch(problem, plan, stage) for stage in totals),
    ]


@family(GradientProblem, "split")
def split(problem: GradientProblem, plan: GradientPlan, gpu: Gpu) -> list[Launch]:
    """K5: sums of sections, their merge, then dx by columns, with the rows looped inside."""
    sums, merge, apply, *totals = plan.stages
    x, stats = _arrays(problem)
    size, weight = accumulator(problem), vector_bytes(problem, "weight")
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    chunks = -(-vecs // CHUNK_VECS)
    runs = apply.grid[0] // plan.partials
    per_vec = VEC_BYTES // ITEMSIZE[problem.x_dtype]
    first = 0.6 * work(gpu, problem.x_dtype, "bwd", CHUNK_LANE_VECS * per_vec)
    last = 0.7 * work(gpu, problem.x_dtype, "bwd", APPLY_VECS * per_vec)
    sections, gradients = 3 * size * problem.rows * plan.sections, 3 * size * problem.rows
    return [
        Launch(
            stage=sums,
            moved=Moved(
                read={"dy": x, "x": x} | weight,
                written={"workspace": sections},
                near={n: problem.rows * b for n, b in weight.items()}
                | {"mean": plan.sections * stats, "rstd": plan.sections * stats},
            ),
            units=sums.grid[0],
            blocks=sums.grid[0],
            trips=plan.chunks_per_section,
            cycles=plan.chunks_per_section * (ISSUE * first + NEAR) + 8 * SHUFFLE + BARRIER,
            instructions=first * CHUNK_THREADS * chunks * problem.rows,
        ),
        Launch(
            stage=merge,
            moved=Moved(written={"workspace": gradients}, near={"workspace": sections}),
            units=merge.grid[0],
            blocks=merge.grid[0],
            trips=0,
            cycles=-(-plan.sections // 32) * NEAR + 8 * SHUFFLE,
            instructions=20.0 * problem.rows * plan.sections,
        ),
        Launch(
            stage=apply,
            moved=Moved(
                written={"dx": x if problem.dx else 0}
                | {"workspace": _partials(problem, plan, plan.pitch)},
                again={"dy": x, "x": x},
                near={"workspace": runs * gradients, "mean": runs * stats, "rstd": runs * stats}
                | {n: plan.partials * b for n, b in weight.items()},
            ),
            units=runs * problem.rows,
            blocks=apply.grid[0],
            trips=1,
            cycles=ISSUE * last + NEAR,
            instructions=last * CHUNK_THREADS * runs * problem.rows,
            ahead=True,
        ),
        *(totals_launch(problem, plan, stage) for stage in totals),
    ]
