"""What times depend on: machine, threads, versions, and the measured tree."""

import hashlib
import importlib.metadata
import os
import platform
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
    cuda = runtime.runtimeGetVersion()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": runtime.getDeviceProperties(runtime.getDevice())["name"].decode(),
        "driver": "" if simulated else _said(*command).partition("\n")[0],
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "nvrtc": ".".join(map(str, nvrtc.getVersion())) if nvrtc else "",
        "cupy": str(cupy.__version__),
    }


def commit() -> str:
    if given := os.environ.get(COMMIT):
        return given
    git = "git", "-C", str(ROOT)
    found = _said(*git, "rev-parse", "--short", "HEAD")
    return found + ("-dirty" if found and _said(*git, "status", "--porcelain", "-uno") else "")


def _said(*command: str) -> str:
    """What a program prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def tree_hash() -> str:
    """Twelve digits over the package's Python and CUDA text: what was measured, git or not."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("cupynorm/**/*.py"), *ROOT.glob("kernels/*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
