"""What times depend on: machine, threads, versions, and the measured tree."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREADS = "CUPYNORM_NUM_THREADS"
COMMIT = "CUPYNORM_COMMIT"  # of a copy of the tree without .git
LIBRARIES = ("numpy", "numba", "torch", "triton", "jax", "onnxruntime", "scikit-learn")
GPU_FACTS = ("gpu", "driver", "cuda", "nvrtc", "cupy")


def threads() -> int:
    """Threads that everybody is given on a CPU: two, if nothing else is asked for."""
    return int(os.environ.setdefault(THREADS, "2"))


def describe(cupy: Any = None, simulated: bool = False) -> dict[str, str]:
    """Flat facts for every row of a table; what cannot be found out is empty."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), "")
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": model or platform.processor(),
        "cpus": str(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()),
        "threads": str(threads()),
        **(_gpu(cupy, simulated) if cupy else dict.fromkeys(GPU_FACTS, "")),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "commit": commit(),
        "tree": tree_hash(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def version(package: str) -> str:
    """Of an installed package, "" where it is not there; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu(cupy: Any, simulated: bool) -> dict[str, str]:
    runtime, nvrtc = cupy.cuda.runtime, getattr(cupy.cuda, "nvrtc", None)
    cuda, driver = runtime.runtimeGetVersion(), ""
    if not simulated and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        driver = done.stdout.splitlines()[0].strip() if done.stdout else ""
    return {
        "gpu": runtime.getDeviceProperties(runtime.getDevice())["name"].decode(),
        "driver": driver,
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "nvrtc": ".".join(map(str, nvrtc.getVersion())) if nvrtc else "",
        "cupy": str(cupy.__version__),
    }


def commit() -> str:
    """The commit that is measured; with a mark if the tree differs from it."""
    if given := os.environ.get(COMMIT):
        return given
    found = _git("rev-parse", "--short", "HEAD")
    return found + ("-dirty" if found and _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def tree_hash() -> str:
    """Twelve digits over the package's Python and CUDA text: what was measured, git or not."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("cupynorm/**/*.py"), *ROOT.glob("kernels/*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
