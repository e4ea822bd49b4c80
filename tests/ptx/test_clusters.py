"""Blocks of a cluster run together and reach each other's shared memory; faults are caught."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.build import compile_ptx
from tests.ptx.launch import DeviceLimits, PtxFault
from tests.ptx.run_kernel import DEVICE, caught, floats, good, run, unwritten

CLUSTER, THREADS = 4, 32

# Each thread sends what it read to its place in every block of the cluster, then adds up what came.
# `mode` breaks it in one way; one text compiles once.
TEXT = f"""{DEVICE}
enum {{ GOOD, BEYOND, NOT_SHARED, NO_SUCH_RANK, NOT_STARTED, UNORDERED, BLOCK_BARRIER, RELAXED,
       ARRIVES_FIRST, PULLS, PULLS_AND_LEAVES, OVERWRITES, SKIPS, LEAVES, TWICE, NEVER_ARRIVES,
       NEVER_WAITS, APART, UNWRITTEN, PLAIN, FIRST_PULLS }};

INLINE void barrier() {{
  cluster_arrive();
  cluster_wait();
}}

extern "C" __global__ void __cluster_dims__(4, 1, 1) k(const float* x, float* y, long long mode) {{
  volatile float* s = (float*)shared;  // [4][32]
  const int rank = cluster_rank(), t = threadIdx.x;
  const int own = blockIdx.x * 32 + t;
  const float mine = x[own];
  const bool pulls = mode == PULLS || mode == PULLS_AND_LEAVES || mode == FIRST_PULLS;
  if (mode != NOT_STARTED) barrier();
  if (mode == SKIPS && rank == 2) return;
  if (mode == LEAVES && own == 7) return;
  if (mode == NEVER_ARRIVES && rank == 1) cluster_wait();
  if (mode == ARRIVES_FIRST) cluster_arrive();
  if (pulls) {{
    s[t] = mine;
  }} else if (mode != UNWRITTEN) {{
    for (int to = 0; to < 4; ++to) {{
      u32 there = shared_address(shared) + 4 * (32 * rank + t);
      if (mode == BEYOND && to == 3) there += 4 * (128 - 32 * rank);
      if (mode == NOT_SHARED) there = t;
      send(peer(there, mode == NO_SUCH_RANK ? to + 1 : to), mine);  // remote store
    }}
  }}
  if (mode == BLOCK_BARRIER) __syncthreads();
  if (mode == RELAXED) cluster_arrive_relaxed(), cluster_wait();
  if (mode == ARRIVES_FIRST) cluster_wait();
  if (mode == TWICE) cluster_arrive();
  if (mode == APART) {{
    if (t % 2) cluster_arrive(); else cluster_arrive_relaxed();
    cluster_wait();
  }}
  if (mode < UNORDERED || (mode >= PULLS && mode != APART)) barrier();
  if (mode == FIRST_PULLS && rank != 2) return;
  float sum = 0;
  for (int from = 0; from < 4; ++from) {{
    if (pulls)
      sum += fetch(peer(shared_address(shared) + 4 * t, from));  // remote load
    else
      sum += s[32 * from + t];
  }}
  y[own] = sum;
  if (mode == OVERWRITES) send(peer(shared_address(shared) + 128 * rank + 4 * t, 3 - rank), 0);
  if (mode == PULLS || mode == OVERWRITES) barrier();
  if (mode == NEVER_WAITS) cluster_arrive();
  if (mode == PLAIN) asm volatile("st.shared.f32 [%0], 0f00000000;" : : "r"(peer(4096, 3 - rank)));
}}
"""
MODES = [name.strip() for name in TEXT.split("enum {")[1].split("}")[0].split(",")]


def go(mode="GOOD", *, launched=good, clusters=3, source=TEXT, **options):
    n = clusters * CLUSTER * THREADS
    y = unwritten(n)
    options = {"grid": (clusters * CLUSTER,), "shared": 4 * CLUSTER * THREADS} | options
    traffic = launched(source, (THREADS,), (floats(n), y, MODES.index(mode)), **options)
    return y.to_numpy(np.float32, (clusters, CLUSTER, THREADS)), traffic


@pytest.mark.parametrize("mode", ["GOOD", "PULLS"])
def test_blocks_of_a_cluster_reach_each_other(mode):
    y, _ = go(mode)
    x = np.arange(y.size, dtype=np.float32).reshape(y.shape)
    assert (y == x.sum(1, keepdims=True)).all()


def test_remote_traffic_is_counted_apart():
    own, sent = 4 * THREADS * CLUSTER, 4 * THREADS * CLUSTER * (CLUSTER - 1)  # of one cluster
    _, traffic = go("GOOD", clusters=3)
    shared = traffic.shared
    assert (shared.remote_written_bytes, shared.remote_read_bytes) == (3 * sent, 0)
    assert (shared.written_bytes, shared.read_bytes) == (3 * own, 3 * own * CLUSTER)
    _, traffic = go("PULLS", clusters=1)
    assert (traffic.shared.remote_read_bytes, traffic.shared.remote_written_bytes) == (sent, 0)
    assert traffic["x"].read_bytes == traffic["x"].distinct_read_bytes == own


@pytest.mark.parametrize(
    ("kinds", "mode", "words"),
    [
        # No such memory, or not yet, or no longer: found whether or not the peer is really gone.
        ("out-of-bounds", "BEYOND", "block 3 of the cluster (512 bytes; offset 512)"),
        ("out-of-bounds", "NOT_SHARED", "no address of the block's shared memory"),
        ("out-of-bounds", "PLAIN", "an address of the cluster's shared memory, taken for"),
        ("argument", "NO_SUCH_RANK", "block 4 of a cluster of 4"),
        ("not-started", "NOT_STARTED", "no cluster barrier came before"),
        ("exited-block", "PULLS_AND_LEAVES", "of the cluster"),
        # With too weak an order a load may also come before the store that it needs.
        ("uninitialized race", "UNORDERED", "of block"),
        ("uninitialized race", "BLOCK_BARRIER", "of block"),
        ("race uninitialized", "RELAXED", "of block"),
        ("race uninitialized", "ARRIVES_FIRST", "of block"),
        ("race", "OVERWRITES", "with no cluster barrier in between"),
        ("uninitialized", "UNWRITTEN", "of block"),
        # A barrier that not all reach.
        ("barrier-divergence exited-block", "SKIPS", "cluster"),
        ("barrier-divergence", "LEAVES", "cluster"),
        ("barrier-divergence", "TWICE", "again before it has waited"),
        ("barrier-divergence", "NEVER_ARRIVES", "where it has not arrived"),
        ("barrier-divergence", "NEVER_WAITS", "before it waits there"),
        ("barrier-divergence", "APART", "waiting at a cluster barrier"),
    ],
)  # fmt: skip
def test_wrong(kinds, mode, words):
    def launched(*args, **options):
        assert words in caught(kinds, *args, seeds=(None, *range(8)), **options)

    go(mode, launched=launched, clusters=1)


@pytest.mark.parametrize(
    ("mode", "words"),
    [("PULLS_AND_LEAVES", "which has exited"), ("FIRST_PULLS", "exits, but thread 0 of block 2")],
)
def test_a_block_that_leaves_before_or_after(mode, words):
    """In this order block 2 comes last to the second barrier, and goes on first."""

    def launched(*args, **options):
        assert words in caught("exited-block", *args, seeds=(None,), **options)

    go(mode, launched=launched, clusters=1)


def test_a_barrier_where_a_peer_waits_elsewhere():
    source = f"""{DEVICE}
extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float* y) {{
  cluster_arrive();
  if (blockIdx.x % 2 && threadIdx.x == 3) __syncthreads();
  cluster_wait();
  if (blockIdx.x % 2 && threadIdx.x != 3) __syncthreads();
  if (blockIdx.x % 2 == 0) cluster_arrive(), cluster_wait();
}}
"""
    message = caught("barrier-divergence", source, (64,), (unwritten(1),), grid=(2,))
    assert "barrier" in message


def refused(words, **options):
    with pytest.raises(PtxFault, match=words) as info:
        go(launched=run, **options)
    assert info.value.kind == "limits"


def test_launches_that_a_device_refuses():
    refused("grid x is 6, no multiple of the cluster's 4", grid=(6,))
    ptx = compile_ptx(TEXT, "90")  # NVRTC takes no cluster for older ones
    for arch in ("75", "89"):
        refused(f"sm_{arch} has none", source=ptx, limits=DeviceLimits.of(arch))
    go(limits=DeviceLimits.of("120"))
    large, square = TEXT.replace("(4, 1, 1)", "(16)"), TEXT.replace("(4, 1, 1)", "(2, 2)")
    refused("clusters of 16 blocks; sm_90 takes 8", source=large, grid=(16,))
    refused("grid y is 1, no multiple", source=square, grid=(2, 1))
    refused("only those along x", source=square, grid=(2, 2))


def test_static_shared_memory_of_a_cluster():
    source = f"""{DEVICE}
extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float* y) {{
  __shared__ float s[32];
  cluster_arrive(), cluster_wait();
  send(peer(shared_address(s + threadIdx.x), cluster_rank() ^ 1), blockIdx.x);
  cluster_arrive(), cluster_wait();
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];
}}
"""
    y = unwritten(128)
    good(source, (32,), (y,), grid=(4,))
    assert (y.to_numpy(np.float32, (4, 32)) == [[1], [0], [3], [2]]).all()
