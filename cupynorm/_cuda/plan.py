"""Decides which kernel runs a problem and with what launch; pure Python, the same anywhere."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from cupynorm._cuda.chunk import CHUNK_PARTIALS, CHUNK_THREADS, CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.device import Device
from cupynorm._cuda.plan_cluster import (
    CLUSTER_SPLIT_MIN_VECS,
    ClusterRow,
    cluster_bytes,
    cluster_row,
)
from cupynorm._cuda.staging import LABELS, STAGE_REGISTERS, copied_bytes, staging_of
from cupynorm._problem import ITEMSIZE, Problem

__all__ = [
    "CHUNK_THREADS",
    "CHUNK_VECS",
    "CODES",
    "MAX_GRID_X",
    "MAX_SECTIONS",
    "TABLE",
    "VEC_BYTES",
    "Device",
    "Plan",
    "Stage",
    "TableRow",
    "choose_plan",
    "table_row",
]

# One section per chunk up to this many, so that every row K3 and K4 can hold has the tree of K5.
MAX_SECTIONS = 512
MAX_GRID_X = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of the plan table: rows of x of up to `max_vecs` 16-byte vectors."""

    cluster: ClassVar[int] = 1

    family: str
    max_vecs: int
    threads_per_row: int
    threads: int  # of a block
    rows_per_group: int  # rows that one group of lanes holds at a time
    blocks_per_sm: int  # occupancy that the registers must allow
    blocks_per_sm_f64: int  # the same for float64, which needs twice the registers for its sums
    source: str


_PREDICTED = "predicted, bench/results/model.md"

# K3's limit is the device's shared memory, so its last row ends where the largest GPU's does.
TABLE = (
    TableRow("warp", 8, 8, 128, 2, 8, 8, _PREDICTED),
    TableRow("warp", 16, 16, 128, 2, 8, 8, _PREDICTED),
    TableRow("warp", 32, 32, 128, 2, 8, 8, _PREDICTED),
    TableRow("warp", 64, 32, 128, 2, 6, 5, _PREDICTED),
    TableRow("warp", 128, 32, 128, 1, 8, 8, _PREDICTED),
    TableRow("warp", 256, 32, 128, 1, 6, 4, _PREDICTED),
    TableRow("block", 512, 64, 128, 1, 6, 4, _PREDICTED),
    TableRow("block", 1024, 128, 128, 1, 6, 4, _PREDICTED),
    TableRow("block", 2048, 256, 256, 1, 3, 2, _PREDICTED),
    TableRow("shared", 7 * CHUNK_VECS, 512, 512, 1, 1, 1, _PREDICTED),
    # Not 1024 threads: those leave 64 registers each, and float64 spills.
    TableRow("shared", 15 * CHUNK_VECS, 768, 768, 1, 1, 1, _PREDICTED),
    TableRow("split", 2**60, CHUNK_THREADS, CHUNK_THREADS, 1, 3, 3, _PREDICTED),
)

# Few rows leave most multiprocessors idle under K3; K5 costs a second launch and a read from L2.
SPLIT_MIN_VECS = 8 * CHUNK_VECS  # 128 KiB
SPLIT_ROWS_PER_SM = 0.5
SPLIT_BLOCKS_PER_SM = 3  # of the normalizing kernel, over all rows


@dataclass(frozen=True, slots=True)
class Stage:
    """One kernel launch: what to compile and how to launch it."""

    kernel: str  # the __device__ template in kernels/
    family: str
    constants: tuple[int, ...]  # its leading template arguments
    name: str  # of the extern "C" entry, which states the specialization
    x_dtype: str
    weight_dtype: str | None
    bias_dtype: str | None
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    blocks_per_sm: int
    cluster: int = 1  # blocks that run together


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs a problem on a device."""

    family: str
    stages: tuple[Stage, ...]
    threads_per_row: int
    vecs_per_thread: int
    rows_per_block: int
    source: str  # of the thresholds
    sections: int = 0  # per row (K5)
    chunks_per_section: int = 0
    parts: int = 0  # blocks per row that normalize (K5)
    workspace_bytes: int = 0


def table_row(vecs: int) -> TableRow:
    """Find the table's row for rows of `vecs` 16-byte vectors."""
    return next(row for row in TABLE if vecs <= row.max_vecs)


@functools.lru_cache(maxsize=4096)
def choose_plan(problem: Problem, device: Device) -> Plan:
    """Choose kernel and launch.

    The choice looks at N, the dtypes and the device; at the number of rows only between K5 and K3
    or K4, whose bits are the same.

    Parameters
    ----------
    problem : Problem
        A problem whose columns have unit stride and which is not empty.
    device : Device
        The GPU.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If the launch would need more than 2**31 - 1 blocks.
    """
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    row: TableRow | ClusterRow = table_row(vecs)
    if row.family in ("shared", "split"):
        row = _long_row(problem, row, vecs, device)
    if row.family == "split":
        return _split_plan(problem, row, device)
    return _row_plan(problem, row, vecs, device)


def _long_row(
    problem: Problem, row: TableRow | ClusterRow, vecs: int, device: Device
) -> TableRow | ClusterRow:
    """Let K4, K3 or K5 have a row that fits no block's registers."""
    size, least = _accumulator_bytes(problem), SPLIT_MIN_VECS
    wide = cluster_row(vecs, ITEMSIZE[problem.x_dtype], size, device)
    if wide:
        row, least = wide, CLUSTER_SPLIT_MIN_VECS
    elif _staged_bytes(problem, vecs, device) > device.shared_bytes:
        return TABLE[-1]
    few = problem.rows * row.cluster <= SPLIT_ROWS_PER_SM * device.sm_count
    return TABLE[-1] if few and vecs >= least else row


def _staged_bytes(problem: Problem, vecs: int, device: Device) -> int:
    chunks = -(-vecs // CHUNK_VECS)
    copied = staging_of(device.compute_capability) != STAGE_REGISTERS
    row = copied_bytes(vecs, rows=1, arrivals=chunks) if copied else VEC_BYTES * vecs
    return row + CHUNK_PARTIALS * chunks * _accumulator_bytes(problem)


def _accumulator_bytes(problem: Problem) -> int:
    return 8 if problem.x_dtype == "float64" else 4


def _row_plan(problem: Problem, row: TableRow | ClusterRow, vecs: int, device: Device) -> Plan:
    """K1 to K4: a row stays with one block or one cluster."""
    rows_per_block = 1
    if isinstance(row, ClusterRow):
        vecs_per_thread = 4
        constants: tuple[int, ...] = (row.cluster, row.threads)
        shared = cluster_bytes(row, vecs, _accumulator_bytes(problem))
        label = f"c{row.cluster}_t{row.threads}"
    elif row.family == "shared":
        vecs_per_thread = 4
        staging = staging_of(device.compute_capability)
        constants = (row.threads, staging)
        shared = _staged_bytes(problem, vecs, device)
        label = f"t{row.threads}{LABELS[staging]}"
    else:
        rows_per_block = row.threads // row.threads_per_row * row.rows_per_group
        vecs_per_thread = -(-vecs // row.threads_per_row)
        constants = (row.threads, row.threads_per_row, vecs_per_thread)
        shared = 0
        label = f"t{row.threads_per_row}_v{vecs_per_thread}"
        if row.family == "warp":
            constants += (row.rows_per_group,)
            label += f"_r{row.rows_per_group}"
        else:
            shared = 3 * row.threads // 32 * _accumulator_bytes(problem)
    grid = row.cluster * -(-problem.rows // rows_per_block)
    stage = _stage(problem, row, f"layer_norm_fwd_{row.family}", constants, label, grid, shared)
    return Plan(
        family=row.family,
        stages=(stage,),
        threads_per_row=row.threads_per_row,
        vecs_per_thread=vecs_per_thread,
        rows_per_block=rows_per_block,
        source=row.source,
    )


def _split_plan(problem: Problem, row: TableRow | ClusterRow, device: Device) -> Plan:
    """K5: the sections depend on N alone, so that a row's bits do not depend on the other rows."""
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    chunks = -(-vecs // CHUNK_VECS)
    per_section = -(-chunks // MAX_SECTIONS)
    sections = -(-chunks // per_section)
    # Every part merges all sections of its row again, so no more parts than keep the device busy.
    parts = max(-(-SPLIT_BLOCKS_PER_SM * device.sm_count // problem.rows), -(-chunks // 64))
    parts = -(-chunks // -(-chunks // min(chunks, parts)))
    size = _accumulator_bytes(problem)
    stats = _stage(
        problem,
        row,
        "layer_norm_fwd_split_stats",
        (),
        "",
        problem.rows * sections,
        24 * size,
    )
    normalize = _stage(
        problem, row, "layer_norm_fwd_split_normalize", (), "", problem.rows * parts, 24 * size
    )
    return Plan(
        family=row.family,
        stages=(stats, normalize),
        threads_per_row=row.threads_per_row,
        vecs_per_thread=4,
        rows_per_block=1,
        sections=sections,
        chunks_per_section=per_section,
        parts=parts,
        workspace_bytes=3 * size * problem.rows * sections,
        source=row.source,
    )


CODES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


def _stage(
    problem: Problem,
    row: TableRow | ClusterRow,
    kernel: str,
    constants: tuple[int, ...],
    label: str,
    grid: int,
    shared: int,
) -> Stage:
    if grid > MAX_GRID_X:
        msg = (
            f"x has {problem.rows} rows of {problem.N} columns, which needs {grid} blocks; "
            f"a launch takes at most {MAX_GRID_X}. Normalize x in slices along its first axis"
        )
        raise ValueError(msg)
    affine = kernel != "layer_norm_fwd_split_stats"  # which sees neither weight nor bias
    weight = problem.weight_dtype if affine else None
    bias = problem.bias_dtype if affine else None
    double = problem.x_dtype == "float64"
    parts = [kernel, CODES[problem.x_dtype], label]
    parts += [f"w_{CODES[weight]}"] if weight else []
    parts += [f"b_{CODES[bias]}"] if bias else []
    return Stage(
        kernel=kernel,
        family=row.family,
        constants=constants,
        name="_".join(p for p in parts if p),
        x_dtype=problem.x_dtype,
        weight_dtype=weight,
        bias_dtype=bias,
        grid=(grid, 1, 1),
        block=(row.threads, 1, 1),
        shared_bytes=shared,
        blocks_per_sm=row.blocks_per_sm_f64 if double else row.blocks_per_sm,
        cluster=row.cluster,
    )
