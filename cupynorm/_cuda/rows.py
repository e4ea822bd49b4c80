"""Decides how rows whose columns are neighbours in memory run (K1 to K5), forward and backward.

Which family runs depends on N, the dtypes and the device; on the number of rows only between K5 and
K3 or K4, whose bits are the same: a row has them in every batch.
"""

from dataclasses import dataclass
from typing import Any

from cupynorm._cuda.plan import (
    CHUNK_PARTIALS,
    CHUNK_THREADS,
    CHUNK_VECS,
    PREDICTED,
    STAGE_LABELS,
    STAGE_REGISTERS,
    VEC_BYTES,
    Device,
    Plan,
    Stage,
    accumulator_bytes,
    copied_bytes,
    make_stage,
    next_row_bytes,
    totals_stages,
    wanted,
    workspace_of,
)
from cupynorm._layout import Problem
from cupynorm._rules import ITEMSIZE


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: rows of x of up to `max_vecs` 16-byte vectors."""

    family: str
    max_vecs: int
    threads_per_row: int  # of all blocks of a cluster
    threads: int  # of a block
    rows_per_group: int  # rows that one group of lanes holds at a time
    blocks_per_sm: int  # occupancy that registers and shared memory must allow
    blocks_per_sm_f64: int  # the same for float64, which needs twice the registers for its sums
    cluster: int = 1  # blocks per row
    max_vecs_16bit: int = 0  # of 16-bit types, where that is another number
    chunks: int = 0  # that each 256 threads of a block hold in registers, of x and of dy
    source: str = PREDICTED


REGISTERS = ("warp", "block")  # whose threads hold a row

# In the order of preference: the first row runs that holds a row of x and that the device has room
# for. K3's limit is the device's shared memory, so its last row ends where the largest GPU's does.
FORWARD = (
    Row("warp", 8, 8, 128, 2, 8, 5),
    Row("warp", 16, 16, 128, 2, 8, 5),
    Row("warp", 32, 32, 128, 2, 8, 5),
    Row("warp", 64, 32, 128, 2, 5, 4),
    Row("warp", 128, 32, 128, 1, 6, 5),
    Row("warp", 256, 32, 128, 1, 5, 4),
    Row("block", 512, 64, 64, 1, 12, 8),
    Row("block", 1024, 128, 128, 1, 6, 4),
    Row("block", 2048, 256, 256, 1, 3, 2),
    # K4 follows K2: K3's one block on a multiprocessor cannot load while it stores. Quack's limits
    # for 16-bit types (32, 64, 128 KiB), which leave a block two chunks; for wider types twice
    # theirs: more than four chunks a block (64 KiB) would leave too few blocks on a multiprocessor
    # to load while another one stores. A row is skipped where the device's shared memory does not
    # hold `blocks_per_sm` blocks; the last is for longer rows, and for devices short of it. Its
    # blocks stand alone on a multiprocessor; with more threads float64 would spill.
    Row("cluster", 8 * CHUNK_VECS, 512, 256, 1, 3, 3, 2, max_vecs_16bit=4 * CHUNK_VECS),
    Row("cluster", 16 * CHUNK_VECS, 1024, 256, 1, 3, 3, 4, max_vecs_16bit=8 * CHUNK_VECS),
    Row("cluster", 32 * CHUNK_VECS, 2048, 256, 1, 3, 3, 8),
    Row("cluster", 112 * CHUNK_VECS, 4096, 512, 1, 1, 1, 8),
    Row("shared", 7 * CHUNK_VECS, 512, 512, 1, 1, 1),
    # Not 1024 threads: those leave 64 registers each, and float64 spills.
    Row("shared", 15 * CHUNK_VECS, 768, 768, 1, 1, 1),
    Row("split", 2**60, CHUNK_THREADS, CHUNK_THREADS, 1, 3, 2),
)
# Under K1 and K2 a thread holds at most two vectors of x and two of dy, and as many of the row that
# comes next, beside up to 32 registers of dweight and dbias. K3's limit is the device's shared
# memory; its last row ends where 512 threads can hold x and dy no longer.
BACKWARD = (
    Row("warp", 8, 8, 128, 1, 4, 4),
    Row("warp", 16, 16, 128, 1, 4, 4),
    Row("warp", 32, 32, 128, 1, 4, 4),
    Row("warp", 64, 32, 128, 1, 3, 3),
    Row("block", 128, 64, 64, 1, 6, 6),
    Row("block", 256, 128, 128, 1, 3, 3),
    Row("block", 512, 256, 256, 1, 2, 2),
    Row("block", 1024, 512, 512, 1, 1, 1),
    # From 32 KiB on K3 has no room for a second row, and what it loads and what it computes take
    # turns: it comes after K4 there. With two chunks a block of K4 the next row fits beside the
    # sums; its last three rows are for devices whose shared memory does not hold those.
    Row("shared", 2 * CHUNK_VECS, 512, 512, 1, 1, 1),
    Row("cluster", 4 * CHUNK_VECS, 1024, 512, 1, 1, 1, 2, chunks=1),
    Row("cluster", 8 * CHUNK_VECS, 2048, 512, 1, 1, 1, 4, chunks=1),
    Row("cluster", 16 * CHUNK_VECS, 4096, 512, 1, 1, 1, 8, chunks=1),
    Row("cluster", 24 * CHUNK_VECS, 6144, 768, 1, 1, 1, 8, chunks=1),
    # With 512 threads of two chunks odd rows spill.
    Row("cluster", 32 * CHUNK_VECS, 2048, 256, 1, 1, 1, 8, chunks=4),
    Row("cluster", 2 * CHUNK_VECS, 512, 256, 1, 1, 1, 2, chunks=1),
    Row("cluster", 4 * CHUNK_VECS, 1024, 256, 1, 1, 1, 4, chunks=1),
    Row("cluster", 8 * CHUNK_VECS, 2048, 256, 1, 1, 1, 8, chunks=1),
    Row("shared", 4 * CHUNK_VECS, 512, 512, 1, 1, 1),
    Row("split", 2**60, CHUNK_THREADS, CHUNK_THREADS, 1, 2, 2),
)

# One section per chunk up to this many, so that every row K3 and K4 can hold has the tree of K5.
MAX_SECTIONS = 512
# Few rows leave most multiprocessors idle under K3; K5 costs a second launch and a read from L2.
SPLIT_MIN_VECS = 8 * CHUNK_VECS  # 128 KiB
SPLIT_ROWS_PER_SM = 0.5
SPLIT_BLOCKS_PER_SM = 3  # of the normalizing kernel, over all rows
# Few rows leave SMs idle under K4 too, but a shorter row is done before K5's second launch.
CLUSTER_SPLIT_MIN_VECS = 64 * CHUNK_VECS  # 1 MiB
# The backward goes from K4 to K5 where it would fill fewer multiprocessors than this share; dx has
# the same bits there.
SPLIT_BLOCKS_PER_SM_BWD = 0.25

# Rows that a block adds up before it leaves a partial sum: that costs 16 bytes a column, written
# and read again, where a row of float32 moves 12.
ROWS_PER_PARTIAL = 4
# kernels/shared.cuh: up to so many vectors a thread, the next row is copied to shared memory where
# that has room. One more of float64, and sm_100 spills.
COPIED_VECS = {"float16": 8, "bfloat16": 8, "float32": 8, "float64": 6}
COPIED_THREADS = 512  # of 768, some of 16-bit types and of float64 spill
# Where it has none, K3 fetches it into registers. One more of float64, and sm_120 spills. Not K4:
# the blocks of a cluster would wait for it when they meet.
AHEAD_VECS = {"float16": 4, "bfloat16": 4, "float32": 4, "float64": 3}
APPLY_VECS = 2  # kernels/split.cuh
APPLY_BLOCKS_PER_SM = 2
MERGE_THREADS = 128
# The share of the multiprocessors that surely take part, by cluster size: they come in groups
# (GPCs), a cluster stays in one, and what is left over in each holds none. By Quack's published
# counts the 170 of an RTX 5090 hold 85, 41 and 19 clusters of 2, 4 and 8. One cluster more than run
# at once would begin when the others end, and double the time.
RESIDENT_SHARE = {2: 1.0, 4: 0.95, 8: 0.9}


class _Call:
    """What the choices look at: a problem and a device, in numbers."""

    def __init__(self, problem: Problem, device: Device) -> None:
        self.problem, self.device = problem, device
        self.backward = problem.backward
        self.dtype = str(problem.dtype("x"))
        self.size = accumulator_bytes(problem)
        self.vecs = -(-problem.N * ITEMSIZE[self.dtype] // VEC_BYTES)
        self.chunks = -(-self.vecs // CHUNK_VECS)
        self.vec_cols = VEC_BYTES // ITEMSIZE[self.dtype]
        self.totals = sum(wanted(problem)[1:])  # how many of dweight and dbias
        # Bytes of the sums that belong to one vector of x, of all that is wanted.
        self.vec_totals = self.totals * self.vec_cols * self.size

    def per_thread(self, row: Row) -> int:
        """Vectors of x that a thread holds at a time."""
        if row.family == "split" and self.backward:
            return APPLY_VECS
        if row.family == "cluster" and self.backward:
            return 4 * row.chunks
        if row.family not in REGISTERS and not self.backward:
            return 4
        return -(-self.vecs // row.threads_per_row)

    def blocks_per_sm(self, row: Row) -> int:
        """Occupancy that the registers must allow; a row's residual takes as many as the row."""
        blocks = row.blocks_per_sm_f64 if self.dtype == "float64" else row.blocks_per_sm
        adds = self.problem.op.residual and not self.backward
        return max(1, blocks // 2) if adds else blocks

    def shared_bytes(self, row: Row) -> int:
        """Shared memory of a block, without a place for the next row."""
        warps, per_thread, size = row.threads // 32, self.per_thread(row), self.size
        sums = 3 * warps * size
        if row.family == "split":
            return 24 * size
        if self.backward:
            if row.family == "warp":
                return 2 * row.threads_per_row * per_thread * self.vec_cols * size
            if row.family == "block":
                return 2 * sums
            exchanged = 3 * (warps * row.chunks + 2 * 32) * size if row.chunks else 2 * sums
            return exchanged + per_thread * row.threads * self.vec_totals
        if row.family in REGISTERS:
            return sums if row.family == "block" else 0
        most = -(-self.chunks // row.cluster)  # chunks of a block
        vecs = self.vecs if row.cluster == 1 else most * CHUNK_VECS
        staged = copied_bytes(vecs, rows=1, arrivals=most)
        merged = 3 * self.chunks if row.family == "cluster" else 0
        return staged + (most * CHUNK_PARTIALS + merged) * size

    def takes(self, row: Row) -> bool:
        """Whether a row of the table holds a row of x on this device."""
        narrow = ITEMSIZE[self.dtype] == 2 and row.max_vecs_16bit
        if self.vecs > (row.max_vecs_16bit if narrow else row.max_vecs):
            return False
        if row.family == "shared":
            # A row is copied there; one with a residual comes through registers.
            reach = self.backward or self.device.staging or self.problem.op.residual
            return bool(reach) and self.shared_bytes(row) <= self.device.shared_bytes
        if row.family == "cluster":
            fits = self.device.holds(self.shared_bytes(row), row.blocks_per_sm)
            return row.cluster <= self.device.clusters and fits
        return True

    def too_few_rows(self, row: Row) -> bool:
        """Whether K5 shares rows better among the multiprocessors than K3 or K4."""
        rows, sm_count = self.problem.rows, self.device.sm_count
        if self.backward:
            blocks = row.cluster * -(-rows // (ROWS_PER_PARTIAL if self.totals else 1))
            few = blocks < SPLIT_BLOCKS_PER_SM_BWD * sm_count
            return row.family == "cluster" and self.vecs >= SPLIT_MIN_VECS and few
        if row.family not in ("shared", "cluster"):
            return False
        least = CLUSTER_SPLIT_MIN_VECS if row.family == "cluster" else SPLIT_MIN_VECS
        return self.vecs >= least and rows * row.cluster <= SPLIT_ROWS_PER_SM * sm_count


def choose_row(problem: Problem, device: Device) -> Row:
    """Find the row of the table that a problem takes."""
    call = _Call(problem, device)
    table = BACKWARD if problem.backward else FORWARD
    row = next(row for row in table if call.takes(row))
    return table[-1] if call.too_few_rows(row) else row


def plan_of(
    problem: Problem,
    device: Device,
    row: Row | None = None,
    *,
    rows_per_partial: int | None = None,
    copies: bool = True,
) -> Plan:
    """Plan a problem that is not empty and whose columns have unit stride.

    What else may be tried than it takes by the tables: a row, rows per partial sum, and whether
    K3's backward copies the next row to shared memory.
    """
    row = row or choose_row(problem, device)
    call = _Call(problem, device)
    per_partial = (rows_per_partial or ROWS_PER_PARTIAL) if call.totals else 1
    if row.family != "split":
        return _row_plan(call, row, per_partial, copies)
    return _split_plan(call, row, per_partial)


def _row_plan(call: _Call, row: Row, rows_per_partial: int, copies: bool) -> Plan:
    """K1 to K4: a row stays with one block or one cluster.

    Of a backward there are as many as the device holds; block b takes rows b, b + grid, ....
    """
    rows_per_block = row.cluster * row.threads // row.threads_per_row * row.rows_per_group
    groups = -(-call.problem.rows // rows_per_block)
    if call.backward:
        blocks, sm_count = call.blocks_per_sm(row), call.device.sm_count
        resident = blocks * sm_count
        if row.cluster > 1:
            resident = resident_clusters(row.cluster, blocks, sm_count)
        groups = min(resident, -(-call.problem.rows // (rows_per_block * rows_per_partial)))
    constants, label, more = _specialize(call, row, copies)
    grid, shared_bytes = row.cluster * groups, call.shared_bytes(row) + more
    main = _stage(call, row, row.family, grid, shared_bytes, constants=constants, label=label)
    return _plan(call, row, (main,), {}, groups, rows_per_block=rows_per_block)


def _specialize(call: _Call, row: Row, copies: bool) -> tuple[tuple[int, ...], str, int]:
    """Template arguments of K1 to K4, how the entry's name states them, further shared memory."""
    per_thread, staging, more = call.per_thread(row), call.device.staging, 0
    label = f"t{row.threads_per_row}_v{per_thread}"
    if row.family == "warp":
        constants = (row.threads, row.threads_per_row, per_thread)
        if call.backward:
            return constants, label, 0
        return (*constants, row.rows_per_group), f"{label}_r{row.rows_per_group}", 0
    if row.family == "block":
        return (row.threads, per_thread), label, 0
    label = f"c{row.cluster}_" * (row.cluster > 1) + f"t{row.threads}"
    if not call.backward:
        return (row.cluster, row.threads, staging), label + STAGE_LABELS[staging], 0
    # The same for all rows of so many vectors a thread: one entry for them.
    longest = call.shared_bytes(row) + next_row_bytes(per_thread * row.threads)
    few = row.threads <= COPIED_THREADS and per_thread <= COPIED_VECS[call.dtype]
    if copies and few and longest <= call.device.shared_bytes:
        most = -(-call.chunks // row.cluster)  # chunks of a block
        more = next_row_bytes(min(call.vecs, most * CHUNK_VECS))
    else:
        staging = STAGE_REGISTERS
    ahead = not staging and row.cluster == 1 and per_thread <= AHEAD_VECS[call.dtype]
    held = (row.cluster, row.threads, per_thread, staging, int(ahead))
    return held, f"{label}_v{per_thread}{STAGE_LABELS[staging]}", more


def _split_plan(call: _Call, row: Row, rows_per_partial: int) -> Plan:
    """K5: the sums of sections, which depend on N alone, as a row's bits must; their merge; y.

    Backward dx is taken with the sums over rows, by columns.
    """
    rows, sm_count, shared = call.problem.rows, call.device.sm_count, call.shared_bytes(row)
    per_section = -(-call.chunks // MAX_SECTIONS)
    sections = -(-call.chunks // per_section)
    places = {"moments": 3 * call.size * rows * sections}
    if not call.backward:
        parts = max(-(-SPLIT_BLOCKS_PER_SM * sm_count // rows), -(-call.chunks // 64))
        parts = -(-call.chunks // -(-call.chunks // min(call.chunks, parts)))
        stages: tuple[Stage, ...] = (
            _stage(call, row, "split_stats", rows * sections, shared),
            _stage(call, row, "split_merge", rows, shared),
            _stage(call, row, "split_normalize", rows * parts, 0),
        )
        places["stats"] = 4 * call.size * rows
    else:
        runs = -(-call.vecs // (CHUNK_THREADS * APPLY_VECS))  # blocks that stand side by side
        parts = -(-APPLY_BLOCKS_PER_SM * sm_count // runs)
        parts = min(max(parts, 1), -(-rows // rows_per_partial))
        places = {"sums": places["moments"], "gradients": 3 * call.size * rows}
        merging = -(-rows // (MERGE_THREADS // 32))
        stages = (
            _stage(call, row, "split_sums", rows * sections, shared),
            _stage(call, row, "split_merge", merging, 0, constants=(MERGE_THREADS,)),
            _stage(call, row, "split_apply", runs * parts, 0),
        )
    split = {"sections": sections, "chunks_per_section": per_section, "parts": parts}
    return _plan(call, row, stages, places, parts, **split)


def _plan(
    call: _Call,
    row: Row,
    stages: tuple[Stage, ...],
    places: dict[str, int],  # in the workspace, by bytes; a backward's partials come first
    partials: int,
    *,
    rows_per_block: int = 1,
    **split: Any,
) -> Plan:
    about: dict[str, Any] = {}
    if call.backward:
        stages += totals_stages(call.problem)
        reads = 4 if split else 2
        about = {"partials": partials, "pitch": call.vecs * call.vec_cols}
        about["passes"] = reads + call.problem.has("dx")
        places = {"partials": partials * call.vecs * call.vec_totals, **places}
    return Plan(
        family=row.family,
        stages=stages,
        threads_per_row=row.threads_per_row,
        rows_per_block=rows_per_block,
        source=row.source,
        vecs_per_thread=call.per_thread(row),
        **workspace_of(places),
        **split,
        **about,
    )


def _stage(call: _Call, row: Row, kind: str, grid: int, shared_bytes: int, **special: Any) -> Stage:
    return make_stage(
        call.problem,
        kind,
        family=row.family,
        grid=grid,
        threads=MERGE_THREADS if call.backward and kind == "split_merge" else row.threads,
        blocks_per_sm=1 if kind == "split_merge" else call.blocks_per_sm(row),
        shared_bytes=shared_bytes,
        cluster=row.cluster,
        **special,
    )


def resident_clusters(cluster: int, blocks_per_sm: int, sm_count: int) -> int:
    """Clusters that surely run at once."""
    return max(1, int(RESIDENT_SHARE[cluster] * sm_count * blocks_per_sm) // cluster)
