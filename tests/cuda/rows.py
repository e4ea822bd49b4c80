"""Runs kernels, forward and backward, on rows at any address, pitch, batch and order of memory.

Each run also checks that no byte between the rows is written and, in the simulator, that every
element is. `execute` alone knows how a plan is executed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cupynorm._cuda import rows as tables
from cupynorm._cuda.launch import BACKWARD, FORWARD, ready
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device, Plan, Stage
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests import oracle
from tests.conftest import ALL_DTYPES, np_dtype
from tests.gpu_backend import Machine
from tests.ptx.launch import Traffic

FAMILIES = ("warp", "block", "shared", "split")
DIRECTIONS = ("forward", "backward")
EACH = pytest.mark.parametrize("direction", DIRECTIONS)
DX_ALONE = (True, False, False)
# Arrays of x's shape, in the order in which tests place them.
SHAPED = {"forward": ("x", "y"), "backward": ("dy", "x", "dx")}


def problem_of(
    dtypes: dict[str, str | None],
    sizes: tuple[int, int, int],
    strides: dict[str, tuple[int, ...]],
    backward: bool = False,
    **more: Any,
) -> Problem:
    """A problem from what tests know of it; dtypes may be None, strides may lack the columns'."""
    named = tuple((a, d) for a, d in dtypes.items() if d)
    steps = tuple((a, (*s, 1)[:3]) for a, s in strides.items())
    return Problem(LAYER_NORM, backward, named, *sizes, steps, (sizes[1], 1), **more)


# --- values -------------------------------------------------------------------------------------


def values(rows, N, dtype="float32", scale=3.0, offset=5.0):
    """The same for the same shape, in whatever order tests run."""
    rng = np.random.default_rng((rows, N))
    return (rng.standard_normal((rows, N)) * scale + offset).astype(np_dtype(dtype))


@functools.cache
def affine(N, weight="float32", bias="float32"):
    """The same vectors for the same N: every case of a length compares bits with the others."""
    rng = np.random.default_rng(N)
    return tuple(
        None if d is None else rng.standard_normal(N).astype(np_dtype(d)) for d in (weight, bias)
    )


@dataclass(frozen=True)
class Case:
    """What one call is given: x, and of a backward dy; a backward has no bias."""

    direction: str
    x: np.ndarray  # (rows, N)
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    dy: np.ndarray | None = None

    @property
    def backward(self):
        return self.direction == "backward"

    @property
    def shaped(self):
        return SHAPED[self.direction]

    def rows(self, which):
        """The same call on some rows, or on rows in another order."""
        dy = None if self.dy is None else self.dy[which].copy()
        return dataclasses.replace(self, x=self.x[which].copy(), dy=dy)

    def many(self, times):
        """All rows several times."""
        return self.rows(np.tile(np.arange(len(self.x)), times))


def case(direction, rows, N, dtype="float32", weight="float32", bias="float32", **x):
    """dy has mean 1/2 and is independent of x."""
    w, b = affine(N, weight, bias)
    x = values(rows, N, dtype, **x)
    if direction == "forward":
        return Case(direction, x, w, b)
    dy = np.random.default_rng((N, rows, 2)).standard_normal((rows, N)) + 0.5
    return Case(direction, x, w, None, dy.astype(np_dtype(dtype)))


def length(family, dtype, direction="forward"):
    """A row of the family whose columns fill neither its vectors nor its lanes.

    The backward's of K3 and K5 are among the shortest.
    """
    vecs = {"warp": 40, "block": 300, "shared": 2 * CHUNK_VECS + 300, "split": 3 * CHUNK_VECS - 7}
    vecs["cluster"] = vecs["shared"]
    if direction == "backward":
        vecs |= dict.fromkeys(("shared", "split"), CHUNK_VECS + 60)
        vecs["cluster"] = 2 * CHUNK_VECS + 60
    return vecs[family] * VEC_BYTES // ITEMSIZE[dtype] - 1


def cols(chunks, dtype, more=0):
    """Columns of so many chunks and `more` vectors, but one."""
    return (chunks * CHUNK_VECS + more) * VEC_BYTES // ITEMSIZE[dtype] - 1


# The two kernels of rows of whole vectors: a type for each family.
WHOLE = [
    *zip(["forward"] * 5, (*FAMILIES, "cluster"), ("bfloat16", "float32") * 3, strict=False),
    *zip(["backward"] * 5, (*FAMILIES, "cluster"), ("float32", "bfloat16") * 3, strict=False),
    *(("forward", "warp", "float64"), ("forward", "block", "float16")),
]


def edges():
    """The ends of the tables' rows: a type for each, that of the next one's first length."""
    most = 227 * 1024 // VEC_BYTES - 60  # of sm_90
    forward = [min(row.max_vecs, most) for row in tables.FORWARD[:-1] if row.cluster == 1]
    backward = [row.max_vecs for row in tables.BACKWARD if row.family in tables.REGISTERS]
    for direction, limits in (("forward", forward), ("backward", backward)):
        yield from ((direction, ALL_DTYPES[i % 4], vecs) for i, vecs in enumerate(limits))


# --- devices ------------------------------------------------------------------------------------


def device_for(machine, family, direction="forward", sm_count=None):
    """A device on which a few rows of the family's length take it."""
    device = machine.device
    if family == "split":  # K3 and K4 hold nothing
        device = dataclasses.replace(device, shared_bytes=0)
    if family == "cluster" and device.compute_capability < 90:
        pytest.skip("clusters need sm_90 or newer")
    if direction == "forward" and family in ("shared", "cluster"):  # few rows are enough
        device = dataclasses.replace(device, sm_count=1)
    if direction == "forward" and family == "shared":
        device = dataclasses.replace(device, max_cluster=1)
    return device if sm_count is None else dataclasses.replace(device, sm_count=sm_count)


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:
    """How rows lie in memory; all in elements."""

    offset: int = 0  # of the first row, from a 256-byte boundary
    gap: int = 0  # between rows: the pitch is N + gap; of F between columns
    outer_gap: int = 0  # between batches, besides that
    way: str = "C"  # F: neighbouring rows are next to each other

    def strides(self, outer: int, M: int, N: int) -> tuple[int, int, int]:
        """For (outer, M, N)."""
        if self.way == "F":
            return N * (M + self.gap) + self.outer_gap, 1, M + self.gap
        return M * (N + self.gap) + self.outer_gap, N + self.gap, 1


HERE = At()


def spread(case, i):
    """Another alignment of each array, and of each row, for each i."""
    places = At(i, i % 3), At(3 * i + 1, (i + 1) % 2), At(2 * i, i % 2)
    return dict(zip(case.shaped, places, strict=False))


class Rows:
    """The rows of one array in a machine's memory, and nothing between them."""

    def __init__(
        self, machine: Machine, name: str, dtype: Any, shape: tuple[int, int, int], at: At = HERE
    ) -> None:
        self.machine, self.dtype, self.way = machine, np.dtype(dtype), at.way
        self.strides = at.strides(*shape)
        steps = [np.arange(n) * s for n, s in zip(shape, self.strides, strict=True)]
        self.places = np.add.outer(np.add.outer(*steps[:2]).ravel(), steps[2])  # (rows, N)
        size = self.dtype.itemsize
        nbytes = (int(self.places.max()) + 1) * size
        self.memory = machine.memory(nbytes, name, at.offset * size, size)
        self.M = shape[1]

    @property
    def ptr(self) -> int:
        return self.memory.ptr

    def put(self, rows: np.ndarray) -> None:
        starts, runs = self.places[:, 0], rows
        if self.way == "F":  # the columns of each batch
            starts = self.places[:: self.M].ravel()
            runs = rows.reshape(-1, self.M, rows.shape[1]).swapaxes(1, 2).reshape(-1, self.M)
        for start, run in zip(starts, runs, strict=True):
            self.machine.put(self.memory, run, int(start) * self.dtype.itemsize)

    def get(self) -> np.ndarray:
        """The rows; every element of theirs was written, and nothing else."""
        written = self.machine.written(self.memory).reshape(-1, self.dtype.itemsize)
        if self.machine.name == "simulated":
            assert written[self.places].all(), "a kernel left an element unwritten"
        between = np.ones(len(written), bool)
        between[self.places] = False
        assert not written[between].any(), "a kernel wrote between the rows"
        return self.machine.get(self.memory).view(self.dtype)[self.places]


def vector_at(machine: Machine, name: str, vector: np.ndarray | None, offset: int) -> Rows | None:
    if vector is None:
        return None
    rows = Rows(machine, name, vector.dtype, (1, 1, vector.size), At(offset))
    rows.put(vector[None])
    rows.memory.writable = False
    return rows


def far_rows(machine, name, nbytes):
    """Two pieces of memory at least 2**31 float16 apart."""
    first = machine.memory(nbytes, f"{name} 0", itemsize=2)
    taken = [machine.hole(5 * 2**30)]
    second = machine.memory(nbytes, f"{name} 1", itemsize=2)
    while abs(second.ptr - first.ptr) < 2**32:  # in some older gap: fill it
        if len(taken) > 3000:
            pytest.skip("the allocator gave no addresses far apart")
        taken.append(machine.hole(2**26 >> min(len(taken) // 100, 12)))
        taken.append(second)
        second = machine.memory(nbytes, f"{name} 1", itemsize=2)
    return first, second


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a plan wrote, and what its launches moved (nothing is counted on a GPU)."""

    arrays: tuple[np.ndarray | None, ...]  # y, mean, rstd; or dx, dweight, dbias
    backward: bool
    plan: Plan
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)
    totals: tuple[Traffic, ...] = field(default=(), repr=False)  # of column_totals

    def bits(self) -> tuple[bytes | None, ...]:
        """Of all arrays."""
        return tuple(None if a is None else a.tobytes() for a in self.arrays)

    def rows(self) -> list[bytes]:
        """Of each row: y, mean and rstd, or dx."""
        first, *rest = self.arrays
        assert first is not None
        with_it = [] if self.backward or rest[0] is None else [a[:, None] for a in rest]
        return [b"".join(a[i].tobytes() for a in (first, *with_it)) for i in range(len(first))]


def statistics(x: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """The mean and rstd that a forward leaves: the exact ones, rounded."""
    kind = stats_dtype(x.dtype.name)
    _, mean, rstd = oracle.layer_norm(x, (1,), None, None, eps)
    return mean[:, 0].astype(kind), rstd[:, 0].astype(kind)


def run(
    machine: Machine,
    case: Case,
    family: str | None = None,
    *,
    at: dict[str, At] = {},  # noqa: B006
    affine_offset: int = 0,
    outer: int = 1,
    seed: int | None = 0,
    eps: float = 1e-5,
    device: Device | None = None,
    sm_count: int | None = None,
    stats: bool = True,  # of a forward
    in_place: bool = False,
    wanted: Sequence[bool] = (True, True, True),  # of a backward
) -> Result:
    """Run the plan for a case, with a family by force where one is named."""
    if family is not None or sm_count is not None:
        device = device_for(machine, family, case.direction, sm_count)
    (rows, N), dtype = case.x.shape, case.x.dtype.name
    sizes, kind = (outer, rows // outer, N), stats_dtype(dtype)
    arrays: dict[str, Any] = {}
    for name in case.shaped:
        arrays[name] = Rows(machine, name, case.x.dtype, sizes, at.get(name, HERE))
        given = {"x": case.x, "dy": case.dy}.get(name)
        if given is not None:
            arrays[name].put(given)
            arrays[name].memory.writable = False
    dtypes = {"x": dtype}
    for name, vector in (("weight", case.weight), ("bias", case.bias)):
        arrays[name] = vector_at(machine, name, vector, affine_offset)
        dtypes[name] = None if vector is None else vector.dtype.name
    results: tuple[str, ...] = ("y", "mean", "rstd")
    if case.backward:
        results = ("dx", "dweight", "dbias")
        arrays["dx"] = arrays["dx"] if wanted[0] else None
        for name, vector in zip(("mean", "rstd"), statistics(case.x, eps), strict=True):
            arrays[name] = vector_at(machine, name, vector, 0)
        total = dtypes["weight"] or kind
        for name, want in zip(results[1:], wanted[1:], strict=True):
            dtypes[name] = total if want else None
            arrays[name] = Rows(machine, name, np_dtype(total), (1, 1, N)) if want else None
    else:
        for name in ("mean", "rstd"):
            arrays[name] = Rows(machine, name, kind, (1, 1, rows)) if stats else None
        if in_place:
            arrays["y"] = arrays["x"]
            arrays["x"].memory.writable = True
    there = {name: a for name, a in arrays.items() if a is not None}
    strides = {name: there[name].strides for name in case.shaped if name in there}
    problem = problem_of(dtypes, sizes, strides, case.backward, stats=stats and not case.backward)
    pointers = {name: a.ptr for name, a in there.items()}
    memories = list({a.ptr: a.memory for a in there.values()}.values())
    plan, traffic = execute(machine, problem, device, pointers, memories, eps=eps, seed=seed)
    assert family is None or plan.family == family
    got = [there[name].get() if name in there else None for name in results]
    flat = (None if a is None else a[0] for a in got[1:])
    ours = sum(stage.template != "column_totals" for stage in plan.stages)
    return Result((got[0], *flat), case.backward, plan, traffic[:ours], traffic[ours:])


def execute(
    machine: Machine,
    problem: Problem,
    device: Device | None,
    pointers: dict[str, int],
    memories: Sequence[Any],
    *,
    eps: float = 1e-5,
    seed: int | None = 0,
) -> tuple[Plan, tuple[Traffic, ...]]:
    """Launch each stage of the plan of a problem, on arrays by name.

    The simulator takes most of a backward's time for the 1024 threads with which column_totals adds
    up 32 columns: those of long rows are added here.
    """
    traffic, host = [], machine.name == "simulated" and problem.N > 1024

    def load(stage: Stage) -> Any:
        def launch(grid: Any, block: Any, args: Any, shared_bytes: int, stream: Any) -> None:
            if stage.template == "column_totals" and host:
                add_partials(machine, {m.ptr: m for m in held}, stage, *args)
            else:
                traffic.append(machine.run(stage, args, held, seed))

        return launch

    settled = ready(problem, device or machine.device, load)
    workspace = machine.memory(max(settled.workspace_bytes, 16), "workspace")
    held = [*memories, workspace]
    names = BACKWARD if problem.backward else FORWARD
    settled.run([pointers.get(name, 0) for name in names], eps, workspace.ptr)
    return settled.plan, tuple(t for t in traffic if t is not None)


def add_partials(machine, memories, stage, partials, count, pitch, N, *targets):
    """What column_totals does, bit for bit, as test_row_inputs.py shows."""
    wanted = zip(targets, (stage.weight_dtype, stage.bias_dtype), strict=True)
    wanted, kind = [(memories[at], d) for at, d in wanted if at], np.dtype(stage.x_dtype)
    flat = machine.get(memories[partials]).view(kind)[: len(wanted) * count * pitch]
    sums = np.zeros((len(wanted), -(-count // 32) * 32, N), kind)
    sums[:, :count] = flat.reshape(len(wanted), count, pitch)[..., :N]
    sums = functools.reduce(np.add, np.split(sums, -(-count // 32), axis=1))
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    for (memory, dtype), total in zip(wanted, sums[:, 0], strict=True):
        machine.put(memory, total.astype(np_dtype(dtype)))


def check(result: Result, case: Case, eps: float = 1e-5) -> None:
    """Compare with the oracle; a mean may cancel terms of any size."""
    x, N = case.x, case.x.shape[1]
    if case.backward:
        oracle.assert_gradients(result.arrays, case.dy, x, (1,), case.weight, eps)
        return
    y, mean, rstd = oracle.layer_norm(x, (1,), case.weight, case.bias, eps)
    kind = stats_dtype(x.dtype.name)
    wanted = (
        (y, x.dtype.name, 1.0),
        (mean[:, 0], kind, float(np.abs(x).max())),
        (rstd[:, 0], kind, 1.0),
    )
    for got, (want, dtype, scale) in zip(result.arrays, wanted, strict=True):
        if got is not None:
            bound = oracle.tolerance(dtype, N)
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=bound, atol=bound * scale)
