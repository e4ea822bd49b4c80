"""Decides how K6 takes strided columns, and K7 columns of their own; pure Python."""

import functools
import itertools
from dataclasses import dataclass

from cupynorm._cuda.plan import CODES, MAX_GRID_X, Device, Stage
from cupynorm._cuda.plan_lanes import lanes_stage
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = [
    "KEPT",
    "SHAPES",
    "ColumnPlan",
    "ColumnProblem",
    "ColumnsProblem",
    "Tile",
    "choose_plan_column",
    "choose_plan_columns",
]

# kernels/tile.cuh: columns whose moments are taken together, of which a panel has a whole number.
TILE_CHUNK = {"float16": 256, "bfloat16": 256, "float32": 256, "float64": 128}

# Words (4 bytes, 8 of float64) of neighbouring rows that a tile's column has, threads of its block,
# and the blocks that a multiprocessor is to hold, so that one is loaded while another is worked on.
# In the order of preference: long segments first; 32 words are 128 bytes.
SHAPES = ((256, 256, 3), (128, 256, 3), (64, 256, 2), (64, 512, 1), (32, 256, 1))
KEPT = 1024  # bytes of each block's shared memory that the system takes, from sm_80 on
_PREDICTED = "predicted, bench/results/model.md"


@dataclass(frozen=True, slots=True)
class ColumnProblem:
    """A forward call in whose x or y neighbouring rows, not columns, lie next to each other."""

    x_dtype: str
    weight_dtype: str | None
    bias_dtype: str | None
    outer: int
    M: int
    N: int
    x_strides: tuple[int, int, int]  # elements, for (outer, M, N); of M's and N's one is 1
    y_strides: tuple[int, int, int]
    stats_strides: tuple[int, int]  # of mean and rstd, for (outer, M)

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.outer * self.M


@dataclass(frozen=True, slots=True)
class ColumnsProblem:
    """A matrix that is made of columns with addresses of their own."""

    y_dtype: str
    weight_dtype: str | None
    bias_dtype: str | None
    M: int
    N: int
    y_strides: tuple[int, int]  # elements, for (M, N)
    omit: bool  # leave NaN out of the statistics


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """What runs K6 or K7 on a device."""

    family: str
    stages: tuple[Stage, ...]
    threads_per_row: int
    rows_per_block: int
    panel: int  # columns of a tile; 0: no tile, the rows are in registers
    panels: int  # tiles of a row: from two on, all but the last are read twice
    workspace_bytes: int
    source: str


@functools.lru_cache(maxsize=4096)
def choose_plan_column(problem: ColumnProblem, device: Device) -> ColumnPlan:
    """Choose registers or the tile, and the launch; no choice moves a bit of the result.

    Parameters
    ----------
    problem : ColumnProblem
        A problem of which x or y has neighbouring rows next to each other, and which is not empty.
    device : Device
        The GPU.

    Returns
    -------
    ColumnPlan

    Raises
    ------
    ValueError
        If the launch would need more than 2**31 - 1 blocks.
    """
    tile = Tile(problem.x_dtype, problem.outer, problem.M, problem.N, exchanges=3)
    along = (problem.x_strides[2] != 1, problem.y_strides[2] != 1)
    dtypes = (problem.x_dtype, problem.weight_dtype, problem.bias_dtype)
    if all(along):
        stage = lanes_stage(dtypes, problem.outer, problem.M, problem.N, device)
        if stage is not None:
            return _plan_of(stage, tile, 1, stage.block[0] * stage.constants[2], panel=0)
    label = "".join("F" if a else "C" for a in along)
    return _plan("layer_norm_fwd_column", tile, device, tuple(map(int, along)), label, dtypes)


@functools.lru_cache(maxsize=4096)
def choose_plan_columns(problem: ColumnsProblem, device: Device) -> ColumnPlan:
    """Choose the tile and the launch for columns of their own, as `choose_plan_column` does."""
    kind = stats_dtype(problem.y_dtype)  # the tile holds what the statistics are taken of
    tile = Tile(kind, 1, problem.M, problem.N, exchanges=3 + problem.omit)
    along = problem.y_strides[0] == 1
    dtypes = (problem.y_dtype, problem.weight_dtype, problem.bias_dtype)
    label = ("F" if along else "C") + ("_omit" if problem.omit else "")
    flags = (int(along), int(problem.omit))
    return _plan("layer_norm_fwd_columns", tile, device, flags, label, dtypes)


@dataclass(frozen=True, slots=True)
class Tile:
    """What the shape of a tile depends on."""

    dtype: str
    outer: int
    M: int
    N: int
    exchanges: int

    @property
    def rows_per_word(self) -> int:
        """Rows that a thread looks at together."""
        return 2 if ITEMSIZE[self.dtype] == 2 else 1

    def nbytes(self, shape: tuple[int, int, int], panel: int) -> int:
        """Shared memory of the tile, its exchanges and its statistics."""
        words, threads, _ = shape
        rows = words * self.rows_per_word
        itemsize, size = ITEMSIZE[self.dtype], ITEMSIZE[stats_dtype(self.dtype)]
        tile = -(-panel * (rows + self.rows_per_word) * itemsize // 16) * 16
        return tile + self.exchanges * (threads // words) * rows * size + 3 * rows * size


def _shape(tile: Tile, device: Device) -> tuple[tuple[int, int, int], int]:
    """One of SHAPES, and the columns of a panel."""

    def fits(shape: tuple[int, int, int], panel: int) -> bool:
        used = (tile.nbytes(shape, panel) + KEPT) * shape[2]
        return used <= device.shared_bytes + KEPT

    fitting = [shape for shape in SHAPES if fits(shape, tile.N)]
    if not fitting:  # two sweeps
        chunk = panel = TILE_CHUNK[tile.dtype]
        shape = SHAPES[2] if fits(SHAPES[2], chunk) else SHAPES[-1]
        while fits(shape, panel + chunk):
            panel += chunk
        return shape, panel
    # Shorter segments where the rows are too few to fill them, or to give every multiprocessor two
    # blocks.
    for shape, smaller in itertools.pairwise(fitting):
        rows = shape[0] * tile.rows_per_word
        too_few = tile.outer * -(-tile.M // rows) < 2 * device.sm_count
        if not (rows >= 2 * tile.M or too_few) or smaller[0] == shape[0]:
            return shape, tile.N
    return fitting[-1], tile.N


def _plan(
    kernel: str,
    tile: Tile,
    device: Device,
    flags: tuple[int, ...],
    label: str,
    dtypes: tuple[str, str | None, str | None],
) -> ColumnPlan:
    shape, panel = _shape(tile, device)
    words, threads, blocks_per_sm = shape
    # Or the sums of float64, and the 16-bit pairs of K7 beside its counts, spill at 80 registers.
    pairs = label == "C_omit" and ITEMSIZE[dtypes[0]] == 2
    if tile.dtype == "float64" or pairs:
        blocks_per_sm = min(blocks_per_sm, 2)
    rows = words * tile.rows_per_word
    grid = tile.outer * -(-tile.M // rows)
    parts = [kernel, CODES[dtypes[0]], f"t{threads}_r{rows}_{label}"]
    parts += [f"{name}_{CODES[d]}" for name, d in zip("wb", dtypes[1:], strict=True) if d]
    stage = Stage(
        kernel=kernel,
        family="column" if kernel == "layer_norm_fwd_column" else "columns",
        constants=(threads, rows, *flags),
        name="_".join(parts),
        x_dtype=dtypes[0],
        weight_dtype=dtypes[1],
        bias_dtype=dtypes[2],
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=tile.nbytes(shape, panel),
        blocks_per_sm=blocks_per_sm,
    )
    return _plan_of(stage, tile, threads // words, rows, panel)


def _plan_of(
    stage: Stage, tile: Tile, threads_per_row: int, rows_per_block: int, panel: int
) -> ColumnPlan:
    grid = stage.grid[0]
    if grid > MAX_GRID_X:
        msg = (
            f"x has {tile.outer * tile.M} rows of {tile.N} columns, which needs {grid} blocks; "
            f"a launch takes at most {MAX_GRID_X}. Normalize x in slices along its first axis"
        )
        raise ValueError(msg)
    return ColumnPlan(
        family=stage.family,
        stages=(stage,),
        threads_per_row=threads_per_row,
        rows_per_block=rows_per_block,
        panel=panel,
        panels=-(-tile.N // panel) if panel else 1,
        workspace_bytes=0,
        source=_PREDICTED,
    )
