"""A contender: something that solves (or copies) a case; checked, then timed."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.cases import EPS
from bench.check import worst
from bench.clock import Batch, Times, interleave

SECONDS = 1.0  # of a case's turns


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
