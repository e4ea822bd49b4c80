"""Devices and streams of the CuPy stand-in."""

from __future__ import annotations

from typing import Any

from .limits import KIB
from .simulator import CUDARuntimeError, Simulator


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
        """Make it current."""
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
        """Run them."""
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
        """Make it current."""
        self._sim.stream_stack[:] = [self]
        return self

    def begin_capture(self) -> None:
        """What is launched from now on runs when the graph does."""
        self._sim.captured = SimulatedGraph()

    def end_capture(self) -> SimulatedGraph:
        """Give the graph."""
        made, self._sim.captured = self._sim.captured, None
        return made

    def is_capturing(self) -> bool:
        """Whether a capture has begun and not ended."""
        return self._sim.captured is not None

    def synchronize(self) -> None:
        """Launches have ended when they return; that somebody waited is counted."""
        self._sim.synchronizations += 1

    def __enter__(self) -> SimulatedStream:
        self._sim.stream_stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._sim.stream_stack.pop()


def current_stream(sim: Simulator) -> SimulatedStream:
    """The innermost stream entered by this host thread, else the null stream."""
    return sim.stream_stack[-1] if sim.stream_stack else sim.null_stream
