"""Times calls in interleaved turns: each round gives every contender one.

A turn is a pause, calls for 2 ms that are not timed, and timed ones for 2 ms or more. The pause
lasts until no thread of the process runs any more: torch's spin for 10 ms after a call and
onnxruntime's for 40, on the core that the next contender's would need, and doubled its time. The
untimed calls are there because a core that was idle is slow, and its caches cold.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.gpu_clock import Times

__all__ = ["interleave", "settle", "spread"]

PAUSE, MOST_PAUSES = 0.005, 20  # seconds
BUSY = 0.1  # of a pause: a thread that spins takes all of it
TURN = 2e-3
MOST_CALLS = 500  # of a turn
FEWEST, MOST = 5, 60  # rounds of a contender, however slow or fast
SLOW, FEWEST_SLOW = 0.15, 3  # a call of so many seconds is given no more rounds than these


def interleave(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call in each of its rounds; in all about `seconds`, shared by time, not turns.

    Who is slow has fewer rounds, spread evenly over those of the others, so that a slow spell of
    the machine hits all alike; each round begins with another contender.
    """
    repeat, wanted = {}, {}
    share = seconds / max(1, len(calls))
    for name, call in calls.items():
        settle()
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start + 1e-9
        repeat[name] = max(1, min(MOST_CALLS, int(TURN / once)))
        turn = 2 * PAUSE + max(TURN, once) + repeat[name] * once
        fewest = FEWEST_SLOW if once > SLOW else FEWEST
        wanted[name] = max(fewest, min(MOST, int(share / turn)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, rounds = list(calls), max(wanted.values(), default=0)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            mine = wanted[name]
            if (number + 1) * mine // rounds > number * mine // rounds:
                times[name].append(_turn(calls[name], repeat[name]))
    return times


def settle() -> None:
    """Wait until the threads of the process are asleep, up to a tenth of a second."""
    for _ in range(MOST_PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < BUSY * PAUSE:
            return


def _turn(call: Callable[[], Any], repeat: int) -> float:
    settle()
    start = time.perf_counter()
    while time.perf_counter() < start + TURN:
        call()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def spread(values: list[float]) -> tuple[Times, float]:
    """Median, p10 and p90 in microseconds, and the fastest turn."""
    us = 1e6 * np.asarray(values)
    p10, median, p90 = (float(q) for q in np.quantile(us, (0.1, 0.5, 0.9)))
    return Times(median, p10, p90, len(us)), float(us.min())
