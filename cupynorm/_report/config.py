"""What is installed, which GPUs are seen, and which paths can run or why they cannot."""

import os
from dataclasses import dataclass
from importlib import import_module

from cupynorm._cpu import threads as _threads
from cupynorm._display import Sections, Table
from cupynorm._report import probe as _probe

__all__ = ["Config", "Gpu", "PathStatus", "show_config"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device.

    Attributes
    ----------
    name : str
        As the driver gives it.
    compute_capability : str
        '90' for sm_90.
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
    detail : str
        What it serves, or why it is not available.
    way_out : str
        What to do about it; empty where it is available.
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
    driver : str or None
        NVIDIA's driver and the newest CUDA that it runs.
    nvrtc : str or None
        Version of the run-time compiler that CuPy uses.
    cuda_headers : str or None
        Folder of CUDA's runtime headers, without which CuPy compiles nothing.
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

        Raises
        ------
        KeyError
            If there is none of that name.

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
        At a prompt it shows itself as aligned text, in a notebook as a table; in a script, print
        it.

    Notes
    -----
    CuPy and Numba are imported, because only that tells whether they work; the versions of torch
    and JAX are read from their metadata. A broken installation is reported, never raised.

    Examples
    --------
    >>> import cupynorm as cn
    >>> cn.show_config().path("cpu-numpy").available
    True
    """
    versions = _probe.versions()
    cuda = _probe.Cuda(versions["cupy"])
    return Config(
        versions=versions,
        driver=cuda.driver,
        nvrtc=cuda.nvrtc,
        cuda_headers=cuda.headers,
        gpus=tuple(Gpu(*gpu) for gpu in cuda.gpus),
        paths=(
            _cuda_status(cuda),
            _numba_status(versions["numba"]),
            PathStatus("cpu-numpy", True, f"NumPy arrays where numba is not, {_thread_count()}"),
            _reference_status(versions),
        ),
    )


def _cuda_status(cuda: _probe.Cuda) -> PathStatus:
    if not cuda.faults:
        return PathStatus("cuda", True, f"CuPy arrays, {len(cuda.gpus)} GPU(s)")
    ways_out = dict.fromkeys(fault.way_out for fault in cuda.faults)  # each once, in order
    why = "; ".join(fault.why for fault in cuda.faults)
    return PathStatus("cuda", False, why, "; ".join(ways_out))


def _numba_status(installed: str | None) -> PathStatus:
    if os.environ.get("CUPYNORM_NUMBA", "").strip() == "0":
        return PathStatus("cpu-numba", False, "CUPYNORM_NUMBA=0 is set", "unset CUPYNORM_NUMBA")
    try:
        import_module("numba")
    except Exception as error:
        fault = _probe.import_fault("numba", error, installed, "pip install 'cupynorm[cpu]'")
        return PathStatus("cpu-numba", False, *fault)
    return PathStatus("cpu-numba", True, f"NumPy arrays, {_thread_count()}")


def _thread_count() -> str:
    try:
        return f"{_threads.num_threads()} thread(s)"
    except ValueError as error:  # of an environment variable: the sentence says what to do
        return str(error)


def _reference_status(versions: dict[str, str | None]) -> PathStatus:
    try:
        import_module("array_api_compat")
    except Exception as error:
        way_out = "pip install 'array-api-compat>=1.11'"
        installed = versions["array-api-compat"]
        fault = _probe.import_fault("array_api_compat", error, installed, way_out)
        return PathStatus("reference", False, *fault)
    there = [name for name in ("torch", "jax", "array-api-strict") if versions[name]]
    others = f"; installed here: {', '.join(there)}" if there else ""
    return PathStatus("reference", True, f"arrays of every other array-API library{others}")
