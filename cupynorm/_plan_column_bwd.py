"""Decides how K6's backward takes rows whose elements are strided; pure Python."""

import functools
from dataclasses import dataclass

from cupynorm._plan import CODES, Device, Stage
from cupynorm._plan_bwd import GradientPlan, totals_stage
from cupynorm._plan_column import KEPT, SHAPES, Tile
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["ColumnGradientProblem", "choose_plan_column_bwd"]

_PREDICTED = "predicted, bench/results/model.md"


@dataclass(frozen=True, slots=True)
class ColumnGradientProblem:
    """A backward call in whose x, dy or dx neighbouring rows lie next to each other."""

    x_dtype: str
    weight_dtype: str | None
    dweight_dtype: str | None  # None: not wanted
    dbias_dtype: str | None
    dx: bool  # wanted
    outer: int
    M: int
    N: int
    dy_strides: tuple[int, int, int]  # elements, for (outer, M, N); of M's and N's one is 1
    x_strides: tuple[int, int, int]
    dx_strides: tuple[int, int, int]  # along the rows where x_strides are
    stats_strides: tuple[int, int]  # of mean and rstd, for (outer, M)

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.outer * self.M


@functools.lru_cache(maxsize=4096)
def choose_plan_column_bwd(
    problem: ColumnGradientProblem, device: Device
) -> tuple[GradientPlan, int] | None:
    """Choose the tiles and the launch; None where no tile holds a row of x and of dy.

    Parameters
    ----------
    problem : ColumnGradientProblem
        A problem that is not empty.
    device : Device
        The GPU.

    Returns
    -------
    plan : GradientPlan
    slots : int
        Places in shared memory for each of dweight and dbias, an argument of the kernel.
    """
    tile = Tile(problem.x_dtype, problem.outer, problem.M, problem.N, exchanges=3)
    fitting = [shape for shape in SHAPES if _fits(tile, shape, device)]
    if not fitting:
        return None
    words, threads, blocks_per_sm = shape = next(
        (s for s in fitting if s[0] * tile.rows_per_word < 2 * problem.M), fitting[-1]
    )
    rows = words * tile.rows_per_word
    tiles = problem.outer * -(-problem.M // rows)
    grid = min(tiles, _blocks(tile, blocks_per_sm) * device.sm_count)
    dtypes = (problem.dweight_dtype, problem.dbias_dtype)
    totals = sum(d is not None for d in dtypes)
    plan = GradientPlan(
        family="column",
        stages=(
            _stage(problem, tile, shape, grid),
            *totals_stage(problem.x_dtype, dtypes, problem.N),
        ),
        threads_per_row=threads // words,
        vecs_per_thread=0,
        rows_per_block=rows,
        sections=0,
        chunks_per_section=0,
        partials=grid,
        pitch=problem.N,
        sums_at=0,
        gradients_at=0,
        workspace_bytes=totals * grid * problem.N * ITEMSIZE[stats_dtype(problem.x_dtype)],
        passes=2 + problem.dx,
        source=_PREDICTED,
    )
    return plan, _slots(problem.N, threads)


def _blocks(tile: Tile, blocks_per_sm: int) -> int:
    """Hold float64 to two blocks, or its sums spill."""
    return min(blocks_per_sm, 2) if tile.dtype == "float64" else blocks_per_sm


def _slots(N: int, threads: int) -> int:
    """Threads times the runs of columns that they stand on, one after the other."""
    span = 8
    while span < min(N, threads):
        span *= 2
    return threads * -(-N // span)


def _nbytes(tile: Tile, shape: tuple[int, int, int]) -> int:
    """Shared memory of both tiles, the exchanges, five numbers a row, and the sums over rows."""
    words, threads, _ = shape
    rows = words * tile.rows_per_word
    size = ITEMSIZE[stats_dtype(tile.dtype)]
    one = -(-tile.N * (rows + tile.rows_per_word) * ITEMSIZE[tile.dtype] // 16) * 16
    rest = 3 * (threads // words) * rows + 5 * rows + 2 * _slots(tile.N, threads)
    return 2 * one + rest * size


def _fits(tile: Tile, shape: tuple[int, int, int], device: Device) -> bool:
    used = (_nbytes(tile, shape) + KEPT) * shape[2]
    return used <= device.shared_bytes + KEPT


def _stage(
    problem: ColumnGradientProblem, tile: Tile, shape: tuple[int, int, int], grid: int
) -> Stage:
    words, threads, blocks_per_sm = shape
    rows = words * tile.rows_per_word
    along = (problem.x_strides[2] != 1, problem.dy_strides[2] != 1)
    wanted = (problem.dx, problem.dweight_dtype is not None, problem.dbias_dtype is not None)
    label = f"t{threads}_r{rows}_" + "".join("F" if a else "C" for a in along)
    parts = ["layer_norm_bwd_column", CODES[problem.x_dtype], label]
    parts += [name for name, w in zip(("dx", "dw", "db"), wanted, strict=True) if w]
    parts += [f"w_{CODES[problem.weight_dtype]}"] if problem.weight_dtype else []
    return Stage(
        kernel="layer_norm_bwd_column",
        family="column_bwd",
        constants=(threads, rows, *(int(flag) for flag in (*along, *wanted))),
        name="_".join(parts),
        x_dtype=problem.x_dtype,
        weight_dtype=problem.weight_dtype,
        bias_dtype=None,
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=_nbytes(tile, shape),
        blocks_per_sm=_blocks(tile, blocks_per_sm),
    )
