"""Decides how strided rows run (K6), and columns with addresses of their own (K7).

No choice moves a bit of y or dx.
"""

import itertools
from dataclasses import dataclass

from cupynorm._cuda.plan import (
    PREDICTED,
    Device,
    Plan,
    Stage,
    accumulator_bytes,
    make_stage,
    totals_stages,
    wanted,
)
from cupynorm._layout import Problem
from cupynorm._rules import ITEMSIZE, stats_dtype

# kernels/tile.cuh: columns whose moments are taken together, of which a panel has a whole number.
TILE_CHUNK = {"float16": 256, "bfloat16": 256, "float32": 256, "float64": 128}

Shape = tuple[int, int, int]
# Words (4 bytes, 8 of float64) of neighbouring rows that a tile's column has, threads of its block,
# and the blocks that a multiprocessor is to hold, so that one is loaded while another is worked on.
# In the order of preference: long segments first; 32 words are 128 bytes.
SHAPES: tuple[Shape, ...] = (
    (256, 256, 3),
    (128, 256, 3),
    (64, 256, 2),
    (64, 512, 1),
    (32, 256, 1),
)
# Where no pair of the backward's tiles holds a row: 256 bytes of a column, two blocks on a
# multiprocessor, unless that leaves so few columns that waiting for each panel costs more than one
# block does.
_WIDEST_PANELS = 2  # of SHAPES
LEAST_PANEL = 32

# kernels/lanes.cuh: what a thread holds of a column, so that a warp reads 256 bytes.
LANE_BYTES = 8
LANE_THREADS = 64  # few: blocks that end one by one leave no gap between a wave's reads and writes
# Columns in registers, and the blocks that a multiprocessor holds of them without a spill (12 of
# float64 at most). Ten warps get no more registers each than twelve: 40 columns want four blocks.
# With 4 blocks of 64 columns 128 KiB are on their way, with 16 of 8 columns 64 KiB.
LANES = ((8, 16), (16, 8), (24, 8), (32, 6), (40, 4), (48, 4), (56, 4), (64, 4))


@dataclass(frozen=True, slots=True)
class Tile:
    """What the shape of a tile depends on."""

    dtype: str  # of what it holds
    outer: int
    M: int
    N: int
    backward: bool = False  # tiles of x and dy, with the sums over rows
    exchanges: int = 3

    @property
    def rows_per_word(self) -> int:
        """Rows that a thread looks at together."""
        return 2 if ITEMSIZE[self.dtype] == 2 else 1

    def rows(self, shape: Shape) -> int:
        """Rows of a tile."""
        return shape[0] * self.rows_per_word

    def tiles(self, shape: Shape) -> int:
        """Tiles that hold all rows side by side."""
        return self.outer * -(-self.M // self.rows(shape))

    def nbytes(self, shape: Shape, cols: int) -> int:
        """Shared memory of a block whose tile, or both of whose tiles, have so many columns."""
        words, threads, _ = shape
        rows, size = self.rows(shape), ITEMSIZE[stats_dtype(self.dtype)]
        tile = -(-cols * (rows + self.rows_per_word) * ITEMSIZE[self.dtype] // 16) * 16
        exchanges = self.exchanges * (threads // words) * rows
        if self.backward:  # five numbers a row, and the sums over rows
            return 2 * tile + (exchanges + 5 * rows + 2 * _slots(cols, threads)) * size
        return tile + (exchanges + 4 * rows) * size

    def fits(self, shape: Shape, cols: int, device: Device) -> bool:
        """Whether a multiprocessor holds as many blocks as a shape is to have."""
        return device.holds(self.nbytes(shape, cols), shape[2])

    def blocks_per_sm(self, shape: Shape) -> int:
        """Hold float64 to two blocks, or its sums spill at 80 registers."""
        return min(shape[2], 2) if self.dtype == "float64" else shape[2]


def plan_of(problem: Problem, device: Device) -> Plan:
    """Plan a problem that is not empty, of K6 or K7."""
    if problem.backward:
        return _plan_bwd(problem, device)
    dtype = str(problem.dtype("x"))
    if not problem.has("x"):
        # The tile holds what the statistics are taken of; what is left out is counted beside them.
        tile = Tile(stats_dtype(dtype), 1, problem.M, problem.N, exchanges=3 + problem.omit)
        label = "F" if problem.steps("y")[1] == 1 else "C"
        label += "_omit" if problem.omit else ""
        return _plan(problem, tile, device, "columns", label)
    tile = Tile(dtype, problem.outer, problem.M, problem.N)
    along = [problem.steps(array)[2] != 1 for array in ("x", "y")]
    if all(along):
        stage = lanes_stage(problem, device)
        if stage is not None:
            rows = stage.block[0] * stage.constants[2]
            return Plan("lanes", (stage,), 1, rows, PREDICTED)
    label = "".join("F" if a else "C" for a in along)
    return _plan(problem, tile, device, "column", label)


def _plan(problem: Problem, tile: Tile, device: Device, kind: str, label: str) -> Plan:
    shape, panel = _shape(tile, device)
    blocks_per_sm = tile.blocks_per_sm(shape)
    # K7 spills at 80 registers, and with its counts float64 at 128.
    if kind == "columns":
        counts_f64 = problem.omit and problem.dtype("x") == "float64"
        blocks_per_sm = min(blocks_per_sm, 1 if counts_f64 else 2)
    words, threads, _ = shape
    rows = tile.rows(shape)
    ways = label[:1] if kind == "columns" else label
    flags = [int(way == "F") for way in ways] + [int(problem.omit)] * (kind == "columns")
    stage = make_stage(
        problem, kind, (threads, rows, *flags), f"t{threads}_r{rows}_{label}",
        family=kind, grid=tile.tiles(shape), threads=threads,
        blocks_per_sm=blocks_per_sm, shared_bytes=tile.nbytes(shape, panel),
    )  # fmt: skip
    return Plan(
        *(kind, (stage,), threads // words, rows, PREDICTED),
        panel=panel,
        panels=-(-tile.N // panel),
    )


def _shape(tile: Tile, device: Device) -> tuple[Shape, int]:
    """One of SHAPES, and the columns of a panel."""
    fitting = [shape for shape in SHAPES if tile.fits(shape, tile.N, device)]
    if not fitting:  # two sweeps
        chunk = panel = TILE_CHUNK[tile.dtype]
        shape = SHAPES[2] if tile.fits(SHAPES[2], chunk, device) else SHAPES[-1]
        while tile.fits(shape, panel + chunk, device):
            panel += chunk
        return shape, panel
    # Shorter segments where the rows are too few to fill them, or to give every multiprocessor two
    # blocks.
    for shape, smaller in itertools.pairwise(fitting):
        too_few = tile.tiles(shape) < 2 * device.sm_count
        if not (tile.rows(shape) >= 2 * tile.M or too_few) or smaller[0] == shape[0]:
            return shape, tile.N
    return fitting[-1], tile.N


def lanes_stage(problem: Problem, device: Device) -> Stage | None:
    """Make the launch for x and y that both lie along the rows; None where a tile does better.

    That is beyond 64 columns (56 of all but float32), and where the rows fill less than half of a
    block or give the multiprocessors fewer than two blocks each: a tile takes 32 rows, and its
    threads share a row.

    Where x or y has its columns next to each other the tile turns it, whatever N. Written from
    registers, a row's piece of 16 bytes would lie a row away from the next lane's: 32 sectors for
    half of their bytes, where the tile fills each sector in one access. Turning it in registers
    takes five shuffles an element, and the tile one store and one load.
    """
    dtype = str(problem.dtype("x"))
    rows = LANE_BYTES // ITEMSIZE[dtype]
    most = 64 if dtype == "float32" else 56  # or it spills even at 255 registers
    fitting = [row for row in LANES if problem.N <= row[0] <= most]
    grid = problem.outer * -(-problem.M // (LANE_THREADS * rows))
    if not fitting or LANE_THREADS * rows >= 2 * problem.M or grid < 2 * device.sm_count:
        return None
    cols, blocks_per_sm = fitting[0]
    blocks_per_sm = min(blocks_per_sm, 12) if dtype == "float64" else blocks_per_sm
    return make_stage(
        problem, "lanes", (LANE_THREADS, cols, rows), f"t{LANE_THREADS}_c{cols}_r{rows}",
        family="lanes", grid=grid, threads=LANE_THREADS, blocks_per_sm=blocks_per_sm,
    )  # fmt: skip


def _plan_bwd(problem: Problem, device: Device) -> Plan:
    """Two tiles, of x and of dy; a block takes tile b, b + grid, ... and keeps its sums."""
    N = problem.N
    tile = Tile(str(problem.dtype("x")), problem.outer, problem.M, N, backward=True)
    fitting = [shape for shape in SHAPES if _columns_held(tile, shape, device) >= N]
    if fitting:
        shape = next((s for s in fitting if tile.rows(s) < 2 * problem.M), fitting[-1])
    else:
        held = {s: _columns_held(tile, s, device) for s in SHAPES[_WIDEST_PANELS:]}
        shape = next((s for s in held if held[s] >= LEAST_PANEL), SHAPES[-1])
    panel = _columns_held(tile, shape, device)
    words, threads, _ = shape
    rows, blocks_per_sm = tile.rows(shape), tile.blocks_per_sm(shape)
    grid = min(tile.tiles(shape), blocks_per_sm * device.sm_count)
    along = [problem.steps(array)[2] != 1 for array in ("x", "dy")]
    stage = make_stage(
        problem, "column", (threads, rows, int(panel < N), *map(int, along)),
        f"t{threads}_r{rows}_" + "p_" * (panel < N) + "".join("F" if a else "C" for a in along),
        family="column", grid=grid, threads=threads,
        blocks_per_sm=blocks_per_sm, shared_bytes=tile.nbytes(shape, panel),
    )  # fmt: skip
    return Plan(
        family="column",
        stages=(stage, *totals_stages(problem)),
        threads_per_row=threads // words,
        rows_per_block=rows,
        source=PREDICTED,
        panel=panel,
        panels=-(-N // panel),
        partials=grid,
        pitch=N,
        slots=_slots(panel, threads),
        passes=2 + problem.has("dx") + 2 * (panel < N),
        workspace=(("partials", 0),),
        workspace_bytes=grid * _partial_bytes(problem),
    )


def bytes_beyond_floor(problem: Problem, plan: Plan) -> int:
    """Count what a backward's plan moves again: partial sums, and x and dy but for a last panel."""
    times, again = plan.partials, 0
    if plan.panels > 1:
        last = problem.N - (problem.N - 1) // plan.panel * plan.panel
        again = 2 * problem.rows * (problem.N - last) * ITEMSIZE[str(problem.dtype("x"))]
        times = problem.outer * -(-problem.M // plan.rows_per_block)
    return 2 * times * _partial_bytes(problem) + again


def _partial_bytes(problem: Problem) -> int:
    """Bytes of what one block leaves of dweight and dbias."""
    return sum(wanted(problem)[1:]) * problem.N * accumulator_bytes(problem)


def _slots(N: int, threads: int) -> int:
    """Threads times the runs of columns that they stand on, one after the other."""
    span = 8
    while span < min(N, threads):
        span *= 2
    return threads * -(-N // span)


def _columns_held(tile: Tile, shape: Shape, device: Device) -> int:
    """Columns of x and dy that a shape's tiles have room for: N, or a multiple of 8 below it."""
    if tile.fits(shape, tile.N, device):
        return tile.N
    cols = 0
    while cols + 8 < tile.N and tile.fits(shape, cols + 8, device):
        cols += 8
    return cols
