"""The forward of rows with unit stride: K1, K2, K3, K5."""

import math

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
from cupynorm._cuda.plan import CHUNK_THREADS, CHUNK_VECS, VEC_BYTES, Plan
from cupynorm._problem import ITEMSIZE, Problem

__all__ = ["row_bytes"]

CHUNK_LANE_VECS = CHUNK_VECS // CHUNK_THREADS  # of a chunk, per lane


def row_bytes(problem: Problem) -> Moved:
    """The floor: x once, y once, statistics where they are wanted."""
    x = problem.rows * problem.N * ITEMSIZE[problem.x_dtype]
    stats = problem.rows * accumulator(problem) if problem.stats else 0
    written = {"y": x} | ({"mean": stats, "rstd": stats} if stats else {})
    return Moved(read={"x": x} | vector_bytes(problem, "weight", "bias"), written=written)


def _near(problem: Problem, blocks: int) -> dict[str, int]:
    return {n: blocks * b for n, b in vector_bytes(problem, "weight", "bias").items()}


@family(Problem, "warp", "block")
def registers(problem: Problem, plan: Plan, gpu: Gpu) -> list[Launch]:
    """K1, K2: a row is loaded at once and stays in registers."""
    (stage,) = plan.stages
    rows = plan.rows_per_block * plan.threads_per_row // stage.block[0]  # of a lane
    held = rows * plan.vecs_per_thread * VEC_BYTES // ITEMSIZE[problem.x_dtype]
    per_lane = work(gpu, problem.x_dtype, "fwd", held, rows)
    lanes = min(32, plan.threads_per_row)
    exchange = BARRIER + NEAR if plan.family == "block" else NEAR
    grid = stage.grid[0]
    floor = row_bytes(problem)
    return [
        Launch(
            stage=stage,
            moved=Moved(floor.read, floor.written, near=_near(problem, grid)),
            units=grid,
            blocks=grid,
            trips=1,
            cycles=ISSUE * per_lane + 2 * math.log2(lanes) * SHUFFLE + exchange,
            instructions=per_lane * stage.block[0] * grid,
            read_run=group_run(lanes, plan.vecs_per_thread),
            write_run=group_run(lanes, plan.vecs_per_thread),
        )
    ]


@family(Problem, "shared", "cluster")
def staged(problem: Problem, plan: Plan, gpu: Gpu) -> list[Launch]:
    """K3, K4: groups of threads load chunk by chunk, then go through shared memory twice."""
    (stage,) = plan.stages
    blocks = cluster_of(stage)
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    chunks, groups = -(-vecs // CHUNK_VECS), stage.block[0] // CHUNK_THREADS
    turns = -(-chunks // (groups * blocks))
    # Copies to shared memory are all on their way at once: of K3 by its constant after its threads.
    copied = plan.family == "cluster" or any(stage.constants[1:2])
    held = turns * CHUNK_LANE_VECS * VEC_BYTES // ITEMSIZE[problem.x_dtype]
    per_lane = work(gpu, problem.x_dtype, "fwd", held, turns)
    grid = stage.grid[0]
    floor = row_bytes(problem)
    return [
        Launch(
            stage=stage,
            moved=Moved(floor.read, floor.written, near=_near(problem, grid // blocks)),
            units=grid,
            blocks=grid,
            trips=1 if copied else turns,
            cycles=ISSUE * per_lane
            + turns * (10 * SHUFFLE + NEAR)
            + 2 * (BARRIER if blocks == 1 else CLUSTER_BARRIER),
            instructions=per_lane * stage.block[0] * grid,
        )
    ]


@family(Problem, "split")
def split(problem: Problem, plan: Plan, gpu: Gpu) -> list[Launch]:
    """K5: moments of sections; then parts of rows, each of which merges its row's moments first."""
    stats, normalize = plan.stages
    size, floor = accumulator(problem), row_bytes(problem)
    x = floor.read.pop("x")
    chunks = -(-problem.N * ITEMSIZE[problem.x_dtype] // (VEC_BYTES * CHUNK_VECS))
    moments = 3 * size * problem.rows * plan.sections
    elements = CHUNK_LANE_VECS * VEC_BYTES // ITEMSIZE[problem.x_dtype]
    whole = work(gpu, problem.x_dtype, "fwd", elements)
    first, second = 0.6 * whole, 0.5 * whole  # of the arithmetic, statistics and y
    per_part = -(-chunks // plan.parts)
    merge = -(-plan.sections // CHUNK_THREADS) * NEAR + 10 * SHUFFLE + BARRIER
    return [
        Launch(
            stage=stats,
            moved=Moved(read={"x": x}, written={"workspace": moments}),
            units=stats.grid[0],
            blocks=stats.grid[0],
            trips=plan.chunks_per_section,
            cycles=plan.chunks_per_section * (ISSUE * first + 10 * SHUFFLE + 2 * BARRIER),
            instructions=first * CHUNK_THREADS * chunks * problem.rows,
        ),
        Launch(
            stage=normalize,
            moved=Moved(
                read=floor.read,
                written=floor.written,
                again={"x": x},
                near={"workspace": plan.parts * moments} | _near(problem, problem.rows),
            ),
            units=normalize.grid[0],
            blocks=normalize.grid[0],
            trips=per_part,
            cycles=merge + per_part * (ISSUE * second + NEAR),
            instructions=second * CHUNK_THREADS * chunks * problem.rows,
        ),
    ]
