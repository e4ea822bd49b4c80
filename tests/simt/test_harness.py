"""The harness itself: bad kernels must be caught and named, good ones run right and be counted right."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.simt.launch import KINDS, Buffer, SimtFault, launch
from tests.simt.limits import KIB, DeviceLimits

VECTOR = "typedef float vec4 __attribute__((vector_size(16)));\n"


def line_of(source: str, text: str) -> int:
    """Number of the one line that holds `text`."""
    found = [i for i, row in enumerate(source.splitlines(), 1) if text in row]
    assert len(found) == 1, f"{text!r} stands in {len(found)} lines"
    return found[0]


def floats(n: int, name: str = "x", **options) -> Buffer:
    """n float32: 0, 1, 2, ..."""
    return Buffer.from_array(np.arange(n, dtype=np.float32), name=name, **options)


def unwritten(n: int, name: str = "y", **options) -> Buffer:
    """Room for n float32."""
    return Buffer.empty(4 * n, name=name, granule=4, **options)


def run(source, block, args, *, entry="k", grid=(1,), shared=0, **options):
    """Launch with the buffers among `args` registered."""
    buffers = [a for a in args if isinstance(a, Buffer)]
    return launch(source, entry, grid, block, shared, args, buffers=buffers, **options)


def caught(kind, source, block, args, text=None, **options):
    """The fault of a bad launch, for several orders of the threads; a good launch must follow."""
    for seed in (None, 0, 1, 2):
        with pytest.raises(SimtFault) as info:
            run(source, block, args, seed=seed, **options)
        assert kind in KINDS
        assert info.value.kind == kind, str(info.value)
        if text is not None:
            assert info.value.line == line_of(source, text), str(info.value)
            assert text in str(info.value)
    y = unwritten(64)
    run(COPY, (64,), (floats(64), y))
    assert (y.to_numpy(np.float32) == np.arange(64)).all()
    return str(info.value)


COPY = """
extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""

# ---- races ----

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


# ---- bounds, alignment, definedness ----


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
    source = VECTOR + """
extern "C" __global__ void k(const float* x, float* y) {
  vec4 v = *(const vec4*)x;
  y[0] = v[0] + v[1];
}
"""
    caught("out-of-bounds", source, (1,), (floats(3), unwritten(1)), "(const vec4*)x")


LOAD4 = VECTOR + """
extern "C" __global__ void k(const float* x, float* y, long long shift) {
  vec4 v = *(const vec4*)(x + 4 * threadIdx.x + shift);
  *(vec4*)(y + 4 * threadIdx.x) = v;
}
"""


def test_misaligned_vector_load():
    message = caught("misaligned", LOAD4, (32,), (floats(160), unwritten(128), 1), "x + 4 *")
    assert "is 4 modulo 16" in message
    caught("misaligned", LOAD4, (32,), (floats(160, offset=8), unwritten(128), 0), "x + 4 *")
    run(LOAD4, (32,), (floats(160, offset=8), unwritten(128), 2))


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
    message = caught("out-of-bounds", source, (33,), (unwritten(64),), "s[threadIdx.x] = 1", shared=128)
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


# ---- warps and barriers ----


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


# ---- arguments and limits ----


def test_float_parameter_fed_a_double():
    source = """
extern "C" __global__ void k(float* y, float eps) { y[0] = eps; }
"""
    message = caught("argument", source, (1,), (unwritten(1), 1e-5))
    assert "parameter 1 of k is a 4-byte floating-point number" in message
    run(source, (1,), (unwritten(1), np.float32(1e-5)))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("int n", 3), ("double n", 3), ("long long n", 3.0), ("long long n", np.int32(3)), ("long long n", True)],
)
def test_argument_of_another_type(parameter, value):
    source = f"""
extern "C" __global__ void k(float* y, {parameter}) {{ y[0] = (float)n; }}
"""
    caught("argument", source, (1,), (unwritten(1), value))


def test_number_of_arguments():
    caught("argument", COPY, (64,), (floats(64),))


def test_text_that_does_not_compile():
    with pytest.raises(SimtFault, match="no_such_name") as info:
        run('extern "C" __global__ void k(float* y) { y[0] = no_such_name; }', (1,), (unwritten(1),))
    assert info.value.kind == "compile"


@pytest.mark.parametrize(
    ("launched", "words"),
    [
        ({"block": (1025,)}, "block x is 1025"),
        ({"block": (32, 33)}, "has 1056 threads"),
        ({"block": (1, 1, 65)}, "block z is 65"),
        ({"grid": (2**31,)}, "grid x is 2147483648"),
        ({"grid": (1, 65536)}, "grid y is 65536"),
        ({"grid": (0,)}, "grid x is 0"),
        ({"shared": 227 * KIB + 1}, "232449 bytes of dynamic"),
        ({"shared": 100 * KIB, "limits": DeviceLimits.of("86")}, "sm_86 takes 101376 per block"),
        ({"shared": 48 * KIB + 4, "opt_in_shared": 48 * KIB}, "max_dynamic_shared_size_bytes"),
        ({"block": (1024,), "registers_per_thread": 65}, "1024 threads of 65 registers"),
        ({"registers_per_thread": 256}, "255 per thread"),
    ],
)
def test_launch_beyond_the_device(launched, words):
    block = launched.pop("block", (1,))
    message = caught("limits", COPY, block, (floats(64), unwritten(64)), **launched)
    assert words in message


def test_launch_at_the_limits():
    run(COPY, (1,), (floats(64), unwritten(64)), shared=227 * KIB)
    run(COPY, (1024,), (floats(1024), unwritten(1024)), registers_per_thread=64)


def test_too_much_static_shared():
    source = """
extern "C" __global__ void k(float* y) {
  __shared__ float s[12289];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[0] = s[0];
}
"""
    assert "49156 bytes of static" in caught("limits", source, (1,), (unwritten(1),))


# ---- results ----

ROW_SUM = """
template <int W> __device__ __forceinline__ float warp_sum(float v) {
  for (int o = W / 2; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o, W);
  return v;
}
extern "C" __global__ void __launch_bounds__(1024) k(const float* __restrict__ x, float* y, long long n) {
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
    run('extern "C" __global__ void k(const float* x, float* y) { y[0] = x[0] * 1e-10f; }', (1,), (x, y))
    assert y.to_numpy(np.float32)[0] == 0
    assert np.float32(1e-30) * np.float32(1e-10) != 0  # the process keeps its own mode


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


# ---- traffic ----


def test_coalesced_vector_loads_use_every_sector():
    x, y = floats(4096), unwritten(4096)
    traffic = run(LOAD4, (256,), (x, y, 0), grid=(1,))
    t = traffic["x"]
    assert (t.read_bytes, t.reads, t.warp_reads, t.read_sectors) == (4096, 256, 8, 128)
    assert (t.read_widths, t.written_bytes, t.read_sector_use) == ({16: 256}, 0, 1.0)
    t = traffic[y]
    assert (t.written_bytes, t.writes, t.warp_writes, t.write_sectors) == (4096, 256, 8, 128)
    assert (t.write_widths, t.read_bytes, t.write_sector_use) == ({16: 256}, 0, 1.0)
    # 16 bytes further on, a warp's 512 bytes touch 17 sectors.
    t = run(LOAD4, (256,), (x, y, 4))["x"]
    assert t.read_sectors == 8 * 17
    assert (t.distinct_read_sectors, t.distinct_read_bytes) == (129, 4096)


STRIDED = """
extern "C" __global__ void k(const float* x, float* y, long long stride) {
  y[threadIdx.x] = x[threadIdx.x * stride];
}
"""


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (3, 12), (8, 32), (100, 32)])
def test_strided_loads(stride, sectors):
    t = run(STRIDED, (64,), (floats(64 * stride), unwritten(64), stride))["x"]
    assert (t.warp_reads, t.read_sectors) == (2, 2 * sectors)
    assert t.read_sector_use == pytest.approx(4 / sectors)


def test_every_lane_reads_one_word():
    t = run(STRIDED, (64,), (floats(1), unwritten(64), 0))["x"]
    assert (t.read_bytes, t.read_sectors, t.distinct_read_bytes) == (256, 2, 4)
    assert t.read_sector_use == 4.0 and t.merged_read_sector_use == 1 / 8


def test_column_walk_is_wasteful_per_access_but_merges():
    """A thread per row: each access touches 32 sectors, and all bytes of each are used in the end."""
    source = """
extern "C" __global__ void k(const float* x, float* y) {
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[threadIdx.x * 8 + i];
  y[threadIdx.x] = sum;
}
"""
    t = run(source, (32,), (floats(256), unwritten(32)))["x"]
    assert (t.warp_reads, t.read_sectors) == (8, 256)
    assert (t.read_sector_use, t.merged_read_sector_use) == (1 / 8, 1.0)


def test_lanes_on_different_ways_are_joined_by_site_and_turn():
    source = """
extern "C" __global__ void k(const float* x, float* y, long long n) {
  float sum = 0;
  if (threadIdx.x < 3) sum = x[threadIdx.x];
  for (long long i = threadIdx.x; i < n; i += 32) sum += x[i];
  y[threadIdx.x] = sum;
}
"""
    for seed in range(3):
        t = run(source, (32,), (floats(80), unwritten(32), 80), seed=seed)["x"]
        # The first 3 lanes alone; two full rows; the first 16 lanes.
        assert (t.reads, t.warp_reads, t.read_sectors) == (83, 4, 1 + 4 + 4 + 2)


def test_one_helper_called_twice_is_two_sites():
    source = """
__device__ __noinline__ float get(const float* x) { return x[threadIdx.x]; }
extern "C" __global__ void k(const float* x, float* y) {
  float v = 0;
  if (threadIdx.x < 8) v = get(x);
  y[threadIdx.x] = v + get(x + 32);
}
"""
    t = run(source, (32,), (floats(64), unwritten(32)))["x"]
    assert (t.warp_reads, t.read_sectors) == (2, 1 + 4)


def test_fault_inside_a_helper_names_its_caller():
    source = """
__device__ __noinline__ float get(const float* x) { return x[threadIdx.x]; }
extern "C" __global__ void k(const float* x, float* y) {
  float v = get(x);
  y[threadIdx.x] = v + get(x + 64);
}
"""
    message = caught("out-of-bounds", source, (32,), (floats(64), unwritten(32)), "return x[")
    assert "called from line 5: y[threadIdx.x] = v + get(x + 64);" in message


def test_counting_can_be_switched_off():
    x, y = floats(64), unwritten(64)
    traffic = run(COPY, (64,), (x, y), count=False)
    assert traffic.read_bytes == traffic.written_bytes == 0
    assert (y.to_numpy(np.float32) == np.arange(64)).all()
    caught("out-of-bounds", COPY, (65,), (x, y), count=False)


BANKS = VECTOR + """
typedef float vec2 __attribute__((vector_size(8)));
extern "C" void* simt_dynamic_shared();
extern "C" __global__ void k(float* y, long long stride) {
  T* s = (T*)simt_dynamic_shared();
  T v = {};
  s[threadIdx.x * stride] = v;
  __syncthreads();
  v = s[threadIdx.x * stride];
  y[threadIdx.x] = *(float*)&v;
}
"""


@pytest.mark.parametrize(
    ("ctype", "stride", "ways", "phases"),
    [
        ("float", 1, 1, 1), ("float", 2, 2, 1), ("float", 32, 32, 1), ("float", 33, 1, 1),
        ("vec2", 1, 1, 2), ("vec2", 2, 2, 2), ("vec2", 16, 16, 2), ("vec2", 17, 1, 2),
        ("vec4", 1, 1, 4), ("vec4", 2, 2, 4), ("vec4", 8, 8, 4), ("vec4", 9, 1, 4),
    ],
)  # fmt: skip
def test_bank_conflicts(ctype, stride, ways, phases):
    y, width = unwritten(32), {"float": 4, "vec2": 8, "vec4": 16}[ctype]
    source = BANKS.replace("T*", f"{ctype}*").replace("T v", f"{ctype} v")
    s = run(source, (32,), (y, stride), shared=32 * stride * width).shared
    assert (s.warp_reads, s.warp_writes, s.read_bytes) == (1, 1, 32 * width)
    assert (s.max_ways, s.wavefronts, s.minimal_wavefronts) == (ways, 2 * ways * phases, 2 * phases)


def test_broadcast_is_no_conflict():
    source = """
extern "C" void* simt_dynamic_shared();
extern "C" __global__ void k(float* y) {
  float* s = (float*)simt_dynamic_shared();
  if (threadIdx.x == 0) s[0] = s[32] = 1;
  __syncthreads();
  y[threadIdx.x] = s[0] + s[threadIdx.x % 2 * 32];
}
"""
    s = run(source, (32,), (unwritten(32),), shared=256).shared
    assert (s.warp_reads, s.max_ways) == (2, 2)
    assert s.wavefronts - s.minimal_wavefronts == 1
