"""Good kernels give right results, the same bits in every order of the threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.simt.launch import Buffer, SimtFault
from tests.simt.run_kernel import COPY, floats, run, unwritten

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
    x = Buffer.from_array(data, name="x", writable=False)
    seen = set()
    for seed in (None, 0, 1, 2, 3):
        y = unwritten(rows)
        run(ROW_SUM, (threads,), (x, y, n), grid=(rows,), seed=seed)
        seen.add(y.bytes().tobytes())
    assert len(seen) == 1
    wanted = np.sqrt((data.astype(np.float64) ** 2).sum(1))
    np.testing.assert_allclose(y.to_numpy(np.float32), wanted, rtol=1e-5)


def test_seed_moves_the_order():
    """A kernel whose result depends on the order must show it."""
    source = """
extern "C" __global__ void k(volatile int* y) { y[threadIdx.x] = 1; }
"""
    orders = set()
    for seed in range(4):
        y = Buffer.empty(4 * 63, name="y", granule=4)
        with pytest.raises(SimtFault) as info:  # thread 63 overruns; who ran before it is the order
            run(source, (64,), (y,), seed=seed)
        assert info.value.kind == "out-of-bounds"
        orders.add(y.defined().tobytes())
    assert len(orders) == 4


def test_indices_in_three_dimensions():
    source = """
extern "C" __global__ void k(int* y) {
  unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[b * (blockDim.x * blockDim.y * blockDim.z) + t] = b * 1000 + t;
}
"""
    y = Buffer.empty(4 * 24 * 30, granule=4)
    run(source, (2, 3, 5), (y,), grid=(2, 3, 4))
    wanted = np.arange(24)[:, None] * 1000 + np.arange(30)
    assert (y.to_numpy(np.int32, (24, 30)) == wanted).all()


def test_float32_subnormals_flush():
    y, x = unwritten(1), Buffer.from_array(np.full(1, 1e-30, np.float32))
    run(
        'extern "C" __global__ void k(const float* x, float* y) { y[0] = x[0] * 1e-10f; }',
        (1,),
        (x, y),
    )
    assert y.to_numpy(np.float32)[0] == 0
    assert np.float32(1e-30) * np.float32(1e-10) != 0  # the process keeps its own mode


def test_float64_subnormals_on_demand():
    source = 'extern "C" __global__ void k(const double* x, double* y) { y[0] = x[0] * 1e-10; }'
    x, y = Buffer.from_array(np.full(1, 1e-300)), Buffer.empty(8, name="y", granule=8)
    for flush, wanted in ((True, 0.0), (False, 1e-300 * 1e-10)):
        run(source, (1,), (x, y), flush=flush)
        assert y.to_numpy(np.float64)[0] == wanted


def test_launches_from_several_threads():
    wrong = []

    def work(seed):
        y = unwritten(64)
        for _ in range(20):
            run(COPY, (64,), (floats(64), y), seed=seed)
        if not (y.to_numpy(np.float32) == np.arange(64)).all():
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
