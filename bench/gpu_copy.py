"""The roof: copies of a case's bytes in the same harness; and a kernel that does nothing."""

import functools
from typing import Any

from bench.gpu_contender import Builder, Contender
from bench.gpu_grid import Case
from bench.gpu_session import Session

__all__ = ["EMPTY", "copies", "empty_kernel", "forget_kernels"]

THREADS = 256
VECS = 4  # 16-byte loads in flight per thread

SOURCE = """
struct alignas(16) Vec { unsigned v[4]; };

// A grid of a few blocks per multiprocessor strides over the array.
extern "C" __global__ void __launch_bounds__(256)
copy_stride(const Vec* x, Vec* y, long long vecs) {
    const long long step = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < vecs; i += 4 * step) {
        const Vec a = x[i], b = x[i + step], c = x[i + 2 * step], d = x[i + 3 * step];
        y[i] = a;
        y[i + step] = b;
        y[i + 2 * step] = c;
        y[i + 3 * step] = d;
    }
    for (; i < vecs; i += step) y[i] = x[i];
}

// A block per 16 KiB, like a layer-norm kernel with a row per block.
extern "C" __global__ void __launch_bounds__(256)
copy_block(const Vec* x, Vec* y, long long vecs) {
    const long long i = (long long)blockIdx.x * 1024 + threadIdx.x;
    if (i + 768 < vecs) {
        const Vec a = x[i], b = x[i + 256], c = x[i + 512], d = x[i + 768];
        y[i] = a;
        y[i + 256] = b;
        y[i + 512] = c;
        y[i + 768] = d;
    } else {
        for (long long k = i; k < vecs; k += 256) y[k] = x[k];
    }
}
"""
EMPTY = 'extern "C" __global__ void empty_kernel(long long unused) {}'


@functools.cache
def _kernel(cupy: Any, source: str, name: str) -> Any:
    return cupy.RawKernel(source, name)


forget_kernels = _kernel.cache_clear  # of a simulated device that is gone


def copies(session: Session, case: Case, inputs: Any) -> list[Builder]:
    """Three ways to move as many bytes as the case must; the fastest one in this run is the roof.

    `inputs` has lists `copy_from` and `copy_to`, of half of `case.copy_bytes` or more each.
    """
    nbytes = case.copy_bytes // 32 * 16
    vecs = nbytes // 16
    cupy = session.cupy

    def kernel(name: str, blocks: int) -> Contender:
        function = _kernel(cupy, SOURCE, name)

        def call(i: int) -> Any:
            arguments = (inputs.copy_from[i], inputs.copy_to[i], vecs)
            function((max(1, blocks),), (THREADS,), arguments)
            return inputs.copy_to[i]

        return Contender(f"copy-{name[5:]}", call, kernel=name, error=differs)

    def memcpy() -> Contender:
        def call(i: int) -> Any:
            inputs.copy_to[i].data.copy_from_device_async(inputs.copy_from[i].data, nbytes)
            return inputs.copy_to[i]

        return Contender("copy-memcpy", call, kernel="cudaMemcpyAsync", error=differs)

    def differs(i: int, y: Any) -> float:
        a, b = (session.plain(f.view("uint8")[:nbytes]) for f in (inputs.copy_from[i], y))
        return 0.0 if bool((a == b).all()) else float("inf")

    stride = min(-(-vecs // THREADS), 8 * session.sm_count)
    return [
        ("copy-stride", lambda: kernel("copy_stride", stride)),
        ("copy-block", lambda: kernel("copy_block", -(-vecs // (THREADS * VECS)))),
        ("copy-memcpy", memcpy),
    ]


def empty_kernel(session: Session) -> Contender:
    """Its time in a batch is the fixed cost of a launch, t0, that every row above it contains."""
    function = _kernel(session.cupy, EMPTY, "empty_kernel")
    return Contender("empty", lambda i: function((1,), (32,), (0,)), kernel="empty_kernel")
