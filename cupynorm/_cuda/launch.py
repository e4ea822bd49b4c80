"""From a problem and a device to a settled launch, which takes addresses and a stream."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupynorm._cuda import rows, tiles
from cupynorm._cuda.arguments import ENTRIES
from cupynorm._cuda.plan import Device, Plan, Stage
from cupynorm._layout import Problem

# A loaded kernel: called with grid, block, arguments, bytes of shared memory and a stream, or None
# for CuPy's current one.
Function = Callable[..., None]

# Addresses in the order in which a launch takes them; 0 for what is absent.
FORWARD = ("x", "y", "weight", "bias", "mean", "rstd")
BACKWARD = ("dy", "x", "mean", "rstd", "weight", "dx", "dweight", "dbias")
COLUMNS = ("table", "y", "weight", "bias")

# The numbers that kernels/layer_norm_columns.cuh gives the types.
COLUMN_TYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)


def choose_plan(problem: Problem, device: Device) -> Plan:
    """Choose kernels and launches for a problem that is not empty, of any kind.

    Raises
    ------
    ValueError
        If a launch would need more than 2**31 - 1 blocks.
    """
    if problem.row_major and problem.has("x"):
        return rows.plan_of(problem, device)
    return tiles.plan_of(problem, device)


@dataclass(frozen=True, slots=True)
class Ready:
    """All of a call that does not depend on its addresses and eps."""

    plan: Plan
    functions: tuple[Function, ...]
    copies: tuple[str, ...]  # arrays that are met as row-major copies, normalized axes last
    workspace_bytes: int
    numbers: tuple[Any, ...]  # that the kernels are given, in the form that a launch takes them
    picks: tuple[Callable[[Any], tuple[Any, ...]], ...]  # the arguments of each stage
    # Where one launch does all: function, grid, block, shared bytes, the arguments between
    # addresses and eps, those after eps. Joining them costs a third of picking them.
    alone: tuple[Function, Any, Any, int, tuple[Any, ...], tuple[Any, ...]] | None = None

    def run(
        self, pointers: Sequence[int], eps: Any = 0.0, workspace: int = 0, stream: Any = None
    ) -> None:
        """Launch.

        Parameters
        ----------
        pointers : sequence of int
            Addresses, as FORWARD, BACKWARD or COLUMNS names them; 0 for what is absent.
        eps : float
            Added to the variance; a backward has none.
        workspace : int
            Address of `workspace_bytes` bytes, aligned to 16, that nothing else on the stream
            writes.
        stream : object with ``ptr``, optional
            Where to launch; CuPy's current stream by default. The device is the current one.
        """
        if self.alone is not None:
            function, grid, block, shared_bytes, numbers, after = self.alone
            function(grid, block, (*pointers, *numbers, eps, *after), shared_bytes, stream)
            return
        places = (workspace + begin for _, begin in self.plan.workspace)
        given = (*pointers, eps, *places, *self.numbers)
        for stage, function, pick in zip(self.plan.stages, self.functions, self.picks, strict=True):
            function(stage.grid, stage.block, pick(given), stage.shared_bytes, stream)


def ready(
    problem: Problem,
    device: Device,
    load: Callable[[Stage], Function],
    pack: Callable[[Iterable[int]], tuple[Any, ...]] = tuple,
) -> Ready:
    """Plan a problem that is not empty, load its kernels, and lay out their arguments.

    Parameters
    ----------
    problem : Problem
    device : Device
    load : callable
        The function of a stage, on the device that is current.
    pack : callable, optional
        Turns numbers that are the same at each call into what `load`'s functions take at least
        cost.
    """
    plan = choose_plan(problem, device)
    functions = tuple(load(stage) for stage in plan.stages)
    pointers = BACKWARD if problem.backward else FORWARD if problem.has("x") else COLUMNS
    constants = _constants(problem, plan)
    names = [ENTRIES[stage.kernel].names for stage in plan.stages]
    moving = (*pointers, "eps", *(name for name, _ in plan.workspace))
    fixed = tuple(dict.fromkeys(n for entry in names for n in entry if n not in moving))
    numbers = pack(constants[name] for name in fixed)
    place = {name: i for i, name in enumerate((*moving, *fixed))}
    alone, first = None, names[0]
    if len(names) == 1 and first[: len(pointers)] == pointers and "eps" in first:
        at, head = first.index("eps") - len(pointers), plan.stages[0]
        shape = (functions[0], head.grid, head.block, head.shared_bytes)
        alone = (*shape, numbers[:at], numbers[at:])
    return Ready(
        plan,
        functions,
        tuple(name for name, _ in problem.copies),
        plan.workspace_bytes,
        numbers,
        tuple(operator.itemgetter(*(place[name] for name in entry)) for entry in names),
        alone,
    )


def _constants(problem: Problem, plan: Plan) -> dict[str, int]:
    """Every number that an entry may be given, by the name that it has in the table."""
    found = {
        "rows": problem.rows,
        "M": problem.M,
        "N": problem.N,
        "stats_outer": problem.stats_strides[0],
        "stats_row": problem.stats_strides[1],
        "sections": plan.sections,
        "chunks_per_section": plan.chunks_per_section,
        "parts": plan.parts,
        "panel": plan.panel,
        "slots": plan.slots,
        "count": plan.partials,
        "pitch": plan.pitch,
    }
    # Where dx is not wanted its strides are those of x: no kernel looks at them.
    strides = {"dx": problem.strides[0][1], **dict(problem.strides)}
    for array, steps in strides.items():
        for axis, step in zip(("outer", "row", "col"), steps, strict=True):
            found[f"{array}_{axis}"] = step
    return found


def column_table(columns: Iterable[tuple[int, int, int, str]]) -> np.ndarray[Any, Any]:
    """Where K7 finds its columns: address, address of the validity or 0, stride, dtype's name."""
    rows_of_table = [
        (values, validity, stride, COLUMN_TYPES.index(dtype))
        for values, validity, stride, dtype in columns
    ]
    return np.array(rows_of_table, dtype=np.int64)
