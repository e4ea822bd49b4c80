"""Asynchronous copies and mbarriers: each mistake that a GPU may forgive by chance is a fault."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import SimtFault
from tests.simt.run_kernel import caught, floats, run, unwritten

SHARED = 1024  # bytes: 64 granules of 4 floats from byte 0, an mbarrier at byte 1008
N = 128


def kernel(body: str) -> str:
    """Text of an entry for 32 threads or more that copies N floats of x and stores 4 to y each."""
    return f"""
typedef float vec4 __attribute__((vector_size(16)));
extern "C" __global__ void k(float* x, float* y) {{
  char* shared = (char*)simt_dynamic_shared();
  vec4* s = (vec4*)shared;
  simt_u64* arrival = (simt_u64*)(shared + 1008);
  const int i = threadIdx.x;
  {body}
}}
"""


ASYNC = """
  simt_copy_async(s + i, x + 4 * i, 16);
  simt_wait_copies();
  __syncthreads();
  ((vec4*)y)[i] = s[31 - i];
"""
TOLD = """
  if (i == 0) simt_arrival_init(arrival, 32);
  __syncthreads();
  simt_copy_async(s + i, x + 4 * i, 16);
  simt_arrive_with_copies(arrival);
  simt_arrival_wait(arrival, 0);
  ((vec4*)y)[i] = s[31 - i];
"""
BULK = """
  if (i == 0) {
    simt_arrival_init(arrival, 1);
    simt_fence_bulk();
    simt_arrive_expecting(arrival, 512);
    simt_copy_bulk(s, x, 512, arrival);
  }
  __syncthreads();
  simt_arrival_wait(arrival, 0);
  ((vec4*)y)[i] = s[31 - i];
"""
# Two rows through one place, as a persistent kernel takes them.
TWICE = """
  if (i == 0) simt_arrival_init(arrival, 1);
  __syncthreads();
  vec4 sum = {0, 0, 0, 0};
  for (int row = 0; row < 2; ++row) {
    if (i == 0) {
      simt_fence_bulk();
      simt_arrive_expecting(arrival, 256);
      simt_copy_bulk(s, x + 64 * row, 256, arrival);
    }
    simt_arrival_wait(arrival, row & 1);
    sum += s[15 - i % 16];
    __syncthreads();  // all have read
  }
  ((vec4*)y)[i] = sum;
"""


def arguments():
    return floats(N), unwritten(N)


@pytest.mark.parametrize("body", [ASYNC, TOLD, BULK], ids=["async", "told", "bulk"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_what_was_waited_for_is_there(body, seed):
    x, y = arguments()
    traffic = run(kernel(body), (32,), (x, y), shared=SHARED, seed=seed)
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
    run(kernel(TWICE), (32,), (x, y), shared=SHARED)
    rows = np.arange(N, dtype=np.float32).reshape(2, 16, 4).sum(0)[::-1]
    assert (y.to_numpy(np.float32, (2, 16, 4)) == rows).all()


def test_a_lane_that_waits_tells_its_warp():
    body = BULK.replace(
        "simt_arrival_wait(arrival, 0);",
        "if (i == 5) simt_arrival_wait(arrival, 0);\n__syncwarp();",
    )
    run(kernel(body), (32,), arguments(), shared=SHARED)
    body = body.replace("__syncwarp();", "__syncthreads();").replace("31 - i", "31 - i % 32")
    run(kernel(body), (64,), (floats(N), unwritten(2 * N)), shared=SHARED)


def without(body: str, *lines: str) -> str:
    for line in lines:
        assert body.count(line) == 1
        body = body.replace(line, "")
    return body


WAIT, SYNC = "simt_arrival_wait(arrival, 0);", "__syncthreads();"
STORE = "((vec4*)y)[i] = s[31 - i];"
WRONG = {
    # Read too early.
    "no-wait": ("uninitialized", without(ASYNC, "simt_wait_copies();"), "in flight"),
    "no-wait-told": ("uninitialized", without(TOLD, WAIT), ""),
    "no-wait-bulk": ("uninitialized", without(BULK, WAIT), "in flight"),
    "wrong-parity": ("uninitialized", BULK.replace("wait(arrival, 0)", "wait(arrival, 1)"), ""),
    "waits-too-late": (
        "uninitialized",
        BULK.replace(WAIT, "vec4 early = s[i];\n" + WAIT).replace("s[31 - i]", "early"),
        "in flight",
    ),
    # Bytes that were not announced, or never come.
    "expects-more": ("deadlock", BULK.replace("(arrival, 512)", "(arrival, 528)"),
                     "528 bytes are expected, copies of 512 were issued"),
    "expects-less": ("deadlock", BULK.replace("(arrival, 512)", "(arrival, 256)"),
                     "256 bytes are expected, copies of 512 were issued"),
    "expects-nothing": ("deadlock", without(BULK, "simt_arrive_expecting(arrival, 512);"),
                        "0 of 1 have arrived"),
    "one-arrives-less": ("deadlock", TOLD.replace("(arrival, 32)", "(arrival, 33)"),
                         "32 of 33 have arrived"),
    "arrives-twice": ("mbarrier", BULK.replace(
        "(arrival, 512);", "(arrival, 256);\n simt_arrive_expecting(arrival, 256);"),
        "all 1 have arrived"),
    "expects-too-much": ("mbarrier", BULK.replace("(arrival, 512)", "(arrival, 1 << 20)"), "2^20"),
    # mbarriers that are none, or not yet.
    "no-init": ("mbarrier", without(BULK, "simt_arrival_init(arrival, 1);"), "initialized"),
    "no-fence": ("mbarrier", without(BULK, "simt_fence_bulk();"), "fence"),
    "no-fence-again": (
        "mbarrier", TWICE.replace("simt_fence_bulk();", "if (!row) simt_fence_bulk();"),
        "no fence in between"),
    "init-overwritten": (
        "mbarrier", BULK.replace(SYNC, "if (i == 0) *arrival = 0;\n" + SYNC), "is an mbarrier's"),
    "init-read": (
        "mbarrier", BULK.replace(STORE, "y[i] = *(float*)arrival;"), "is an mbarrier's"),
    "init-twice": (
        "mbarrier", TOLD.replace("if (i == 0) simt", "if (i < 2) simt"), "is an mbarrier's"),
    # Addresses and sizes.
    "bulk-from": ("misaligned", BULK.replace("(s, x, 512", "(s, x + 2, 496"), "8 modulo 16"),
    "bulk-to": ("misaligned", BULK.replace("(s, x, 512", "(shared + 4, x, 496"), "4 and 0"),
    "bulk-size": ("misaligned", BULK.replace("x, 512", "x, 504"), "504 bytes"),
    "bulk-nothing": ("misaligned", BULK.replace("x, 512", "x, 0"), "0 bytes"),
    "async-from": ("misaligned", ASYNC.replace("x + 4 * i, 16", "x + 4 * i + 1, 8"), "modulo 8"),
    "async-size": ("argument", ASYNC.replace("16)", "12)"), "4, 8 or 16"),
    "arrival-at": ("misaligned", TOLD.replace("if (i == 0)", "arrival = (simt_u64*)(shared + 1012);"
                   "\nif (i == 0)"), "4 modulo 8"),
    "bulk-overrun": ("out-of-bounds", BULK.replace("512", "528"), "after x"),
    "async-overrun": ("out-of-bounds", ASYNC.replace("s + i, ", "s + i + 40, "), "shared memory"),
    "to-global": ("argument", ASYNC.replace("(s + i,", "((vec4*)y + i,"), "global to shared"),
    # Written while it is copied.
    "target": ("in-flight", ASYNC.replace("simt_wait", "s[i][0] = 1;\nsimt_wait"), "a copy is in"),
    "target-bulk": ("in-flight", BULK.replace(WAIT, "s[i][0] = 1;\n" + WAIT), "a copy is in"),
    "target-twice": ("in-flight", BULK.replace("simt_copy_bulk(s, x, 512, arrival);",
                     "simt_copy_bulk(s, x, 256, arrival);\nsimt_copy_bulk(s, x, 256, arrival);"),
                     "a copy is in"),
    "source": ("in-flight", ASYNC.replace("simt_wait", "x[4 * i] = 1;\nsimt_wait"), "reads"),
    "source-told": ("in-flight", TOLD.replace(WAIT, "x[4 * i] = 1;\n" + WAIT), "reads"),
    "source-bulk": (
        "in-flight", BULK.replace(SYNC, "if (i == 0) x[127] = 1;\n" + SYNC), "reads"),
    "never-waited": (
        "in-flight", without(ASYNC, "simt_wait_copies();", STORE), "as the block ends"),
    "never-waited-bulk": ("in-flight", without(BULK, WAIT, STORE), "as the block ends"),
    "never-waited-told": ("in-flight", without(TOLD, WAIT, STORE), "as the block ends"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    kind, body, words = WRONG[name]
    message = caught(kind, kernel(body), (32,), arguments(), shared=SHARED)
    assert words in message
    if kind == "deadlock":
        assert "waiting at the mbarrier at byte 1008 of dynamic shared memory, phase 0" in message
        assert "simt_arrival_wait(arrival, 0);" in message


REFILLED = BULK.replace("arrival, 1);", "arrival, 1);\nsimt_arrival_init(arrival + 1, 1);").replace(
    WAIT,
    WAIT
    + """
  if (i == 0) {
    simt_fence_bulk();
    simt_arrive_expecting(arrival + 1, 512);
    simt_copy_bulk(s, x, 512, arrival + 1);
  }
""",
)
# What happens depends on the order of the threads: the kinds that may, the first of which must.
RACES = {
    # The thread's own copies are there; those of others need a barrier too.
    "async-no-barrier": (
        "race uninitialized",
        without(ASYNC, SYNC).replace("((vec4*)y)[i] = s[31 - i]", "if (i == 31) y[0] = s[0][0]"),
    ),
    # Others wait; this one takes their word without having heard it.
    "waits-for-others": (
        "race uninitialized", BULK.replace(WAIT, "if (i < 31) simt_arrival_wait(arrival, 0);")),
    "refilled-too-early": ("race uninitialized", REFILLED),
    # Who comes late to a phase takes the next one's end for it.
    "overtaken": ("deadlock uninitialized", without(TWICE, "__syncthreads();  // all have read")),
    "source-read-by-others": (
        "race in-flight",
        BULK.replace(WAIT, "if (i) simt_arrival_wait(arrival, 0);\nif (!i) x[127] = 1;"),
    ),
    "init-unseen": ("race mbarrier", TOLD.replace(SYNC, "")),
    "one-arrives-more": (
        "uninitialized mbarrier", TOLD.replace("(arrival, 32)", "(arrival, 31)")),
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_wrong_in_every_order(name):
    kinds, body = RACES[name]
    seen = set()
    for seed in (None, *range(8)):
        with pytest.raises(SimtFault) as info:
            run(kernel(body), (32,), arguments(), shared=SHARED, seed=seed)
        seen.add(info.value.kind)
    assert kinds.split()[0] in seen
    assert seen <= set(kinds.split())
