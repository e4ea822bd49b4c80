"""The claims about speed that no GPU has confirmed, and what the model says of each."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bench.gpu_grid import BIG, BWD, FEW, FWD, LAYOUT, Case, case
from bench.model_cases import COLUMNS_OF, Predicted, cases, planned, predicted
from bench.model_gpus import GPUS, Gpu
from bench.model_launches import Launch, launches_of
from bench.model_time import NEXT_LAUNCH, copy_time

__all__ = ["Target", "alone_us", "targets"]

# A model of a few percent's error tells no difference below this.
NEAR = 0.01


@dataclass(frozen=True)
class Target:
    """A claim of PENDING.md by its number, and by GPU what is predicted at the worst case."""

    number: str
    claim: str
    aim: float
    least: dict[str, tuple[float, str]]  # value, and which case and why
    free: dict[str, float]  # the least if instructions took no time
    upward: bool = True  # the aim is a least; else a most

    def missed(self) -> list[str]:
        """GPUs on which the model says no."""
        sign = 1 if self.upward else -1
        return [g for g, (v, _) in self.least.items() if sign * (v - self.aim) < -NEAR]


def alone_us(c: Case, gpu: Gpu) -> float:
    """Microseconds of a call's blocks on an idle GPU, beyond a launch that does nothing."""
    launches = _launches(c, gpu)
    waits = sum(la.trips * gpu.latency + la.cycles / gpu.clock / 1e3 for la in launches)
    return waits + NEXT_LAUNCH * (len(launches) - 1)


def _launches(c: Case, gpu: Gpu) -> list[Launch]:
    return [la for pair in planned(c, gpu) for la in launches_of(*pair, gpu)]


def _target(
    number: str, claim: str, aim: float, chosen: Iterable[Case], value: Callable[[Predicted], float]
) -> Target:
    """A claim at its worst case on each GPU."""
    least, free, kept = {}, {}, list(chosen)
    for gpu in GPUS:
        found = [p for p in (predicted(c, gpu) for c in kept) if p]
        p = min(found, key=value)
        least[gpu.name] = value(p), _why(p)
        free[gpu.name] = min(value(_without_instructions(p)) for p in found)
    return Target(number, claim, aim, least, free)


def _without_instructions(p: Predicted) -> Predicted:
    return replace(p, time=replace(p.time, us=p.time.us - p.time.issue, issue=0.0))


def _why(p: Predicted) -> str:
    c = p.case
    size = f"{c.rows} × {c.N}" if c.group == FEW else f"N = {c.N}"
    return f"{c.dtype}, {size}, {p.families}: {p.time.bottleneck}"


def _fraction(p: Predicted) -> float:
    return p.fraction_of_copy


def _gain(p: Predicted) -> float:
    """Times faster than a copy to row-major at the roof, then the row kernel."""
    rows = predicted(replace(p.case, layout="C"), p.gpu)
    if rows is None:
        raise ValueError(p.case)
    return (copy_time(p.case.copy_bytes, p.gpu) + rows.time.us) / p.time.us


@functools.cache
def targets() -> list[Target]:
    """In the order of PENDING.md."""
    every = cases()
    whole = [c for c in every if (c.op, c.group) == (FWD, BIG) and c.N >= 256]
    forward, longer = ([c for c in whole if (c.N > 16384) == far] for far in (False, True))
    backward = [c for c in every if (c.op, c.group) == (BWD, BIG) and c.N <= 16384]
    long = [c for c in every if (c.op, c.group) == (BWD, BIG) and c.N > 16384]
    few = [c for c in every if c.group == FEW]
    tiles = [c for c in every if (c.op, c.group) == (FWD, LAYOUT) and c.N <= 900]
    turned = [c for c in tiles if c.layout == "FC"]
    small = case("bfloat16", 64, rows=8)
    alone = {g.name: (alone_us(small, g), "8 × 64, bfloat16") for g in GPUS}
    waits = {g.name: sum(la.trips for la in _launches(small, g)) * g.latency for g in GPUS}
    columns = [c for c in tiles if c.layout == COLUMNS_OF]
    return [
        _target("3", "forward at 1 GB, N from 256 to 16384", 0.97, forward, _fraction),
        _target("3", "forward at 1 GB, N from 65536 up", 0.97, longer, _fraction),
        _target("12", "backward at 1 GB, N from 64 to 16384", 0.92, backward, _fraction),
        _target("15", "backward of longer rows", 0.50, long, _fraction),
        _target("3a", "forward, 1 and 8 rows of 1M to 64M columns", 0.85, few, _fraction),
        Target("3b", "us of a small call beyond an empty kernel", 2.0, alone, waits, upward=False),
        _target("23", "K6, F to C, 8 to 900 columns", 0.85, turned, _fraction),
        _target("23", "K6, F to C, times faster than a copy and K1 to K3", 1.8, turned, _gain),
        _target("23", "K7, 8 to 900 float32 columns", 0.85, columns, _fraction),
    ]
