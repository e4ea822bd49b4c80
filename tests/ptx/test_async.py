"""Asynchronous copies and mbarriers: each mistake that a GPU may forgive by chance is a fault."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.run_kernel import DEVICE, caught, floats, good, unwritten

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
