"""Each kernel family at aligned, odd, offset, pitched and in-place shapes, checked.

`compute-sanitizer --tool memcheck python -m bench.sanitize` watches it; alone it is a short test
that needs no pytest. CuPy's memory pool is off: every array ends where its memory ends.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import cupynorm as cn
from bench.gpu_check import EPS, largest_error, limit
from cupynorm._problem import numpy_dtype

__all__ = ["CASES", "main", "run"]

# (dtype, rows, N): the families by row length, each at a multiple of a vector and off it. The
# family of a length is the plan's affair; `main` prints what ran.
CASES = (
    ("float32", 37, 32),
    ("float16", 9, 100),
    ("bfloat16", 5, 255),
    ("float64", 3, 33),
    ("float32", 5, 1023),  # warp, 32 lanes
    ("bfloat16", 3, 4096),  # block
    ("float32", 3, 4095),
    ("float32", 2, 9001),  # shared
    ("float64", 2, 8192),
    ("float32", 1, 40001),  # split
    ("bfloat16", 2, 80000),
)
TINY = (CASES[0], ("float32", 2, 33))


def variants(cupy: Any, dtype: str, rows: int, N: int) -> Iterator[tuple[str, Any, Any]]:
    """x and out by name; the values stand in `x` before the call."""
    host = (np.random.default_rng(N).standard_normal((rows, N)) * 2 + 1).astype(numpy_dtype(dtype))

    def placed(offset: int, pitch: int) -> Any:
        flat = cupy.empty(offset + rows * pitch, dtype=host.dtype)
        flat.view("uint8").fill(0xFF)
        a = flat[offset:].reshape(rows, pitch)[:, :N]
        a[...] = cupy.asarray(host)
        return a

    yield "contiguous", placed(0, N), None
    yield "offset", placed(1, N), placed(1, N)
    yield "offset apart", placed(1, N), placed(3, N)
    yield "pitch", placed(0, N + 3), placed(0, N + 5)
    x = placed(0, N)
    yield "in place", x, x


def run(cupy: Any, cases: Any = CASES, out: Any = print) -> int:
    """Run all; the number of wrong results."""
    wrong = 0
    for dtype, rows, N in cases:
        rng = np.random.default_rng(rows)
        weight, bias = (
            cupy.asarray(rng.standard_normal(N).astype(numpy_dtype(dtype))) for _ in "wb"
        )
        for name, x, y in variants(cupy, dtype, rows, N):
            before = cupy.asnumpy(x)
            result = cn.layer_norm(x, N, weight, bias, EPS, out=y, return_stats=True)
            hosts = (before, *(cupy.asnumpy(a) for a in (weight, bias, result.y)))
            error = largest_error(np, *hosts)
            right = error <= limit(dtype, N, ours=True) and _stats_right(before, result, cupy)
            wrong += not right
            out(f"{'ok   ' if right else 'WRONG'} {dtype} {rows}x{N} {name}: error {error:.3g}")
    return wrong


def _stats_right(x: np.ndarray, result: Any, cupy: Any) -> bool:
    wide = x.astype(np.float64)
    mean, rstd = wide.mean(1, keepdims=True), 1 / np.sqrt(wide.var(1, keepdims=True) + EPS)
    pairs = ((result.mean, mean), (result.rstd, rstd))
    return all(np.allclose(cupy.asnumpy(a), b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if any result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument(
        "--simulate", action="store_true", help="on the simulated device, two shapes"
    )
    simulate = parser.parse_args(argv).simulate
    with contextlib.ExitStack() as stack:
        if simulate:
            from bench.gpu_simulated import simulated_session_cupy

            stack.enter_context(simulated_session_cupy())
        import cupy

        cupy.cuda.set_allocator(None)
        wrong = run(cupy, TINY if simulate else CASES)
        names = _kernels_that_ran()
    print(f"{wrong} wrong; kernels: {', '.join(names)}")
    return int(wrong > 0)


def _kernels_that_ran() -> list[str]:
    from cupynorm import _cuda

    plans = [ready.plan for ready in _cuda._prepared.values()]
    return sorted({stage.name for plan in plans for stage in plan.stages})


if __name__ == "__main__":
    sys.exit(main())
