"""Runs the row kernels, forward and backward, on rows at any address, pitch and batch.

Each run also checks that no byte between the rows is written and, in the simulator, that every
element is. The argument lists are written here a second time, apart from `cupynorm._cuda`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device, Plan
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests import oracle
from tests.conftest import np_dtype
from tests.gpu_backend import Machine
from tests.simt.launch import Traffic

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


def slope_of(rows, N, dtype="float32"):
    """dy, of mean 1/2, independent of x."""
    slope = np.random.default_rng((N, rows, 2)).standard_normal((rows, N)) + 0.5
    return slope.astype(np_dtype(dtype))


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
    w, b = affine(N, weight, bias)
    x = values(rows, N, dtype, **x)
    if direction == "forward":
        return Case(direction, x, w, b)
    return Case(direction, x, w, None, slope_of(rows, N, dtype))


def length(family, dtype, direction="forward"):
    """A row of the family whose columns fill neither its vectors nor its lanes.

    The backward's of K3 and K5 are among the shortest: a block of 1024 threads adds up 32 columns.
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


def need_the_memory_of_sm_90(machine):
    """Skip what looks at K4's table on a device that holds less of a row, such as sm_120."""
    if machine.device.shared_bytes < 227 * 1024:
        pytest.skip("this row of the table is for devices with 227 KiB of shared memory")


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:
    """How rows lie in memory; all in elements."""

    offset: int = 0  # of the first row, from a 256-byte boundary
    gap: int = 0  # between rows: the pitch is N + gap
    outer_gap: int = 0  # between batches, besides that

    def strides(self, M: int, N: int) -> tuple[int, int]:
        """Of the outer step and of a row."""
        return M * (N + self.gap) + self.outer_gap, N + self.gap


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
        outer, M, N = shape
        self.machine, self.dtype = machine, np.dtype(dtype)
        self.strides = at.strides(M, N)
        starts = np.add.outer(np.arange(outer) * self.strides[0], np.arange(M) * self.strides[1])
        self.columns = starts.reshape(-1, 1) + np.arange(N)
        size = self.dtype.itemsize
        nbytes = (int(self.columns[-1, -1]) + 1) * size
        self.memory = machine.memory(nbytes, name, at.offset * size, size)

    @property
    def ptr(self) -> int:
        return self.memory.ptr

    def put(self, rows: np.ndarray) -> None:
        for start, row in zip(self.columns[:, 0], rows, strict=True):
            self.machine.put(self.memory, row, int(start) * self.dtype.itemsize)

    def get(self) -> np.ndarray:
        """The rows; every element of theirs was written, and nothing else."""
        written = self.machine.written(self.memory).reshape(-1, self.dtype.itemsize)
        if self.machine.name == "simulated":
            assert written[self.columns].all(), "a kernel left an element unwritten"
        between = np.ones(len(written), bool)
        between[self.columns] = False
        assert not written[between].any(), "a kernel wrote between the rows"
        return self.machine.get(self.memory).view(self.dtype)[self.columns]


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
    """What a plan wrote, and what each of its launches moved (nothing is counted on a GPU)."""

    arrays: tuple[np.ndarray | None, ...]  # y, mean, rstd; or dx, dweight, dbias
    backward: bool
    plan: Plan
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)

    def bits(self) -> tuple[bytes | None, ...]:
        """Of all arrays."""
        return tuple(None if a is None else a.tobytes() for a in self.arrays)

    def rows(self) -> list[bytes]:
        """Of each row: y, mean and rstd, or dx."""
        first, *rest = self.arrays
        assert first is not None
        with_it = [] if self.backward or rest[0] is None else [a[:, None] for a in rest]
        return [b"".join(a[i].tobytes() for a in (first, *with_it)) for i in range(len(first))]


def run(machine: Machine, case: Case, family: str | None = None, **options: Any) -> Result:
    """Run the plan for a case, with a family by force where one is named.

    Options: at (by array), affine_offset, outer, seed, eps, device, sm_count; of a forward stats
    and in_place, of a backward wanted and totals (dtypes of dweight and dbias).
    """
    sm_count = options.pop("sm_count", None)
    if family is not None or sm_count is not None:
        options["device"] = device_for(machine, family, case.direction, sm_count)
    result = (differentiate if case.backward else normalize)(machine, case, **options)
    assert family is None or result.plan.family == family
    return result


def _placed(machine: Machine, case: Case, outer: int, at: dict[str, At]) -> dict[str, Any]:
    """Arrays of x's shape: those that are given hold their values."""
    rows, N = case.x.shape
    found = {}
    for name in case.shaped:
        found[name] = Rows(
            machine, name, case.x.dtype, (outer, rows // outer, N), at.get(name, HERE)
        )
        given = {"x": case.x, "dy": case.dy}.get(name)
        if given is not None:
            found[name].put(given)
            found[name].memory.writable = False
    return found


def normalize(
    machine: Machine,
    case: Case,
    *,
    at: dict[str, At] = {},  # noqa: B006
    affine_offset: int = 0,
    outer: int = 1,
    seed: int | None = 0,
    eps: float = 1e-5,
    device: Device | None = None,
    stats: bool = True,
    in_place: bool = False,
) -> Result:
    """Run the forward's plan."""
    (rows, N), dtype = case.x.shape, case.x.dtype.name
    arrays = _placed(machine, case, outer, at)
    if in_place:
        arrays["y"] = arrays["x"]
        arrays["x"].memory.writable = True
    vectors = {"weight": case.weight, "bias": case.bias}
    dtypes = {"x": dtype} | {n: None if v is None else v.dtype.name for n, v in vectors.items()}
    for name, vector in vectors.items():
        arrays[name] = vector_at(machine, name, vector, affine_offset)
    for name in ("mean", "rstd"):
        arrays[name] = Rows(machine, name, stats_dtype(dtype), (1, 1, rows)) if stats else None
    strides = {name: arrays[name].strides for name in case.shaped}
    problem = problem_of(dtypes, (outer, rows // outer, N), strides, stats=stats)
    plan = choose_plan(problem, device or machine.device)
    pointers = [0 if a is None else a.ptr for a in arrays.values()]
    memories = list({a.ptr: a.memory for a in arrays.values() if a is not None}.values())
    traffic = run_plan(machine, plan, problem, pointers, memories, eps=eps, seed=seed)
    y, mean, rstd = (arrays[name] for name in ("y", "mean", "rstd"))
    got = y.get(), *(None if a is None else a.get()[0] for a in (mean, rstd))
    return Result(got, False, plan, traffic)


def statistics(x: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """The mean and rstd that a forward leaves: the exact ones, rounded."""
    kind = stats_dtype(x.dtype.name)
    _, mean, rstd = oracle.layer_norm(x, (1,), None, None, eps)
    return mean[:, 0].astype(kind), rstd[:, 0].astype(kind)


def differentiate(
    machine: Machine,
    case: Case,
    *,
    at: dict[str, At] = {},  # noqa: B006
    affine_offset: int = 0,
    outer: int = 1,
    seed: int | None = 0,
    eps: float = 1e-5,
    device: Device | None = None,
    wanted: Sequence[bool] = (True, True, True),
    totals: Sequence[str] = (),  # weight's dtype, or the statistics'
) -> Result:
    """Run the backward's plan."""
    (rows, N), dtype = case.x.shape, case.x.dtype.name
    placed = _placed(machine, case, outer, at)
    arrays: dict[str, Any] = {name: placed[name] for name in ("dy", "x")}
    for name, vector in zip(("mean", "rstd"), statistics(case.x, eps), strict=True):
        arrays[name] = vector_at(machine, name, vector, 0)
    arrays["weight"] = vector_at(machine, "weight", case.weight, affine_offset)
    arrays["dx"] = placed["dx"] if wanted[0] else None
    weight = None if case.weight is None else case.weight.dtype.name
    totals = totals or (weight or stats_dtype(dtype),) * 2
    dtypes = {"x": dtype, "weight": weight}
    for name, kind, want in zip(("dweight", "dbias"), totals, wanted[1:], strict=True):
        dtypes[name] = kind if want else None
        arrays[name] = Rows(machine, name, np_dtype(kind), (1, 1, N)) if want else None
    strides = {n: placed[n].strides for n in ("x", "dy", "dx") if arrays[n] is not None}
    problem = problem_of(dtypes, (outer, rows // outer, N), strides, backward=True)
    plan = choose_plan(problem, device or machine.device)
    pointers = [0 if a is None else a.ptr for a in arrays.values()]
    memories = [a.memory for a in arrays.values() if a is not None]
    traffic = run_plan(machine, plan, problem, pointers, memories, seed=seed)
    got = [None if arrays[n] is None else arrays[n].get() for n in ("dx", "dweight", "dbias")]
    return Result((got[0], *(None if a is None else a[0] for a in got[1:])), True, plan, traffic)


def run_plan(
    machine: Machine,
    plan: Plan,
    problem: Problem,
    pointers: Sequence[int],  # x, y, weight, ...: of a backward dy, x, mean, rstd, weight, dx, ...
    memories: Sequence[Any],
    *,
    eps: float = 1e-5,
    seed: int | None = 0,
) -> tuple[Traffic, ...]:
    """Launch each stage of a plan."""
    workspace = machine.memory(max(plan.workspace_bytes, 16), "workspace")
    memories, at = [*memories, workspace], workspace.ptr
    shaped = SHAPED["backward" if problem.backward else "forward"]
    steps = [s for n in shaped for s in problem.steps(n if problem.has(n) else "x")[:2]]
    numbers, N = (problem.rows, problem.M), problem.N
    sections = (plan.sections, plan.chunks_per_section)
    if problem.backward:
        *inputs, dweight, dbias = pointers
        common = (*inputs, at, *numbers, *steps, N)
        places = {name: at + begin for name, begin in plan.workspace}
        sums, gradients = places.get("sums"), places.get("gradients")
        calls = {
            "layer_norm_bwd_split_sums": (*common, sums, *sections),
            "layer_norm_bwd_split_merge": (sums, gradients, problem.rows, plan.sections, N),
            "layer_norm_bwd_split_apply": (*common, gradients, plan.partials),
            "column_totals": (at, plan.partials, plan.pitch, N, dweight, dbias),
        }
    else:
        common = (*pointers, *numbers, *steps, N, eps)
        calls = {
            "layer_norm_fwd_split_stats": (pointers[0], at, *numbers, *steps[:2], N, *sections),
            "layer_norm_fwd_split_normalize": (*common, at, *sections, plan.parts),
        }
    traffic = [
        machine.run(stage, calls.get(stage.kernel, common), memories, seed) for stage in plan.stages
    ]
    return tuple(t for t in traffic if t is not None)


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
