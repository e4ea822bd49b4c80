"""Decides which kernels run a backward problem and with what launches; pure Python."""

import functools

from cupynorm._cuda.gradient_plan import GradientPlan, totals_stage
from cupynorm._cuda.plan import (
    CHUNK_THREADS,
    CHUNK_VECS,
    CODES,
    MAX_GRID_X,
    MAX_SECTIONS,
    SPLIT_MIN_VECS,
    VEC_BYTES,
    Device,
    Stage,
    TableRow,
)
from cupynorm._cuda.plan_cluster import (
    CLUSTER_BWD_MIN_VECS,
    SPLIT_BLOCKS_PER_SM_BWD,
    ClusterBwdRow,
    cluster_bwd_bytes,
    cluster_bwd_row,
    resident_clusters,
)
from cupynorm._cuda.staging import LABELS, STAGE_REGISTERS, next_row_bytes, staging_of
from cupynorm._problem import ITEMSIZE, GradientProblem, stats_dtype

__all__ = ["BWD_TABLE", "GradientPlan", "choose_plan_bwd"]

_PREDICTED = "predicted, bench/results/model.md"

# Under K1 and K2 a thread holds at most two vectors of x and two of dy, and as many of the row that
# comes next, beside up to 32 registers of dweight and dbias. K3's limit is the device's shared
# memory; its row ends where 512 threads can hold x and dy no longer.
BWD_TABLE = (
    TableRow("warp", 8, 8, 128, 1, 4, 4, _PREDICTED),
    TableRow("warp", 16, 16, 128, 1, 4, 4, _PREDICTED),
    TableRow("warp", 32, 32, 128, 1, 4, 4, _PREDICTED),
    TableRow("warp", 64, 32, 128, 1, 3, 3, _PREDICTED),
    TableRow("block", 128, 64, 64, 1, 6, 6, _PREDICTED),
    TableRow("block", 256, 128, 128, 1, 3, 3, _PREDICTED),
    TableRow("block", 512, 256, 256, 1, 2, 2, _PREDICTED),
    TableRow("block", 1024, 512, 512, 1, 1, 1, _PREDICTED),
    TableRow("shared", 4096, 512, 512, 1, 1, 1, _PREDICTED),
    TableRow("split", 2**60, CHUNK_THREADS, CHUNK_THREADS, 1, 2, 2, _PREDICTED),
)

# Rows that a block adds up before it leaves a partial sum: that costs 16 bytes a column, written
# and read again, where a row of float32 moves 12.
ROWS_PER_PARTIAL = 4
# kernels/layer_norm_shared_bwd.cuh: up to so many vectors a thread, the next row is copied to
# shared memory where that has room. One more of float64, and sm_100 spills.
COPIED_VECS = {"float16": 8, "bfloat16": 8, "float32": 8, "float64": 7}
# Where it has none, it is fetched into registers. One more of float64, and sm_120 spills.
AHEAD_VECS = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 3}
APPLY_VECS = 2  # kernels/layer_norm_split_bwd.cuh
APPLY_BLOCKS_PER_SM = 2
MERGE_THREADS = 128

_Row = TableRow | ClusterBwdRow


@functools.lru_cache(maxsize=4096)
def choose_plan_bwd(problem: GradientProblem, device: Device) -> GradientPlan:
    """Choose kernels and launches.

    Which family runs depends on N, the dtypes and the device, and on the number of rows only
    between K4 and K5, which give dx the same bits: a row has them in every batch.

    Parameters
    ----------
    problem : GradientProblem
        A problem whose columns have unit stride and which is not empty.
    device : Device
        The GPU.

    Returns
    -------
    GradientPlan

    Raises
    ------
    ValueError
        If a launch would need more than 2**31 - 1 blocks.
    """
    vecs = -(-problem.N * ITEMSIZE[problem.x_dtype] // VEC_BYTES)
    row: _Row = next(row for row in BWD_TABLE if vecs <= row.max_vecs)
    if row.family in ("shared", "split"):
        row = _long_row(problem, row, vecs, device)
    if row.family == "split":
        return _split_plan(problem, row, vecs, device)
    return _row_plan(problem, row, vecs, device)


def _long_row(problem: GradientProblem, row: _Row, vecs: int, device: Device) -> _Row:
    """Let K3, K4 or K5 have a row whose sums for dweight and dbias fit no block's registers."""
    if row.family == "shared" and _shared_bytes(problem, row, vecs) > device.shared_bytes:
        row = BWD_TABLE[-1]
    if row.family == "shared" and vecs <= CLUSTER_BWD_MIN_VECS:
        return row
    totals = _totals_of(problem) * _vec_totals_bytes(problem)
    wide = cluster_bwd_row(vecs, totals, _accumulator_bytes(problem), device)
    if not wide:
        return row
    blocks = wide.cluster * -(-problem.rows // _rows_per_partial(problem))
    few = vecs >= SPLIT_MIN_VECS and blocks < SPLIT_BLOCKS_PER_SM_BWD * device.sm_count
    return BWD_TABLE[-1] if few else wide


def _rows_per_partial(problem: GradientProblem, wanted: int | None = None) -> int:
    return (wanted or ROWS_PER_PARTIAL) if _totals_of(problem) else 1


def _accumulator_bytes(problem: GradientProblem) -> int:
    return ITEMSIZE[stats_dtype(problem.x_dtype)]


def _totals_of(problem: GradientProblem) -> int:
    """How many of dweight and dbias are wanted."""
    return (problem.dweight_dtype is not None) + (problem.dbias_dtype is not None)


def _vec_totals_bytes(problem: GradientProblem) -> int:
    """Bytes of the sums that belong to one vector of x."""
    return VEC_BYTES // ITEMSIZE[problem.x_dtype] * _accumulator_bytes(problem)


def _shared_bytes(problem: GradientProblem, row: _Row, vecs: int) -> int:
    size, vecs_per_thread = _accumulator_bytes(problem), -(-vecs // row.threads_per_row)
    totals = _totals_of(problem) * _vec_totals_bytes(problem)
    if isinstance(row, ClusterBwdRow):
        return cluster_bwd_bytes(row, vecs, totals, size)
    if row.family == "warp":
        return 2 * row.threads_per_row * vecs_per_thread * _vec_totals_bytes(problem)
    sums = 2 * 3 * row.threads // 32 * size
    if row.family == "block":
        return sums
    return sums + vecs_per_thread * row.threads * totals


def _partials_bytes(problem: GradientProblem, vecs: int, partials: int) -> int:
    return _totals_of(problem) * partials * vecs * _vec_totals_bytes(problem)


def _row_plan(
    problem: GradientProblem,
    row: _Row,
    vecs: int,
    device: Device,
    rows_per_partial: int | None = None,
    copies: bool = True,
) -> GradientPlan:
    """K1 to K4: as many blocks (K4: clusters) as the device holds.

    Block b takes rows b, b + grid, ....
    """
    rows_per_block, vecs_per_thread = 1, -(-vecs // row.threads_per_row)
    shared = _shared_bytes(problem, row, vecs)
    partials = _blocks_per_sm(problem, row) * device.sm_count
    if isinstance(row, ClusterBwdRow):
        vecs_per_thread = 4 * row.chunks
        partials = resident_clusters(row.cluster, _blocks_per_sm(problem, row), device.sm_count)
        ahead = row.ahead_f64 if problem.x_dtype == "float64" else row.ahead
        constants: tuple[int, ...] = (row.cluster, row.threads, row.chunks, int(ahead))
        label = f"c{row.cluster}_t{row.threads}_v{vecs_per_thread}"
    else:
        rows_per_block = row.threads // row.threads_per_row
        label = f"t{row.threads_per_row}_v{vecs_per_thread}"
        constants = (row.threads, vecs_per_thread)
    if row.family == "warp":
        constants = (row.threads, row.threads_per_row, vecs_per_thread)
    elif row.family == "shared":
        # The same for all rows of so many vectors a thread: one entry for them.
        longest = next_row_bytes(vecs_per_thread * row.threads_per_row)
        few = copies and vecs_per_thread <= COPIED_VECS[problem.x_dtype]
        fits = few and shared + longest <= device.shared_bytes
        staging = staging_of(device.compute_capability) if fits else STAGE_REGISTERS
        ahead = staging == STAGE_REGISTERS and vecs_per_thread <= AHEAD_VECS[problem.x_dtype]
        constants += (staging, int(ahead))
        label += LABELS[staging]
        shared += next_row_bytes(vecs) if staging != STAGE_REGISTERS else 0
    per_block = rows_per_block * _rows_per_partial(problem, rows_per_partial)
    partials = min(partials, -(-problem.rows // per_block))
    grid = row.cluster * partials
    main = _gradient_stage(problem, row, row.family, constants, label, grid, shared)
    return GradientPlan(
        family=row.family,
        stages=(main, *_totals_stage(problem)),
        threads_per_row=row.threads_per_row,
        vecs_per_thread=vecs_per_thread,
        rows_per_block=rows_per_block,
        partials=partials,
        pitch=vecs * VEC_BYTES // ITEMSIZE[problem.x_dtype],
        workspace_bytes=_partials_bytes(problem, vecs, partials),
        passes=2 + problem.dx,
        source=row.source,
    )


def _split_plan(
    problem: GradientProblem,
    row: _Row,
    vecs: int,
    device: Device,
    rows_per_partial: int | None = None,
) -> GradientPlan:
    """K5: the sums of sections, their merge, then dx with the sums over rows, by columns."""
    chunks = -(-vecs // CHUNK_VECS)
    per_section = -(-chunks // MAX_SECTIONS)
    sections = -(-chunks // per_section)
    runs = -(-vecs // (CHUNK_THREADS * APPLY_VECS))  # blocks that stand side by side
    parts = -(-APPLY_BLOCKS_PER_SM * device.sm_count // runs)
    parts = min(max(parts, 1), -(-problem.rows // _rows_per_partial(problem, rows_per_partial)))
    size = _accumulator_bytes(problem)
    merging = -(-problem.rows // (MERGE_THREADS // 32))
    stages = (
        _gradient_stage(problem, row, "split_sums", (), "", problem.rows * sections, 24 * size),
        _gradient_stage(problem, row, "split_merge", (MERGE_THREADS,), "", merging, 0),
        _gradient_stage(problem, row, "split_apply", (), "", runs * parts, 0),
    )
    sums_at = _partials_bytes(problem, vecs, parts)
    gradients_at = sums_at + 3 * size * problem.rows * sections
    return GradientPlan(
        family=row.family,
        stages=(*stages, *_totals_stage(problem)),
        threads_per_row=row.threads_per_row,
        vecs_per_thread=APPLY_VECS,
        rows_per_block=1,
        sections=sections,
        chunks_per_section=per_section,
        partials=parts,
        pitch=vecs * VEC_BYTES // ITEMSIZE[problem.x_dtype],
        sums_at=sums_at,
        gradients_at=gradients_at,
        workspace_bytes=gradients_at + 3 * size * problem.rows,
        passes=4 + problem.dx,
        source=row.source,
    )


def _blocks_per_sm(problem: GradientProblem, row: _Row) -> int:
    return row.blocks_per_sm_f64 if problem.x_dtype == "float64" else row.blocks_per_sm


def _gradient_stage(
    problem: GradientProblem,
    row: _Row,
    kind: str,
    constants: tuple[int, ...],
    label: str,
    grid: int,
    shared: int,
) -> Stage:
    """Make the stage of a kernel of `kernels/layer_norm_*_bwd.cuh`."""
    if grid > MAX_GRID_X:
        msg = (
            f"x has {problem.rows} rows of {problem.N} columns, which needs {grid} blocks; "
            f"a launch takes at most {MAX_GRID_X}. Differentiate x in slices along its first axis"
        )
        raise ValueError(msg)
    kernel = f"layer_norm_bwd_{kind}"
    wanted = (problem.dx, problem.dweight_dtype is not None, problem.dbias_dtype is not None)
    merge = kind == "split_merge"  # which sees sums alone
    weight = None if merge else problem.weight_dtype
    dtype = stats_dtype(problem.x_dtype) if merge else problem.x_dtype
    parts = [kernel, CODES[dtype], label]
    if kind not in ("split_sums", "split_merge"):
        constants = (*constants, *(int(w) for w in wanted))
        parts += [name for name, w in zip(("dx", "dw", "db"), wanted, strict=True) if w]
    parts += [f"w_{CODES[weight]}"] if weight else []
    return Stage(
        kernel=kernel,
        family=f"{row.family}_bwd",
        constants=constants,
        name="_".join(p for p in parts if p),
        x_dtype=dtype,
        weight_dtype=weight,
        bias_dtype=None,
        grid=(grid, 1, 1),
        block=(MERGE_THREADS if merge else row.threads, 1, 1),
        shared_bytes=shared,
        blocks_per_sm=_blocks_per_sm(problem, row),
        cluster=row.cluster,
    )


def _totals_stage(problem: GradientProblem) -> tuple[Stage, ...]:
    dtypes = (problem.dweight_dtype, problem.dbias_dtype)
    return totals_stage(problem.x_dtype, dtypes, problem.N)
