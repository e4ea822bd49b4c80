"""Forward on NumPy arrays against torch's CPU layer_norm: two threads each, interleaved.

    python bench/cpu.py [--seconds 2] [--dtypes float32] [--to bench/results]

Bytes of a case, the least that can move: M*N read + M*N written + what weight and bias hold.
Every contender is checked against float64 on the same input before any is timed. Times are
medians over rounds in which each contender has its turn, so that a slow spell hits all alike. A
turn is a pause, calls for 2 ms that are not timed, and timed ones: torch's second thread spins for
milliseconds after a call, on the core that the next contender's would need.
"""

import argparse
import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUPYNORM_NUM_THREADS", "2")

import ml_dtypes
import numba
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cupynorm as cn  # noqa: E402
from cupynorm import _cpu  # noqa: E402
from tests import oracle  # noqa: E402

SHAPES = [
    (8, 768),
    (512, 768),
    (4096, 768),
    (16384, 1024),
    (4096, 4096),
    (1024, 16384),
    (200000, 64),
    (2, 4000000),
]
CONTENDERS = ["torch", "numba", "numpy", "numba out=", "copyto"]
PAUSE = 0.01  # seconds
RATIOS = {"numba": "torch", "numpy": "torch", "numba out=": "copyto"}


def machine() -> dict[str, str]:
    """What the times depend on, for every row of the CSV."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": model or platform.processor(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "threads": os.environ["CUPYNORM_NUM_THREADS"],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def tensor(a: np.ndarray) -> torch.Tensor:
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def contenders(M: int, N: int, dtype: Any) -> tuple[dict[str, Callable[[], Any]], np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, N), np.float32).astype(dtype)
    w, b = (rng.standard_normal(N, np.float32).astype(dtype) for _ in range(2))
    out = np.empty_like(x)
    tx, tw, tb = tensor(x), tensor(w), tensor(b)

    def plain() -> Any:
        with _cpu.without_numba():
            return cn.layer_norm(x, N, w, b)

    calls = {
        "torch": lambda: torch.nn.functional.layer_norm(tx, (N,), tw, tb),
        "numba": lambda: cn.layer_norm(x, N, w, b),
        "numpy": plain,
        "numba out=": lambda: cn.layer_norm(x, N, w, b, out=out),
        "copyto": lambda: np.copyto(out, x),
    }
    check(calls, x, w, b)
    return calls, x


def check(calls: dict[str, Callable[[], Any]], x: np.ndarray, w: Any, b: Any) -> None:
    """Refuse to time what is wrong: first and last rows against float64."""
    M, N = x.shape
    rows = np.unique(np.r_[: min(M, 16), max(0, M - 16) : M])[: max(1, (1 << 24) // N)]
    exact = oracle.layer_norm(x[rows], (1,), w, b, 1e-5)[0]
    bound = 2 * oracle.tolerance(x.dtype, N)
    for name, call in calls.items():
        if name == "copyto":
            continue
        y = call()
        y = y.float().numpy() if isinstance(y, torch.Tensor) else y
        error = np.abs(y[rows].astype(np.float64) - exact) / (1 + np.abs(exact))
        if not error.max() < bound:
            sys.exit(f"{name} is wrong on {x.shape} {x.dtype}: {error.max():.3g} > {bound:.3g}")


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call by rounds; a round runs each in turn, small ones several times."""
    repeat = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        call()
        start = time.perf_counter()
        call()
        repeat[name] = max(1, min(500, int(2e-3 / (time.perf_counter() - start + 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 7:
        for name, call in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            while time.perf_counter() < start + 2e-3:
                call()
            start = time.perf_counter()
            for _ in range(repeat[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeat[name])
    return times


def geometric_mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, ratios)))


def write(rows: list[dict[str, Any]], folder: Path, name: str) -> Path:
    """Save rows as a CSV that says in its name what it holds, when and of which commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{rows[0]['date']}-{rows[0]['commit']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["CUPYNORM_NUM_THREADS"]))
    host = machine()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    print("bytes = (2*M*N + 2*N) * itemsize; times are medians in us")
    head = "".join(f"{name:>12}" for name in CONTENDERS)
    ratios = "".join(f"{a + '/' + b:>18}" for a, b in RATIOS.items())
    print(f"{'dtype':9}{'M':>7}{'N':>9}{head}{ratios}{'GB/s':>8}")
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for M, N in SHAPES:
            kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            calls, x = contenders(M, N, kind)
            times = measure(calls, args.seconds)
            t = {name: statistics.median(values) for name, values in times.items()}
            moved = (2 * M * N + 2 * N) * x.itemsize
            ratio = {f"{a}/{b}": t[a] / t[b] for a, b in RATIOS.items()}
            us = "".join(f"{t[name] * 1e6:12.1f}" for name in CONTENDERS)
            part = "".join(f"{r:18.2f}" for r in ratio.values())
            print(f"{dtype:9}{M:7}{N:9}{us}{part}{moved / t['numba'] / 1e9:8.1f}", flush=True)
            rows.append(
                {"dtype": dtype, "M": M, "N": N, "bytes": moved}
                | {f"{name} us": round(t[name] * 1e6, 2) for name in CONTENDERS}
                | {name: round(r, 3) for name, r in ratio.items()}
                | host
            )
        mine = [row for row in rows if row["dtype"] == dtype]
        for a, b in RATIOS.items():
            values = [row[f"{a}/{b}"] for row in mine]
            mean = geometric_mean(values)
            print(f"{dtype} {a}/{b}: geometric mean {mean:.2f}, worst {max(values):.2f}")
    if args.to:
        print(write(rows, args.to, "cpu"))


if __name__ == "__main__":
    main()
