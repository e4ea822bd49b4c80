"""Each kernel family at aligned, odd, offset, pitched, in-place and column-major shapes, checked.

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
from bench.gpu_check_backward import gradient_errors, worst_of
from cupynorm._problem import numpy_dtype

__all__ = ["CASES", "main", "run"]

# (dtype, rows, N): the families by row length, each at a multiple of a vector and off it, forward
# and backward. The family of a length is the plan's affair; `main` prints what ran. With three rows
# or more a block of the backward takes several, and column_totals adds up several partials at 5.
CASES = (
    ("float32", 37, 32),
    ("float16", 9, 100),
    ("bfloat16", 5, 255),
    ("float64", 3, 33),
    ("float32", 5, 1023),  # warp, 32 lanes
    ("bfloat16", 3, 4096),  # block
    ("float32", 3, 4095),
    ("float32", 2, 9001),  # shared, from sm_90 on clusters of 2, 4 and 8
    ("float64", 2, 8192),
    ("float32", 1, 40001),  # split, or clusters
    ("bfloat16", 5, 80000),
    ("float16", 2, 270000),  # of 768 threads; the backward is K5's
    ("float32", 1, 470001),  # split everywhere
    ("float32", 70001, 8),  # column-major: registers; the others take tiles, from 4096 on panels
)
TINY = (CASES[0], ("float32", 2, 33))


def variants(cupy: Any, dtype: str, rows: int, N: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """x, out and dy by name; the values stand in x and dy before the call."""
    rng = np.random.default_rng(N)
    hosts = [(rng.standard_normal((rows, N)) * 2 + c).astype(numpy_dtype(dtype)) for c in (1, 0)]

    def placed(offset: int, pitch: int, host: np.ndarray = hosts[0]) -> Any:
        flat = cupy.empty(offset + rows * pitch, dtype=host.dtype)
        flat.view("uint8").fill(0xFF)
        a = flat[offset:].reshape(rows, pitch)[:, :N]
        a[...] = cupy.asarray(host)
        return a

    yield "contiguous", placed(0, N), None, placed(0, N, hosts[1])
    yield "offset", placed(1, N), placed(1, N), placed(1, N, hosts[1])
    yield "offset apart", placed(1, N), placed(3, N), placed(3, N, hosts[1])
    yield "pitch", placed(0, N + 3), placed(0, N + 5), placed(1, N + 5, hosts[1])
    x = placed(0, N)
    yield "in place", x, x, None

    def by_column(host: np.ndarray) -> Any:
        flat = cupy.empty(1 + (rows + 2) * N, dtype=host.dtype)
        flat.view("uint8").fill(0xFF)
        a = flat[1:].reshape(N, rows + 2)[:, :rows].transpose(1, 0)
        a[...] = cupy.asarray(host)
        return a

    yield "column-major", by_column(hosts[0]), None, by_column(hosts[1])
    yield "column-major to rows", by_column(hosts[0]), placed(0, N), None


def run(cupy: Any, cases: Any = CASES, out: Any = print) -> int:
    """Run all, forward and backward; the number of wrong results."""
    wrong = 0

    def say(right: bool, what: str, error: float) -> int:
        out(f"{'ok   ' if right else 'WRONG'} {what}: error {error:.3g}")
        return int(not right)

    for dtype, rows, N in cases:
        rng = np.random.default_rng(rows)
        weight, bias = (
            cupy.asarray(rng.standard_normal(N).astype(numpy_dtype(dtype))) for _ in "wb"
        )
        for name, x, y, dy in variants(cupy, dtype, rows, N):
            before = cupy.asnumpy(x)
            result = cn.layer_norm(x, N, weight, bias, EPS, out=y, return_stats=True)
            hosts = (before, *(cupy.asnumpy(a) for a in (weight, bias, result.y)))
            error = largest_error(np, *hosts)
            right = error <= limit(dtype, N, ours=True) and _stats_right(before, result, cupy)
            wrong += say(right, f"{dtype} {rows}x{N} {name}", error)
            if dy is not None:
                error, allowed = _backward_error(cupy, dy, x, N, result, weight)
                wrong += say(error <= allowed, f"{dtype} {rows}x{N} {name}, backward", error)
    return wrong


def _backward_error(
    cupy: Any, dy: Any, x: Any, N: int, result: Any, weight: Any
) -> tuple[float, float]:
    """Error of the worst gradient, and what it may be."""
    made = cn.layer_norm_backward(dy, x, N, result.mean, result.rstd, weight)
    dy, x, weight, *grads = (cupy.asnumpy(a) for a in (dy, x, weight, *made))
    errors = gradient_errors(np, dy, x, weight, tuple(grads))
    return worst_of(errors, dict.fromkeys(errors, str(x.dtype)), x.shape, ours=True)


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
    from cupynorm._cuda import arrays as _cuda

    prepared = (*_cuda._prepared.values(), *_cuda._prepared_bwd.values())
    plans = [ready.plan for ready in prepared]
    return sorted({stage.name for plan in plans for stage in plan.stages})


if __name__ == "__main__":
    sys.exit(main())
