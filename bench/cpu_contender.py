"""A contender on the CPU: checked against float64, then timed; who is wrong gets no number."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cpu_clock import interleave, spread
from bench.cpu_data import CpuInputs, errors, verdict
from bench.gpu_clock import Times
from bench.gpu_contender import Unavailable

__all__ = ["CpuContender", "CpuResult", "Unavailable", "as_arrays", "measure", "refuse"]

Array = np.ndarray[Any, Any]


@dataclass
class CpuContender:
    """What runs, and how to look at what it left."""

    call: Callable[[], Any]
    arrays: Callable[[Any], tuple[Array | None, ...]] = lambda result: as_arrays(result)
    ours: bool = False
    kept: Array | None = None  # the result's memory, where it is used again and again
    source: Array | None = None  # of a copy: what must have arrived


@dataclass
class CpuResult:
    """What became of a contender on a case."""

    name: str
    status: str  # ok, wrong, error, skipped
    error: float | None = None
    times: Times | None = None
    best: float | None = None  # microseconds
    note: str = ""
    kept: bool = False


Builder = tuple[str, Callable[[], CpuContender]]


def as_arrays(result: Any) -> tuple[Array | None, ...]:
    """A result as a tuple of NumPy arrays."""
    return tuple(result) if isinstance(result, tuple) else (result,)


def refuse(why: str) -> Any:
    """Say why a contender has no number."""
    raise Unavailable(why)


def measure(inputs: CpuInputs, builders: Iterable[Builder], seconds: float) -> list[CpuResult]:
    """Check everybody, then time the right ones interleaved."""
    results, calls = [], {}
    for name, build in builders:
        try:
            contender = build()
            result = _check(inputs, name, contender)
        except (Unavailable, ImportError) as reason:
            result = CpuResult(name, "skipped", note=str(reason))
        except Exception as error:  # out of memory, a refused dtype: the others go on
            result = CpuResult(name, "error", note=f"{type(error).__name__}: {error}")
        results.append(result)
        if result.status == "ok":
            calls[name] = contender.call
    times = interleave(calls, seconds)
    for result in results:
        if result.name in times:
            result.times, result.best = spread(times[result.name])
    return results


def _check(inputs: CpuInputs, name: str, contender: CpuContender) -> CpuResult:
    if contender.kept is not None:  # NaN in every dtype: what is not written shows
        contender.kept.reshape(-1, order="A").view(np.uint8).fill(0xFF)
    arrays = contender.arrays(contender.call())
    kept = contender.kept is not None
    if contender.source is not None:
        right = np.array_equal(_bits(arrays[0]), _bits(contender.source))
        return CpuResult(name, "ok" if right else "wrong", kept=kept)
    worst, allowed = verdict(inputs, errors(inputs, arrays), contender.ours)
    if worst <= allowed:
        return CpuResult(name, "ok", worst, kept=kept)
    return CpuResult(name, "wrong", worst, note=f"error {worst:.3g}, allowed {allowed:g}")


def _bits(a: Array) -> Array:
    return a.reshape(-1, order="A").view(np.uint8)
