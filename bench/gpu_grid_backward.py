"""Cases of the backward table: the backward alone, then forward and backward together."""

import functools

from bench.gpu_grid import BIG, BOTH, BWD, FEW, LAYOUT, ODD, POWERS, SMALL, Case, case

__all__ = ["BACKWARD_GRIDS", "full", "quick", "tiny"]

backward = functools.partial(case, op=BWD)
both = functools.partial(case, op=BOTH)


def quick() -> list[Case]:
    """About eight minutes with torch.compile, half of it for the cases that the claims rest on."""
    wide = (4096, 1024, 256, 16384, 64, 1000, 4095)
    cases = [backward(dtype, N) for N in wide for dtype in ("bfloat16", "float32")]
    cases += [backward("float16", N) for N in (1024, 4096)]
    cases += [backward("bfloat16", N, SMALL) for N in (256, 1024, 4096, 16384)]
    cases += [backward("float32", N, SMALL) for N in (1024, 4096)]
    cases += [both(dtype, N) for N in (1024, 4096, 16384) for dtype in ("bfloat16", "float32")]
    cases += [
        both("bfloat16", 1024, SMALL),
        both("bfloat16", 4096, SMALL),
        backward("bfloat16", 65536),  # K4
        backward("float32", 65536),
        backward("bfloat16", 2**18),  # K5
        backward("bfloat16", 4 * 2**20, FEW, 8, weight_dtype=None),
        backward("bfloat16", 4096, LAYOUT, weight_dtype="float32"),
        backward("bfloat16", 4096, LAYOUT, weight_dtype=None),
        backward("bfloat16", 4096, LAYOUT, layout="offset"),
        backward("float64", 4096),
    ]
    return cases


def full() -> list[Case]:
    """The quick grid, then every other point; give it several runs or a long `--seconds`."""
    cases = quick()
    columns = sorted(POWERS + ODD)
    for dtype in ("bfloat16", "float32", "float16"):
        for make in (backward, both):
            cases += [make(dtype, N) for N in columns]
            cases += [make(dtype, N, SMALL) for N in columns]
    for N in (1000, 1024, 4096, 5001, 16384):
        for dtype in ("bfloat16", "float32"):
            for layout in ("offset", "pitch"):
                cases.append(backward(dtype, N, LAYOUT, layout=layout))
            cases.append(backward(dtype, N, LAYOUT, weight_dtype=None))
        cases += [backward(d, N, LAYOUT, weight_dtype="float32") for d in ("float16", "bfloat16")]
        cases.append(backward("float64", N))
    for make in (backward, both):
        cases += [make("float64", N) for N in columns]
    for rows in (1, 2, 4, 8):
        # 64 Mi columns of 8 rows in bfloat16: 1 GB each of x, dy and dx.
        for N in (2**20, 4 * 2**20, 16 * 2**20, 64 * 2**20):
            cases += [backward("bfloat16", N, FEW, rows, weight_dtype=w) for w in ("same", None)]
    return list(dict.fromkeys(cases))


def tiny() -> list[Case]:
    """For the simulated device: a warp, an offset base, a pitch without weight, K4, and both."""
    return [
        Case("float32", 5, 32, BIG, op=BWD),
        Case("float32", 3, 33, LAYOUT, layout="offset", op=BWD),
        Case("float32", 2, 33, LAYOUT, weight_dtype=None, layout="pitch", op=BWD),
        Case("float32", 2, 16401, FEW, op=BWD),
        Case("float32", 5, 32, BIG, op=BOTH),
    ]


BACKWARD_GRIDS = {"quick": quick, "full": full, "tiny": tiny}
