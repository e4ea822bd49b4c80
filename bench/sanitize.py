"""Each kernel family at aligned, odd, offset, pitched, in-place and column-major shapes, checked.

`compute-sanitizer --tool memcheck python -m bench.sanitize` watches it; alone it is a short test
that needs no pytest. CuPy's memory pool is off: every array ends where its memory ends.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import cupynorm as cn
from bench.cases import BOTH, EPS, Case
from bench.check import Given, judge, statistics
from bench.data import numpy_dtype
from bench.device import Gpu, ahead, simulated_cupy

# (dtype, M, N): the families by row length, each at a multiple of a vector and off it, forward and
# backward. The family of a length is the plan's affair. With three rows or more a block of the
# backward takes several, and column_totals adds up several partials at 5.
CASES = (
    ("float32", 37, 32), ("float16", 9, 100), ("bfloat16", 5, 255), ("float64", 3, 33),
    ("float32", 5, 1023),  # warp, 32 lanes
    ("bfloat16", 3, 4096), ("float32", 3, 4095),  # block
    ("float32", 2, 9001), ("float64", 2, 8192),  # shared, from sm_90 on clusters of 2, 4 and 8
    ("float32", 1, 40001), ("bfloat16", 5, 80000),  # split, or clusters
    ("float16", 2, 270000),  # of 768 threads; the backward is K5's
    ("float32", 1, 470001),  # split everywhere
    ("float32", 70001, 8),  # column-major: registers; the others take tiles, from 4096 on panels
)  # fmt: skip
TINY = (CASES[0], ("float32", 2, 33))
Variant = tuple[
    str, Any, Any, Any
]  # name, x, out, dy; the values stand in x and dy before the call


def variants(cupy: Any, dtype: str, M: int, N: int) -> Iterator[Variant]:
    """The ways in which memory may lie."""
    rng = np.random.default_rng(N)
    hosts = [(rng.standard_normal((M, N)) * 2 + c).astype(numpy_dtype(dtype)) for c in (1, 0)]

    def filled(length: int, place: Callable[[Any], Any], host: np.ndarray) -> Any:
        flat = cupy.empty(length, dtype=host.dtype)
        flat.view("uint8").fill(0xFF)
        a = place(flat)
        a[...] = cupy.asarray(host)
        return a

    def rows(offset: int, pitch: int, host: np.ndarray = hosts[0]) -> Any:
        return filled(offset + M * pitch, lambda f: f[offset:].reshape(M, pitch)[:, :N], host)

    def by_column(host: np.ndarray) -> Any:
        place = lambda f: f[1:].reshape(N, M + 2)[:, :M].transpose(1, 0)  # noqa: E731
        return filled(1 + (M + 2) * N, place, host)

    yield "contiguous", rows(0, N), None, rows(0, N, hosts[1])
    yield "offset", rows(1, N), rows(1, N), rows(1, N, hosts[1])
    yield "offset apart", rows(1, N), rows(3, N), rows(3, N, hosts[1])
    yield "pitch", rows(0, N + 3), rows(0, N + 5), rows(1, N + 5, hosts[1])
    x = rows(0, N)
    yield "in place", x, x, None
    yield "column-major", by_column(hosts[0]), None, by_column(hosts[1])
    yield "column-major to rows", by_column(hosts[0]), rows(0, N), None


def one(
    cupy: Any, x: Any, y: Any, dy: Any, dtype: str
) -> tuple[Case, Given, tuple[Any, ...], bool]:
    """Forward, and backward where there is a dy: what went in, what came out, right statistics."""
    M, N = x.shape
    rng = np.random.default_rng(M)
    affine = [cupy.asarray(rng.standard_normal(N).astype(numpy_dtype(dtype))) for _ in "wb"]
    before = cupy.asnumpy(x)
    y, mean, rstd = cn.layer_norm(x, N, *affine, EPS, out=y, return_stats=True)
    given, made = Given(np, before, None, *map(cupy.asnumpy, affine)), [cupy.asnumpy(y)]
    stats = zip((mean, rstd), statistics(np, before), strict=True)
    right = all(np.allclose(cupy.asnumpy(a), b, rtol=1e-5, atol=1e-6) for a, b in stats)
    case = Case(BOTH, "sanitize", dtype, (M, N))
    if dy is not None:
        given.dy = cupy.asnumpy(dy)
        made += map(cupy.asnumpy, cn.layer_norm_backward(dy, x, N, mean, rstd, affine[0]))
    return case, given, tuple(made), right


def run(cupy: Any, cases: Sequence[Any] = CASES, out: Callable[[str], Any] = print) -> int:
    """Run all, forward and backward; the number of wrong results."""
    wrong = 0
    for dtype, M, N in cases:
        for name, x, y, dy in variants(cupy, dtype, M, N):
            case, given, made, right = one(cupy, x, y, dy, dtype)
            if dy is None:
                case = Case("layer_norm_fwd", case.group, dtype, case.shape)
            error, allowed = judge(case, given, made, ours=True)
            right = right and error <= allowed
            wrong += not right
            way = "both ways" if dy is not None else "forward"
            out(f"{'ok   ' if right else 'WRONG'} {dtype} {M}x{N} {name}, {way}: error {error:.3g}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if any result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument(
        "--simulate", action="store_true", help="on the simulated device, two shapes"
    )
    simulate = parser.parse_args(argv).simulate
    with contextlib.ExitStack() as stack:
        if simulate:
            stack.enter_context(simulated_cupy())
        import cupy

        cupy.cuda.set_allocator(None)
        cases = TINY if simulate else CASES

        def compile_all(case: tuple[str, int, int]) -> None:
            for _, *arrays in variants(cupy, *case):
                one(cupy, *arrays, case[0])

        ahead(Gpu(cupy, simulated=simulate), [lambda c=c: compile_all(c) for c in cases])
        wrong = run(cupy, cases)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
