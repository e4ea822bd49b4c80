"""Which rows a cluster of blocks takes (K4, sm_90 and newer), and what each block holds."""

from dataclasses import dataclass
from typing import ClassVar

from cupynorm._cuda.chunk import CHUNK_PARTIALS, CHUNK_THREADS, CHUNK_VECS
from cupynorm._cuda.device import Device
from cupynorm._cuda.staging import copied_bytes

__all__ = [
    "CLUSTER_BWD_MIN_VECS",
    "CLUSTER_BWD_TABLE",
    "CLUSTER_MIN_VECS",
    "CLUSTER_SPLIT_MIN_VECS",
    "CLUSTER_TABLE",
    "RESIDENT_SHARE",
    "SPLIT_BLOCKS_PER_SM_BWD",
    "ClusterBwdRow",
    "ClusterRow",
    "cluster_bwd_bytes",
    "cluster_bwd_row",
    "cluster_bytes",
    "cluster_row",
    "resident_clusters",
]

_PREDICTED = "predicted, bench/results/model.md"
RESERVED = 1024  # bytes of each block's shared memory that the system keeps


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """One row of the forward's table: rows of x of up to so many chunks of 16 KiB."""

    family: ClassVar[str] = "cluster"

    cluster: int  # blocks per row
    max_chunks: int
    max_chunks_16bit: int
    threads: int  # of a block
    blocks_per_sm: int  # that registers and shared memory must allow
    blocks_per_sm_f64: int
    source: str

    @property
    def threads_per_row(self) -> int:
        """Of all blocks."""
        return self.cluster * self.threads


# Quack's limits for 16-bit types (32, 64, 128 KiB), which leave a block two chunks; for wider types
# twice theirs: more than four chunks a block (64 KiB) would leave too few blocks on a
# multiprocessor to load while another one stores. A row is skipped where the device's shared
# memory does not hold `blocks_per_sm` blocks; the fourth is for devices that are short of it. The
# blocks of the last row stand alone: with fewer threads they would have less than 48 KiB in flight,
# and with 1024 float64 would spill, as K3's does.
CLUSTER_TABLE = (
    ClusterRow(2, 8, 4, 256, 3, 3, _PREDICTED),
    ClusterRow(4, 16, 8, 256, 3, 3, _PREDICTED),
    ClusterRow(8, 32, 32, 256, 3, 3, _PREDICTED),
    ClusterRow(8, 32, 32, 512, 1, 1, _PREDICTED),
    ClusterRow(8, 112, 112, 768, 1, 1, _PREDICTED),
)
# K4 follows K2: K3's one block on a multiprocessor cannot load while it stores.
CLUSTER_MIN_VECS = 2 * CHUNK_VECS  # 32 KiB
# Few rows leave multiprocessors idle under K4 too, but a shorter row than this is done before K5's
# second launch.
CLUSTER_SPLIT_MIN_VECS = 64 * CHUNK_VECS  # 1 MiB


@dataclass(frozen=True, slots=True)
class ClusterBwdRow:
    """One row of the backward's table: what a block of the cluster has for its part of a row."""

    family: ClassVar[str] = "cluster"

    cluster: int
    threads: int
    chunks: int  # that each 256 threads of a block hold in registers, of x and of dy
    ahead: bool  # whether the next row is fetched while this one is summed
    ahead_f64: bool
    blocks_per_sm: int
    blocks_per_sm_f64: int
    source: str

    @property
    def threads_per_row(self) -> int:
        """Of all blocks."""
        return self.cluster * self.threads

    @property
    def slots(self) -> int:
        """Chunks that a block holds."""
        return self.threads // CHUNK_THREADS * self.chunks


# The first that holds the row. With two chunks a block the next row fits the registers beside this
# one; the last three are for devices whose shared memory does not hold the sums of two chunks.
CLUSTER_BWD_TABLE = (
    ClusterBwdRow(2, 512, 1, True, False, 1, 1, _PREDICTED),
    ClusterBwdRow(4, 512, 1, True, False, 1, 1, _PREDICTED),
    ClusterBwdRow(8, 512, 1, True, False, 1, 1, _PREDICTED),
    ClusterBwdRow(8, 768, 1, False, False, 1, 1, _PREDICTED),
    ClusterBwdRow(8, 512, 2, False, False, 1, 1, _PREDICTED),
    ClusterBwdRow(2, 256, 1, True, True, 1, 1, _PREDICTED),
    ClusterBwdRow(4, 256, 1, True, True, 1, 1, _PREDICTED),
    ClusterBwdRow(8, 256, 1, True, True, 1, 1, _PREDICTED),
)
# From here on K3's threads hold no second row, and what it loads and what it computes take turns.
CLUSTER_BWD_MIN_VECS = 2 * CHUNK_VECS  # 32 KiB
# The share of the multiprocessors that surely take part, by cluster size: they come in groups
# (GPCs), a cluster stays in one, and what is left over in each holds none. By Quack's published
# counts the 170 of an RTX 5090 hold 85, 41 and 19 clusters of 2, 4 and 8. One cluster more than run
# at once would begin when the others end, and double the time.
RESIDENT_SHARE = {2: 1.0, 4: 0.95, 8: 0.9}
# The backward goes to K5 where it would fill fewer multiprocessors than this share; dx has the same
# bits there.
SPLIT_BLOCKS_PER_SM_BWD = 0.25


def cluster_bytes(row: ClusterRow, vecs: int, accumulator: int) -> int:
    """Shared memory of a block of `layer_norm_fwd_cluster`."""
    chunks = -(-vecs // CHUNK_VECS)
    most = -(-chunks // row.cluster)
    staged = copied_bytes(most * CHUNK_VECS, rows=1, arrivals=most)
    return staged + (most * CHUNK_PARTIALS + 3 * chunks) * accumulator


def cluster_row(vecs: int, itemsize: int, accumulator: int, device: Device) -> ClusterRow | None:
    """Find the first row that holds `vecs` vectors of x; None where no cluster does."""
    if vecs <= CLUSTER_MIN_VECS:
        return None
    chunks = -(-vecs // CHUNK_VECS)
    for row in CLUSTER_TABLE:
        limit = row.max_chunks_16bit if itemsize == 2 else row.max_chunks
        if row.cluster <= device.clusters and chunks <= limit:
            size = cluster_bytes(row, vecs, accumulator)
            if _fits(size, row.blocks_per_sm, device.shared_bytes):
                return row
    return None


def cluster_bwd_bytes(row: ClusterBwdRow, vecs: int, vec_totals: int, accumulator: int) -> int:
    """Shared memory of a block of `layer_norm_bwd_cluster`.

    `vec_totals` are the bytes of the sums that belong to one vector, of all that is wanted.
    """
    chunks = -(-vecs // CHUNK_VECS)
    sums = (row.slots * CHUNK_THREADS // 32 + 2 * chunks) * 3 * accumulator
    return row.slots * CHUNK_VECS * vec_totals + sums


def cluster_bwd_row(
    vecs: int, vec_totals: int, accumulator: int, device: Device
) -> ClusterBwdRow | None:
    """Find the first row that holds `vecs` vectors of x and dy; None where no cluster does."""
    chunks = -(-vecs // CHUNK_VECS)
    for row in CLUSTER_BWD_TABLE:
        if row.cluster <= device.clusters and chunks <= row.cluster * row.slots:
            size = cluster_bwd_bytes(row, vecs, vec_totals, accumulator)
            if _fits(size, 1, device.shared_bytes):
                return row
    return None


def resident_clusters(cluster: int, blocks_per_sm: int, sm_count: int) -> int:
    """Clusters that surely run at once."""
    return max(1, int(RESIDENT_SHARE[cluster] * sm_count * blocks_per_sm) // cluster)


def _fits(block_bytes: int, blocks: int, shared_bytes: int) -> bool:
    return blocks * (block_bytes + RESERVED) <= shared_bytes + RESERVED
