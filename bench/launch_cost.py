"""What a small call costs from the call to the launch, piece by piece, in ns and in byte codes.

    python bench/launch_cost.py [--seconds 5] [--to bench/results]

float32 8x64 with weight and bias. "launch" is the compiled loops for NumPy arrays and torch
tensors on the CPU; for CuPy arrays there is no GPU here, and a launch only counts
(bench/launch_device.py), so that the Python of a call is timed. Contenders take turns; numbers are
medians. Results are checked against float64 before anything is timed.
"""

import argparse
import os
import statistics
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("CUPYNORM_NUM_THREADS", "2")

import numpy as np
import torch

import cupynorm as cn
from bench import cpu_machine
from bench.launch_device import counting_cupy
from bench.opcodes import opcodes
from cupynorm._arguments import check_arguments
from cupynorm._cpu import at_once as _cpu_at_once
from tests import oracle

M, N, EPS = 8, 64, 1e-5
COUNT = 300  # calls of one sample

Calls = dict[str, dict[str, Callable[[], Any]]]


def arrays() -> list[np.ndarray]:  # x (M, N), weight (N,), bias (N,), y (M, N)
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s, np.float32) for s in ((M, N), N, N, (M, N))]


def ways(x: Any, w: Any, b: Any, y: Any) -> dict[str, Callable[[], Any]]:
    """The calls of one library, and its argument rules alone."""
    f = cn.prepare(x, N, w, b, EPS)
    return {
        "layer_norm(x)": lambda: cn.layer_norm(x, N, w, b, EPS),
        "layer_norm(x, out=y)": lambda: cn.layer_norm(x, N, w, b, EPS, out=y),
        "prepared f(x)": lambda: f(x),
        "prepared f(x, out=y)": lambda: f(x, out=y),
        "argument rules alone": lambda: check_arguments(x, N, w, b, EPS, None, "K", None),
    }


def numpy_calls() -> dict[str, Callable[[], Any]]:
    x, w, b, y = arrays()
    ready = _cpu_at_once.ready_for(x.shape, x.dtype, (1,), EPS)
    if ready is None:
        sys.exit("without numba there is no small call to measure; pip install 'cupynorm[cpu]'")
    loops, fixed, dtype = ready.call, ready.fixed, x.dtype
    tx, tw, tb = map(torch.from_numpy, (x, w, b))
    return ways(x, w, b, y) | {
        "allocation": lambda: np.empty((M, N), dtype),
        "launch": lambda: loops(x, y, w, b, *fixed),
        "torch": lambda: torch.nn.functional.layer_norm(tx, (N,), tw, tb, EPS),
    }


def torch_calls() -> dict[str, Callable[[], Any]]:
    x, w, b, y = map(torch.from_numpy, arrays())
    from cupynorm._cpu import raw as _cpu_raw

    call, fixed, _ = _cpu_raw.forward_alone("float32", EPS)
    at = [t.data_ptr() for t in (x, y)], [t.data_ptr() for t in (w, b)]
    return ways(x, w, b, y) | {
        "allocation": lambda: torch.empty_like(x),
        "launch": lambda: call(*at[0], M, N, *at[1], EPS, fixed[0], fixed[1], 0, 0, fixed[2]),
    }


def cupy_calls(cupy: Any) -> dict[str, Callable[[], Any]]:
    hosts = arrays()
    x, w, b, y = map(cupy.from_numpy, hosts)
    calls = ways(x, w, b, y)
    return calls


def check(calls: dict[str, Callable[[], Any]]) -> None:
    """Refuse to time what is wrong."""
    x, w, b, _ = arrays()
    exact = oracle.layer_norm(x, (1,), w, b, EPS)[0]
    bound = 2 * oracle.tolerance(x.dtype, N)
    for name, call in calls.items():
        if "(" in name or name == "torch":
            error = float((np.abs(np.asarray(call()) - exact) / (1 + np.abs(exact))).max())
            if not error < bound:
                sys.exit(f"{name} is wrong on {x.shape}: {error:.3g} > {bound:.3g}")


def measure(calls: Calls, seconds: float) -> dict[tuple[str, str], float]:
    """Median ns of each call; they take turns."""
    flat = {(lib, name): call for lib, mine in calls.items() for name, call in mine.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in flat}
    for call in flat.values():
        timeit.timeit(call, number=COUNT)
    end = timeit.default_timer() + seconds
    while timeit.default_timer() < end or len(samples["NumPy", "torch"]) < 5:
        for key, call in flat.items():
            samples[key].append(1e9 * timeit.timeit(call, number=COUNT) / COUNT)
    return {key: statistics.median(values) for key, values in samples.items()}


def table(calls: Calls, times: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Rows of the CSV: what of a call is rules and look-up, allocation, launch."""
    rows = []
    for library, mine in calls.items():
        launch = times.get((library, "launch"), 0.0)
        new = times.get((library, "allocation"), 0.0)
        for name, call in mine.items():
            ns = times[library, name]
            row: dict[str, Any] = {"library": library, "call": name, "M": M, "N": N, "ns": ns}
            whole = name.endswith(")")
            row["allocation ns"] = new if whole and "out" not in name else 0.0
            row["launch ns"] = launch if whole else 0.0
            row["python ns"] = ns - row["allocation ns"] - row["launch ns"] if whole else ""
            row["over torch"] = ns / times["NumPy", "torch"]
            row["opcodes"] = opcodes(call) if "(" in name else ""
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    args = parser.parse_args()
    host = cpu_machine.machine()
    torch.set_num_threads(int(host["threads"]))
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    calls: Calls = {"NumPy": numpy_calls(), "torch": torch_calls()}
    for mine in calls.values():
        check(mine)
    with counting_cupy() as cupy:
        calls["CuPy"] = cupy_calls(cupy)
        rows = table(calls, measure(calls, args.seconds))
    print(
        f"{'':6}{'call':24}{'ns':>8}{'python':>8}{'alloc':>8}{'launch':>8}{'/torch':>8}{'opcodes':>9}"
    )
    for r in rows:
        cells = [r[k] for k in ("ns", "python ns", "allocation ns", "launch ns")]
        shown = "".join(f"{c:8.0f}" if c != "" else f"{'':8}" for c in cells)
        print(f"{r['library']:6}{r['call']:24}{shown}{r['over torch']:8.2f}{r['opcodes']:>9}")
    python = {(r["library"], r["call"]): r["python ns"] for r in rows}
    call = "layer_norm(x, out=y)"
    ratio = python["CuPy", call] / python["NumPy", call]
    print(f"the Python part of a CuPy call is {ratio:.2f} of a NumPy call's ({call})")
    if args.to:
        print(cpu_machine.write([r | host for r in rows], args.to, "launch-cost"))


if __name__ == "__main__":
    main()
