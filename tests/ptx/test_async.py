"""Asynchronous copies, mbarriers and clusters: each mistake that a GPU may forgive by chance."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.build import compile_ptx
from tests.ptx.launch import DeviceLimits, PtxFault
from tests.ptx.run_kernel import DEVICE, caught, floats, good, run, unwritten

SHARED = 1024  # bytes: 64 granules of 4 floats from byte 0, an mbarrier at byte 1008
N = 128


def kernel(body: str) -> str:
    """Text of an entry for 32 threads or more that copies N floats of x and stores 4 to y each."""
    return f"""{DEVICE}
extern "C" __global__ void k(float* x, float* y) {{
  volatile float* plain = (float*)shared;
  float4* s = (float4*)shared;
  u64* arrival = (u64*)(shared + 1008);
  const int i = threadIdx.x;
  {body}
}}
"""


ASYNC = """
  STAGE(s + i, x + 4 * i, 16);
  staged();
  __syncthreads();
  ((float4*)y)[i] = s[31 - i];
"""
TOLD = """
  if (i == 0) arrival_init(arrival, 32);
  __syncthreads();
  STAGE(s + i, x + 4 * i, 16);
  arrive_with_copies(arrival);
  wait_for(arrival, 0);
  ((float4*)y)[i] = s[31 - i];
"""
BULK = """
  if (i == 0) {
    arrival_init(arrival, 1);
    fence_bulk();
    arrive_expecting(arrival, 512);
    copy_bulk(s, x, 512, arrival);
  }
  __syncthreads();
  wait_for(arrival, 0);
  ((float4*)y)[i] = s[31 - i];
"""
# Two rows through one place, as a persistent kernel takes them.
TWICE = """
  if (i == 0) arrival_init(arrival, 1);
  __syncthreads();
  float4 sum = {0, 0, 0, 0};
  for (int row = 0; row < 2; ++row) {
    if (i == 0) {
      fence_bulk();
      arrive_expecting(arrival, 256);
      copy_bulk(s, x + 64 * row, 256, arrival);
    }
    wait_for(arrival, row & 1);
    const float4 v = s[15 - i % 16];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    __syncthreads();  // all have read
  }
  ((float4*)y)[i] = sum;
"""


def arguments():
    return floats(N), unwritten(N)


@pytest.mark.parametrize("body", [ASYNC, TOLD, BULK], ids=["async", "told", "bulk"])
def test_what_was_waited_for_is_there(body):
    x, y = arguments()
    traffic = good(kernel(body), (32,), (x, y), shared=SHARED)
    want = np.arange(N, dtype=np.float32).reshape(32, 4)[::-1]
    assert (y.to_numpy(np.float32, (32, 4)) == want).all()
    t = traffic["x"]
    assert (t.read_bytes, t.read_sectors, t.distinct_read_bytes) == (512, 16, 512)
    assert t.read_widths == ({32: 1} if body == BULK else {16: 32})
    own = body != ASYNC  # the mbarrier's first store
    assert traffic.shared.written_bytes - 8 * own == traffic.shared.read_bytes == 512
    assert traffic.shared.wavefronts - own == traffic.shared.minimal_wavefronts - own == 8


def test_phases_follow_each_other():
    x, y = arguments()
    good(kernel(TWICE), (32,), (x, y), shared=SHARED)
    rows = np.arange(N, dtype=np.float32).reshape(2, 16, 4).sum(0)[::-1]
    assert (y.to_numpy(np.float32, (2, 16, 4)) == rows).all()


def test_a_lane_that_waits_tells_its_warp():
    body = BULK.replace(WAIT, f"if (i == 5) {WAIT}\n__syncwarp();")
    good(kernel(body), (32,), arguments(), shared=SHARED)
    body = body.replace("__syncwarp();", SYNC).replace("31 - i", "31 - i % 32")
    good(kernel(body), (64,), (floats(N), unwritten(2 * N)), shared=SHARED)


def test_a_fence_puts_what_others_stored_before_the_copy():
    body = BULK.replace("arrive_exp", SPLIT + "fence_bulk();\narrive_exp")
    good(kernel(body), (32,), arguments(), shared=SHARED)


def without(body: str, *lines: str) -> str:
    for line in lines:
        assert body.count(line) == 1
        body = body.replace(line, "")
    return body


WAIT, SYNC, INIT = "wait_for(arrival, 0);", "__syncthreads();", "arrival_init(arrival, 1);"
STORE = "((float4*)y)[i] = s[31 - i];"
COPIED = "copy_bulk(s, x, 512, arrival);"
REFILLED = BULK.replace(INIT, f"{INIT}\narrival_init(arrival + 1, 1);").replace(
    WAIT,
    WAIT
    + """
  if (i == 0) {
    fence_bulk();
    arrive_expecting(arrival + 1, 512);
    copy_bulk(s, x, 512, arrival + 1);
  }
""",
)
# Others store between the fence and the copy.
# Others store between what the issuer did before and what it does next.
SPLIT = "}\nplain[4 * i] = 1;\n__syncthreads();\nif (i == 0) {\n"
# Of each: the kind of fault, or those that it has in one order or another, the text, words of the
# message.
WRONG = {
    # Read too early.
    "no-wait": ("uninitialized", without(ASYNC, "staged();"), "in flight"),
    "no-wait-told": ("uninitialized", without(TOLD, WAIT), ""),
    "no-wait-bulk": ("uninitialized", without(BULK, WAIT), "in flight"),
    "asks-once": ("uninitialized", BULK.replace("wait_for", "is_over"), "in flight"),
    "asks-once-told": ("uninitialized", TOLD.replace("wait_for", "is_over"), "in flight"),
    "wrong-parity": ("uninitialized", BULK.replace("wait_for(arrival, 0)", "wait_for(arrival, 1)"),
                     "in flight"),
    "no-parity": ("argument", BULK.replace("wait_for(arrival, 0)", "wait_for(arrival, 2)"),
                  "parity 2, which is 0 or 1"),
    "waits-too-late": ("uninitialized", BULK.replace(WAIT, "y[i] = plain[i];\n" + WAIT),
                       "in flight"),
    # Bytes that were not announced, or never come.
    "expects-more": ("deadlock", BULK.replace("(arrival, 512)", "(arrival, 528)"),
                     "528 bytes are expected, copies of 512 were issued"),
    "expects-less": ("deadlock", BULK.replace("(arrival, 512)", "(arrival, 256)"),
                     "256 bytes are expected, copies of 512 were issued"),
    "expects-nothing": ("deadlock", without(BULK, "arrive_expecting(arrival, 512);"),
                        "0 of 1 have arrived"),
    "one-arrives-less": ("deadlock", TOLD.replace("(arrival, 32)", "(arrival, 33)"),
                         "32 of 33 have arrived"),
    "waits-for-nobody": ("deadlock", BULK.replace(WAIT, WAIT + "\nwait_for(arrival, 1);"),
                         "phase 1: 0 of 1 have arrived"),
    "one-arrives-more": ("mbarrier", TOLD.replace("(arrival, 32)", "(arrival, 31)"),
                         "all 31 have arrived"),
    "arrives-twice": ("mbarrier", BULK.replace(
        "(arrival, 512);", "(arrival, 256);\n arrive_expecting(arrival, 256);"),
        "all 1 have arrived"),
    "expects-too-much": ("mbarrier", BULK.replace("(arrival, 512)", "(arrival, 1 << 20)"), "2^20"),
    # mbarriers that are none, or not yet.
    "no-init": ("mbarrier", without(BULK, INIT), "initialized"),
    "init-for-none": ("argument", BULK.replace(INIT, "arrival_init(arrival, 0);"), "0 arrivals"),
    "no-fence": ("mbarrier", without(BULK, "fence_bulk();"), "fence"),
    "no-fence-again": ("mbarrier", TWICE.replace("fence_bulk();", "if (!row) fence_bulk();"),
                       "no fence in between"),
    "no-fence-after-a-store": ("mbarrier", BULK.replace(COPIED, "plain[5] = 1;\n" + COPIED),
                               "no fence in between"),
    "no-fence-for-the-source": ("mbarrier", BULK.replace(COPIED, "x[5] = 1;\n" + COPIED),
                                "no fence of global memory"),
    "fence-too-early": ("mbarrier", BULK.replace("arrive_exp", SPLIT + "arrive_exp"),
                        "no fence in between"),
    "init-overwritten": ("mbarrier", BULK.replace(SYNC, "if (i == 0) *arrival = 0;\n" + SYNC),
                         "is an mbarrier's"),
    "init-read": ("mbarrier", BULK.replace(STORE, "y[i] = plain[252];"), "is an mbarrier's"),
    "init-twice": ("mbarrier", TOLD.replace("if (i == 0)", "if (i < 2)"), "is an mbarrier's"),
    # Addresses and sizes.
    "bulk-from": ("misaligned", BULK.replace("(s, x, 512", "(s, x + 2, 496"), "8 modulo 16"),
    "bulk-to": ("misaligned", BULK.replace("(s, x, 512", "(shared + 4, x, 496"), "4 and 0"),
    "bulk-size": ("misaligned", BULK.replace("x, 512", "x, 504"), "504 bytes"),
    "bulk-nothing": ("misaligned", BULK.replace("x, 512", "x, 0"), "0 bytes"),
    "async-from": ("misaligned", ASYNC.replace("x + 4 * i, 16", "x + 4 * i + 1, 8"), "modulo 8"),
    "async-to": ("misaligned", ASYNC.replace("(s + i,", "(shared + 4,"), "4 modulo 16"),
    "async-size": ("compile", ASYNC.replace("16)", "12)"), "a copy of 12 bytes"),
    "arrival-at": ("misaligned", TOLD.replace("if (i == 0)", "arrival = (u64*)(shared + 1012);"
                   "\nif (i == 0)"), "4 modulo 8"),
    "bulk-overrun": ("out-of-bounds", BULK.replace("512", "528"), "after x"),
    "bulk-overrun-shared": ("out-of-bounds", BULK.replace("(s, x", "(s + 33, x"), "shared memory"),
    "async-overrun": ("out-of-bounds", ASYNC.replace("s + i, ", "s + i + 40, "), "shared memory"),
    "to-global": ("compile", ASYNC.replace("(s + i,", "((float4*)y + i,"), "cvta.to.shared"),
    # Written while it is copied.
    "target": ("in-flight", ASYNC.replace("staged", "plain[4 * i] = 1;\nstaged"), "a copy is in"),
    "target-bulk": ("in-flight", BULK.replace(WAIT, "plain[4 * i] = 1;\n" + WAIT), "a copy is in"),
    "target-twice": ("in-flight", BULK.replace(COPIED, 2 * COPIED.replace("512", "256")),
                     "a copy is in"),
    "source": ("in-flight", ASYNC.replace("staged", "x[4 * i] = 1;\nstaged"), "reads"),
    "source-told": ("in-flight", TOLD.replace(WAIT, "x[4 * i] = 1;\n" + WAIT), "reads"),
    "source-bulk": ("in-flight", BULK.replace(SYNC, "if (i == 0) x[127] = 1;\n" + SYNC), "reads"),
    "never-waited": ("in-flight", without(ASYNC, "staged();", STORE), "as the block ends"),
    "never-waited-bulk": ("in-flight", without(BULK, WAIT, STORE), "as the block ends"),
    "never-waited-told": ("in-flight", without(TOLD, WAIT, STORE), "as the block ends"),
    # Waited for, but not by all, or for something else.
    "async-no-barrier": (
        "race", without(ASYNC, SYNC).replace(STORE, "if (i == 31) y[0] = plain[0];"),
        "with no __syncwarp or __syncthreads in between"),
    "waits-for-others": ("race", BULK.replace(WAIT, f"if (i < 31) {WAIT}"),
                         "which a copy wrote that this thread has not waited for"),
    "init-unseen": ("race mbarrier", TOLD.replace(SYNC, ""), ""),
    "refilled-too-early": ("uninitialized race", REFILLED, ""),
    # Who comes late to a phase takes the next one's end for it.
    "overtaken": ("deadlock race uninitialized",
                  without(TWICE, "__syncthreads();  // all have read"), ""),
    "parity-of-the-last-phase": ("uninitialized race", TWICE.replace("row & 1", "0"), ""),
    "source-read-by-others": (
        "race in-flight", BULK.replace(WAIT, f"if (i) {WAIT}\nif (!i) x[127] = 1;"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    kinds, body, words = WRONG[name]
    seeds = (None, *range(8))
    message = caught(kinds, kernel(body), (32,), arguments(), shared=SHARED, seeds=seeds)
    assert words in message
    if kinds == "deadlock":
        assert "waiting at the mbarrier at byte 1008 of shared memory, phase " in message
        assert "called from line" in message and "wait_for(arrival, " in message


# ---- blocks of a cluster run together and reach each other's shared memory ----

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
    own, away = 4 * THREADS * CLUSTER, 4 * THREADS * CLUSTER * (CLUSTER - 1)  # of one cluster
    for mode, reads, writes in (("GOOD", 0, away), ("PULLS", away, 0)):
        _, traffic = go(mode, clusters=1)
        shared = traffic.shared
        assert (shared.remote_read_bytes, shared.remote_written_bytes) == (reads, writes)
        assert traffic["x"].read_bytes == shared.written_bytes == own


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
def test_wrong_clusters(kinds, mode, words):
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
