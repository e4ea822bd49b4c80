"""What a run on a GPU carries along: CuPy, the machine's description, a stream and a deadline."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Session"]


@dataclass
class Session:
    """One run of the benchmark."""

    cupy: Any
    machine: dict[str, str]
    simulated: bool = False
    deadline: float = float("inf")  # of time.monotonic()
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Graphs are captured from a stream that is not the null stream.
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        attributes = self.cupy.cuda.Device().attributes
        self.l2_bytes = attributes["L2CacheSize"]
        self.sm_count = attributes["MultiProcessorCount"]
        # The reference is computed by plain array operations, which the simulated device has not.
        self.xp = np if self.simulated else self.cupy

    def plain(self, a: Any) -> Any:
        """The array where `xp` can compute with it."""
        return self.cupy.asnumpy(a) if self.simulated else a

    def synchronize(self) -> None:
        """Wait for everything on the device."""
        self.cupy.cuda.runtime.deviceSynchronize()

    def time_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextlib.contextmanager
    def until(self, seconds: float) -> Iterator[None]:
        """Move the deadline for a while."""
        before, self.deadline = self.deadline, min(self.deadline, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.deadline = before
