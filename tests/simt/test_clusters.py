"""Blocks of a cluster run together and reach each other's shared memory; faults are caught."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import DeviceLimits, SimtFault
from tests.simt.run_kernel import caught, floats, run, unwritten

CLUSTER, THREADS = 4, 32

# Each thread sends what it read to its place in every block of the cluster, then adds up what came.
# `mode` breaks it in one way; one text compiles once.
TEXT = """
enum { GOOD, BEYOND, NOT_SHARED, NO_SUCH_RANK, NOT_STARTED, UNORDERED, BLOCK_BARRIER, RELAXED,
       ARRIVES_FIRST, PULLS, PULLS_AND_LEAVES, OVERWRITES, SKIPS, LEAVES, TWICE, NEVER_ARRIVES,
       NEVER_WAITS, APART, UNWRITTEN };

inline __attribute__((always_inline)) void barrier() {
  simt_cluster_arrive(1);
  simt_cluster_wait();
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) k(const float* x, float* y, long long mode) {
  float* s = (float*)simt_dynamic_shared();  // float [4][32]
  const int rank = simt_cluster_rank(), t = threadIdx.x;
  const int own = blockIdx.x * 32 + t;
  const float mine = x[own];
  if (mode != NOT_STARTED) barrier();
  if (mode == SKIPS && rank == 2) return;
  if (mode == LEAVES && own == 7) return;
  if (mode == NEVER_ARRIVES && rank == 1) simt_cluster_wait();
  if (mode == ARRIVES_FIRST) simt_cluster_arrive(1);
  if (mode == PULLS || mode == PULLS_AND_LEAVES) {
    s[t] = mine;
  } else if (mode != UNWRITTEN) {
    for (int to = 0; to < 4; ++to) {
      float* there = s + 32 * rank + t;
      if (mode == BEYOND && to == 3) there += 128 - 32 * rank;
      if (mode == NOT_SHARED) there = (float*)x;
      int peer = mode == NO_SUCH_RANK ? to + 1 : to;
      *(float*)simt_cluster_map(there, peer) = mine;  // remote store
    }
  }
  if (mode == BLOCK_BARRIER) __syncthreads();
  if (mode == RELAXED) simt_cluster_arrive(0), simt_cluster_wait();
  if (mode == ARRIVES_FIRST) simt_cluster_wait();
  if (mode == TWICE) simt_cluster_arrive(1);
  if (mode == APART) {
    if (t % 2) simt_cluster_arrive(1); else simt_cluster_arrive(1 + mode);
    simt_cluster_wait();
  }
  if (mode < UNORDERED || (mode >= PULLS && mode != APART)) barrier();
  float sum = 0;
  for (int from = 0; from < 4; ++from) {
    if (mode == PULLS || mode == PULLS_AND_LEAVES)
      sum += *(float*)simt_cluster_map(s + t, from);  // remote load
    else
      sum += s[32 * from + t];
  }
  y[own] = sum;
  if (mode == OVERWRITES) *(float*)simt_cluster_map(s + 32 * rank + t, 3 - rank) = 0;  // too early
  if (mode == PULLS || mode == OVERWRITES) barrier();
  if (mode == NEVER_WAITS) simt_cluster_arrive(1);
}
"""
MODES = [name.strip() for name in TEXT.split("{")[1].split("}")[0].split(",")]


def sums(clusters):
    """What the good kernel gives for x = 0, 1, 2, ..."""
    x = np.arange(clusters * CLUSTER * THREADS, dtype=np.float32).reshape(
        clusters, CLUSTER, THREADS
    )
    return np.repeat(x.sum(1, keepdims=True), CLUSTER, 1).ravel()


def go(mode, *, clusters=3, source=TEXT, **options):
    n = clusters * CLUSTER * THREADS
    y = unwritten(n)
    options.setdefault("grid", (clusters * CLUSTER,))
    options.setdefault("shared", 4 * CLUSTER * THREADS)
    traffic = run(source, (THREADS,), (floats(n), y, MODES.index(mode)), **options)
    return y.to_numpy(np.float32), traffic


def fault(kind, mode, text=None):
    n = CLUSTER * THREADS
    args = (floats(n), unwritten(n), MODES.index(mode))
    return caught(kind, TEXT, (THREADS,), args, text, grid=(CLUSTER,), shared=4 * n)


@pytest.mark.parametrize("mode", ["GOOD", "PULLS"])
def test_blocks_of_a_cluster_reach_each_other(mode):
    for seed in (None, *range(4)):
        y, _ = go(mode, seed=seed)
        assert (y == sums(3)).all()


def test_remote_traffic_is_counted_apart():
    own, sent = 4 * THREADS * CLUSTER, 4 * THREADS * CLUSTER * (CLUSTER - 1)  # of one cluster
    _, traffic = go("GOOD", clusters=3)
    shared = traffic.shared
    assert (shared.remote_written_bytes, shared.remote_read_bytes) == (3 * sent, 0)
    assert (shared.written_bytes, shared.read_bytes) == (3 * own, 3 * own * CLUSTER)
    assert (shared.remote_warp_writes, shared.remote_warp_reads) == (3 * 12, 0)
    assert {s.memory for s in traffic.sites()} >= {"shared memory", "remote shared memory"}
    _, traffic = go("PULLS", clusters=1)
    assert (traffic.shared.remote_read_bytes, traffic.shared.remote_written_bytes) == (sent, 0)
    assert traffic["x"].read_bytes == traffic["x"].distinct_read_bytes == own


def test_beyond_the_peers_shared_memory():
    message = fault("out-of-bounds", "BEYOND", "= mine;  // remote store")
    assert "after dynamic shared memory of block 3 of the cluster (512 bytes" in message


@pytest.mark.parametrize(
    ("kind", "mode", "words"),
    [
        ("out-of-bounds", "NOT_SHARED", "no address of the block's dynamic shared memory"),
        ("argument", "NO_SUCH_RANK", "block 4 of a cluster of 4"),
        ("not-started", "NOT_STARTED", "no cluster barrier came before"),
    ],
)
def test_no_such_memory(kind, mode, words):
    assert words in fault(kind, mode)


def test_a_block_that_has_exited():
    """Found whether or not the block was really gone when its peer came to read."""
    assert "of the cluster" in fault("exited-block", "PULLS_AND_LEAVES")


@pytest.mark.parametrize("mode", ["UNORDERED", "BLOCK_BARRIER", "RELAXED", "ARRIVES_FIRST"])
def test_races_between_blocks(mode):
    """With too weak an order a load may also come before the store that it needs."""
    kinds = set()
    for seed in (None, *range(8)):
        with pytest.raises(SimtFault) as info:
            go(mode, clusters=1, seed=seed)
        kinds.add(info.value.kind)
    assert kinds <= {"race", "uninitialized"}
    assert "race" in kinds or mode == "UNORDERED"  # where the first to come reads nothing yet


def test_overwriting_what_a_peer_still_reads():
    assert "with no cluster barrier in between" in fault("race", "OVERWRITES")


def test_unwritten_shared_memory():
    assert "of block" in fault("uninitialized", "UNWRITTEN")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("SKIPS", "cluster"),
        ("LEAVES", "cluster"),
        ("TWICE", "again before it has waited"),
        ("NEVER_ARRIVES", "where it has not arrived"),
        ("NEVER_WAITS", "before it waits there"),
        ("APART", "lanes of one warp arrive at a cluster barrier apart"),
    ],
)
def test_a_barrier_that_not_all_reach(mode, words):
    assert words in fault("barrier-divergence", mode)


def test_a_barrier_where_a_peer_waits_elsewhere():
    source = """
extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float* y) {
  simt_cluster_arrive(1);
  if (blockIdx.x % 2 && threadIdx.x == 3) __syncthreads();
  simt_cluster_wait();
  if (blockIdx.x % 2 && threadIdx.x != 3) __syncthreads();
  if (blockIdx.x % 2 == 0) simt_cluster_arrive(1), simt_cluster_wait();
}
"""
    message = caught("barrier-divergence", source, (64,), (unwritten(1),), grid=(2,))
    assert "barrier" in message


def refused(words, source=TEXT, **options):
    with pytest.raises(SimtFault, match=words) as info:
        go("GOOD", source=source, **options)
    assert info.value.kind == "limits"


def test_launches_that_a_device_refuses():
    refused("grid x is 6, no multiple of the cluster's 4", grid=(6,))
    for arch in ("75", "89"):
        refused(f"sm_{arch} has none", limits=DeviceLimits.of(arch))
    go("GOOD", limits=DeviceLimits.of("120"))
    refused("clusters of 16 blocks; sm_90 takes 8", TEXT.replace("(4, 1, 1)", "(16)"), grid=(16,))
    refused("grid y is 1, no multiple", TEXT.replace("(4, 1, 1)", "(2, 2)"), grid=(2, 1))


def test_what_is_not_simulated_is_refused():
    refused("only those along x", TEXT.replace("(4, 1, 1)", "(2, 2, 1)"), grid=(2, 2))
    static = TEXT.replace("const int rank", "__shared__ volatile float z; z = 1; const int rank")
    refused("static shared memory", static)
