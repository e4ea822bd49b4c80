"""Shuffles, votes and barriers: right when met by all, caught and named when not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.launch import Buffer
from tests.ptx.run_kernel import caught, entry, floats, good, ptx, unwritten, wrong

FULL = "0xffffffffu"
# Of each: the kind of fault, threads, n of a bad and of a good launch, the text, the line to blame,
# words of the message.
WRONG = {
    "two-barriers": (
        "barrier-divergence", 64, 32, 64, """
if (i < n) {
  y[i] = 1;
  __syncthreads();  // first
} else {
  __syncthreads();  // second
}""", None, ": __syncthreads();  // first", ": __syncthreads();  // second"),
    "not-all-reach-it": (
        "barrier-divergence", 64, 60, 64, "if (i >= n) return;\n__syncthreads();\ny[i] = 1;",
        None, "waiting at __syncthreads, line", "exited"),
    "barrier-against-warp-barrier": (
        "barrier-divergence", 32, 5, 32, """
if (i == n) __syncthreads();
else __syncwarp();
y[i] = 1;""", None, "1 thread(s), first 5: waiting at __syncthreads, line",
        "31 thread(s), first 0: waiting in a warp operation with mask 0xffffffff, line",
        ": if (i == n) __sync", ": else __sync"),
    "shuffle-with-exited-lane": (
        "exited-lane", 32, 31, 32,
        f"if (i >= n) return;\ny[i] = __shfl_xor_sync({FULL}, 1.0f, 1);",
        "y[i] = __shfl_xor_sync", "names lane 31"),
    "shuffle-reads-outside": (
        "not-in-mask", 4, 4, 3, "y[i] = __shfl_sync(0x0fu, 1.0f, (int)n);",
        "y[i] = __shfl_sync", "reads lane 4"),
    "shuffle-outside-mask": (
        "not-in-mask", 32, 16, 8, "if (i < n) y[i] = __shfl_sync(0xffu, 1.0f, 0);",
        "__shfl_sync", "does not name it"),
    "vote-outside-mask": (
        "not-in-mask", 32, 16, 8, "if (i < n) y[i] = __any_sync(0xffu, i > 2);", "__any_sync"),
    "masks-differ": (
        "mask-mismatch", 32, 16, 32,
        f"y[i] = __shfl_xor_sync(i < n ? {FULL} : 0xfffffffeu, 1.0f, 1);", "__shfl_xor_sync"),
    "operations-differ": (
        "mask-mismatch", 32, 16, 32,
        f"if (i < n) y[i] = __shfl_xor_sync({FULL}, 1.0f, 1);\nelse __syncwarp();",
        None, ": if (i < n) y[i] = __shfl", ": else __syncwarp();"),
    "a-ring-that-waits": (
        "deadlock", 5, 0x11, 0, """
y[i] = 1;
if (n && i == 0) __syncwarp(0x3);
if (n && i == 1) __syncwarp(0x6);
if (n && i == 2) __syncwarp(0xc);
if (n && i == 3) __syncwarp(0x18);
if (n && i == 4) __syncwarp(n);""", None,
        "waiting in a warp operation with mask 0x00000018, line"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    wrong(*WRONG[name])


@pytest.mark.parametrize(
    ("loop", "seed"),
    [
        ("while (*(volatile float*)x < n) {}", 1),  # what another thread should write
        ("for (volatile float sum = *x; n > 0;) sum = sum + 1;", None),
    ],
)
def test_endless_loop(loop, seed):
    words = "instructions with no barrier: an endless loop"
    wrong("deadlock", 1, 5, 0, loop, None, words, f": {loop}", seeds=(seed,))


def test_shuffle_with_a_lane_that_was_never_there():
    source = entry(f"y[i] = __shfl_xor_sync({FULL}, 1.0f, 1);")
    caught("exited-lane", source, (31,), (floats(1), unwritten(32), 0), "__shfl_xor_sync")


def test_only_the_barrier_of_all_threads_is_executed():
    caught("argument", ptx("bar.sync 1;"), (32,), (unwritten(32),) * 2, "bar.sync 1;")
    good(ptx("bar.sync 0;"), (32,), (unwritten(32),) * 2)


def test_votes_over_the_block():
    source = """
extern "C" __global__ void k(int* y) {
  int i = threadIdx.x;
  y[i] = __syncthreads_count(i % 3 == 0);
  y[i + 64] = __syncthreads_or(i == 40);
  y[i + 128] = __syncthreads_and(i == 40);
}
"""
    y = Buffer.empty(4 * 192, granule=4)
    good(source, (64,), (y,))
    assert (y.to_numpy(np.int32, (3, 64)) == [[22], [1], [0]]).all()


def test_full_mask_after_part_mask():
    """Half of a warp may meet among itself while the other half already waits for all."""
    source = """
extern "C" __global__ void k(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffffu, v, 1);
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 16);
}
"""
    y = Buffer.empty(128, granule=4)
    good(source, (32,), (y,))
    i = np.arange(32)
    assert (y.to_numpy(np.int32) == np.where(i < 16, i + 16, (i - 16) ^ 1)).all()
