"""Looks at the installation, one step at a time: what is there, and what stops a path."""

import platform
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Cuda", "Fault", "ProbedGpu", "import_fault", "short", "versions"]

# CuPy is one module but many distributions; two of them installed together break each other.
_CUPY_NAMES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_OTHERS = ("torch", "jax", "numba", "ml_dtypes", "array-api-strict")
_CUPY_WAY_OUT = "pip install 'cupynorm[cuda12]' (with a driver for CUDA 13: 'cupynorm[cuda13]')"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Fault(NamedTuple):
    """Why a path cannot run, and the way out."""

    why: str
    way_out: str


class ProbedGpu(NamedTuple):
    """One CUDA device as the driver describes it."""

    name: str
    compute_capability: str
    memory_bytes: int


def versions() -> dict[str, str | None]:
    """Version of everything that a path may use, read without importing any of it."""
    from cupynorm import __version__

    cupys = {name: v for name in _CUPY_NAMES if (v := _installed(name))}
    return {
        "cupynorm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "array-api-compat": _installed("array-api-compat"),
        "cupy": ", ".join(f"{v} ({name})" for name, v in cupys.items()) or None,
        **{name: _installed(name) for name in _OTHERS},
    }


def _installed(name: str) -> str | None:
    """Version of a distribution, None if it is absent; a damaged one counts as '(unknown)'."""
    try:
        return metadata.version(name) or "(unknown)"
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # metadata without a Version field raises KeyError, and others
        return "(unknown)"


def short(error: BaseException) -> str:
    """First line of an error: CuPy's import error alone is twenty lines long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =\t")]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def import_fault(module: str, error: BaseException, installed: str | None, way_out: str) -> Fault:
    """Tell a package that is absent from one that is there but broken."""
    if installed is None and isinstance(error, ModuleNotFoundError):
        return Fault(f"{module} is not installed", way_out)
    found = f"{module} {installed}" if installed else module
    return Fault(f"{found} is installed but does not import ({short(error)})", way_out)


class Cuda:
    """What CuPy tells of driver, compiler, headers and GPUs; one failure hides no other."""

    def __init__(self, installed: str | None) -> None:
        self.driver = _driver_version()
        self.nvrtc: str | None = None
        self.headers: str | None = None
        self.gpus: tuple[ProbedGpu, ...] = ()
        self.faults: list[Fault] = []
        if installed is not None and "," in installed:
            why = f"two CuPy distributions overwrite each other: {installed}"
            names = " ".join(_CUPY_NAMES)
            self.faults.append(Fault(why, f"pip uninstall {names}; then {_CUPY_WAY_OUT}"))
        try:
            self.cupy: Any = import_module("cupy")
        except Exception as error:
            self.faults.append(import_fault("cupy", error, installed, _CUPY_WAY_OUT))
            return
        self._try("NVRTC cannot be loaded", self._find_nvrtc, _CUPY_WAY_OUT)
        self._try("CUDA's headers cannot be found", self._find_headers, _CUPY_WAY_OUT)
        way_out = "an NVIDIA GPU with a driver for CUDA 12 or newer is needed"
        self._try("no GPU can be used", self._find_gpus, way_out)

    def _try(self, why: str, look: Any, way_out: str) -> None:
        try:
            look()
        except Exception as error:
            self.faults.append(Fault(f"{why} ({short(error)})", way_out))

    def _find_nvrtc(self) -> None:
        major, minor = self.cupy.cuda.nvrtc.getVersion()
        self.nvrtc = f"{major}.{minor}"

    def _find_headers(self) -> None:
        self.headers = import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
        if self.headers is None:
            msg = "CuPy compiles nothing without them"
            raise FileNotFoundError(msg)

    def _find_gpus(self) -> None:
        runtime = self.cupy.cuda.runtime
        version = runtime.driverGetVersion()  # 0 without a driver
        if version:
            newest = f"runs CUDA up to {version // 1000}.{version % 1000 // 10}"
            self.driver = f"{self.driver}, {newest}" if self.driver else newest
        found = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
        self.gpus = tuple(
            ProbedGpu(p["name"].decode(), f"{p['major']}{p['minor']}", int(p["totalGlobalMem"]))
            for p in found
        )
        if not self.gpus:
            msg = "the driver lists none"
            raise RuntimeError(msg)


def _driver_version() -> str | None:
    """Version of NVIDIA's kernel driver, as Linux shows it without any library."""
    try:
        words = _DRIVER_FILE.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((w for w in words if "." in w and w.replace(".", "").isdigit()), None)
