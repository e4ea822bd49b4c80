"""Good kernels: right results, the same bits in every order, and what they move, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.__main__ import BACKWARD, FORWARD
from tests.ptx.__main__ import run as digits_through
from tests.ptx.launch import Buffer, PtxFault
from tests.ptx.run_kernel import COPY, LOAD4, caught, floats, good, run, unwritten

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


# ---- bytes, sectors and banks ----


def test_coalesced_vector_loads_use_every_sector():
    x, y = floats(4096), unwritten(4096)
    traffic = good(LOAD4, (256,), (x, y, 0), grid=(1,))
    t = traffic["x"]
    assert (t.read_bytes, t.reads, t.warp_reads, t.read_sectors) == (4096, 256, 8, 128)
    assert (t.read_widths, t.written_bytes, t.read_sector_use) == ({16: 256}, 0, 1.0)
    t = traffic[y]
    assert (t.written_bytes, t.writes, t.warp_writes, t.write_sectors) == (4096, 256, 8, 128)
    assert (t.write_widths, t.read_bytes, t.write_sector_use) == ({16: 256}, 0, 1.0)
    # 16 bytes further on, a warp's 512 bytes touch 17 sectors.
    t = good(LOAD4, (256,), (x, y, 4))["x"]
    assert t.read_sectors == 8 * 17
    assert (t.distinct_read_sectors, t.distinct_read_bytes) == (129, 4096)


STRIDED = "y[i] = x[i * n];"
# Of each: the body, threads, floats of x, n, and what is counted of x.
LOADS = {
    **{
        f"stride {n}": (STRIDED, 64, 64 * n, n, {
            "warp_reads": 2, "read_sectors": 2 * sectors, "read_sector_use": 4 / sectors})
        for n, sectors in ((1, 4), (2, 8), (3, 12), (8, 32), (100, 32))
    },
    "one word": (STRIDED, 64, 1, 0, {
        "read_bytes": 256, "read_sectors": 2, "distinct_read_bytes": 4, "read_sector_use": 4.0,
        "merged_read_sector_use": 1 / 8}),
    # A thread per row: each access touches 32 sectors, and all bytes of each get used.
    "columns": ("float sum = 0;\nfor (int k = 0; k < 8; ++k) sum += x[i * 8 + k];\ny[i] = sum;",
        32, 256, 0, {"warp_reads": 8, "read_sectors": 256, "read_sector_use": 1 / 8,
                     "merged_read_sector_use": 1.0}),
    # Joined by site and turn: the first 3 lanes alone; two full rows; the first 16 lanes.
    "on different ways": ("""
float sum = 0;
if (i < 3) sum = x[i];
#pragma unroll 1
for (long long k = i; k < n; k += 32) sum += x[k];
y[i] = sum;""", 32, 80, 80, {"reads": 83, "warp_reads": 4, "read_sectors": 1 + 4 + 4 + 2}),
    "one helper called twice": ("float v = 0;\nif (i < 8) v = get(x);\ny[i] = v + get(x + 32);",
        32, 64, 0, {"warp_reads": 2, "read_sectors": 1 + 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_loads(name):
    body, threads, length, n, counted = LOADS[name]
    source = f"""
__device__ __forceinline__ float get(const float* x) {{ return x[threadIdx.x]; }}
extern "C" __global__ void k(const float* x, float* y, long long n) {{
  const int i = threadIdx.x;
  {body}
}}
"""
    t = good(source, (threads,), (floats(length), unwritten(threads), n))["x"]
    assert {key: getattr(t, key) for key in counted} == pytest.approx(counted)


def test_fault_inside_a_helper_names_its_callers():
    source = """
__device__ __forceinline__ float get(const float* x) { return x[threadIdx.x]; }
__device__ __forceinline__ float next(const float* x) { return get(x + 64); }
extern "C" __global__ void k(const float* x, float* y) {
  float v = get(x);
  y[threadIdx.x] = v + next(x);
}
"""
    message = caught("out-of-bounds", source, (32,), (floats(64), unwritten(32)), "return x[")
    lines = [row.strip() for row in message.splitlines()[-2:]]
    rows = [row.strip() for row in source.splitlines()]
    assert lines == [f"called from line 3: {rows[2]}", f"called from line 6: {rows[5]}"]


def test_counting_can_be_switched_off():
    x, y = floats(64), unwritten(64)
    traffic = good(COPY, (64,), (x, y), count=False)
    assert traffic.read_bytes == traffic.written_bytes == 0
    assert (y.to_numpy(np.float32) == np.arange(64)).all()
    caught("out-of-bounds", COPY, (65,), (x, y), count=False)


BANKS = """
extern __shared__ __align__(16) unsigned char shared[];
extern "C" __global__ void k(float* y, long long stride) {
  T* s = (T*)shared;
  s[threadIdx.x * stride] = T();
  __syncthreads();
  T v = s[threadIdx.x * stride];
  y[threadIdx.x] = SUM;
}
"""


@pytest.mark.parametrize(
    ("ctype", "stride", "ways", "phases"),
    [
        ("float", 1, 1, 1), ("float", 2, 2, 1), ("float", 32, 32, 1), ("float", 33, 1, 1),
        ("float2", 1, 1, 2), ("float2", 2, 2, 2), ("float2", 16, 16, 2), ("float2", 17, 1, 2),
        ("float4", 1, 1, 4), ("float4", 2, 2, 4), ("float4", 8, 8, 4), ("float4", 9, 1, 4),
    ],
)  # fmt: skip
def test_bank_conflicts(ctype, stride, ways, phases):
    y, width = unwritten(32), {"float": 4, "float2": 8, "float4": 16}[ctype]
    # All of it is used, else only a part would be loaded.
    used = {"float": "v", "float2": "v.x + v.y", "float4": "v.x + v.y + v.z + v.w"}[ctype]
    source = f"typedef {ctype} T;\n{BANKS.replace('SUM', used)}"
    s = good(source, (32,), (y, stride), shared=32 * stride * width).shared
    assert (s.warp_reads, s.warp_writes, s.read_bytes) == (1, 1, 32 * width)
    assert (s.max_ways, s.wavefronts, s.minimal_wavefronts) == (ways, 2 * ways * phases, 2 * phases)


def test_broadcast_is_no_conflict():
    source = """
extern __shared__ volatile float s[];
extern "C" __global__ void k(float* y) {
  if (threadIdx.x % 32 == 0) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[0] + s[threadIdx.x % 2 * 32];
}
"""
    s = good(source, (64,), (unwritten(64),), shared=256).shared
    assert (s.warp_reads, s.max_ways) == (4, 2)
    assert s.wavefronts - s.minimal_wavefronts == 2
