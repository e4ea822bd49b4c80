"""Good kernels give right results, the same bits in every order of the threads."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.__main__ import BACKWARD, FORWARD
from tests.ptx.__main__ import run as digits_through
from tests.ptx.launch import Buffer, PtxFault
from tests.ptx.run_kernel import good, run, unwritten

ROW_SUM = """
template <int W> __device__ __forceinline__ float warp_sum(float v) {
  for (int o = W / 2; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o, W);
  return v;
}
extern "C" __global__ void __launch_bounds__(1024)
    k(const float* __restrict__ x, float* y, long long n) {
  __shared__ float part[32];
  const float* row = x + blockIdx.x * n;
  float sum = 0;
  for (long long i = threadIdx.x; i < n; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
  sum = warp_sum<32>(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum<32>(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0);
  if (threadIdx.x == 0) y[blockIdx.x] = sqrtf(sum);
}
"""


@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_seed_never_moves_a_bit(threads):
    rows, n = 12, 3001
    data = np.random.default_rng(1).standard_normal((rows, n), np.float32)
    y = unwritten(rows)
    good(ROW_SUM, (threads,), (Buffer.from_array(data, writable=False), y, n), grid=(rows,))
    wanted = np.sqrt((data.astype(np.float64) ** 2).sum(1))
    np.testing.assert_allclose(y.to_numpy(np.float32), wanted, rtol=1e-5)


@pytest.mark.parametrize(("blocks", "threads"), [(1, 256), (8, 32)])
def test_seed_moves_the_order(blocks, threads):
    """The last thread overruns; what ran before it is the order of warps, and of blocks."""
    source = """
extern "C" __global__ void k(volatile int* y) { y[blockIdx.x * blockDim.x + threadIdx.x] = 1; }
"""
    orders = set()
    for seed in range(8):
        y = Buffer.empty(4 * 255, name="y", granule=4)
        with pytest.raises(PtxFault, match="out-of-bounds"):
            run(source, (threads,), (y,), grid=(blocks,), seed=seed)
        orders.add(y.defined().tobytes())
    assert len(orders) > 4


def test_lanes_that_parted_go_on_in_any_order():
    """Which half is there first when the other half loads what it stores."""
    source = """
extern "C" __global__ void k(volatile int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = 1;
  else y[threadIdx.x] = y[threadIdx.x - 16];
}
"""
    kinds = set()
    for seed in range(8):
        with pytest.raises(PtxFault) as info:
            run(source, (32,), (Buffer.empty(128, granule=4),), seed=seed)
        kinds.add(info.value.kind)
    assert kinds == {"race", "uninitialized"}


@pytest.mark.parametrize(("case", "backward"), [(FORWARD[1], False), (BACKWARD[1], True)])
def test_digits_through_a_kernel(case, backward):
    """`make emulate`, of which a row is checked against float64 before it is shown."""
    kernel, *_, moved, _ = digits_through(case, backward)
    assert "_block_f32" in kernel and moved == "1.00"
