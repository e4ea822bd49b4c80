"""Times device work: CUDA graphs of many calls, between events, contenders interleaved."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.gpu_session import Session

__all__ = ["Batch", "Times", "capture", "interleave", "launched", "passes_for"]

TARGET_SECONDS = 2e-3  # of one batch: a thousand times the resolution of an event
WARM_ROUNDS = 2
SIMULATED_ROUNDS = 1
SLOW_SECONDS = 0.4  # a contender gets fewer rounds if all of them would take longer


@dataclass
class Batch:
    """Calls that are timed together, once per buffer and `passes` times over."""

    replay: Callable[[], None]
    calls: int
    method: str  # "graph", or "launches" where capture failed: then host time may show
    keep: list[Any] = field(default_factory=list)  # memory that a replay writes to


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds per call over the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int


def passes_for(session: Session, calls: int, moved_bytes: int) -> int:
    """How often to go over the buffers for a long enough batch; the same for everybody."""
    if session.simulated:
        return 1
    guess = calls * (3e-6 + moved_bytes / 3e12)
    return max(1, math.ceil(TARGET_SECONDS / guess))


def capture(session: Session, body: Callable[[], None], calls: int) -> Batch:
    """Graph of what `body` launches through CuPy; plain launches where it cannot be captured."""
    cuda = session.cupy.cuda
    # A pool of its own: memory that a captured call frees is written again by every replay.
    pool = cuda.MemoryPool()
    with session.stream, cuda.using_allocator(pool.malloc):
        session.stream.begin_capture()
        try:
            body()
        except Exception as error:
            with contextlib.suppress(Exception):
                session.stream.end_capture()
            session.notes.append(f"not captured, timed as launches: {error}")
            batch = launched(session, body, calls)
            batch.keep.append(pool)
            return batch
        graph = session.stream.end_capture()
    return Batch(lambda: graph.launch(session.stream), calls, "graph", [pool, graph])


def launched(session: Session, body: Callable[[], None], calls: int) -> Batch:
    """Plain launches, of what a graph cannot hold: host time may show."""

    def replay() -> None:
        with session.stream:
            body()

    return Batch(replay, calls, "launches")


def interleave(session: Session, batches: dict[str, Batch], rounds: int) -> dict[str, Times]:
    """Replay all batches in turn, starting with another one each round.

    Clocks, temperature and neighbours drift over seconds; what is compared must share them.
    """
    rounds = min(rounds, SIMULATED_ROUNDS) if session.simulated else rounds
    samples: dict[str, list[float]] = {name: [] for name in batches}
    wanted = {}
    for name, batch in batches.items():
        once = max(1e-9, _seconds(session, batch))
        wanted[name] = max(3, min(rounds, int(SLOW_SECONDS / once)))
    names = list(batches)
    for number in range(-WARM_ROUNDS, rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if number >= wanted[name]:
                continue
            seconds = _seconds(session, batches[name])
            if number >= 0:
                samples[name].append(1e6 * seconds / batches[name].calls)
    return {name: summarize(values) for name, values in samples.items()}


def _seconds(session: Session, batch: Batch) -> float:
    cuda = session.cupy.cuda
    begin, end = cuda.Event(), cuda.Event()
    begin.record(session.stream)
    batch.replay()
    end.record(session.stream)
    end.synchronize()
    return cuda.get_elapsed_time(begin, end) / 1e3


def summarize(samples: Iterable[float]) -> Times:
    """Median and the spread around it."""
    values = np.asarray(list(samples))
    p10, median, p90 = (float(q) for q in np.quantile(values, (0.1, 0.5, 0.9)))
    return Times(median, p10, p90, len(values))
