"""From launches to microseconds.

    time = t0 + next_launch * (launches - 1) + sum over launches of max(memory, instructions, L2)
    memory = bytes / (S * (1 - exp(-D / S)))

S is what the memory gives, D what the resident blocks would draw from an idle memory: units
in flight times bytes of a unit over its time, waits and work (Little's law). Where D is far above S
that is bytes / bandwidth, where it is far below, the in-flight limit; between the two neither is
reached. What is left after the last full round of units runs with as many units as there are.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from bench.model_gpus import Gpu
from bench.model_launches import NEAR, Launch, launches_of
from bench.model_occupancy import resident_blocks

__all__ = [
    "NEXT_LAUNCH",
    "Prediction",
    "copy_time",
    "predict",
    "run_efficiency",
]

NEXT_LAUNCH = 2.0  # microseconds between two kernels of a call that wait for each other; assumed
L2_SHARE = 0.5  # of L2 that holds what will be read again; the rest goes to what streams past
L2_BYTES = 32  # per multiprocessor and cycle; assumed
SM_BYTES = 64  # that one multiprocessor can draw per cycle
L1_BYTES = 64 * 1024  # of weight and bias that L1 keeps from row to row; assumed
COPY_THREADS, COPY_TILE = 256, 16 * 1024  # bench/gpu_copy.py, copy_block
COPY_CYCLES = 100

# GB/s on an H100 by the bytes that lie together, against 512 (Quack's notes on coalescing).
LOADS = ((16, 550 / 2894), (32, 1466 / 2894), (128, 2679 / 2894), (256, 2853 / 2894), (512, 1.0))
STORES = ((16, 249 / 3175), (32, 1007 / 3175), (128, 2973 / 3175), (256, 3143 / 3175), (512, 1.0))


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a call, and what they are made of."""

    us: float
    fixed: float  # launches
    floor: float  # bytes that no kernel can do without, at full bandwidth
    extra: float  # bytes beyond those
    gaps: float  # segments too short
    in_flight: float  # too few bytes on their way, the last round of blocks among it
    issue: float  # instructions: blocks that work where they could load; also what L2 cannot serve

    @property
    def bottleneck(self) -> str:
        """What costs most beyond the floor."""
        parts = {
            "fixed cost": self.fixed,
            "extra bytes": self.extra,
            "short segments": self.gaps,
            "bytes in flight": self.in_flight,
            "instructions": self.issue,
        }
        worst = max(parts, key=lambda name: parts[name])
        return worst if parts[worst] > 0.01 * self.us else "bandwidth"


def run_efficiency(run: float, table: tuple[tuple[int, float], ...]) -> float:
    """Share of the bandwidth that pieces of `run` bytes reach, by the logarithm between points."""
    if run >= table[-1][0]:
        return 1.0
    if run <= table[0][0]:
        return table[0][1] * run / table[0][0]
    for (a, low), (b, high) in itertools.pairwise(table):
        if run <= b:
            return low + (high - low) * math.log2(run / a) / math.log2(b / a)
    raise ValueError(run)


def predict(
    problem: Any,
    plan: Any,
    gpu: Gpu,
    floor_bytes: int,
    registers: int | None = None,
    merged: bool = True,
) -> Prediction:
    """Time of a plan for a problem whose floor is `floor_bytes`.

    `merged`: what a block's warps touch side by side counts as lying together, since L2 joins it.
    False is the lower bound, where each warp's access stands alone.
    """
    launches = launches_of(problem, plan, gpu)
    fixed = gpu.t0 + NEXT_LAUNCH * (len(launches) - 1)
    parts = [_parts(launch, gpu, registers, merged) for launch in launches]
    moved, gaps, in_flight, issue = (sum(p[i] for p in parts) for i in range(4))
    floor = floor_bytes / gpu.supply
    return Prediction(
        us=fixed + moved + gaps + in_flight + issue,
        fixed=fixed,
        floor=floor,
        extra=moved - floor,
        gaps=gaps,
        in_flight=in_flight,
        issue=issue,
    )


def _parts(
    launch: Launch, gpu: Gpu, registers: int | None, merged: bool
) -> tuple[float, float, float, float]:
    """Microseconds: bytes at full bandwidth; on top of it gaps, too few in flight, instructions."""
    resident = resident_blocks(launch.stage, gpu, registers) * gpu.sm_count
    at_a_time = max(1, min(launch.units, launch.blocks, resident))
    moved = launch.moved
    read, written = sum(moved.read.values()), sum(moved.written.values())
    again, hits = sum(moved.again.values()), _hits(launch, gpu, at_a_time)
    near = sum(b for b in moved.near.values() if b / max(1, launch.blocks) > L1_BYTES)
    l2 = (near + hits) / (L2_BYTES * gpu.sm_count * gpu.clock * 1e3)
    bare = (read + again - hits + written) / gpu.supply
    gaps = (
        (read + again - hits)
        / gpu.supply
        * (1 / run_efficiency(launch.read_run[merged], LOADS) - 1)
    )
    gaps += written / gpu.supply * (1 / run_efficiency(launch.write_run[merged], STORES) - 1)
    # L2 serves beside the memory, so its bytes count where they are drawn, not in the supply.
    drawn = (read + written + again) / launch.units
    supply = (read + again + written) / (bare + gaps) if bare else gpu.supply
    from_l2 = hits / (read + again) if read + again else 0.0
    waits = launch.trips * (gpu.latency * (1 - from_l2) + NEAR / gpu.clock / 1e3 * from_l2)
    works = launch.cycles / gpu.clock / 1e3
    unit = max(waits, works) if launch.ahead else waits + works
    memory = _rounds(launch.units, at_a_time, drawn, unit, supply, gpu)
    # As if the instructions took no time, to tell what is their share.
    idle = min(memory, _rounds(launch.units, at_a_time, drawn, waits, supply, gpu))
    lanes = gpu.sm_count * gpu.lanes * gpu.clock * 1e3
    whole = max(memory, launch.instructions / lanes, l2)
    return bare, gaps, idle - bare - gaps, whole - idle


def _hits(launch: Launch, gpu: Gpu, at_a_time: int) -> float:
    """Bytes of second reads that L2 still has."""
    again, room = sum(launch.moved.again.values()), L2_SHARE * gpu.l2_bytes
    if not launch.own_again:
        return min(again, room)
    return again * min(1.0, room / (launch.own_again * at_a_time))


def _rounds(
    units: int, at_a_time: int, drawn: float, unit: float, supply: float, gpu: Gpu
) -> float:
    """Microseconds of all rounds, the last of which may be short of units."""
    full, rest = divmod(units, at_a_time)
    time = full * at_a_time * drawn / _rate(at_a_time, drawn, unit, supply, gpu) if full else 0.0
    return time + (rest * drawn / _rate(rest, drawn, unit, supply, gpu) if rest else 0.0)


def _rate(units: int, drawn: float, unit: float, supply: float, gpu: Gpu) -> float:
    """Bytes per microsecond with so many units in flight, each `unit` microseconds long."""
    most = min(units, gpu.sm_count) * SM_BYTES * gpu.clock * 1e3
    return min(most, supply * (1 - math.exp(-units * drawn / unit / supply)) if unit else supply)


def copy_time(nbytes: int, gpu: Gpu) -> float:
    """A block per 16 KiB that reads and writes half of `nbytes` each: the roof."""
    units = max(1, -(-nbytes // (2 * COPY_TILE)))
    at_a_time = min(units, gpu.threads_per_sm // COPY_THREADS * gpu.sm_count)
    unit = gpu.latency + COPY_CYCLES / gpu.clock / 1e3
    return gpu.t0 + _rounds(units, at_a_time, nbytes / units, unit, gpu.supply, gpu)
