"""Devices, streams and kernels of the CuPy stand-in, as strict as CuPy's own."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .launch import Buffer, SimtFault, Traffic, launch, load
from .limits import KIB, DeviceLimits
from .simulated_array import Array, MemoryPointer


@dataclass(frozen=True)
class Launch:
    """One launch that a test can look at."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    device: int
    args: tuple[Any, ...]
    traffic: Traffic


@dataclass
class Simulator:
    """State of one stand-in: devices, memory, and what has been compiled and launched."""

    limits: DeviceLimits
    sm_count: int
    device_count: int
    l2_bytes: int
    seed: int | None = 0
    count: bool = True
    registers_per_thread: int | None = None
    launches: list[Launch] = field(default_factory=list)
    compilations: list[tuple[str, int]] = field(default_factory=list)
    allocations: int = 0
    device_type: Any = None
    null_stream: Any = None

    def __post_init__(self) -> None:
        self._thread = threading.local()
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self.streams: dict[int, int] = {}  # pointer -> device

    @property
    def current_device(self) -> int:
        """Of this host thread, as in CUDA."""
        return getattr(self._thread, "device", 0)

    @current_device.setter
    def current_device(self, device: int) -> None:
        if not 0 <= device < self.device_count:
            msg = f"cudaErrorInvalidDevice: invalid device ordinal {device}"
            raise CUDARuntimeError(msg)
        self._thread.device = device

    @property
    def stream_stack(self) -> list[Any]:
        """Streams entered by this host thread."""
        if not hasattr(self._thread, "streams"):
            self._thread.streams = []
        return self._thread.streams

    def alloc(
        self, nbytes: int, dtype: Any = None, shape: Any = (), *, offset: int = 0, name: str = ""
    ) -> MemoryPointer:
        """Memory on the current device; 512-byte aligned in CuPy, 256 here, or as `offset` says."""
        self.allocations += 1
        size = np.dtype(dtype or np.uint8).itemsize
        buffer = Buffer(
            nbytes,
            name=name or f"array {self.allocations} ({dtype or 'bytes'}{list(shape)})",
            offset=offset,
            granule=size if size in (1, 2, 4, 8) else 1,
            device=self.current_device,
        )
        self._buffers.add(buffer)
        return MemoryPointer(buffer, 0)

    def buffers(self) -> list[Buffer]:
        """All memory that is alive, on all devices."""
        return [b for b in self._buffers if b.nbytes]

    def find(self, address: int) -> Buffer | None:
        """The memory that holds an address."""
        return next((b for b in self.buffers() if b.ptr <= address < b.ptr + b.nbytes), None)


class CUDARuntimeError(RuntimeError):
    """What `cupy.cuda.runtime` raises."""


class SimulatedDevice:
    """`cupy.cuda.Device`."""

    _sim: Simulator

    def __init__(self, device: Any = None) -> None:
        self.id = self._sim.current_device if device is None else int(device)
        if not 0 <= self.id < self._sim.device_count:
            msg = f"cudaErrorInvalidDevice: invalid device ordinal {self.id}"
            raise CUDARuntimeError(msg)
        self._outer: list[int] = []

    @property
    def compute_capability(self) -> str:
        """"90" for 9.0."""
        return self._sim.limits.compute_capability

    @property
    def attributes(self) -> dict[str, int]:
        """Names as CUDA's, without the prefix cudaDevAttr."""
        limits = self._sim.limits
        return {
            "ComputeCapabilityMajor": int(limits.compute_capability[:-1]),
            "ComputeCapabilityMinor": int(limits.compute_capability[-1]),
            "L2CacheSize": self._sim.l2_bytes,
            "MaxBlockDimX": limits.block[0],
            "MaxGridDimX": limits.grid[0],
            "MaxGridDimY": limits.grid[1],
            "MaxRegistersPerBlock": limits.registers,
            "MaxRegistersPerMultiprocessor": limits.registers,
            "MaxSharedMemoryPerBlock": limits.shared,
            "MaxSharedMemoryPerBlockOptin": limits.opt_in_shared,
            "MaxSharedMemoryPerMultiprocessor": limits.shared_per_multiprocessor,
            "MaxThreadsPerBlock": limits.threads,
            "MaxThreadsPerMultiProcessor": limits.threads_per_multiprocessor,
            "MultiProcessorCount": self._sim.sm_count,
            "ReservedSharedMemoryPerBlock": KIB,
            "WarpSize": 32,
        }

    def use(self) -> None:
        """Make it current."""
        self._sim.current_device = self.id

    def synchronize(self) -> None:
        """Launches have ended when they return."""

    def __enter__(self) -> SimulatedDevice:
        self._outer.append(self._sim.current_device)
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        self._sim.current_device = self._outer.pop()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedDevice) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class SimulatedStream:
    """`cupy.cuda.Stream`; its pointer is a number that only the log of launches sees."""

    _sim: Simulator
    null: SimulatedStream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: Any = None
    ) -> None:
        self.device_id = self._sim.current_device
        self.ptr = 0 if null else 0x5000 + 0x10 * len(self._sim.streams)
        if self.ptr:
            self._sim.streams[self.ptr] = self.device_id

    def use(self) -> SimulatedStream:
        """Make it current."""
        self._sim.stream_stack[:] = [self]
        return self

    def synchronize(self) -> None:
        """Launches have ended when they return."""

    def __enter__(self) -> SimulatedStream:
        self._sim.stream_stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._sim.stream_stack.pop()


class Function:
    """`cupy.cuda.function.Function`: an entry loaded on one device."""

    __slots__ = ("_code", "_device", "_name", "_opt_in", "_sim")

    def __init__(self, sim: Simulator, code: str, name: str) -> None:
        load(code, name)
        self._sim, self._code, self._name = sim, code, name
        self._device = sim.current_device
        self._opt_in = sim.limits.shared
        sim.compilations.append((name, self._device))

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Any,
        shared_mem: int = 0,
        stream: Any = None,
        enable_cooperative_groups: bool = False,
    ) -> None:
        for what, value in (("grid", grid), ("block", block)):
            if type(value) is not tuple:
                msg = f"Argument '{what}' has incorrect type (expected tuple, got {type(value).__name__})"
                raise TypeError(msg)
        sim = self._sim
        pointer = current_stream(sim).ptr if stream is None else stream.ptr
        if sim.current_device != self._device:
            msg = f"{self._name} was loaded on device {self._device}, not on {sim.current_device}"
            raise SimtFault("wrong-device", msg)
        if sim.streams.get(pointer, self._device) != self._device:
            msg = f"{self._name}: the stream belongs to device {sim.streams[pointer]}"
            raise SimtFault("wrong-device", msg)
        # CuPy: missing lengths are 1, and so are lengths below 1.
        full_grid = tuple(max(1, int(n)) for n in (*grid, 1, 1)[:3])
        full_block = tuple(max(1, int(n)) for n in (*block, 1, 1)[:3])
        traffic = launch(
            self._code, self._name, full_grid, full_block, shared_mem,
            tuple(a.data.ptr if isinstance(a, Array) else a for a in args),
            buffers=sim.buffers(), seed=sim.seed, limits=sim.limits, opt_in_shared=self._opt_in,
            registers_per_thread=sim.registers_per_thread, device=self._device, count=sim.count,
        )  # fmt: skip
        sim.launches.append(
            Launch(self._name, full_grid, full_block, shared_mem, pointer, self._device, tuple(args), traffic)
        )


class RawKernel:
    """`cupy.RawKernel`: compiled on first use on each device."""

    _sim: Simulator

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        *,
        enable_cooperative_groups: bool = False,
        jitify: Any = None,
    ) -> None:
        for what, value, wanted in (
            ("code", code, str), ("name", name, str), ("options", options, tuple), ("backend", backend, str),
        ):  # fmt: skip
            if type(value) is not wanted:
                msg = f"Argument '{what}' has incorrect type (expected {wanted.__name__}, got {type(value).__name__})"
                raise TypeError(msg)
        self.code, self.name, self.options, self.backend = code, name, options, backend
        self.enable_cooperative_groups = enable_cooperative_groups
        self._loaded: dict[int, Function] = {}

    @property
    def kernel(self) -> Function:
        """The entry on the current device."""
        device = self._sim.current_device
        if device not in self._loaded:
            self._loaded[device] = Function(self._sim, self.code, self.name)
        return self._loaded[device]

    def compile(self, log_stream: Any = None) -> None:
        """Compile for the current device, again if need be."""
        self._loaded = {}
        _ = self.kernel

    def __call__(self, grid: Any, block: Any, args: Any, **kwargs: Any) -> None:
        self.kernel(
            grid, block, args, enable_cooperative_groups=self.enable_cooperative_groups, **kwargs
        )

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Of the entry on the current device; 48 KiB until set."""
        return self.kernel._opt_in

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        most = self._sim.limits.opt_in_shared
        if not 0 <= nbytes <= most:
            msg = f"{self.name}: {nbytes} bytes of dynamic shared memory; the device takes {most}"
            raise SimtFault("limits", msg)
        self.kernel._opt_in = int(nbytes)


def current_stream(sim: Simulator) -> SimulatedStream:
    """The innermost stream entered by this host thread, else the null stream."""
    return sim.stream_stack[-1] if sim.stream_stack else sim.null_stream
