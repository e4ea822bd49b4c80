"""The array libraries that the self-check can try, and how numbers get into and out of each."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from cupynorm._problem import numpy_dtype
from cupynorm._report import probe as _probe
from cupynorm._report.config import Config

__all__ = ["Backend", "Unavailable", "epsilon", "find", "torch_call", "torch_on_one_thread"]

Array = np.ndarray[Any, Any]

_STANDARD = ("float32", "float64")
_EXPLICIT_MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A path that cannot be checked here, and why."""

    path: str
    library: str
    why: str


@dataclass(frozen=True)
class Backend:
    """One path with the arrays of one library, given as NumPy arrays and read back as such."""

    path: str
    library: str
    dtypes: tuple[str, ...]
    device: str = "cpu"

    def put(self, a: Array) -> Any:
        """Array of this library with a's values."""
        return a

    def get(self, a: Any) -> Array:
        """NumPy array with the values of this library's a."""
        return np.asarray(a)

    def wait(self, y: Any) -> None:
        """Return when y is computed."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Within this context calls take this path."""
        return contextlib.nullcontext()


class _PlainNumpy(Backend):
    """NumPy arrays as if numba were not installed."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from cupynorm._cpu import arrays as _cpu

        with _cpu.without_numba():
            yield


class _Cupy(Backend):
    def put(self, a: Array) -> Any:
        cupy = import_module("cupy")
        return cupy.asarray(_as_bits(a)).view(a.dtype)  # as bits: bfloat16 is foreign to NumPy

    def get(self, a: Any) -> Array:
        cupy = import_module("cupy")
        bits: Array = cupy.asnumpy(a.view(f"u{a.itemsize}"))
        return bits.view(a.dtype)

    def wait(self, y: Any) -> None:
        import_module("cupy").cuda.get_current_stream().synchronize()


class _Torch(Backend):
    def put(self, a: Array) -> Any:
        return _tensor(a)

    def get(self, a: Any) -> Array:
        torch = import_module("torch")
        if a.dtype == torch.bfloat16:
            return np.asarray(a.view(torch.int16).numpy()).view(numpy_dtype("bfloat16"))
        return np.asarray(a.numpy())


class _Jax(Backend):
    def put(self, a: Array) -> Any:
        return import_module("jax.numpy").asarray(a)

    def wait(self, y: Any) -> None:
        y.block_until_ready()


class _Strict(Backend):
    def put(self, a: Array) -> Any:
        return import_module("array_api_strict").asarray(a)


def find(config: Config) -> tuple[list[Backend], list[Unavailable]]:
    """List every path that can be checked here, and every other with the reason."""
    narrow = ("float16", "bfloat16") if _bfloat16_is_there() else ("float16",)
    every = (*narrow, *_STANDARD)
    there: list[Backend] = []
    absent: list[Unavailable] = []
    for path, library, kind, device in (
        ("cuda", "cupy", _Cupy, "cuda"),
        ("cpu-numba", "numpy", Backend, "cpu"),
        ("cpu-numpy", "numpy", _PlainNumpy, "cpu"),
    ):
        status = config.path(path)
        if status.available:
            there.append(kind(path, library, every, device))
        else:
            absent.append(Unavailable(path, library, f"{status.detail} -> {status.way_out}"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the GPU to the others
    for path, library, module, kind in (
        ("torch", "torch", "torch", _Torch),
        ("reference", "jax", "jax", _Jax),
        ("reference", "array-api-strict", "array_api_strict", _Strict),
    ):
        try:
            imported = import_module(module)
        except Exception as error:
            fault = _probe.import_fault(
                library, error, config.versions[library], f"pip install {library}"
            )
            absent.append(Unavailable(path, library, " -> ".join(fault)))
            continue
        dtypes = {"array-api-strict": _STANDARD, "torch": every}.get(library)
        if dtypes is None:
            dtypes = every if imported.config.jax_enable_x64 else (*narrow, "float32")
        there.append(kind(path, library, dtypes))
    return there, absent


def _bfloat16_is_there() -> bool:
    try:
        import_module("ml_dtypes")
    except Exception:
        return False
    return True


def epsilon(name: str) -> float:
    """Distance from 1 to the next number; NumPy's finfo does not know bfloat16."""
    return 2.0 ** -_EXPLICIT_MANTISSA[name]


def _as_bits(a: Array) -> Array:
    return a.view(f"u{a.itemsize}")


def _tensor(a: Array) -> Any:
    torch = import_module("torch")
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def torch_call(device: str, host: list[Array], eps: float) -> Callable[[], Any] | None:
    """Give torch's own layer_norm on the same numbers, to compare times; None without torch."""
    try:
        torch = import_module("torch")
        if device == "cuda" and not torch.cuda.is_available():
            return None
        x, weight, bias = (_tensor(a).to(device) for a in host)
    except Exception:
        return None

    def call() -> Any:
        y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return call


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Within this context torch computes on one thread; torch must be there."""
    torch = import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
