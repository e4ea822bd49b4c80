"""Candidates around K4's thresholds: 2, 4 or 8 blocks a row, their threads, and K3 and K5."""

import dataclasses
from collections.abc import Iterator

from bench import gpu_tune
from bench.gpu_grid import BWD, Case, case
from bench.gpu_tune import Trial
from bench.gpu_tune_backward import Candidate
from cupynorm._cuda.chunk import CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.plan import TABLE, Device, TableRow
from cupynorm._cuda.plan_bwd import BWD_TABLE
from cupynorm._cuda.plan_cluster import (
    CLUSTER_BWD_TABLE,
    CLUSTER_TABLE,
    ClusterBwdRow,
    ClusterRow,
    cluster_bwd_row,
    cluster_row,
)
from cupynorm._problem import ITEMSIZE

__all__ = ["bwd_candidates", "candidates", "cluster_bwd_trials", "cluster_trials"]

CLUSTERS = (2, 4, 8)
# Threads and blocks per multiprocessor of a block, as long as registers allow 80 a thread.
BLOCKS = ((256, 3), (256, 2), (512, 1), (768, 1))
# In chunks: the last of a row of a table, and the first beyond it.
LENGTHS = (3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 112)
BWD_LENGTHS = (3, 4, 5, 8, 9, 16, 17, 24, 32)
FEW = (64, 100)  # chunks: where K5 takes few rows
FEW_BWD = (8, 16)


def candidates(row: ClusterRow) -> list[ClusterRow | TableRow]:
    """The row itself, every other geometry, then a block of its own and the split row."""
    change = dataclasses.replace
    made: list[ClusterRow | TableRow] = [row]
    made += [
        change(row, cluster=c, threads=t, blocks_per_sm=b, blocks_per_sm_f64=b)
        for c in CLUSTERS
        for t, b in BLOCKS
    ]
    return list(dict.fromkeys([*made, *(r for r in TABLE if r.family in ("shared", "split"))]))


def bwd_candidates(row: ClusterBwdRow, chunks: int) -> list[Candidate]:
    """The row itself, those that hold as much, K3 and K5, and partials more and less often."""
    rows: list[ClusterBwdRow | TableRow] = [row]
    rows += [r for r in CLUSTER_BWD_TABLE if chunks <= r.cluster * r.slots]
    rows += [r for r in BWD_TABLE if r.family in ("shared", "split")]
    made = [Candidate(r) for r in dict.fromkeys(rows)]
    return [*made, *(Candidate(row, count) for count in (1, 2, 8, 16))]


def _columns(dtype: str, chunks: int) -> int:
    return chunks * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]


def cluster_trials(device: Device) -> Iterator[Trial]:
    """The forward's thresholds for each dtype, then few rows; nothing before sm_90."""
    if device.clusters == 1:
        return
    for chunks in LENGTHS:
        for dtype in gpu_tune.DTYPES:
            vecs, size = chunks * CHUNK_VECS, ITEMSIZE[dtype]
            row = cluster_row(vecs, size, 4, device)
            row = row or CLUSTER_TABLE[-1]
            name = f"cluster: {dtype}, {chunks} chunks"
            yield Trial(name, candidates(row), [case(dtype, _columns(dtype, chunks))])
    for chunks in FEW:
        for share in (0.05, 0.25, 0.5, 1.0, 2.0):
            rows = max(1, int(share * device.sm_count) // 8)
            few = Case("bfloat16", rows, _columns("bfloat16", chunks), "few rows")
            name = f"split: {chunks} chunks, {share:g} blocks of clusters per multiprocessor"
            yield Trial(name, [CLUSTER_TABLE[-1], TABLE[-1]], [few])


def cluster_bwd_trials(device: Device) -> Iterator[Trial]:
    """As `cluster_trials`, for the backward."""
    if device.clusters == 1:
        return
    for chunks in BWD_LENGTHS:
        for dtype in gpu_tune.DTYPES:
            vecs, totals = chunks * CHUNK_VECS, 2 * 4 * VEC_BYTES // ITEMSIZE[dtype]
            row = cluster_bwd_row(vecs, totals, 4, device)
            if row is not None:
                cases = [case(dtype, _columns(dtype, chunks), op=BWD)]
                name = f"cluster: backward, {dtype}, {chunks} chunks"
                yield Trial(name, bwd_candidates(row, chunks), cases)
    for chunks in FEW_BWD:
        row = next(r for r in CLUSTER_BWD_TABLE if chunks <= r.cluster * r.slots)
        for share in (0.05, 0.125, 0.25, 0.5, 1.0):
            rows = max(1, int(4 * share * device.sm_count) // row.cluster)
            few = Case("float32", rows, _columns("float32", chunks), "few rows", op=BWD)
            name = f"split: backward, {chunks} chunks, {share:g} blocks per multiprocessor"
            yield Trial(name, [Candidate(row), Candidate(BWD_TABLE[-1])], [few])
