"""Tiles: K6, strided columns, forward and backward, and K7, columns of their own."""

from typing import Any

from bench.model_gpus import Gpu
from bench.model_launches import (
    BARRIER,
    FAR,
    ISSUE,
    NEAR,
    SHUFFLE,
    Launch,
    Moved,
    Run,
    accumulator,
    family,
    vector_bytes,
    work,
)
from bench.model_rows_bwd import totals_launch
from cupynorm._cuda.plan_bwd import GradientPlan
from cupynorm._cuda.plan_column import ColumnPlan, ColumnProblem, ColumnsProblem
from cupynorm._cuda.plan_column_bwd import ColumnGradientProblem
from cupynorm._problem import ITEMSIZE

__all__ = ["COLUMN_BYTES"]

# Reads and writes of shared memory beside the arithmetic of a row kernel, per element; an estimate.
TILE_INSTRUCTIONS = {2: 4, 4: 6, 8: 6}
COLUMN_BYTES = 4  # of an element of K7's columns, which are taken as float32 without nulls


def _run(strides: tuple[int, int, int], M: int, N: int, rows: int, itemsize: int) -> Run:
    """Of an array of such strides: lanes stand on neighbouring rows' words, or along columns."""
    _, row, col = strides
    if row == 1:
        tile = min(rows, M) * itemsize
        return min(tile, 32 * max(4, itemsize)), FAR if col == M == rows else tile
    span = 32 if N > 16 else 16 if N > 8 else 8
    return min(span, N) * itemsize, FAR if row == N else N * itemsize


def _tile(problem: Any, plan: Any, dtype: str, M: int, gpu: Gpu, way: str) -> tuple[float, float]:
    """Cycles of a tile beside its loads, and instructions of one of its lanes."""
    threads = plan.stages[0].block[0]
    held = problem.N * min(plan.rows_per_block, M) / threads
    per_lane = work(gpu, dtype, way, held) + TILE_INSTRUCTIONS[ITEMSIZE[dtype]] * held
    return ISSUE * per_lane + 4 * BARRIER + 2 * SHUFFLE + NEAR, per_lane


def _sweeps(N: int, plan: ColumnPlan) -> tuple[int, int]:
    """Waits for a panel, and columns that are read a second time."""
    return 2 * plan.panels - 1, (plan.panels - 1) * plan.panel


@family(ColumnProblem, "column", "lanes")
def column(problem: ColumnProblem, plan: ColumnPlan, gpu: Gpu) -> list[Launch]:
    """K6: a tile is loaded whole, or a row into a thread's registers; longer ones go in panels."""
    (stage,) = plan.stages
    size, grid = ITEMSIZE[problem.x_dtype], stage.grid[0]
    x = problem.rows * problem.N * size  # statistics, where they are wanted, come on top
    trips, again = _sweeps(problem.N, plan)
    cycles, per_lane = _tile(problem, plan, problem.x_dtype, problem.M, gpu, "fwd")
    vectors = vector_bytes(problem, "weight", "bias")
    shape = problem.M, problem.N, plan.rows_per_block, size
    return [
        Launch(
            stage=stage,
            moved=Moved(
                read={"x": x} | vectors,
                written={"y": x},
                again={"x": problem.rows * again * size} if again else {},
                near={n: grid * b for n, b in vectors.items()},
            ),
            units=grid,
            blocks=grid,
            trips=trips,
            cycles=cycles,
            instructions=per_lane * stage.block[0] * grid,
            read_run=_run(problem.x_strides, *shape),
            write_run=_run(problem.y_strides, *shape),
            own_again=plan.rows_per_block * problem.N * size,
        )
    ]


@family(ColumnsProblem, "columns")
def columns(problem: ColumnsProblem, plan: ColumnPlan, gpu: Gpu) -> list[Launch]:
    """K7: as K6, from float32 columns."""
    (stage,) = plan.stages
    grid, cells = stage.grid[0], problem.M * problem.N
    size = ITEMSIZE[problem.y_dtype]
    trips, again = _sweeps(problem.N, plan)
    # Eight columns are asked for at once by each thread.
    per_thread = problem.N * plan.rows_per_block / stage.block[0]
    cycles, per_lane = _tile(problem, plan, problem.y_dtype, problem.M, gpu, "fwd")
    vectors = vector_bytes(problem, "weight", "bias")
    strides = (0, *problem.y_strides)
    return [
        Launch(
            stage=stage,
            moved=Moved(
                read={"columns": cells * COLUMN_BYTES} | vectors,
                written={"y": cells * size},
                again={"columns": problem.M * again * COLUMN_BYTES} if again else {},
                near={n: grid * b for n, b in vectors.items()} | {"table": grid * 32 * problem.N},
            ),
            units=grid,
            blocks=grid,
            trips=max(1.0, per_thread / 8) * trips / plan.panels,
            cycles=cycles,
            instructions=per_lane * stage.block[0] * grid,
            read_run=(32 * COLUMN_BYTES, min(plan.rows_per_block, problem.M) * COLUMN_BYTES),
            write_run=_run(strides, problem.M, problem.N, plan.rows_per_block, size),
            own_again=plan.rows_per_block * problem.N * COLUMN_BYTES,
        )
    ]


@family(ColumnGradientProblem, "column", "panels")
def column_bwd(problem: ColumnGradientProblem, plan: GradientPlan, gpu: Gpu) -> list[Launch]:
    """K6 backward: a tile of x and one of dy, or panels twice; nothing is fetched ahead."""
    main, *totals = plan.stages
    size = ITEMSIZE[problem.x_dtype]
    x, stats = problem.rows * problem.N * size, problem.rows * accumulator(problem)
    units = problem.outer * -(-problem.M // plan.rows_per_block)
    cycles, per_lane = _tile(problem, plan, problem.x_dtype, problem.M, gpu, "bwd")
    weight = vector_bytes(problem, "weight")
    shape = problem.M, problem.N, plan.rows_per_block, size
    runs = (_run(s, *shape) for s in (problem.x_strides, problem.dy_strides))
    panel = main.constants[2] if plan.family == "panels" else problem.N
    panels = -(-problem.N // panel)
    again = problem.rows * (panels - 1) * panel * size  # of x and of dy: all but the last panel
    # After its first tile a block of panels reads and writes its partial sums in the L2.
    sums = (panels > 1) * 2 * (units - plan.partials) * plan.workspace_bytes // plan.partials
    return [
        Launch(
            stage=main,
            moved=Moved(
                read={"dy": x, "x": x, "mean": stats, "rstd": stats} | weight,
                written={"dx": x if problem.dx else 0, "workspace": plan.workspace_bytes},
                again={"dy": again, "x": again} if again else {},
                near={n: plan.partials * b for n, b in weight.items()} | {"workspace": sums},
            ),
            units=units,
            blocks=main.grid[0],
            trips=2 * panels - 1,
            cycles=cycles,
            instructions=per_lane * main.block[0] * units,
            read_run=min(runs),
            write_run=_run(problem.dx_strides, *shape),
            own_again=2 * plan.rows_per_block * problem.N * size if again else 0,
        ),
        *(totals_launch(problem, plan, stage) for stage in totals),
    ]
