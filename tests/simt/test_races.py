"""Accesses that no barrier orders must be caught, those that one orders must not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import SimtFault
from tests.simt.run_kernel import COPY, caught, floats, line_of, run, unwritten

REVERSE = """
extern "C" __global__ void k(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  BARRIER
  y[threadIdx.x] = s[127 - threadIdx.x];
}
"""


def test_missing_barrier():
    bad = REVERSE.replace("BARRIER", "")
    # With no barrier a load may also come before the store it needs, depending on the order.
    kinds = set()
    for seed in (None, *range(8)):
        with pytest.raises(SimtFault) as info:
            run(bad, (128,), (floats(128), unwritten(128)), seed=seed)
        kinds.add(info.value.kind)
        assert "static shared memory" in str(info.value)
    assert kinds <= {"race", "uninitialized"}


def test_missing_barrier_between_read_and_overwrite():
    source = """
extern "C" __global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float a = s[63 - threadIdx.x];
  s[threadIdx.x] = 2 * a;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
"""
    message = caught("race", source, (64,), (floats(64), unwritten(64)))
    assert "with no __syncthreads in between" in message


def test_barrier_orders():
    good = REVERSE.replace("BARRIER", "__syncthreads();")
    y = unwritten(128)
    run(good, (128,), (floats(128), y))
    assert (y.to_numpy(np.float32) == np.arange(128)[::-1]).all()


WITHIN_WARP = """
extern "C" __global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  BARRIER
  y[threadIdx.x] = s[SOURCE];
}
"""


def test_syncwarp_orders_within_its_warp_only():
    within = WITHIN_WARP.replace("SOURCE", "threadIdx.x ^ 1")
    good = within.replace("BARRIER", "__syncwarp();")
    y = unwritten(64)
    run(good, (64,), (floats(64), y))
    assert (y.to_numpy(np.float32) == np.arange(64) ^ 1).all()
    across = good.replace("threadIdx.x ^ 1", "threadIdx.x ^ 32")
    kinds = set()
    for seed in range(4):
        with pytest.raises(SimtFault) as info:
            run(across, (64,), (floats(64), unwritten(64)), seed=seed)
        kinds.add(info.value.kind)
    assert kinds <= {"race", "uninitialized"}


def test_shuffle_orders_no_memory():
    within = WITHIN_WARP.replace("SOURCE", "threadIdx.x ^ 1")
    bad = within.replace("BARRIER", "__shfl_sync(0xffffffffu, 1, 0);")
    message = caught("race", bad, (64,), (floats(64), unwritten(64)), "y[threadIdx.x] = s[")
    assert "__syncwarp" in message
    assert f"wrote at line {line_of(bad, 's[threadIdx.x] = x')}" in message


def test_syncwarp_of_a_part_orders_that_part():
    source = """
extern "C" __global__ void k(const float* x, float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 16) __syncwarp(0x0000ffffu);
  __shfl_sync(0xffffffffu, 1, 0);
  if (threadIdx.x < 16) y[threadIdx.x] = s[threadIdx.x ^ PARTNER];
}
"""
    run(source.replace("PARTNER", "1"), (32,), (floats(32), unwritten(32)))
    caught("race", source.replace("PARTNER", "16"), (32,), (floats(32), unwritten(32)))


def test_race_between_blocks():
    source = """
extern "C" __global__ void k(float* y) { y[blockIdx.x / 2] = threadIdx.x; }
"""
    message = caught("race", source, (1,), (unwritten(8),), "y[blockIdx.x / 2]", grid=(16,))
    assert "another block" in message


def test_blocks_of_another_launch_do_not_race():
    y = unwritten(64)
    for _ in range(2):
        run(COPY, (64,), (floats(64), y))
