"""From a problem and a device to a settled launch, which takes addresses and a stream."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cupynorm._cuda import rows, tiles
from cupynorm._cuda.arguments import entry_of
from cupynorm._cuda.plan import VEC_BYTES, Device, Plan, Stage
from cupynorm._layout import Problem
from cupynorm._rules import ITEMSIZE, stats_dtype

# A loaded kernel: called with grid, block, arguments, bytes of shared memory and a stream, or None
# for CuPy's current one.
Function = Callable[..., None]
# With its grid, block, bytes of shared memory, and what picks its arguments from all.
Launch = tuple[Function, Any, Any, int, Callable[[Any], tuple[Any, ...]]]

# Addresses in the order in which a launch takes them; 0 for what is absent.
FORWARD = ("x", "y", "weight", "bias", "mean", "rstd")
BACKWARD = ("dy", "x", "mean", "rstd", "weight", "dx", "dweight", "dbias")
RESIDUAL = ("residual", "sum", "dsum")  # after these, where there is one
COLUMNS = ("table", "y", "weight", "bias")

# The numbers that kernels/columns.cuh gives the types.
COLUMN_TYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
)

# Numbers of a plan that entries are given.
_OF_PLANS = ("sections", "chunks_per_section", "parts", "panel", "slots", "pitch")


def choose_plan(problem: Problem, device: Device) -> Plan:
    """Choose kernels and launches for a problem that is not empty, of any kind."""
    if problem.row_major and problem.has("x"):
        return rows.plan_of(problem, device)
    return tiles.plan_of(problem, device)


def check_aligned(name: str, at: int, itemsize: int) -> None:
    """Refuse an address that no kernel can load an item from: the GPU would do no more work."""
    if at % itemsize:
        name = {"y": "out", "sum": "sum_out"}.get(name, name)
        msg = (
            f"{name} begins at address {at:#x}, no multiple of the {itemsize} bytes of its items, "
            "which a GPU cannot read; copy its bytes to memory of their own first"
        )
        raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class Ready:
    """All of a call that does not depend on its addresses and eps."""

    plan: Plan
    sizes: tuple[tuple[str, int], ...]  # names of the addresses, and bytes of an item there
    copies: tuple[str, ...]  # arrays that are met as row-major copies, normalized axes last,
    dtype: str  # of this dtype, which is x's in all kernels
    workspace_bytes: int
    # What the kernels are given lies in this order: addresses, `before`, eps, `after`, places in
    # the workspace. That is the first entry's own order, so that one launch needs no picking.
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    launches: tuple[Launch, ...]
    # The same for any address, where `launches` want every one to be a multiple of 16.
    skewed: Callable[[], tuple[Launch, ...]] | None

    @property
    def alone(self) -> bool:
        """Whether one launch, which takes all in that order, does it."""
        return len(self.launches) == 1 and self.launches[0][-1] is tuple

    @property
    def low_bits(self) -> int:
        """Those that no address may have that `launches` are given without a further look."""
        most = max(size for _, size in self.sizes)
        return most - 1 if self.skewed is None else VEC_BYTES - 1

    def run(
        self, pointers: Iterable[int], eps: Any = 0.0, workspace: int = 0, stream: Any = None
    ) -> None:
        """Launch on the current device, on CuPy's current stream if none is given.

        `pointers` are addresses as FORWARD, BACKWARD or COLUMNS names them, 0 for what is absent;
        at `workspace` are `workspace_bytes` bytes, aligned to 16, that nothing else on the stream
        writes.
        """
        pointers, launches = tuple(pointers), self.launches
        if functools.reduce(operator.or_, pointers) & self.low_bits:
            for (name, size), at in zip(self.sizes, pointers, strict=True):
                check_aligned(name, at, size)
            launches = launches if self.skewed is None else self.skewed()
        given = (*pointers, *self.before, eps, *self.after)
        if self.plan.workspace:
            given += tuple(workspace + begin for _, begin in self.plan.workspace)
        for function, grid, block, shared_bytes, pick in launches:
            function(grid, block, pick(given), shared_bytes, stream)


def ready(
    problem: Problem,
    device: Device,
    load: Callable[[Stage], Function],
    pack: Callable[[Iterable[int]], tuple[Any, ...]] = tuple,
) -> Ready:
    """Plan a problem that is not empty, load its kernels, and lay out their arguments.

    `load` gives the function of a stage on the device that is current; `pack` turns numbers that
    are the same at each call into what such a function takes at least cost.
    """
    plan = choose_plan(problem, device)
    known = BACKWARD if problem.backward else FORWARD if problem.has("x") else COLUMNS
    pointers = *known, *(name for name in RESIDUAL if problem.has(name))
    places = [name for name, _ in plan.workspace]
    entries = [entry_of(stage.template, stage.op.residual).names for stage in plan.stages]
    fixed = [n for n in dict.fromkeys(itertools.chain(*entries)) if n not in (*pointers, *places)]
    at = fixed.index("eps") if "eps" in fixed else len(fixed)
    before, after = fixed[:at], fixed[at + 1 :]
    order = (*pointers, *before, "eps", *after, *places)
    constants = _constants(problem, plan)

    def launch(stage: Stage, names: tuple[str, ...]) -> Launch:
        pick = tuple if names == order else operator.itemgetter(*map(order.index, names))
        return load(stage), stage.grid, stage.block, stage.shared_bytes, pick

    @functools.cache
    def skewed() -> tuple[Launch, ...]:
        return tuple(launch(s.skewed, n) for s, n in zip(plan.stages, entries, strict=True))

    copies = tuple(name for name, _ in problem.copies)
    return Ready(
        plan,
        tuple((name, _item_bytes(problem, name)) for name in pointers),
        copies,
        str(problem.dtype("x")),
        plan.workspace_bytes,
        pack(constants[name] for name in before),
        pack(constants[name] for name in after),
        tuple(map(launch, plan.stages, entries)),
        skewed if any(stage.aligned for stage in plan.stages) else None,
    )


def _item_bytes(problem: Problem, name: str) -> int:
    """Of an array that a launch is given the address of."""
    if name == "table":
        return 8
    x = str(problem.dtype("x"))
    kind = stats_dtype(x) if name in ("mean", "rstd") else problem.dtype(name) or x
    return ITEMSIZE[kind]


def _constants(problem: Problem, plan: Plan) -> dict[str, int]:
    """Every number that an entry may be given, by the name that it has in the table."""
    # Where dx is not wanted its strides are those of x: no kernel looks at them.
    strides = {"dx": problem.strides[0][1], **dict(problem.strides)}
    steps = {"stats": problem.stats_strides, **strides}
    axes = "outer", "row", "col"
    return {
        **{f"{a}_{axis}": n for a, ns in steps.items() for axis, n in zip(axes, ns, strict=False)},
        **{name: getattr(problem, name) for name in ("rows", "M", "N")},
        **{name: getattr(plan, name) for name in _OF_PLANS},
        "count": plan.partials,
    }
