"""What CPU times depend on: machine, threads, versions, commit; and the file that keeps them."""

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "THREADS", "machine", "physical_cores", "threads", "version", "write"]

ROOT = Path(__file__).resolve().parents[1]
THREADS = "CUPYNORM_NUM_THREADS"


def threads() -> int:
    """Threads that everybody is given."""
    return int(os.environ.get(THREADS, "2"))


def version(package: str) -> str:
    """Of an installed package, "" where it is not there; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine() -> dict[str, str]:
    """What the times depend on, for every row of a CSV."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    packages = ("numpy", "numba", "torch", "jax", "onnxruntime", "scikit-learn")
    return {
        "cpu": model or platform.processor(),
        "cpus": str(len(physical_cores())),
        "threads": str(threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def physical_cores() -> list[int]:
    """CPUs that this process may use, those first that share no core with one before them."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    first, rest, seen = [], [], set()
    for cpu in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = path.read_text() if path.exists() else str(cpu)
        (rest if core in seen else first).append(cpu)
        seen.add(core)
    return first + rest


def write(rows: list[dict[str, Any]], folder: Path, name: str) -> Path:
    """Save rows as a CSV that says in its name what it holds, when and of which commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{rows[0]['date']}-{rows[0]['commit']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path
