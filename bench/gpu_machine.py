"""Describes the machine, the versions and the measured tree."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["describe", "tree_hash"]

ROOT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "CUPYNORM_COMMIT"  # for a copy of the tree without .git
LIBRARIES = (
    "numpy",
    "torch",
    "triton",
    "liger_kernel",
    "quack",
    "ml_dtypes",
    "array_api_compat",
    "pytest",
    "hypothesis",
    "matplotlib",
)


def describe(cupy: Any, simulated: bool = False) -> dict[str, str]:
    """Flat facts, all text; what cannot be found out is empty."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "simulated": str(simulated),
        "commit": commit(),
        "tree": tree_hash(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        **_device(cupy),
        **_driver(simulated),
    }
    facts |= versions() | {"cupy": str(cupy.__version__)}
    facts["compute-sanitizer"] = shutil.which("compute-sanitizer") or ""
    facts["nvcc"] = shutil.which("nvcc") or ""
    return facts


def versions() -> dict[str, str]:
    """Versions of the libraries, "" where one is not there; importing them would take seconds."""
    owners = importlib.metadata.packages_distributions()
    found = {}
    for name in LIBRARIES:
        there = importlib.util.find_spec(name) is not None
        found[name] = "installed, version unknown" if there else ""
        if there and name in owners:
            found[name] = importlib.metadata.version(owners[name][0])
    return found


def _device(cupy: Any) -> dict[str, str]:
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    device = cupy.cuda.Device()
    facts = {
        "gpu": properties["name"].decode(),
        "compute_capability": str(device.compute_capability),
        "sm_count": str(properties["multiProcessorCount"]),
        "l2_bytes": str(device.attributes["L2CacheSize"]),
        "memory_bytes": str(properties["totalGlobalMem"]),
        "cuda": dotted(runtime.runtimeGetVersion()),
        "driver_cuda": dotted(runtime.driverGetVersion()),
        "nvrtc": "",
    }
    nvrtc = getattr(cupy.cuda, "nvrtc", None)
    if nvrtc is not None:
        facts["nvrtc"] = ".".join(str(n) for n in nvrtc.getVersion())
    return facts


def dotted(number: int) -> str:
    """12090 as 12.9, as CUDA writes its versions."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver(simulated: bool) -> dict[str, str]:
    query = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "ecc.mode.current")
    if simulated or shutil.which("nvidia-smi") is None:
        return {"driver": ""}
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [v.strip() for v in done.stdout.splitlines()[:1] for v in v.split(",")]
    named = dict(zip(query, values, strict=False))
    return {"driver": named.pop("driver_version", ""), **named}


def commit() -> str:
    """The commit that is measured; with a mark if the tree differs from it."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    found = _git("rev-parse", "HEAD")
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
    for path in sorted([*ROOT.glob("cupynorm/*.py"), *ROOT.glob("kernels/*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
