"""The state of one stand-in for CuPy; its devices, streams and kernels, as strict as CuPy's own."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .buffer import Buffer
from .fault import PtxFault
from .launch import Traffic, launch, load
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
    cluster: int = 1


@dataclass
class Simulator:
    """State of one stand-in: devices, memory, and what has been compiled and launched."""

    limits: DeviceLimits
    sm_count: int
    device_count: int
    seed: int | None = 0
    count: bool = True
    launches: list[Launch] = field(default_factory=list)
    compilations: list[tuple[str, int]] = field(default_factory=list)
    allocations: int = 0
    synchronizations: int = 0
    device_type: Any = None
    null_stream: Any = None
    captured: Any = None  # a graph, while a stream is captured

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


# ---- devices and streams ----


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
        """ "90" for 9.0."""
        return self._sim.limits.compute_capability

    @property
    def attributes(self) -> dict[str, int]:
        """Names as CUDA's, without the prefix cudaDevAttr."""
        return {
            "L2CacheSize": 50 * 1024 * KIB,
            "MaxSharedMemoryPerBlockOptin": self._sim.limits.opt_in_shared,
            "MultiProcessorCount": self._sim.sm_count,
        }

    def use(self) -> None:
        self._sim.current_device = self.id

    def synchronize(self) -> None:
        """Launches have ended when they return; that somebody waited is counted."""
        self._sim.synchronizations += 1

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


class SimulatedGraph(list):
    """`cupy.cuda.Graph`: the launches that a stream captured."""

    def launch(self, stream: Any = None) -> None:
        for run in self:
            run()


class SimulatedStream:
    """`cupy.cuda.Stream`; its pointer is a number that only the log of launches sees."""

    _sim: Simulator
    null: SimulatedStream

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: Any = None,
    ) -> None:
        self.device_id = self._sim.current_device
        self.ptr = 0 if null else 0x5000 + 0x10 * len(self._sim.streams)
        if self.ptr:
            self._sim.streams[self.ptr] = self.device_id

    def use(self) -> SimulatedStream:
        self._sim.stream_stack[:] = [self]
        return self

    def begin_capture(self) -> None:
        """What is launched from now on runs when the graph does."""
        self._sim.captured = SimulatedGraph()

    def end_capture(self) -> SimulatedGraph:
        made, self._sim.captured = self._sim.captured, None
        return made

    def is_capturing(self) -> bool:
        return self._sim.captured is not None

    def synchronize(self) -> None:
        self._sim.synchronizations += 1

    def __enter__(self) -> SimulatedStream:
        self._sim.stream_stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._sim.stream_stack.pop()


def current_stream(sim: Simulator) -> SimulatedStream:
    """The innermost stream entered by this host thread, else the null stream."""
    return sim.stream_stack[-1] if sim.stream_stack else sim.null_stream


# ---- kernels ----


def _wrong_type(what: str, wanted: type, value: Any) -> TypeError:
    got = type(value).__name__
    return TypeError(
        f"Argument '{what}' has incorrect type (expected {wanted.__name__}, got {got})"
    )


class Function:
    """`cupy.cuda.function.Function`: an entry loaded on one device."""

    __slots__ = ("_code", "_device", "_name", "_opt_in", "_sim")

    def __init__(self, sim: Simulator, code: str, name: str) -> None:
        load(code, name, sim.limits.compute_capability)
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
    ) -> None:
        for what, value in (("grid", grid), ("block", block)):
            if type(value) is not tuple:
                raise _wrong_type(what, tuple, value)
        sim = self._sim
        pointer = current_stream(sim).ptr if stream is None else stream.ptr
        if sim.current_device != self._device:
            msg = f"{self._name} was loaded on device {self._device}, not on {sim.current_device}"
            raise PtxFault("wrong-device", msg)
        if sim.streams.get(pointer, self._device) != self._device:
            msg = f"{self._name}: the stream belongs to device {sim.streams[pointer]}"
            raise PtxFault("wrong-device", msg)
        # CuPy: missing lengths are 1, and so are lengths below 1.
        full_grid = tuple(max(1, int(n)) for n in (*grid, 1, 1)[:3])
        full_block = tuple(max(1, int(n)) for n in (*block, 1, 1)[:3])
        passed = tuple(a.data.ptr if isinstance(a, Array) else a for a in args)
        cluster, *_ = load(self._code, self._name, sim.limits.compute_capability).cluster

        def run() -> None:
            traffic = launch(
                self._code, self._name, full_grid, full_block, shared_mem, passed,
                buffers=sim.buffers(), seed=sim.seed, limits=sim.limits,
                opt_in_shared=self._opt_in, device=self._device, count=sim.count,
            )  # fmt: skip
            about = self._name, full_grid, full_block, shared_mem, pointer, self._device, passed
            sim.launches.append(Launch(*about, traffic, cluster))

        run() if sim.captured is None else sim.captured.append(run)


class RawKernel:
    """`cupy.RawKernel`: compiled on first use on each device."""

    _sim: Simulator

    def __init__(
        self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc"
    ) -> None:
        for what, value, wanted in (
            ("code", code, str), ("name", name, str), ("options", options, tuple),
            ("backend", backend, str),
        ):  # fmt: skip
            if type(value) is not wanted:
                raise _wrong_type(what, wanted, value)
        self.code, self.name, self.options, self.backend = code, name, options, backend
        self._loaded: dict[int, Function] = {}

    @property
    def kernel(self) -> Function:
        """The entry on the current device."""
        device = self._sim.current_device
        if device not in self._loaded:
            self._loaded[device] = Function(self._sim, self.code, self.name)
        return self._loaded[device]

    def __call__(self, grid: Any, block: Any, args: Any, **kwargs: Any) -> None:
        self.kernel(grid, block, args, **kwargs)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Of the entry on the current device; 48 KiB until set."""
        return self.kernel._opt_in

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        most = self._sim.limits.opt_in_shared
        if not 0 <= nbytes <= most:
            msg = f"{self.name}: {nbytes} bytes of dynamic shared memory; the device takes {most}"
            raise PtxFault("limits", msg)
        self.kernel._opt_in = int(nbytes)
