"""Addresses, alignment, definedness and rights: each breach caught and named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import Buffer
from tests.simt.run_kernel import COPY, LOAD4, VECTOR, caught, floats, line_of, run, unwritten


def test_overrun_by_one_element():
    source = """
extern "C" __global__ void k(const float* x, float* y, long long n) {
  long long i = threadIdx.x;
  if (i <= n) {
    y[i] =
        x[i];
  }
}
"""
    x, y, longer = floats(100, "input"), unwritten(101), floats(101, "input")
    message = caught("out-of-bounds", source, (128,), (x, y, 100))
    assert f"at line {line_of(source, '        x[i];')}: x[i];" in message
    assert "ends 4 bytes after input (400 bytes; offset 400)" in message
    message = caught("out-of-bounds", source, (128,), (longer, unwritten(100), 100), "y[i] =")
    assert "store" in message
    caught("out-of-bounds", source, (128,), (longer, y, 101))


def test_underrun_and_wild_address():
    source = """
extern "C" __global__ void k(const float* x, float* y, long long shift) { y[0] = x[shift]; }
"""
    message = caught("out-of-bounds", source, (1,), (floats(4), unwritten(1), -1))
    assert "starts 4 bytes before x" in message
    message = caught("out-of-bounds", source, (1,), (floats(4), unwritten(1), 1 << 44))
    assert "outside every buffer" in message


def test_vector_across_the_end():
    source = (
        VECTOR
        + """
extern "C" __global__ void k(const float* x, float* y) {
  vec4 v = *(const vec4*)x;
  y[0] = v[0] + v[1];
}
"""
    )
    caught("out-of-bounds", source, (1,), (floats(3), unwritten(1)), "(const vec4*)x")


def test_misaligned_vector_load():
    message = caught("misaligned", LOAD4, (32,), (floats(160), unwritten(128), 1), "x + 4 *")
    assert "is 4 modulo 16" in message
    caught("misaligned", LOAD4, (32,), (floats(160, offset=8), unwritten(128), 0), "x + 4 *")
    run(LOAD4, (32,), (floats(160, offset=8), unwritten(128), 2))


def test_vectors_of_32_bytes():
    source = """
extern "C" __global__ void k(const float* x, float* y, long long shift) {
  float v[8];
  simt_load32(x + 8 * threadIdx.x + shift, v);
  simt_store32(y + 8 * threadIdx.x, v);
}
"""
    x, y = floats(264), unwritten(256)
    traffic = run(source, (32,), (x, y, 8))
    assert (y.to_numpy(np.float32) == np.arange(8, 264)).all()
    t = traffic["x"]
    assert (t.read_widths, t.read_bytes, t.read_sectors, t.warp_reads) == ({32: 32}, 1024, 32, 1)
    message = caught("misaligned", source, (32,), (x, unwritten(256), 4), "simt_load32")
    assert "is 16 modulo 32" in message
    caught("out-of-bounds", source, (32,), (x, unwritten(252), 8), "simt_store32")


@pytest.mark.parametrize("offset", [0, 2, 16, 100, 254])
def test_offset_of_a_buffer(offset):
    for nbytes in (2, 4096, 8190, 10000):
        assert Buffer.empty(nbytes, offset=offset).ptr % 256 == offset


def test_reading_what_nobody_wrote():
    x = Buffer.empty(256, name="workspace", granule=4)
    message = caught("uninitialized", COPY, (64,), (x, unwritten(64)), "x[threadIdx.x]")
    assert "workspace" in message
    x.write(np.zeros(63, np.float32))
    message = caught("uninitialized", COPY, (64,), (x, unwritten(64)))
    assert "nobody wrote byte 252" in message and "thread (63, 0, 0)" in message
    x.write(np.zeros(1, np.float32), start=252)
    run(COPY, (64,), (x, unwritten(64)))


def test_definedness_lasts_from_launch_to_launch():
    work, y = Buffer.empty(256, granule=4), unwritten(64)
    run(COPY, (64,), (floats(64), work))
    run(COPY, (64,), (work, y))
    assert (y.to_numpy(np.float32) == np.arange(64)).all() and y.defined().all()


def test_unwritten_memory_is_poisoned():
    y = unwritten(64)
    run(COPY, (32,), (floats(64), y))
    assert y.defined().reshape(64, 4).all(1).tolist() == [True] * 32 + [False] * 32
    assert (y.bytes()[128:] == 0xFF).all()


def test_shared_memory_is_undefined_in_each_block():
    source = """
extern "C" void* simt_dynamic_shared();
extern "C" __global__ void k(float* y) {
  float* s = (float*)simt_dynamic_shared();
  if (blockIdx.x == FIRST) s[threadIdx.x] = 1;
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];
}
"""
    for first in "01":
        bad = source.replace("FIRST", first)
        message = caught("uninitialized", bad, (32,), (unwritten(64),), grid=(2,), shared=128)
        assert "dynamic shared memory" in message


def test_shared_overrun():
    source = """
extern "C" void* simt_dynamic_shared();
extern "C" __global__ void k(float* y) {
  float* s = (float*)simt_dynamic_shared();
  s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}
"""
    message = caught(
        "out-of-bounds", source, (33,), (unwritten(64),), "s[threadIdx.x] = 1", shared=128
    )
    assert "dynamic shared memory (128 bytes; offset 128)" in message
    run(source, (33,), (unwritten(64),), shared=132)
    static = """
extern "C" __global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
"""
    message = caught("out-of-bounds", static, (33,), (unwritten(64),))
    assert "static shared memory (128 bytes" in message


def test_read_only_buffer():
    x = floats(64, writable=False)
    caught("read-only", COPY, (64,), (floats(64), x), "y[threadIdx.x] =")


def test_memory_of_another_device():
    x, y = floats(64, device=1), unwritten(64)
    caught("wrong-device", COPY, (64,), (x, y))
    run(COPY, (64,), (x, unwritten(64, device=1)), device=1)


def test_stack_arrays_and_constants_are_no_ones_business():
    source = """
__constant__ float table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
__device__ __noinline__ void fill(float* a, int n) { for (int i = 0; i < n; ++i) a[i] = table[i]; }
extern "C" __global__ void k(float* y) {
  float a[8];
  fill(a, 8);
  y[threadIdx.x] = a[threadIdx.x % 8];
}
"""
    y = unwritten(64)
    traffic = run(source, (64,), (y,))
    assert (y.to_numpy(np.float32) == np.arange(64) % 8 + 1).all()
    assert traffic.read_bytes == 0


def test_stack_overflow():
    source = """
__device__ __noinline__ float sink(float* p, int n) {
  volatile float room[1024];
  room[n % 1024] = p[0];
  return n ? sink(p, n - 1) + room[(n * 7) % 1024] : 0;
}
extern "C" __global__ void k(float* y) { y[0] = sink(y, 100); }
"""
    y = unwritten(1)
    y.write(np.zeros(1, np.float32))
    caught("stack-overflow", source, (1,), (y,))
