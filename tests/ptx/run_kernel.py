"""Short ways to run a kernel in the tests of the engine, and to demand that it be caught."""

from __future__ import annotations

import numpy as np
import pytest

from cupynorm._cuda.source import kernels_folder
from tests.ptx.fault import KINDS
from tests.ptx.launch import Buffer, PtxFault, launch

SEEDS = (None, 1, 2, 3, 0)  # orders of threads, blocks and copies; traffic is counted for the last

# The copies, mbarriers and barriers of the kernels themselves, for texts that are wrong with them,
# and what only such texts do.
STAGING = (kernels_folder() / "stage.cuh").read_text(encoding="utf-8")
STAGING = "__device__" + STAGING.partition("__device__")[2].partition("// In one access")[0]
CLUSTERS = (kernels_folder() / "cluster.cuh").read_text(encoding="utf-8")
CLUSTERS = "__device__" + CLUSTERS.partition("__device__")[2].partition("// Stores `value`")[0]
DEVICE = f"""
typedef unsigned int u32;
typedef unsigned long long u64;
#define INLINE __device__ __forceinline__
extern __shared__ __align__(16) unsigned char shared[];
{STAGING}{CLUSTERS}
#define STAGE(to, from, bytes) \\
  asm volatile("cp.async.ca.shared.global [%0], [%1], " #bytes ";" \\
               : : "r"(shared_address(to)), "l"(from) : "memory")
INLINE bool is_over(u64* a, u32 parity) {{
  u32 done;
  asm volatile("{{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
               "selp.u32 %0, 1, 0, p;}}"
               : "=r"(done) : "r"(shared_address(a)), "r"(parity) : "memory");
  return done;
}}
INLINE void cluster_arrive_relaxed() {{
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}}
INLINE u32 peer(u32 here, int rank) {{
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}}
INLINE void send(u32 there, float v) {{
  asm volatile("st.shared::cluster.f32 [%0], %1;" : : "r"(there), "f"(v) : "memory");
}}
INLINE float fetch(u32 there) {{
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
  return v;
}}
"""

COPY = """
extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""
LOAD4 = """
extern "C" __global__ void k(const float* x, float* y, long long shift) {
  float4 v = *(const float4*)(x + 4 * threadIdx.x + shift);
  *(float4*)(y + 4 * threadIdx.x) = v;
}
"""


def entry(body: str) -> str:
    """A text of which `wrong` and others launch the threads i of a block, with a number n."""
    return f"""{DEVICE}
extern "C" __global__ void k(float* x, float* y, long long n) {{
  volatile float* s = (float*)shared;
  const int i = threadIdx.x;
  {body}
}}
"""


def ptx(body: str) -> str:
    """A text in PTX: %rd1 and %rd2 hold the thread's places in x and y, %r1 its number."""
    return f"""
.version 8.8
.target sm_90
.address_size 64
.visible .entry k(.param .u64 x, .param .u64 y)
{{
.reg .pred %p<4>;
.reg .b32 %r<8>;
.reg .f32 %f<4>;
.reg .b64 %rd<8>;
ld.param.u64 %rd3, [x];
ld.param.u64 %rd4, [y];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd1, %rd3, %rd5;
add.s64 %rd2, %rd4, %rd5;
{body}
ret;
}}
"""


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


def run(source, block, args, *, seed=0, grid=(1,), shared=0, **options):
    """Launch with the buffers among `args` registered."""
    buffers = [a for a in args if isinstance(a, Buffer)]
    return launch(source, "k", grid, block, shared, args, buffers=buffers, seed=seed, **options)


def good(source, block, args, **options):
    """Traffic of a launch that must leave the same bits in every order."""
    buffers = [a for a in args if isinstance(a, Buffer)]
    before = [(b.bytes().copy(), b.defined().copy()) for b in buffers]
    seen = set()
    for seed in SEEDS:
        for b, (held, marks) in zip(buffers, before, strict=True):
            b.bytes()[:], b.defined()[:] = held, marks
        traffic = run(source, block, args, seed=seed, **options)
        seen.add(b"".join(b.bytes().tobytes() + b.defined().tobytes() for b in buffers))
    assert len(seen) == 1
    return traffic


def caught(kinds, source, block, args, at=None, *, seeds=SEEDS, **options):
    """The message of a bad launch's fault, at the line of a text; a good launch must follow.

    Which of the kinds it is may depend on the order; in one it must be the first.
    """
    kinds, seen = kinds.split(), set()
    for seed in seeds:
        with pytest.raises(PtxFault) as info:
            run(source, block, args, seed=seed, **options)
        assert info.value.kind in kinds, str(info.value)
        seen.add(info.value.kind)
        if at is not None:
            assert info.value.line == line_of(source, at), str(info.value)
            assert at in str(info.value)
    assert kinds[0] in seen and KINDS.issuperset(kinds)
    y = unwritten(64)
    run(COPY, (64,), (floats(64), y))
    assert (y.to_numpy(np.float32) == np.arange(64)).all()
    return str(info.value)


def wrong(kinds, threads, bad, fine, body, at, *words, seeds=SEEDS, **options):
    """Demand a fault at the line of a text, with words in its message, for one n; none for another.

    x holds 64 floats, y has room for 64, and so has s in shared memory.
    """
    source, options = entry(body), {"shared": 256} | options
    args = floats(64), unwritten(64)
    message = caught(kinds, source, (threads,), (*args, bad), at, seeds=seeds, **options)
    assert all(word in message for word in words), message
    good(source, (threads,), (*args, fine), **options)
