"""The device of a run without a GPU: tests/simt's stand-in, with events and graphs that record.

A captured launch does not run until the graph is replayed, as on a GPU; an event's time is the
number of launches before it. So the benchmark's own logic runs whole, and no time means anything.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from bench.gpu_copy import forget_kernels

__all__ = ["simulated_session_cupy"]

SECONDS_PER_LAUNCH = 1e-5


class _Recorder:
    """Holds launches back while a stream captures."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None

    def wrap(self, launch: Callable[..., None]) -> Callable[..., None]:
        def call(function: Any, *args: Any, **kwargs: Any) -> None:
            if self.captured is None:
                launch(function, *args, **kwargs)
            else:
                self.captured.append(lambda: launch(function, *args, **kwargs))

        return call


class _Graph:
    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self.launches = launches

    def launch(self, stream: Any = None) -> None:
        for launch in self.launches:
            launch()


class _Pool:
    """Keeps what was allocated through it alive, as CuPy's pool keeps device memory."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def malloc(self, nbytes: int) -> Any:
        raise NotImplementedError


def _add_time(cupy: Any, recorder: _Recorder) -> None:
    sim = cupy.simulator

    class Event:
        def record(self, stream: Any = None) -> None:
            self.launches = len(sim.launches)

        def synchronize(self) -> None:
            """Launches have ended when they return."""

    def begin_capture(stream: Any, mode: Any = None) -> None:
        recorder.captured = []

    def end_capture(stream: Any) -> _Graph:
        launches, recorder.captured = recorder.captured, None
        return _Graph(launches or [])

    @contextlib.contextmanager
    def using_allocator(malloc: Any) -> Iterator[None]:
        plain = sim.alloc

        def alloc(*args: Any, **kwargs: Any) -> Any:
            made = plain(*args, **kwargs)
            malloc.__self__.blocks.append(made)
            return made

        sim.alloc = alloc
        try:
            yield
        finally:
            del sim.alloc

    cuda = cupy.cuda
    cuda.Event, cuda.MemoryPool, cuda.using_allocator = Event, _Pool, using_allocator
    cuda.Stream.begin_capture, cuda.Stream.end_capture = begin_capture, end_capture
    cuda.get_elapsed_time = lambda a, b: 1e3 * SECONDS_PER_LAUNCH * max(1, b.launches - a.launches)
    cuda.set_allocator = lambda allocator=None: None


@contextlib.contextmanager
def simulated_session_cupy() -> Iterator[Any]:
    """`import cupy` and `cupynorm._cuda.arrays` speak of a simulated device inside."""
    from tests.simt.cupy_stand_in import simulated_cupy
    from tests.simt.simulated_kernel import Function

    launch = Function.__call__
    with simulated_cupy(reload=("cupynorm._cuda.arrays",), count=False) as cupy:
        recorder = _Recorder()
        _add_time(cupy, recorder)
        Function.__call__ = recorder.wrap(launch)
        try:
            yield cupy
        finally:
            Function.__call__ = launch
            forget_kernels()
