"""Decides how K6's backward takes rows whose elements are strided; pure Python."""

import functools
from dataclasses import dataclass

from cupynorm._cuda.gradient_plan import GradientPlan, totals_stage
from cupynorm._cuda.plan import CODES, Device, Stage
from cupynorm._cuda.plan_column import KEPT, SHAPES, Tile
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["ColumnGradientProblem", "bytes_beyond_floor", "choose_plan_column_bwd"]

_PREDICTED = "predicted, bench/results/model.md"

# Where no pair of tiles holds a row: 256 bytes of a column, two blocks on a multiprocessor, unless
# that leaves so few columns that waiting for each panel costs more than one block does.
_WIDEST_PANELS = 2  # of SHAPES
LEAST_PANEL = 32


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
) -> tuple[GradientPlan, int]:
    """Choose the tiles and the launch; neither moves a bit of dx.

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
    fitting = [shape for shape in SHAPES if _columns_held(tile, shape, device) >= problem.N]
    panel = 0
    if fitting:
        shape = next((s for s in fitting if s[0] * tile.rows_per_word < 2 * problem.M), fitting[-1])
    else:
        held = {s: _columns_held(tile, s, device) for s in SHAPES[_WIDEST_PANELS:]}
        shape = next((s for s in held if held[s] >= LEAST_PANEL), SHAPES[-1])
        panel = held[shape]
    words, threads, blocks_per_sm = shape
    rows = words * tile.rows_per_word
    grid = min(_tiles(problem, rows), _blocks(tile, blocks_per_sm) * device.sm_count)
    dtypes = (problem.dweight_dtype, problem.dbias_dtype)
    plan = GradientPlan(
        family="panels" if panel else "column",
        stages=(
            _stage(problem, tile, shape, panel, grid),
            *totals_stage(problem.x_dtype, dtypes, problem.N),
        ),
        threads_per_row=threads // words,
        vecs_per_thread=0,
        rows_per_block=rows,
        partials=grid,
        pitch=problem.N,
        workspace_bytes=grid * _partial_bytes(problem),
        passes=2 + problem.dx + 2 * bool(panel),
        source=_PREDICTED,
    )
    return plan, _slots(panel or problem.N, threads)


def bytes_beyond_floor(problem: ColumnGradientProblem, plan: GradientPlan) -> int:
    """Count what a plan moves again: partial sums, and x and dy but for the last panel."""
    times = plan.partials
    again = 0
    if plan.family == "panels":
        panel = plan.stages[0].constants[2]
        last = problem.N - (problem.N - 1) // panel * panel
        again = 2 * problem.rows * (problem.N - last) * ITEMSIZE[problem.x_dtype]
        times = _tiles(problem, plan.rows_per_block)
    return 2 * times * _partial_bytes(problem) + again


def _tiles(problem: ColumnGradientProblem, rows: int) -> int:
    return problem.outer * -(-problem.M // rows)


def _partial_bytes(problem: ColumnGradientProblem) -> int:
    """Bytes of what one block leaves of dweight and dbias."""
    totals = sum(d is not None for d in (problem.dweight_dtype, problem.dbias_dtype))
    return totals * problem.N * ITEMSIZE[stats_dtype(problem.x_dtype)]


def _blocks(tile: Tile, blocks_per_sm: int) -> int:
    """Hold float64 to two blocks, or its sums spill."""
    return min(blocks_per_sm, 2) if tile.dtype == "float64" else blocks_per_sm


def _slots(N: int, threads: int) -> int:
    """Threads times the runs of columns that they stand on, one after the other."""
    span = 8
    while span < min(N, threads):
        span *= 2
    return threads * -(-N // span)


def _nbytes(tile: Tile, shape: tuple[int, int, int], cols: int) -> int:
    """Shared memory of both tiles, the exchanges, five numbers a row, and the sums over rows."""
    words, threads, _ = shape
    rows = words * tile.rows_per_word
    size = ITEMSIZE[stats_dtype(tile.dtype)]
    one = -(-cols * (rows + tile.rows_per_word) * ITEMSIZE[tile.dtype] // 16) * 16
    rest = 3 * (threads // words) * rows + 5 * rows + 2 * _slots(cols, threads)
    return 2 * one + rest * size


def _columns_held(tile: Tile, shape: tuple[int, int, int], device: Device) -> int:
    """Columns of x and dy that a shape's tiles have room for: N, or a multiple of 8 below it."""

    def fits(cols: int) -> bool:
        used = (_nbytes(tile, shape, cols) + KEPT) * shape[2]
        return used <= device.shared_bytes + KEPT

    if fits(tile.N):
        return tile.N
    cols = 0
    while cols + 8 < tile.N and fits(cols + 8):
        cols += 8
    return cols


def _stage(
    problem: ColumnGradientProblem,
    tile: Tile,
    shape: tuple[int, int, int],
    panel: int,
    grid: int,
) -> Stage:
    words, threads, blocks_per_sm = shape
    rows = words * tile.rows_per_word
    along = (problem.x_strides[2] != 1, problem.dy_strides[2] != 1)
    wanted = (problem.dx, problem.dweight_dtype is not None, problem.dbias_dtype is not None)
    kernel = "layer_norm_bwd_column" + ("_panels" if panel else "")
    panels = (panel,) if panel else ()
    label = f"t{threads}_r{rows}_" + "".join(f"p{p}_" for p in panels)
    label += "".join("F" if a else "C" for a in along)
    parts = [kernel, CODES[problem.x_dtype], label]
    parts += [name for name, w in zip(("dx", "dw", "db"), wanted, strict=True) if w]
    parts += [f"w_{CODES[problem.weight_dtype]}"] if problem.weight_dtype else []
    return Stage(
        kernel=kernel,
        family="panels_bwd" if panel else "column_bwd",
        constants=(threads, rows, *panels, *(int(flag) for flag in (*along, *wanted))),
        name="_".join(parts),
        x_dtype=problem.x_dtype,
        weight_dtype=problem.weight_dtype,
        bias_dtype=None,
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=_nbytes(tile, shape, panel or problem.N),
        blocks_per_sm=_blocks(tile, blocks_per_sm),
    )
