"""State of one stand-in: its devices, its memory, what it compiled and launched."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .buffer import Buffer
from .counts import Traffic
from .limits import DeviceLimits
from .simulated_array import MemoryPointer


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
