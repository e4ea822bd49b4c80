"""K4's plans: which rows go to a cluster, what its blocks hold, when few rows go to K5 instead."""

import itertools
import re

import pytest

from cupynorm._cuda.plan import CHUNK_PARTIALS, CHUNK_THREADS, CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.rows import (
    BACKWARD,
    CLUSTER_SPLIT_MIN_VECS,
    FORWARD,
    resident_clusters,
)
from cupynorm._cuda.source import kernels_folder, source_of
from cupynorm._rules import ITEMSIZE
from tests.cuda.test_plan import BOTH, NEITHER, SM90, device_of, plan_of, without_rows

WITH_CLUSTERS = ("90", "100", "120")
DIRECTIONS = ("forward", "backward")


def of_chunks(direction, chunks, dtype, *, more=0, **options):
    N = (chunks * CHUNK_VECS + more) * VEC_BYTES // ITEMSIZE[dtype]
    return plan_of(direction, N, dtype, **options)


def ends(direction, dtype, device, most):
    """(last number of chunks, constants) of each run of chunks that has one K4 kernel."""
    found = {}
    for chunks in range(1, most):
        plan = of_chunks(direction, chunks, dtype, device=device)
        if plan.family == "cluster":
            found[plan.stages[0].constants] = chunks
    return [(chunks, constants) for constants, chunks in found.items()]


def test_limits_on_sm_90():
    """Written out: where the kernels change, in chunks of 16 KiB."""
    wide = [(8, (2, 256)), (16, (4, 256)), (32, (8, 256)), (112, (8, 768))]
    assert ends("forward", "float32", SM90, 130) == wide
    assert ends("forward", "float16", SM90, 130) == [(4, (2, 256)), (8, (4, 256)), *wide[2:]]
    assert ends("forward", "float64", SM90, 130) == [*wide[:3], (104, (8, 768))]
    ours = [(4, (2, 512, 1, 1)), (8, (4, 512, 1, 1)), (16, (8, 512, 1, 1)), (24, (8, 768, 1, 0))]
    theirs = [(n, (*c, 1, 1, 1)) for n, c in ours]
    assert ends("backward", "float16", SM90, 40) == theirs
    last = (32, (8, 512, 2, 0, 1, 1, 1))
    assert ends("backward", "float32", SM90, 40) == [*theirs, last]


def test_they_follow_the_registers_and_precede_the_split():
    for dtype in ITEMSIZE:
        for direction, before, beyond in (("forward", "block", 113), ("backward", "shared", 33)):
            assert of_chunks(direction, 2, dtype).family == before
            assert of_chunks(direction, 2, dtype, more=1).family == "cluster"
            assert of_chunks(direction, beyond, dtype).family == "split"


@pytest.mark.parametrize("capability", ["75", "80", "86", "89"])
def test_older_devices_have_none(capability):
    tried = itertools.product(DIRECTIONS, (2, 3, 6, 13, 30, 112), ITEMSIZE)
    for direction, chunks, dtype in tried:
        plan = of_chunks(direction, chunks, dtype, device=device_of(capability))
        assert plan.family != "cluster"
        assert all("__cluster_dims__" not in source_of(stage) for stage in plan.stages)


@pytest.mark.parametrize("capability", WITH_CLUSTERS)
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_blocks_hold_their_part_of_a_row(capability, dtype):
    """All that a block has in shared memory, as the kernels lay it out, for every chunk."""
    device = device_of(capability)
    number = 8 if dtype == "float64" else 4
    for chunks, more in itertools.product(range(2, 130), (1, CHUNK_VECS)):
        plan = of_chunks("forward", chunks, dtype, more=more, device=device)
        if plan.family == "cluster":
            (stage,) = plan.stages
            most = -(-(chunks + 1) // stage.cluster)
            assert most * stage.cluster <= stage.block[0]  # one thread sends to one block
            staged = most * (CHUNK_VECS * VEC_BYTES + CHUNK_PARTIALS * number)
            staged += VEC_BYTES + 8 * most  # the granule more, and a chunk's mbarrier
            assert stage.shared_bytes == staged + 3 * (chunks + 1) * number
            resident = stage.blocks_per_sm * (stage.shared_bytes + 1024)
            assert resident <= device.shared_bytes + 1024
            assert stage.grid[0] % stage.cluster == 0
        plan = of_chunks("backward", chunks, dtype, more=more, device=device)
        if plan.family == "cluster":
            stage = plan.stages[0]
            cluster, threads, held, *_ = stage.constants
            slots = threads // CHUNK_THREADS * held
            assert -(-(chunks + 1) // cluster) <= slots
            totals = 2 * slots * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype] * number
            sums = 3 * (8 * slots + 2 * (chunks + 1)) * number
            assert stage.shared_bytes == totals + sums <= device.shared_bytes
            assert stage.grid[0] == cluster * plan.partials


def test_all_the_shared_memory_of_a_cluster_is_used():
    """The longest row of the forward: 8 blocks of 14 chunks, 1.75 MiB; one more fits no block."""
    stage = of_chunks("forward", 112, "float16").stages[0]
    assert stage.shared_bytes + CHUNK_VECS * VEC_BYTES > SM90.shared_bytes
    assert 112 * CHUNK_VECS * VEC_BYTES == 1_835_008


def test_entries_state_their_clusters():
    for direction in DIRECTIONS:
        stage = of_chunks(direction, 5, "float16").stages[0]
        bounds = f"__cluster_dims__(4, 1, 1) __launch_bounds__({stage.block[0]}, "
        assert f"__global__ void {bounds}" in source_of(stage)
    assert "__cluster_dims__" not in source_of(of_chunks("forward", 1, "float16").stages[0])


# --- the number of rows -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_rows_choose_only_between_cluster_and_split(dtype):
    """As many blocks as half the multiprocessors, and a row of 1 MiB at least."""
    for chunks in (3, 20, 63, 64, 100, 113):
        plans = [of_chunks("forward", chunks, dtype, rows=M) for M in (1, 2, 8, 9, 1000, 10**6)]
        families = [plan.family for plan in plans]
        if chunks in (64, 100):
            assert families == ["split"] * 3 + ["cluster"] * 3
            assert all(p.chunks_per_section == 1 for p in plans[:3])  # the same trees
        else:
            assert len(set(families)) == 1
        for family in set(families):
            same = [without_rows(plan) for plan in plans if plan.family == family]
            assert all(plan == same[0] for plan in same)
    assert CLUSTER_SPLIT_MIN_VECS == 64 * CHUNK_VECS


@pytest.mark.parametrize("totals", [BOTH, NEITHER])
def test_rows_choose_between_cluster_and_split_backward(totals):
    """Where clusters would take less than a quarter of the device: its 33rd block is enough."""
    per_cluster = 4 if totals == BOTH else 1
    for chunks, cluster in ((7, 4), (8, 4), (16, 8)):
        enough = 1 if chunks < 8 else -(-33 // cluster)
        for clusters in (enough - 1, enough, 2 * enough):
            if clusters:
                rows = clusters * per_cluster
                plan = of_chunks("backward", chunks, "float32", rows=rows, totals=totals)
                assert plan.family == ("cluster" if clusters >= enough else "split")
                assert plan.partials >= clusters or plan.family == "split"


def test_no_more_clusters_than_run_at_once():
    """Quack publishes what an RTX 5090 holds: 85, 41 and 19 clusters of 2, 4 and 8."""
    for cluster, held in ((2, 85), (4, 41), (8, 19)):
        assert 0.9 * held <= resident_clusters(cluster, 1, 170) <= held
    assert resident_clusters(8, 1, 4) == 1
    plan = of_chunks("backward", 16, "float32", rows=10**6)
    assert plan.partials == resident_clusters(8, 1, SM90.sm_count)


# --- the tables ---------------------------------------------------------------------------------


def test_every_row_is_reached():
    devices = [device_of(capability) for capability in WITH_CLUSTERS]
    for direction, table in (("forward", FORWARD), ("backward", BACKWARD)):
        rows = [row for row in table if row.cluster > 1]
        keys = [(r.cluster, r.threads, *([r.chunks] if r.chunks else [])) for r in rows]
        made = {
            constants[: len(keys[0])]
            for device, dtype in itertools.product(devices, ITEMSIZE)
            for _, constants in ends(direction, dtype, device, 130)
        }
        assert made == set(keys)
        assert {row.cluster for row in rows} == {2, 4, 8}
        assert all(row.threads % CHUNK_THREADS == 0 for row in rows)


def test_constants_agree_with_the_kernel_text():
    chunk = (kernels_folder() / "chunk.cuh").read_text(encoding="utf-8")
    warps, vecs = (
        int(re.search(rf"{name} = (\d+),", chunk)[1]) for name in ("CHUNK_WARPS", "CHUNK_VECS")
    )
    assert (32 * warps, 32 * warps * vecs) == (CHUNK_THREADS, CHUNK_VECS)
    assert 3 * warps + 1 == CHUNK_PARTIALS
    assert "CHUNK_PARTIALS = 3 * CHUNK_WARPS + 1" in chunk
