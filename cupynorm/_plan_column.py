"""Decides how K6 takes rows whose elements are strided; pure Python."""

import functools
import itertools
from dataclasses import dataclass

from cupynorm._plan import CODES, MAX_GRID_X, Device, Stage
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["ColumnPlan", "ColumnProblem", "choose_plan_column"]

# kernels/tile.cuh: columns whose moments are taken together, of which a panel has a whole number.
TILE_CHUNK = {"float16": 256, "bfloat16": 256, "float32": 256, "float64": 128}

# Words (4 bytes, 8 of float64) of neighbouring rows that a tile's column has, threads of its block,
# and the blocks that a multiprocessor is to hold, so that one is loaded while another is worked on.
# In the order of preference: long segments first; 32 words are 128 bytes.
SHAPES = ((256, 256, 3), (128, 256, 3), (64, 256, 2), (64, 512, 1), (32, 256, 1))
KEPT = 1024  # bytes of each block's shared memory that the system takes, from sm_80 on
_PREDICTED = "predicted, bench/results/PENDING.md"


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
class ColumnPlan:
    """What runs a forward problem whose columns are strided, on a device."""

    family: str
    stages: tuple[Stage, ...]
    threads_per_row: int
    rows_per_block: int
    panel: int  # columns of a tile
    panels: int  # tiles of a row: from two on, all but the last are read twice
    workspace_bytes: int
    source: str


@functools.lru_cache(maxsize=4096)
def choose_plan_column(problem: ColumnProblem, device: Device) -> ColumnPlan:
    """Choose the tile and the launch; no choice moves a bit of the result.

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
    shape, panel = _shape(problem, device)
    rows_per_block = shape[0] * _rows_per_word(problem)
    grid = problem.outer * -(-problem.M // rows_per_block)
    if grid > MAX_GRID_X:
        msg = (
            f"x has {problem.rows} rows of {problem.N} columns, which needs {grid} blocks; "
            f"a launch takes at most {MAX_GRID_X}. Normalize x in slices along its first axis"
        )
        raise ValueError(msg)
    return ColumnPlan(
        family="column",
        stages=(_stage(problem, shape, panel, grid),),
        threads_per_row=shape[1] // shape[0],
        rows_per_block=rows_per_block,
        panel=panel,
        panels=-(-problem.N // panel),
        workspace_bytes=0,
        source=_PREDICTED,
    )


def _rows_per_word(problem: ColumnProblem) -> int:
    return 2 if ITEMSIZE[problem.x_dtype] == 2 else 1


def _shape(problem: ColumnProblem, device: Device) -> tuple[tuple[int, int, int], int]:
    """One of SHAPES, and the columns of a panel."""

    def fits(shape: tuple[int, int, int], panel: int) -> bool:
        used = (_bytes(problem, shape, panel) + KEPT) * shape[2]
        return used <= device.shared_bytes + KEPT

    per_word = _rows_per_word(problem)
    fitting = [shape for shape in SHAPES if fits(shape, problem.N)]
    if not fitting:  # two sweeps
        chunk = panel = TILE_CHUNK[problem.x_dtype]
        shape = SHAPES[2] if fits(SHAPES[2], chunk) else SHAPES[-1]
        while fits(shape, panel + chunk):
            panel += chunk
        return shape, panel
    # Shorter segments where the rows are too few to fill them, or to give every multiprocessor two
    # blocks.
    for shape, smaller in itertools.pairwise(fitting):
        blocks = problem.outer * -(-problem.M // (shape[0] * per_word))
        too_wide = shape[0] * per_word >= 2 * problem.M
        if not (too_wide or blocks < 2 * device.sm_count) or smaller[0] == shape[0]:
            return shape, problem.N
    return fitting[-1], problem.N


def _bytes(problem: ColumnProblem, shape: tuple[int, int, int], panel: int) -> int:
    """Shared memory of a tile, its exchanges and its statistics."""
    words, threads, _ = shape
    rows = words * _rows_per_word(problem)
    itemsize, size = ITEMSIZE[problem.x_dtype], ITEMSIZE[stats_dtype(problem.x_dtype)]
    tile = -(-panel * (rows + _rows_per_word(problem)) * itemsize // 16) * 16
    return tile + 3 * (threads // words) * rows * size + 3 * rows * size


def _stage(problem: ColumnProblem, shape: tuple[int, int, int], panel: int, grid: int) -> Stage:
    words, threads, blocks_per_sm = shape
    rows = words * _rows_per_word(problem)
    along = (problem.x_strides[2] != 1, problem.y_strides[2] != 1)
    label = f"t{threads}_r{rows}_" + "".join("F" if a else "C" for a in along)
    parts = ["layer_norm_fwd_column", CODES[problem.x_dtype], label]
    parts += [f"w_{CODES[problem.weight_dtype]}"] if problem.weight_dtype else []
    parts += [f"b_{CODES[problem.bias_dtype]}"] if problem.bias_dtype else []
    return Stage(
        kernel="layer_norm_fwd_column",
        family="column",
        constants=(threads, rows, *(int(a) for a in along)),
        name="_".join(parts),
        x_dtype=problem.x_dtype,
        weight_dtype=problem.weight_dtype,
        bias_dtype=problem.bias_dtype,
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=_bytes(problem, shape, panel),
        blocks_per_sm=blocks_per_sm,
    )
