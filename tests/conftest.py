"""The libraries that a test body runs on, and how an array of each is made and read back."""

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest

from cupynorm._cpu.engine import state, without_numba

pytest_plugins = ["tests.report"]

# Of OpenMP, before torch and scikit-learn load it. Its threads spin while they wait; where several
# test processes share the CPUs, small calls of torch then take twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

hypothesis.settings.register_profile(
    "cupynorm",
    deadline=None,  # a first example may compile
    print_blob=True,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("cupynorm")

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Backend(Enum):
    """Each way that `layer_norm` is reached; the value is the test id."""

    NUMPY = "numpy"
    NUMPY_PLAIN = "numpy-plain"  # as if numba were not installed
    CUPY_SIMULATED = "cupy-simulated"
    CUPY = "cupy"
    TORCH = "torch"
    TORCH_CUDA = "torch-cuda"
    JAX = "jax"
    STRICT = "strict"
    STRICT_DEVICE1 = "strict-device1"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Floating dtypes of the library as it is set up here (JAX without x64)."""
        if self in (Backend.STRICT, Backend.STRICT_DEVICE1):
            return ("float32", "float64")
        return ALL_DTYPES[:3] if self is Backend.JAX else ALL_DTYPES

    @property
    def on_gpu(self) -> bool:
        return self in (Backend.CUPY, Backend.TORCH_CUDA)

    @property
    def compiles(self) -> bool:
        """Whether each new combination of dtypes costs a second: test few."""
        return self is Backend.CUPY_SIMULATED

    # What a test may ask for with @pytest.mark.needs("strided").

    @property
    def strided(self) -> bool:
        """Whether a user can choose the layout of an array."""
        return self.value.startswith(("numpy", "cupy", "torch"))

    unstrided = property(lambda self: not self.strided)

    @property
    def tile_for_columns(self) -> bool:
        """Whether strided columns are summed in another order than neighbouring ones (K6)."""
        return self.value.startswith("cupy") or self is Backend.TORCH_CUDA

    writable = property(lambda self: self is not Backend.JAX)
    numpy = property(lambda self: self.value.startswith("numpy"))
    not_numpy = property(lambda self: not self.numpy)
    has_float16 = property(lambda self: "float16" in self.dtypes)
    # Whether a row's bits are ours to choose: XLA orders sums by the shape of the whole.
    same_bits = property(lambda self: self is not Backend.JAX)


@dataclass(frozen=True)
class Library:
    """An array library as the tests see it."""

    backend: Backend
    from_numpy: Callable[[np.ndarray], Any]  # same dtype, and same strides where `strided`
    to_numpy: Callable[[Any], np.ndarray]  # same dtype
    strides: Callable[[Any], tuple[int, ...]] | None = None  # in elements

    @property
    def name(self) -> str:
        return self.backend.value

    def array(self, values: Any, dtype: str = "float32") -> Any:
        """Array of this library that holds the values, rounded to dtype."""
        return self.from_numpy(np.asarray(values).astype(np_dtype(dtype)))

    def dtype(self, array: Any) -> str:
        return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]


def np_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name)) if name == "bfloat16" else np.dtype(name)


class Exporter:
    """Speaks DLPack and nothing else: the least that a producer of the standard offers."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None) -> None:
        self.__dlpack__ = array.__dlpack__
        self.__dlpack_device__ = (lambda: device) if device else array.__dlpack_device__


def _numpy(backend: Backend) -> Library:
    return Library(backend, lambda a: a, lambda a: a, _steps)


def _cupy(backend: Backend) -> Library:
    import cupy

    def from_numpy(a: np.ndarray) -> Any:
        return cupy.asarray(a, order="K" if a.flags.forc else "C")

    return Library(backend, from_numpy, cupy.asnumpy, _steps)


def _steps(a: Any) -> tuple[int, ...]:
    return tuple(s // a.itemsize for s in a.strides)


def _torch(backend: Backend) -> Library:
    import torch

    device = "cuda" if backend.on_gpu else "cpu"

    def from_numpy(a: np.ndarray) -> Any:
        if a.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(a).to(device)

    def to_numpy(t: Any) -> np.ndarray:
        t = t.detach().cpu()
        if t.dtype == torch.bfloat16:
            return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    return Library(backend, from_numpy, to_numpy, strides=lambda t: t.stride())


def _jax(backend: Backend) -> Library:
    import jax.numpy as jnp

    return Library(backend, from_numpy=jnp.asarray, to_numpy=np.asarray)


def _strict(backend: Backend) -> Library:
    import array_api_strict as strict

    host = strict.Device("CPU_DEVICE")
    device = host if backend is Backend.STRICT else strict.Device("device1")
    return Library(
        backend,
        from_numpy=lambda a: strict.asarray(a, device=device, copy=True),
        to_numpy=lambda a: np.asarray(a.to_device(host)),
    )


def library(backend: Backend) -> Library:
    """The library, where it is here; CuPy's stand-in inside its context alone."""
    makers = {"numpy": _numpy, "cupy": _cupy, "torch": _torch, "jax": _jax, "strict": _strict}
    return makers[backend.value.partition("-")[0]](backend)


@functools.cache
def why_not(backend: Backend) -> str | None:
    """The reason why a backend cannot run here; None where it can."""
    library = backend.value.partition("-")[0].replace("strict", "array_api_strict")
    if backend is Backend.CUPY_SIMULATED:
        return None if importlib.util.find_spec("tests.ptx.cupy_stand_in") else "not built yet"
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    return _why_no_cuda() if backend.on_gpu else None


@functools.cache
def _why_no_cuda() -> str | None:
    """Ask the driver itself: importing CuPy or torch to ask takes seconds."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no CUDA driver"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return None if status == 0 and count.value else f"no CUDA device (cuInit gives {status})"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(property, ...): run on such backends only")


def _param(backend: Backend, *dtype: str) -> Any:
    marks = [pytest.mark.gpu] if backend.on_gpu else []
    return pytest.param(backend, *dtype, marks=marks, id="-".join((backend.value, *dtype)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run on every backend that is here; with a `dtype` argument, on every dtype it has.

    `@pytest.mark.needs` and a module's BACKENDS narrow the choice. The backends that are not
    here, and why, are reported once, by `test_backend_is_here`.
    """
    if "cupy_lib" in metafunc.fixturenames:
        cupys = [b for b in (Backend.CUPY_SIMULATED, Backend.CUPY) if not why_not(b)]
        metafunc.parametrize("cupy_lib", [_param(b) for b in cupys], indirect=True)
    if "lib" not in metafunc.fixturenames:
        return
    both = "dtype" in metafunc.fixturenames
    cases = []
    needs = [need for mark in metafunc.definition.iter_markers("needs") for need in mark.args]
    for backend in getattr(metafunc.module, "BACKENDS", Backend):
        if why_not(backend) or not all(getattr(backend, need) for need in needs):
            continue
        cases += [_param(backend, d) for d in backend.dtypes] if both else [_param(backend)]
    metafunc.parametrize("lib,dtype" if both else "lib", cases, indirect=["lib"])


@contextlib.contextmanager
def _simulated() -> Iterator[None]:
    """CuPy's stand-in, and a `_cuda` that was imported with it and has no kernels of another."""
    from tests.ptx.cupy_stand_in import simulated_cupy

    with simulated_cupy(reload=("cupynorm._cuda.arrays",)):
        yield


@pytest.fixture
def sim(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The stand-in, with two devices; `sim.simulator` knows what was launched and allocated."""
    from tests.cuda.calls import capability_for
    from tests.ptx.cupy_stand_in import simulated_cupy

    of = {"compute_capability": capability_for(request), "reload": ("cupynorm._cuda.arrays",)}
    with simulated_cupy(devices=2, **of) as module:
        yield module


_CONTEXTS = {Backend.CUPY_SIMULATED: _simulated, Backend.NUMPY_PLAIN: without_numba}


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library of this case, as the tests see it."""
    with _CONTEXTS.get(request.param, contextlib.nullcontext)():
        yield library(request.param)


@pytest.fixture(params=["numba", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """With numba's loops and without numba."""
    assert state()[0] or request.param != "numba", state()[1]
    with contextlib.nullcontext() if request.param == "numba" else without_numba():
        yield request.param


cupy_lib = lib  # the same for tests that need CuPy, simulated or real
