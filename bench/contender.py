"""Contenders that solve (or copy) a case: checked, then timed in turns, of which each round has one
of everybody's.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.cases import EPS
from bench.check import worst

SECONDS = 1.0  # of a case's turns


@dataclass
class Batch:
    """Calls that are timed together: one turn."""

    replay: Callable[[], None]
    calls: int
    method: str  # calls, graph, launches or blocking: see the column's meaning in table.py
    keep: list[Any] = field(default_factory=list)  # memory that a replay writes to
    left: Callable[[], dict[int, Any]] = dict  # what some calls of a replay leave, by number


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds per call over the rounds."""

    median: float
    p10: float
    p90: float
    best: float
    rounds: int


def spread(seconds: Iterable[float]) -> Times:
    us = 1e6 * np.asarray(list(seconds))
    p10, median, p90 = (float(q) for q in np.quantile(us, (0.1, 0.5, 0.9)))
    return Times(median, p10, p90, float(us.min()), len(us))


def interleave(
    batches: dict[str, Batch],
    turn: Callable[[Batch], float],
    rounds: Callable[[float, float], int],
    seconds: float,
) -> dict[str, Times]:
    """Times of a call, over `rounds(seconds of a turn, share of all seconds)` turns of each.

    Clocks, temperature and neighbours drift over seconds; what is compared must share them. So who
    is slow has fewer turns, spread evenly over those of the others, and each round begins with
    another contender.
    """
    wanted = {}
    for name, batch in batches.items():
        turn(batch)  # cold
        wanted[name] = rounds(max(1e-9, turn(batch)), seconds / len(batches))
    found: dict[str, list[float]] = {name: [] for name in batches}
    names, most = list(batches), max(wanted.values(), default=0)
    for number in range(most):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            mine = wanted[name]
            if (number + 1) * mine // most > number * mine // most:
                found[name].append(turn(batches[name]) / batches[name].calls)
    return {name: spread(values) for name, values in found.items()}


# -- on the CPU: a pause, calls that are not timed, timed ones -------------------------------------

PAUSE, MOST_PAUSES = 0.005, 20  # seconds
BUSY = 0.1  # of a pause: a thread that spins takes all of it
TURN = 2e-3  # seconds of calls
MOST_CALLS = 500  # of a turn
FEWEST, MOST = 5, 60  # turns of a contender, however slow or fast
SLOW, FEWEST_SLOW = 0.15, 3  # a turn of so many seconds: no more turns than these


def settle() -> None:
    """Wait until the threads of the process are asleep, up to a tenth of a second.

    torch's spin for 10 ms after a call and onnxruntime's for 40, on the core that the next
    contender's would need, and doubled its time.
    """
    for _ in range(MOST_PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < BUSY * PAUSE:
            return


def host_turn(batch: Batch) -> float:
    """Seconds of a batch; it ran once before, as a core that was idle is slow, its caches cold."""
    settle()
    batch.replay()
    begin = time.perf_counter()
    batch.replay()
    return time.perf_counter() - begin


def host_rounds(once: float, share: float) -> int:
    fewest = FEWEST_SLOW if once > SLOW else FEWEST
    return max(fewest, min(MOST, int(share / (2 * PAUSE + 2 * once))))


def host_batch(call: Callable[[], Any], scope: Callable[[], Any] = contextlib.nullcontext) -> Batch:
    """A turn of as many calls as take TURN, within a scope; no result outlives the next call."""
    with scope():
        call()
        begin = time.perf_counter()
        call()
    once = time.perf_counter() - begin + 1e-9
    repeat = max(1, min(MOST_CALLS, math.ceil(TURN / once)))

    def replay() -> None:
        with scope():
            for _ in range(repeat):
                call()

    return Batch(replay, repeat, "calls")


def host_times(calls: dict[Any, Callable[[], Any]], seconds: float) -> dict[Any, Times]:
    """Of each call, in turns on this machine."""
    batches = {name: host_batch(call) for name, call in calls.items()}
    return interleave(batches, host_turn, host_rounds, seconds)


# -- who takes part ------------------------------------------------------------------------------


class Unavailable(Exception):
    """This contender cannot run here or not on this case; the message says why."""


def refuse(why: str) -> Any:
    raise Unavailable(why)


def load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # not installed, or installed and broken
        msg = f"{name} cannot be imported: {error}"
        raise Unavailable(msg) from error


@dataclass
class Contender:
    """What runs, and how to look at what it left."""

    call: Callable[[int], Any]  # call number i on buffer i; gives its result
    kernel: str = ""
    ours: bool = False
    fresh: bool = False  # its result is memory that was not there before, so it may fault its pages
    capture: Callable[[Any, Callable[[], None], int], Batch] | None = None  # if not the device's
    scope: Callable[[], Any] = contextlib.nullcontext  # of its library: stream, no gradients
    arrays: Callable[[Any], Any] = lambda result: result  # of the device's library
    eps: float = EPS  # that its library has
    arrived: Callable[[int, Any], bool] | None = None  # of a copy: instead of the comparison


@dataclass
class Result:
    name: str
    status: str  # ok, wrong, error, skipped
    kernel: str = ""
    method: str = ""
    error: float | None = None
    times: Times | None = None
    note: str = ""
    fresh: bool = False


Builder = tuple[str, Callable[[], Contender]]


def measure(
    device: Any, inputs: Any, builders: Iterable[Builder], seconds: float = SECONDS
) -> list[Result]:
    """Check everybody's batch, then time the right ones interleaved; a wrong one gets no number."""
    results, batches = [], {}
    for name, build in builders:
        try:
            result, batch = _checked(device, inputs, name, build())
        except (Unavailable, ImportError) as reason:
            result = Result(name, "skipped", note=str(reason))
        except Exception as error:  # out of memory, a refused shape: the others go on
            result = Result(name, "error", note=f"{type(error).__name__}: {error}")
            device.recover()
        results.append(result)
        if result.status == "ok":
            batches[name] = batch
    times = interleave(batches, device.turn, device.rounds, seconds)
    for result in results:
        result.times = times.get(result.name)
    return results


def _checked(device: Any, inputs: Any, name: str, contender: Contender) -> tuple[Result, Batch]:
    batch = device.batch(contender, inputs)  # what is checked is what is timed
    found = []
    for i, result in batch.left().items():
        made = contender.arrays(result)
        if contender.arrived is not None:  # right or wrong by its bits
            found.append((0.0 if contender.arrived(i, made) else math.inf, 0.5))
        else:
            made = made if isinstance(made, tuple) else (made,)
            found.append(inputs.judge(i, made, contender.ours, contender.eps))
    error, allowed = worst(found)
    right = error <= allowed
    note = "" if right else f"error {error:.3g}, allowed {allowed:g}"
    about = {"note": note, "fresh": contender.fresh}
    status = "ok" if right else "wrong"
    return Result(name, status, contender.kernel, batch.method, error, **about), batch
