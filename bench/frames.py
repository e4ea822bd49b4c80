"""Layer norm of pandas frames against `to_numpy` and scaling in NumPy: times and peak memory.

Everybody is checked against float64 on the first rows, then takes turns. The mixed frame's
`to_numpy()` by itself gives Python objects, because it has bools (the contender "objects"), so the
others ask for the result's dtype, as a careful user would. Memory is that of a process of its own:
the highest while the call runs, less what was resident before the frame was made; against the bytes
of the frame and of the result.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import cupynorm as cn
from bench import command_line, saved, some_of
from bench.cases import EPS
from bench.check import Given, demand
from bench.contender import host_times
from bench.machine import ROOT, describe, threads, version
from bench.table import dated, progress
from cupynorm import frames

N = 100
KINDS = ("float32", "float64", "int64", "int8", "bool")
FRAMES = ("mixed", "mixed to float32", "nullable", "arrow", "column-major", "row-major")
CONTENDERS = ("frame", "matrix", "numpy", "numpy in place", "objects")


def frame(name: str, M: int) -> pd.DataFrame:
    """100 columns; a tenth of the values of every fifth column is missing where it can be."""
    rng, nullable = np.random.default_rng(0), name in ("nullable", "arrow")
    if name.endswith("-major"):
        x = np.empty((M, N), np.float32, order="F" if name == "column-major" else "C")
        x[...] = rng.standard_normal((M, N), np.float32)
        return pd.DataFrame(x, copy=False)
    data: dict[str, Any] = {}
    for j in range(N):
        kind = KINDS[j % 5]
        values, missing = (rng.standard_normal(M) * 50).astype(kind), rng.random(M) < 0.1
        if nullable:
            values = pd.array(values, dtype="boolean" if kind == "bool" else kind.capitalize())
        if j % 25 < 5 and (nullable or kind[0] == "f"):
            values[missing] = pd.NA if nullable else np.nan
        data[f"c{j}"] = values
    df = pd.DataFrame(data)
    return df.convert_dtypes(dtype_backend="pyarrow") if name == "arrow" else df


def contenders(name: str, df: pd.DataFrame) -> tuple[dict[str, Callable[[], Any]], Any]:
    dtype = np.dtype("float64" if name in ("mixed", "nullable", "arrow") else "float32")
    missing = {"na_value": np.nan} if name in ("nullable", "arrow") else {}
    matrix = lambda: df.to_numpy(dtype=dtype, **missing)  # noqa: E731

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
        "matrix": lambda: cn.layer_norm_columns(df, dtype=dtype),
        "numpy": lambda: scaled(matrix()),
        "numpy in place": in_place,
    }
    if name == "mixed":
        calls["objects"] = lambda: scaled(df.to_numpy().astype(dtype))
    return calls, dtype


def check(calls: dict[str, Callable[[], Any]], df: pd.DataFrame, dtype: Any) -> None:
    """Refuse to time what is wrong: rows against float64; a missing value spoils its row."""
    x = df.iloc[:64].to_numpy(dtype=np.float64, na_value=np.nan).astype(dtype)
    spoilt = np.isnan(x).any(axis=1)
    for name, call in calls.items():
        y = np.asarray(call()[:64], dtype)
        error = Given(np, x[~spoilt]).error_of_y(y[~spoilt])
        same = (np.isnan(y).all(axis=1) == spoilt).all()
        demand(name, error if same else np.nan, dtype.name, N, ours=False)


def resident(field: str) -> int:
    """Bytes, once Python and the allocators have given back what they can."""
    if field == "VmRSS":
        gc.collect()
        pa.default_memory_pool().release_unused()
        with contextlib.suppress(AttributeError, OSError):  # no glibc
            ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def peak(name: str, contender: str, M: int) -> float:
    """Peak resident memory of one call over the bytes of frame and result."""
    contenders(name, frame(name, 64))[0][contender]()  # compiled code and imports are no part of it
    before = resident("VmRSS")
    df = frame(name, M)
    calls, dtype = contenders(name, df)
    needed = int(df.memory_usage(index=False).sum()) + M * N * dtype.itemsize
    resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
    result = calls[contender]()
    highest = resident("VmHWM") - before
    del result
    return highest / needed


def row_of(name: str, M: int, seconds: float) -> dict[str, Any]:
    df = frame(name, M)
    calls, dtype = contenders(name, df)
    check(calls, df, dtype)
    times = host_times(calls, seconds)
    row = {"frame": name, "M": M, "N": N, "dtype": dtype.name}
    row |= {f"{c} ms": round(times[c].median / 1e3, 2) if c in times else "" for c in CONTENDERS}
    over = {c: times[c].median / times["frame"].median for c in CONTENDERS[2:4]}
    row |= {f"{c}/frame": round(ratio, 2) for c, ratio in over.items()}
    row |= {"load": round(os.getloadavg()[0], 1)}  # more than `cpus`: others had a share
    for contender in ("frame", "numpy"):
        args = [sys.executable, "-m", "bench.frames", "--rows", str(M), "--peak", name, contender]
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True)
        row[f"{contender} peak"] = round(float(done.stdout), 3)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = command_line("frames", __doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per frame")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--frames", default=",".join(FRAMES), type=some_of(FRAMES))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    saved(parser)
    given = parser.parse_args(argv)
    threads()
    if given.peak:
        print(peak(*given.peak, given.rows))
        return 0
    host, rows = describe() | {lib: version(lib) for lib in ("pandas", "pyarrow")}, []
    for name in progress(given.frames, "bench.frames"):
        row = row_of(name, given.rows, given.seconds)
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)
        rows.append(row | host)
    if given.to:
        print(dated(rows, given.to, "frames"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
