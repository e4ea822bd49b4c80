"""`python -m tests.ptx`: handwritten digits through every kernel, without a GPU.

Each call is the library's own, on arrays of the stand-in for CuPy; the PTX that NVRTC makes for the
architecture is executed, with every check of the engine. A row says how far the result is from
float64, and how many bytes of the arrays moved over those of each input once and each result once.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

import cupynorm as cn
from tests import oracle
from tests.ptx.cupy_stand_in import simulated_cupy


class Case(NamedTuple):
    """Rows of N columns on an architecture: each of these brings a kernel of its own."""

    arch: str
    dtype: str
    rows: int
    N: int
    order: str = "C"  # or F, or columns that lie anywhere


FORWARD = (
    Case("90", "float16", 512, 64),
    Case("90", "float32", 9, 3000),
    Case("90", "float64", 2, 20_000),
    Case("75", "float16", 2, 28_000),
    Case("90", "float32", 1, 600_000),
    Case("90", "float64", 1797, 8, "F"),
    Case("90", "float16", 512, 300, "F"),
    Case("90", "float32", 1797, 64, "columns"),
)
BACKWARD = (
    Case("90", "float16", 512, 64),
    Case("90", "float32", 9, 1500),
    Case("90", "float64", 30, 3000),
    Case("90", "float16", 2, 40_000),
    Case("80", "float32", 2, 60_000),
    Case("90", "float64", 512, 64, "F"),
    Case("90", "float16", 130, 2000, "F"),
)
WIDTHS = (66, 7, 9, 13, 12, 14, 8)


def digits(case: Case, turn: float = 0) -> np.ndarray:
    """Pixels of digits one after another, from 0 to 16."""
    pixels = np.resize(load_digits().data, (case.rows, case.N))
    order = "C" if case.order == "C" else "F"
    return np.asarray(pixels - turn * pixels[::-1], dtype=case.dtype, order=order)


def run(case: Case, backward: bool) -> tuple[str, ...]:
    """A call, held against float64, as a row of the table."""
    x, weight = digits(case), np.linspace(0.5, 1.5, case.N).astype(case.dtype)
    begin = time.perf_counter()
    door = ("cupynorm._cuda.arrays",)
    with simulated_cupy(compute_capability=case.arch, sm_count=1, reload=door) as cupy:
        here, w = cupy.asarray(x), cupy.asarray(weight)
        if backward:
            dy, kind = digits(case, 0.5), np.float64 if case.dtype == "float64" else np.float32
            _, *stats = oracle.layer_norm(x, (1,), None, None, 1e-5)
            slope = cupy.asarray(dy)
            stats = [cupy.asarray(s.astype(kind)) for s in stats]
            results = cn.layer_norm_backward(slope, here, case.N, *stats, w)
            wanted = oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5)
            oracle.assert_gradients([r.get() for r in results], dy, x, (1,), weight)
            arrays = (slope, here, results[0])
        else:
            columns = [cupy.asarray(column) for column in x.T] if case.order == "columns" else []
            results = [
                cn.layer_norm_columns(columns, w) if columns else cn.layer_norm(here, case.N, w)
            ]
            wanted = oracle.layer_norm(x, (1,), weight, None, 1e-5)[:1]
            bound = oracle.tolerance(case.dtype, case.N)
            y = results[0].get().astype(np.float64)
            np.testing.assert_allclose(y, wanted[0], rtol=bound, atol=bound)
            arrays = (*(columns or [here]), results[0])
        errors = [
            np.abs(got.get() - want).max() / np.abs(want).max() / np.finfo(case.dtype).eps
            for got, want in zip(results, wanted, strict=True)
        ]
        traffic = [launch.traffic for launch in cupy.simulator.launches]
        moved = sum(t[a].read_bytes + t[a].written_bytes for t in traffic for a in arrays)
        kernel = max(cupy.simulator.launches, key=lambda launch: launch.traffic.read_bytes).name
    return (
        kernel, f"sm_{case.arch}", case.dtype, f"{case.rows} x {case.N}", f"{max(errors):.2f}",
        f"{moved / sum(a.nbytes for a in arrays):.2f}", f"{time.perf_counter() - begin:.1f}",
    )  # fmt: skip


def show(row: tuple[str, ...]) -> None:
    print("".join(cell.ljust(width) for cell, width in zip(row, WIDTHS, strict=True)), flush=True)


def main() -> None:
    show(("kernel", "arch", "dtype", "shape", "error / eps", "bytes / floor", "seconds"))
    for backward, cases in ((False, FORWARD), (True, BACKWARD)):
        for case in cases:
            show(run(case, backward))


if __name__ == "__main__":
    main()
