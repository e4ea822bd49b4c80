"""A module that stands in for CuPy where there is no GPU: kernels run on the CPU, under checks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .limits import DeviceLimits
from .simulated_array import Array, MemoryPointer
from .simulator import (
    CUDARuntimeError,
    RawKernel,
    SimulatedDevice,
    SimulatedStream,
    Simulator,
    current_stream,
)

_DTYPES = (
    "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64 bool_"
)


def make_cupy(
    compute_capability: str = "90",
    sm_count: int = 132,
    *,
    devices: int = 1,
    seed: int | None = 0,
    count: bool = True,
) -> Any:
    """A fresh stand-in; `module.simulator` holds its launches, compilations and memory."""
    sim = Simulator(DeviceLimits.of(compute_capability), sm_count, devices, seed, count)
    bound = {"_sim": sim, "__module__": "cupy"}
    cupy: Any = ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.__path__ = []  # a package: `import cupy.cuda` looks here
    cupy.simulator = sim
    cupy.ndarray = type("ndarray", (Array,), bound)
    cupy.RawKernel = type("RawKernel", (RawKernel,), bound)
    cupy.cuda = _make_cuda(sim, bound)
    cupy.dtype = np.dtype
    for name in _DTYPES.split():
        setattr(cupy, name, getattr(np, name))
    for function in (_creation(cupy), _conversion(cupy)):
        vars(cupy).update(function)
    return cupy


def _make_cuda(sim: Simulator, bound: dict[str, Any]) -> Any:
    cuda: Any = ModuleType("cupy.cuda")
    cuda.__path__ = []
    cuda.Device = sim.device_type = type("Device", (SimulatedDevice,), bound)
    cuda.Stream = type("Stream", (SimulatedStream,), bound)
    cuda.Stream.null = sim.null_stream = cuda.Stream(null=True)

    def external(self: Any, ptr: int, device_id: int = -1) -> None:
        vars(self).update(ptr=ptr, device_id=device_id)

    cuda.ExternalStream = type("ExternalStream", (cuda.Stream,), {"__init__": external})
    cuda.MemoryPointer = MemoryPointer
    cuda.get_current_stream = lambda device_id=None: current_stream(sim)
    cuda.runtime = runtime = ModuleType("cupy.cuda.runtime")
    capability = sim.limits.compute_capability
    properties = {
        "name": b"Simulated GPU sm_" + capability.encode(),
        "major": int(capability[:-1]),
        "minor": int(capability[-1]),
        "totalGlobalMem": 80 * 1024**3,
    }
    vars(runtime).update(
        CUDARuntimeError=CUDARuntimeError,
        getDevice=lambda: sim.current_device,
        getDeviceCount=lambda: sim.device_count,
        getDeviceProperties=lambda device: dict(properties),
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 12090,
        deviceSynchronize=lambda: cuda.Device().synchronize(),
    )
    return cuda


def _creation(cupy: Any) -> dict[str, Any]:
    def empty(shape: Any, dtype: Any = float, order: str = "C") -> Array:
        return cupy.ndarray(shape, dtype, order=order)

    def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> Array:
        made = cupy.ndarray(
            shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order
        )
        made.fill(fill_value)
        return made

    def empty_like(
        prototype: Array, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
    ) -> Array:
        host = np.empty_like(prototype._host(), dtype=dtype, order=order, shape=shape)
        return cupy.ndarray(host.shape, host.dtype, strides=host.strides)

    return {
        "empty": empty,
        "empty_like": empty_like,
        "full": full,
        "zeros": lambda shape, dtype=float, order="C": full(shape, 0, dtype, order),
        "ones": lambda shape, dtype=float, order="C": full(shape, 1, dtype, order),
    }


def _conversion(cupy: Any) -> dict[str, Any]:
    def place(host: Any, *, offset: int = 0, name: str = "", order: str = "K") -> Array:
        """For tests: an array whose address is `offset` modulo 256, with a name for reports."""
        host = np.array(host, order=order)
        memory = cupy.simulator.alloc(host.nbytes, host.dtype, host.shape, offset=offset, name=name)
        made = cupy.ndarray(host.shape, host.dtype, memory, host.strides)
        made.set(host)
        return made

    def asarray(
        a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False
    ) -> Array:
        if not isinstance(a, Array):
            interface = getattr(a, "__cuda_array_interface__", None)
            a = from_interface(interface, a) if interface else place(a, order=order or "K")
        made = a.astype(a.dtype if dtype is None else dtype, order=order or "K", copy=False)
        return made.copy() if copy and made is a else made

    def from_interface(interface: dict[str, Any], owner: Any) -> Array:
        address, _ = interface["data"]
        memory = cupy.simulator.find(address)
        if memory is None:
            msg = f"{address:#x} is not memory of a simulated device"
            raise ValueError(msg)
        dtype = np.dtype(interface["typestr"])
        pointer = MemoryPointer(memory, address - memory.ptr)
        made = cupy.ndarray(interface["shape"], dtype, pointer, interface.get("strides"))
        made.base = owner
        return made

    def ascontiguousarray(a: Any, dtype: Any = None) -> Array:
        return asarray(a, dtype, order="C")

    def copyto(dst: Array, src: Any, casting: str = "same_kind", where: Any = None) -> None:
        if isinstance(src, Array) and not np.can_cast(src.dtype, dst.dtype, casting):
            msg = f"Cannot cast {src.dtype!r} to {dst.dtype!r} in {casting} casting mode"
            raise TypeError(msg)
        dst[...] = src

    def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None) -> np.ndarray:
        return a.get(order=order) if isinstance(a, Array) else np.asarray(a, order=order)

    def from_dlpack(a: Any, **_: Any) -> Array:
        return a.__dlpack__().simulated_array[...]

    def broadcast_to(a: Array, shape: Any) -> Array:
        return a._view_of(np.broadcast_to(a._host(), shape))

    functions = place, asarray, ascontiguousarray, copyto, asnumpy, from_dlpack, broadcast_to
    return {f.__name__: f for f in functions} | {
        "array": lambda a, **kw: asarray(a, copy=True, **kw)
    }


@contextlib.contextmanager
def simulated_cupy(*, reload: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """`import cupy` gives a fresh stand-in inside, and what it gave before afterwards.

    Modules named in `reload` are imported anew inside and forgotten afterwards: those that keep
    a reference to the cupy they found, as "cupynorm._cuda.arrays" does.
    """
    made = make_cupy(**options)
    modules = {"cupy": made, "cupy.cuda": made.cuda, "cupy.cuda.runtime": made.cuda.runtime}
    before = _forget(reload)
    sys.modules.update(modules)
    try:
        yield made
    finally:
        _forget(reload)
        for name, module in before.items():
            sys.modules[name] = module
            package, _, last = name.rpartition(".")
            if name in reload and package in sys.modules:
                setattr(sys.modules[package], last, module)


def _forget(reload: tuple[str, ...]) -> dict[str, Any]:
    """Take cupy, cupyx and the modules of `reload` out of sys.modules, and of their packages."""
    # The real cupy leaves a lazy cupyx behind: whoever looks at all modules, as inspect does when
    # torch registers an operator, would load it, and it would ask the stand-in for cupy._core.
    names = [n for n in sys.modules if n.partition(".")[0] in ("cupy", "cupyx")]
    for name in reload:
        package, _, last = name.rpartition(".")
        vars(sys.modules.get(package, ModuleType(""))).pop(last, None)
    return {n: sys.modules.pop(n) for n in (*names, *reload) if n in sys.modules}
