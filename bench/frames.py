"""Layer norm of pandas frames against `to_numpy` and scaling in NumPy: times and peak memory.

    python bench/frames.py [--seconds 4] [--rows 200000] [--to bench/results]

Every contender is checked against float64 on its first rows before any is timed. Times are medians
over rounds in which each contender has its turn, so that a slow spell hits all alike. The frames
hold 100 columns: the mixed one's `to_numpy()` by itself gives Python objects, because it has bools
(the contender "objects"), so the others ask for the result's dtype, as a careful user would.

Memory is that of a process of its own: the highest resident memory while the call runs, less what
was resident before the frame was made; against the bytes of the frame and of the result.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUPYNORM_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.cpu_machine import machine, write  # noqa: E402
from bench.progress import progress, say  # noqa: E402
from cupynorm import frames  # noqa: E402
from cupynorm.frames import columns  # noqa: E402
from tests import oracle  # noqa: E402

N, EPS = 100, 1e-5
KINDS = ("float32", "float64", "int64", "int8", "bool")
NULLABLE = ("Float32", "Float64", "Int64", "Int8", "boolean")
FRAMES = ("mixed", "mixed to float32", "nullable", "arrow", "column-major", "row-major")
CONTENDERS = ("frame", "matrix", "numpy", "numpy in place", "objects")


def frame(name: str, M: int) -> pd.DataFrame:
    """100 columns; a tenth of the values of every fifth column is missing where it can be."""
    rng = np.random.default_rng(0)
    if name in ("column-major", "row-major"):
        order = "F" if name == "column-major" else "C"
        x = np.empty((M, N), np.float32, order=order)
        x[...] = rng.standard_normal((M, N), np.float32)
        return pd.DataFrame(x, copy=False)
    data: dict[str, Any] = {}
    for j in range(N):
        values = (rng.standard_normal(M) * 50).astype(KINDS[j % 5])
        missing = rng.random(M) < 0.1
        if name in ("nullable", "arrow"):
            array = pd.array(values, dtype=NULLABLE[j % 5])
            if j % 25 < 5:
                array[missing] = pd.NA
            data[f"c{j}"] = array
        else:
            if values.dtype.kind == "f" and j % 25 < 5:
                values[missing] = np.nan
            data[f"c{j}"] = values
    df = pd.DataFrame(data)
    return df.convert_dtypes(dtype_backend="pyarrow") if name == "arrow" else df


def contenders(name: str, df: pd.DataFrame) -> tuple[dict[str, Callable[[], Any]], type]:
    dtype = np.float64 if name in ("mixed", "nullable", "arrow") else np.float32

    def matrix() -> np.ndarray:
        missing = {"na_value": np.nan} if name in ("nullable", "arrow") else {}
        return df.to_numpy(dtype=dtype, **missing)

    def scaled(x: np.ndarray) -> np.ndarray:
        mean, var = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        return (x - mean) / np.sqrt(var + EPS)

    def in_place() -> np.ndarray:
        x = matrix()
        if np.shares_memory(x, df.iloc[:, 0].array):  # a frame of one block: its own memory
            x = x.copy(order="K")
        x -= x.mean(axis=1, keepdims=True)
        x *= 1 / np.sqrt(np.einsum("ij,ij->i", x, x) / N + EPS)[:, None].astype(dtype)
        return x

    calls = {
        "frame": lambda: frames.layer_norm(df, dtype=dtype),
        "matrix": lambda: columns.layer_norm_columns(df, dtype=dtype),
        "numpy": lambda: scaled(matrix()),
        "numpy in place": in_place,
    }
    if name == "mixed":
        calls["objects"] = lambda: scaled(df.to_numpy().astype(dtype))
    return calls, dtype


def check(calls: dict[str, Callable[[], Any]], df: pd.DataFrame, dtype: type) -> None:
    """Refuse to time what is wrong: the first rows against float64."""
    rows = df.iloc[:64].to_numpy(dtype=np.float64, na_value=np.nan)
    exact = oracle.layer_norm(rows.astype(dtype), (1,), None, None, EPS)[0]
    bound = 4 * oracle.tolerance(dtype, N)
    for name, call in calls.items():
        y = np.asarray(call()[:64], np.float64)
        np.testing.assert_allclose(y, exact, rtol=bound, atol=bound, err_msg=name)


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, over rounds in which each has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["frame"]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def give_back() -> None:
    """Free what making the frame has left, in Python and in the allocators."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak(name: str, contender: str, M: int) -> tuple[float, float]:
    """Peak memory of one call over the bytes of frame and result: resident, and as traced."""
    calls, _ = contenders(name, frame(name, 64))
    calls[contender]()  # compiled code and imports are no part of it
    del calls
    give_back()
    before = _resident("VmRSS")
    tracemalloc.start()
    df = frame(name, M)
    calls, dtype = contenders(name, df)
    needed = int(df.memory_usage(index=False).sum()) + M * N * np.dtype(dtype).itemsize
    give_back()
    tracemalloc.reset_peak()
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
    result = calls[contender]()
    resident = _resident("VmHWM") - before
    traced = tracemalloc.get_traced_memory()[1]
    del result
    return resident / needed, traced / needed


def peak_of_a_process(name: str, contender: str, M: int) -> tuple[float, float]:
    args = [sys.executable, __file__, "--rows", str(M), "--peak", name, contender]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    resident, traced = done.stdout.split()
    return float(resident), float(traced)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per frame")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(*peak(*args.peak, args.rows))
        return
    host = machine() | {lib: importlib.metadata.version(lib) for lib in ("pandas", "pyarrow")}
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    print("times are medians in ms; ratios: both numpy ways over frame; peaks over frame + result")
    heads = (*CONTENDERS, "ratio", "ratio in place", "peak frame", "peak numpy")
    print(f"{'frame':18}" + "".join(f"{head:>15}" for head in heads))
    rows = []
    for name in progress(FRAMES, "bench.frames"):
        df = frame(name, args.rows)
        calls, dtype = contenders(name, df)
        check(calls, df, dtype)
        times = measure(calls, args.seconds)
        del calls, df
        row = {"frame": name, "M": args.rows, "N": N, "dtype": np.dtype(dtype).name}
        row |= {f"{c} ms": round(times.get(c, np.nan) * 1e3, 2) for c in CONTENDERS}
        for c in ("numpy", "numpy in place"):
            row |= {f"{c}/frame": round(times[c] / times["frame"], 2)}
        row |= {"load": round(os.getloadavg()[0], 1)}  # more than `cpus`: others had a share
        for contender in ("frame", "numpy"):
            resident, traced = peak_of_a_process(name, contender, args.rows)
            row |= {f"{contender} peak": round(resident, 3)}
            row |= {f"{contender} peak traced": round(traced, 3)}
        shown = [row[f"{c} ms"] for c in CONTENDERS] + [
            row["numpy/frame"],
            row["numpy in place/frame"],
        ]
        shown += [row["frame peak"], row["numpy peak"]]
        say(f"{name:18}" + "".join(f"{value:15.2f}" for value in shown))
        rows.append(row | host)
    if args.to:
        print(write(rows, args.to, "frames"))


if __name__ == "__main__":
    main()
