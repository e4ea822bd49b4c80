"""What is installed, which GPUs are seen, and which paths can run or why they cannot."""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._display import Sections, Table

# CuPy is one module but many distributions; two of them installed together break each other.
_CUPY_NAMES = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_OTHERS = ("torch", "jax", "numba", "ml_dtypes", "array-api-strict")
_CUPY_WAY_OUT = "pip install 'cupynorm[cuda12]' (with a driver for CUDA 13: 'cupynorm[cuda13]')"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

Fault = tuple[str, str]  # why a path cannot run, and the way out


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device.

    Attributes
    ----------
    name, compute_capability : str
        As the driver gives it; '90' for sm_90.
    memory_bytes : int
        Global memory in all.
    """

    name: str
    compute_capability: str
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.compute_capability}, {self.memory_bytes / 2**30:.1f} GiB"


@dataclass(frozen=True, slots=True)
class PathStatus:
    """Whether one path can run here.

    Attributes
    ----------
    name : str
        'cuda', 'cpu-numba', 'cpu-numpy' or 'reference'.
    available : bool
        Whether a call can take it for the arrays that it serves.
    detail, way_out : str
        What it serves, or why it is not available; what to do about it, empty where all is well.
    """

    name: str
    available: bool
    detail: str
    way_out: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Config(Table):
    """What `cupynorm.show_config` found; prints as aligned text, shows as a table in a notebook.

    Attributes
    ----------
    versions : dict of str to str or None
        Distribution name to version; None where it is not installed.
    driver, nvrtc, cuda_headers : str or None
        NVIDIA's driver and the newest CUDA that it runs; version of the run-time compiler that CuPy
        uses; folder of CUDA's runtime headers, without which CuPy compiles nothing.
    gpus : tuple of Gpu
        In the order of their device numbers.
    paths : tuple of PathStatus
        Each way in which a layer norm can run.
    """

    versions: dict[str, str | None]
    driver: str | None
    nvrtc: str | None
    cuda_headers: str | None
    gpus: tuple[Gpu, ...]
    paths: tuple[PathStatus, ...]

    def path(self, name: str) -> PathStatus:
        """Status of the path of that name.

        Parameters
        ----------
        name : {'cuda', 'cpu-numba', 'cpu-numpy', 'reference'}
            Which path.

        Returns
        -------
        PathStatus
            Whether it can run, and why not.

        Examples
        --------
        >>> import cupynorm as cn
        >>> cn.show_config().path("reference").way_out
        ''
        """
        return {p.name: p for p in self.paths}[name]

    def _sections(self) -> Sections:
        found = [
            ("driver", self.driver or "none"),
            ("NVRTC", self.nvrtc or "none"),
            ("headers", self.cuda_headers or "none"),
        ]
        found += [(f"GPU {i}", str(gpu)) for i, gpu in enumerate(self.gpus)] or [("GPU", "none")]
        paths = []
        for p in self.paths:
            paths.append((p.name, f"{'yes' if p.available else 'no'}: {p.detail}"))
            if p.way_out:
                paths.append(("", f"-> {p.way_out}"))
        listed = [(name, version or "not installed") for name, version in self.versions.items()]
        return [("versions", listed), ("CUDA", found), ("paths", paths)]


def show_config() -> Config:
    """Tell what is installed, which GPUs are seen, and which paths can run.

    Returns
    -------
    Config
        At a prompt it shows itself as aligned text, in a notebook as a table.

    Notes
    -----
    CuPy and Numba are imported, because only that tells whether they work. A broken installation is
    reported, never raised.

    Examples
    --------
    >>> import cupynorm as cn
    >>> cn.show_config().path("cpu-numpy").available
    True
    """
    from cupynorm import __version__

    cupys = {name: v for name in _CUPY_NAMES if (v := _installed(name))}
    versions = {
        "cupynorm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "array-api-compat": _installed("array-api-compat"),
        "cupy": ", ".join(f"{v} ({name})" for name, v in cupys.items()) or None,
        **{name: _installed(name) for name in _OTHERS},
    }
    cuda, found = _look_at_cuda(versions["cupy"])
    plain = PathStatus("cpu-numpy", True, f"NumPy arrays where numba is not, {_thread_count()}")
    paths = cuda, _numba_status(versions["numba"]), plain, _reference_status(versions)
    return Config(versions=versions, paths=paths, **found)


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


def import_fault(name: str, installed: str | None, way_out: str) -> Fault | None:
    """Tell a package that is absent from one that is there but broken; None if it does import."""
    try:
        import_module(name.replace("-", "_"))
    except Exception as error:
        if installed is None and isinstance(error, ModuleNotFoundError):
            return f"{name} is not installed", way_out
        found = f"{name} {installed}" if installed else name
        return f"{found} is installed but does not import ({short(error)})", way_out
    return None


def _numba_status(installed: str | None) -> PathStatus:
    if os.environ.get("CUPYNORM_NUMBA", "").strip() == "0":
        return PathStatus("cpu-numba", False, "CUPYNORM_NUMBA=0 is set", "unset CUPYNORM_NUMBA")
    fault = import_fault("numba", installed, "pip install 'cupynorm[cpu]'")
    if fault:
        return PathStatus("cpu-numba", False, *fault)
    told, way_out = f"NumPy arrays, {_thread_count()}", ""
    try:  # whether numba finds a folder to keep compiled code in; nothing is compiled to know that
        import_module("numba").njit(cache=True)(_thread_count)
    except (RuntimeError, OSError):
        told += "; no folder for compiled code can be written, so each process compiles anew"
        told += ", for seconds"
        way_out = "set NUMBA_CACHE_DIR to a folder that can be written"
    return PathStatus("cpu-numba", True, told, way_out)


def _thread_count() -> str:
    try:
        return f"{_threads.num_threads()} thread(s)"
    except ValueError as error:  # of an environment variable: the sentence says what to do
        return str(error)


def _reference_status(versions: dict[str, str | None]) -> PathStatus:
    name, way_out = "array_api_compat", "pip install 'array-api-compat>=1.11'"
    fault = import_fault(name, versions["array-api-compat"], way_out)
    if fault:
        return PathStatus("reference", False, *fault)
    there = [name for name in ("torch", "jax", "array-api-strict") if versions[name]]
    others = f"; installed here: {', '.join(there)}" if there else ""
    return PathStatus("reference", True, f"arrays of every other array-API library{others}")


def _look_at_cuda(installed: str | None) -> tuple[PathStatus, dict[str, Any]]:
    """What CuPy tells of driver, compiler, headers and GPUs; one failure hides no other."""
    driver, nvrtc, headers = _driver_version(), None, None
    gpus: tuple[Gpu, ...] = ()
    faults: list[Fault] = []

    @contextlib.contextmanager
    def looking(why: str, way_out: str = _CUPY_WAY_OUT) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            faults.append((f"{why} ({short(error)})", way_out))

    if installed is not None and "," in installed:
        why = f"two CuPy distributions overwrite each other: {installed}"
        faults.append((why, f"pip uninstall {' '.join(_CUPY_NAMES)}; then {_CUPY_WAY_OUT}"))
    if fault := import_fault("cupy", installed, _CUPY_WAY_OUT):
        faults.append(fault)
    else:
        cuda = import_module("cupy").cuda
        with looking("NVRTC cannot be loaded"):
            nvrtc = ".".join(map(str, cuda.nvrtc.getVersion()))
        with looking("CUDA's headers cannot be found"):
            headers = import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
            if headers is None:
                msg = "CuPy compiles nothing without them"
                raise FileNotFoundError(msg)
        needed = "an NVIDIA GPU with a driver for CUDA 12 or newer is needed"
        with looking("no GPU can be used", needed):
            version = cuda.runtime.driverGetVersion()  # 0 without a driver
            newest = f"runs CUDA up to {version // 1000}.{version % 1000 // 10}"
            driver = ", ".join(filter(None, (driver, newest if version else None))) or None
            count = cuda.runtime.getDeviceCount()
            gpus = tuple(map(_gpu, map(cuda.runtime.getDeviceProperties, range(count))))
            if not gpus:
                msg = "the driver lists none"
                raise RuntimeError(msg)
    status = PathStatus("cuda", True, f"CuPy arrays, {len(gpus)} GPU(s)")
    if faults:
        why, way_out = ("; ".join(dict.fromkeys(said)) for said in zip(*faults, strict=True))
        status = PathStatus("cuda", False, why, way_out)
    return status, {"driver": driver, "nvrtc": nvrtc, "cuda_headers": headers, "gpus": gpus}


def _gpu(found: dict[str, Any]) -> Gpu:
    capability = f"{found['major']}{found['minor']}"
    return Gpu(found["name"].decode(), capability, int(found["totalGlobalMem"]))


def _driver_version() -> str | None:
    """Version of NVIDIA's kernel driver, as Linux shows it without any library."""
    try:
        words = _DRIVER_FILE.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((w for w in words if "." in w and w.replace(".", "").isdigit()), None)
