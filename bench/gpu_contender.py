"""A contender: something that solves (or copies) the buffers of a case; checked, then timed."""

import contextlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.gpu_clock import Batch, Times, capture, interleave, passes_for
from bench.gpu_data import poison
from bench.gpu_grid import Case
from bench.gpu_session import Session

__all__ = ["Contender", "Result", "Unavailable", "load", "measure"]

COPY_ERROR = 0.5  # of what is right or wrong by its bits: 0 or infinity


class Unavailable(Exception):
    """This contender cannot run here or not on this case; the message says why."""


def load(name: str) -> Any:
    """A library that may be missing."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # not installed, or installed and broken
        msg = f"{name} cannot be imported: {error}"
        raise Unavailable(msg) from error


@dataclass
class Contender:
    """What runs, and how to look at what it left."""

    name: str
    call: Callable[[int], Any]  # launches call number i and gives its result
    kernel: str = ""
    ours: bool = False
    capture: Callable[[Session, Callable[[], None], int], Batch] = capture
    scope: Callable[[], Any] = contextlib.nullcontext  # of its library: stream, no gradients
    to_cupy: Callable[[Any], Any] = lambda result: result
    error: Callable[[int, Any], float] | None = None  # instead of the comparison with float64
    # Instead of the inputs' own: error and limit where a library has another eps, say.
    judge: Callable[[int, Any], tuple[float, float]] | None = None


@dataclass
class Result:
    """What became of a contender on a case."""

    name: str
    status: str  # ok, wrong, error, skipped
    kernel: str = ""
    method: str = ""
    error: float | None = None
    times: Times | None = None
    note: str = ""
    ours: bool = False


Builder = tuple[str, Callable[[], Contender]]


def measure(
    session: Session, case: Case, inputs: Any, builders: Iterable[Builder], rounds: int
) -> list[Result]:
    """Check everybody's batch, then time the right ones interleaved; a wrong one gets no number.

    `inputs` has a length; `poison()`, which spoils the results that are its own; and
    `judge(session, i, result, ours)`, which gives the error of what call i left and the largest
    error that passes.
    """
    results, batches = [], {}
    passes = passes_for(session, len(inputs), case.moved_bytes)
    for name, build in builders:
        try:
            contender = build()
            result, batch = _prepare(session, inputs, contender, passes)
        except Unavailable as reason:
            result, batch = Result(name, "skipped", note=str(reason)), None
        except Exception as error:  # out of memory, a refused shape: the others go on
            result, batch = Result(name, "error", note=f"{type(error).__name__}: {error}"), None
            _quiet(session)
        results.append(result)
        if batch is not None and result.status == "ok":
            batches[name] = batch
    times = interleave(session, batches, rounds)
    for result in results:
        result.times = times.get(result.name)
    return results


def _prepare(
    session: Session, inputs: Any, contender: Contender, passes: int
) -> tuple[Result, Batch]:
    calls = range(len(inputs))
    kept: list[Any] = [None] * len(inputs)  # no result may be reused while its batch runs

    def body() -> None:
        for _ in range(passes):
            for i in calls:
                kept[i] = contender.call(i)

    session.synchronize()
    with session.stream, contender.scope():
        contender.call(0)  # compiles
    session.synchronize()
    batch = contender.capture(session, body, passes * len(inputs))
    inputs.poison()
    for result in kept:  # allocated by the contender; the views are the inputs' own
        poison([a for a in _arrays(contender, result) if a.flags.c_contiguous])
    session.synchronize()
    batch.replay()  # what is checked is what is timed
    session.synchronize()
    batch.keep += [contender, kept]  # a graph knows addresses, and does not hold the memory
    found = [_judge(session, inputs, contender, i, kept[i]) for i in {0, len(kept) - 1}]
    worst, allowed = max(found, key=lambda e: e[0] / e[1] if e[0] == e[0] else float("inf"))
    right = worst <= allowed
    note = "" if right else f"error {worst:.3g}, allowed {allowed:g}"
    status = "ok" if right else "wrong"
    return Result(
        contender.name,
        status,
        contender.kernel,
        batch.method,
        worst,
        note=note,
        ours=contender.ours,
    ), batch


def _arrays(contender: Contender, result: Any) -> list[Any]:
    """The arrays of a result: one, or several, of which those not asked for are None."""
    result = contender.to_cupy(result)
    arrays = result if isinstance(result, tuple) else (result,)
    return [a for a in arrays if a is not None]


def _judge(
    session: Session, inputs: Any, contender: Contender, i: int, result: Any
) -> tuple[float, float]:
    result = contender.to_cupy(result)
    if contender.error is not None:
        return contender.error(i, result), COPY_ERROR
    if contender.judge is not None:
        return contender.judge(i, result)
    error, allowed = inputs.judge(session, i, result, contender.ours)
    return error, allowed


def _quiet(session: Session) -> None:
    """After a failure: give memory back and see whether the device still answers."""
    with contextlib.suppress(AttributeError):  # the simulated device has no pool
        session.cupy.get_default_memory_pool().free_all_blocks()
    session.synchronize()
