"""Shuffles, votes and barriers: right when met by all, caught and named when not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import Buffer
from tests.simt.run_kernel import caught, line_of, run, unwritten


def test_divergent_barriers():
    source = """
extern "C" __global__ void k(float* y) {
  if (threadIdx.x < 32) {
    y[threadIdx.x] = 1;
    __syncthreads();  // first
  } else {
    __syncthreads();  // second
  }
}
"""
    message = caught("barrier-divergence", source, (64,), (unwritten(64),))
    first, second = line_of(source, "// first"), line_of(source, "// second")
    assert f"line {first}" in message and f"line {second}" in message


def test_barrier_that_some_threads_never_reach():
    source = """
extern "C" __global__ void k(float* y, long long n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
"""
    message = caught("barrier-divergence", source, (64,), (unwritten(64), 60))
    assert f"waiting at __syncthreads, line {line_of(source, '__syncthreads')}" in message
    assert "exited" in message
    run(source, (64,), (unwritten(64), 64))


def test_barrier_against_warp_barrier():
    source = """
extern "C" __global__ void k(float* y) {
  if (threadIdx.x == 5) __syncthreads();
  else __syncwarp();
  y[threadIdx.x] = 1;
}
"""
    message = caught("barrier-divergence", source, (32,), (unwritten(32),))
    assert "1 thread(s), first 5: waiting at __syncthreads, line 3" in message
    assert "31 thread(s), first 0: waiting in __syncwarp with mask 0xffffffff, line 4" in message


def test_shuffle_from_an_exited_lane():
    source = """
extern "C" __global__ void k(float* y, long long n) {
  if (threadIdx.x >= n) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
"""
    message = caught("exited-lane", source, (32,), (unwritten(32), 31), "__shfl_xor_sync")
    assert "names lane 31" in message
    caught("exited-lane", source, (31,), (unwritten(32), 31), "__shfl_xor_sync")
    run(source, (32,), (unwritten(32), 32))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("__shfl_sync(0x0fu, v, 4)", "not-in-mask"),  # reads a lane outside
        ("__shfl_sync(0xf0u, v, 4)", "not-in-mask"),  # is outside itself
        ("__shfl_sync(0x0fu, v, 3, 3)", "argument"),  # a width that is no power of two
    ],
)
def test_bad_mask(call, kind):
    source = f"""
extern "C" __global__ void k(float* y) {{
  float v = threadIdx.x;
  if (threadIdx.x < 4)
    y[threadIdx.x] = {call};
}}
"""
    caught(kind, source, (32,), (unwritten(32),), call)


def test_lanes_that_disagree():
    masks = """
extern "C" __global__ void k(float* y) {
  unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xfffffffeu;
  y[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}
"""
    caught("mask-mismatch", masks, (32,), (unwritten(32),), "__shfl_xor_sync")
    operations = """
extern "C" __global__ void k(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  else __syncwarp();
}
"""
    message = caught("mask-mismatch", operations, (32,), (unwritten(32),))
    assert "line 3" in message and "line 4" in message


def test_deadlock_of_warps():
    source = """
extern "C" __global__ void k(float* y) {
  y[threadIdx.x] = 1;
  if (threadIdx.x == 0) __syncwarp(0x3);
  if (threadIdx.x == 1) __syncwarp(0x6);
  if (threadIdx.x == 2) __syncwarp(0xc);
  if (threadIdx.x == 3) __syncwarp(0x18);
  if (threadIdx.x == 4) __syncwarp(0x11);
}
"""
    message = caught("deadlock", source, (5,), (unwritten(8),))
    assert "waiting in __syncwarp with mask 0x00000018, line 7" in message


SHUFFLES = """
extern "C" __global__ void k(T* y) {
  int lane = threadIdx.x;
  T v = (T)(lane + 100);
  y[lane] = __shfl_sync(0xffffffffu, v, lane * 3 + 1, W);
  y[lane + 32] = __shfl_up_sync(0xffffffffu, v, 3, W);
  y[lane + 64] = __shfl_down_sync(0xffffffffu, v, 3, W);
  y[lane + 96] = __shfl_xor_sync(0xffffffffu, v, 5, W);
  y[lane + 128] = __any_sync(0xffffffffu, lane == 9);
  y[lane + 160] = __all_sync(0xffffffffu, lane == 9);
  y[lane + 192] = __ballot_sync(0xffffffffu, lane % 3 == 0) >> 1;
}
"""


@pytest.mark.parametrize("width", [32, 8, 2])
@pytest.mark.parametrize("ctype", ["float", "double", "int", "unsigned", "long long"])
def test_shuffles_and_votes(ctype, width):
    dtype = {"float": "f4", "double": "f8", "int": "i4", "unsigned": "u4", "long long": "i8"}[ctype]
    y = Buffer.empty(7 * 32 * np.dtype(dtype).itemsize, granule=4)
    run(SHUFFLES.replace("T*", f"{ctype}*").replace("T v = (T)", f"{ctype} v = ({ctype})")
        .replace("W)", f"{width})"), (32,), (y,))  # fmt: skip
    lane = np.arange(32)
    low = lane // width * width
    high = low + width - 1
    xor = np.where((lane ^ 5) > high, lane, lane ^ 5)
    wanted = [
        low + (lane * 3 + 1) % width,
        np.where(lane - 3 < low, lane, lane - 3),
        np.where(lane + 3 > high, lane, lane + 3),
        xor,
    ]
    got = y.to_numpy(dtype, (7, 32))
    assert (got[:4] == np.array(wanted) + 100).all()
    ballot = sum(1 << i for i in range(0, 32, 3)) >> 1
    assert (got[4:] == np.array([[1], [0], [ballot]]).astype(dtype)).all()


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
    run(source, (64,), (y,))
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
    for seed in range(4):
        y = Buffer.empty(128, granule=4)
        run(source, (32,), (y,), seed=seed)
        i = np.arange(32)
        assert (y.to_numpy(np.int32) == np.where(i < 16, i + 16, (i - 16) ^ 1)).all()
