"""What a plan's launches do for the cost model: bytes by closed formulas, waits, instructions.

A family is a function from (problem, plan, gpu) to its launches, named in FAMILIES; a new kernel
family is a new line there. `tests/test_model.py` holds the bytes to what the simulator counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.model_code import Instructions, instructions_of
from bench.model_gpus import Gpu
from cupynorm._cuda.plan import VEC_BYTES, Stage
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = [
    "BARRIER",
    "CLUSTER_BARRIER",
    "FAMILIES",
    "FAR",
    "ISSUE",
    "NEAR",
    "SHUFFLE",
    "Launch",
    "Moved",
    "Run",
    "accumulator",
    "cluster_of",
    "family",
    "group_run",
    "launches_of",
    "vector_bytes",
    "work",
]

# Cycles, estimates: a shuffle with the addition that waits for it, a barrier, an access that L1 or
# L2 serves, and an instruction of a warp that has no other to wait behind.
SHUFFLE, BARRIER, NEAR, ISSUE = 30, 60, 250, 2
CLUSTER_BARRIER = 400  # with the exchange through distributed shared memory
# Of the code that `bench/model_code.py` counts per row and thread; the rest is slow paths of
# divisions and what a block does once. An estimate.
EXECUTED = 0.4
FAR = 1 << 20  # bytes next to each other: no gap that costs
# Bytes that lie together of what one access of a warp touches, and of what its block does.
Run = tuple[int, int]


@dataclass(frozen=True)
class Moved:
    """Bytes by buffer. Reads of weight, bias and what another launch has just written are near."""

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)  # read before in the same call
    near: dict[str, int] = field(default_factory=dict)  # distinct per block


@dataclass(frozen=True)
class Launch:
    """One launch. A unit is what a block does between a load and the stores that follow from it."""

    stage: Stage
    moved: Moved
    units: int
    blocks: int  # that take the units; fewer blocks than units go round
    trips: float  # waits for memory in a unit, one after the other
    cycles: float  # of a unit, besides them
    instructions: float  # of lanes, in all
    ahead: bool = False  # the loads of the next unit are on their way meanwhile
    read_run: Run = (FAR, FAR)
    write_run: Run = (FAR, FAR)
    own_again: int = 0  # bytes that a block keeps for itself until it reads them again; 0: the call


Family = Callable[[Any, Any, Gpu], list[Launch]]
FAMILIES: dict[tuple[str, str], Family] = {}  # by type of the problem and family of the plan


def family(problem: type, *names: str) -> Callable[[Family], Family]:
    """Name the function that tells a family's launches."""

    def put(function: Family) -> Family:
        for name in names:
            FAMILIES[problem.__name__, name] = function
        return function

    return put


def launches_of(problem: Any, plan: Any, gpu: Gpu) -> list[Launch]:
    """Launches of a plan, in order."""
    import bench.model_columns
    import bench.model_rows
    import bench.model_rows_bwd  # noqa: F401 - they name their families

    key = type(problem).__name__, plan.family
    if key not in FAMILIES:
        msg = f"the cost model knows no family {key}; add it in bench/model_*.py"
        raise ValueError(msg)
    return FAMILIES[key](problem, plan, gpu)


def work(gpu: Gpu, dtype: str, direction: str, elements: float, rows: float = 1) -> float:
    """Instructions of a lane for its elements of `rows` rows."""
    n: Instructions = instructions_of(gpu.compute_capability, dtype, direction)
    return n.per_element * elements + EXECUTED * (n.per_row * rows + n.per_thread)


def accumulator(problem: Any) -> int:
    """Bytes of a sum."""
    return ITEMSIZE[stats_dtype(getattr(problem, "x_dtype", None) or problem.y_dtype)]


def vector_bytes(problem: Any, *names: str) -> dict[str, int]:
    """Bytes of weight, bias, dweight and dbias: those that there are."""
    dtypes = {n: getattr(problem, f"{n}_dtype") for n in names}
    return {n: problem.N * ITEMSIZE[d] for n, d in dtypes.items() if d}


def cluster_of(stage: Stage) -> int:
    """Blocks that share a row."""
    return int(getattr(stage, "cluster", 1))


def group_run(lanes: int, vecs: int) -> Run:
    """Of lanes that hold a row of so many vectors each; a warp's rows are neighbours."""
    return (FAR if vecs == 1 else VEC_BYTES * min(32, lanes)), FAR
