"""What a plan is, and what all of them share; pure Python, the same anywhere."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM, Op
from cupynorm._rules import ITEMSIZE, stats_dtype

PREDICTED = "predicted, bench/results/model.md"
CODES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
MAX_GRID_X = 2**31 - 1
TOTALS_THREADS = 1024
ROW_FAMILIES = ("warp", "block", "shared", "cluster", "split")

# The unit of K3, K4 and K5, as `kernels/statistics.cuh` has it.
VEC_BYTES = 16
CHUNK_VECS = 1024  # 256 threads of 4 vectors, 16 KiB
CHUNK_THREADS = 256
CHUNK_PARTIALS = 25

# How a row comes into shared memory (`kernels/stage.cuh`).
STAGE_REGISTERS = 0
STAGE_ASYNC = 1  # cp.async, which every thread issues
STAGE_BULK = 2  # bulk copies, which one thread issues
STAGE_LABELS = ("", "_async", "_bulk")  # in an entry's name
_ARRIVAL_BYTES = 8

ALIGNED = "_aligned"  # at the end of an entry's name
KEPT = 1024  # bytes of each block's shared memory that the system takes, from sm_80 on


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of a GPU."""

    compute_capability: int  # 90 for sm_90
    sm_count: int  # streaming multiprocessors
    shared_bytes: int  # that a block may have after opting in
    max_cluster: int = 8  # blocks of a cluster at most, from sm_90 on; 1 plans without clusters

    @property
    def clusters(self) -> int:
        """Blocks of a cluster at most; 1 where there are none."""
        return self.max_cluster if self.compute_capability >= 90 else 1

    @property
    def staging(self) -> int:
        """How rows come into shared memory: what asks least of the threads.

        Predicted: bench/results/PENDING.md.
        """
        if self.compute_capability < 80:
            return STAGE_REGISTERS
        return STAGE_ASYNC if self.compute_capability < 90 else STAGE_BULK

    def holds(self, block_bytes: int, blocks: int) -> bool:
        """Whether a multiprocessor has shared memory for so many blocks."""
        return blocks * (block_bytes + KEPT) <= self.shared_bytes + KEPT


@dataclass(frozen=True, slots=True)
class Stage:
    """One kernel launch: what to compile and how to launch it."""

    template: str  # of kernels/, but for `norm_`
    family: str
    constants: tuple[int, ...]  # its leading template arguments, but for Op and ALIGNED
    name: str  # of the extern "C" entry, which states the specialization
    x_dtype: str
    weight_dtype: str | None
    bias_dtype: str | None
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    blocks_per_sm: int
    cluster: int = 1  # blocks that run together
    op: Op = LAYER_NORM
    # Whether rows, weight and bias have to begin on 16-byte boundaries; None of a kernel that does
    # not ask.
    aligned: bool | None = None

    @property
    def skewed(self) -> Stage:
        """The same for any address."""
        if not self.aligned:
            return self
        return replace(self, aligned=False, name=self.name.removesuffix(ALIGNED))


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs a problem on a device."""

    family: str
    stages: tuple[Stage, ...]
    threads_per_row: int
    rows_per_block: int
    source: str  # of the thresholds
    vecs_per_thread: int = 0
    sections: int = 0  # per row (K5)
    chunks_per_section: int = 0
    parts: int = 0  # blocks per row that normalize, per column that differentiate (K5)
    panel: int = 0  # columns of a tile; 0: no tile
    panels: int = 1  # tiles of a row: from two on, all but the last are read twice
    partials: int = 0  # blocks (K4: clusters) that leave sums for dweight and dbias
    pitch: int = 0  # columns of one partial
    slots: int = 0  # places in shared memory for each of dweight and dbias (K6)
    passes: int = 2  # over memory: of x, y, dy and dx, of which each has one at least
    workspace: tuple[tuple[str, int], ...] = ()  # what lies there, and where it begins, in bytes
    workspace_bytes: int = 0


def workspace_of(places: dict[str, int]) -> dict[str, Any]:
    """How a plan states what lies in its workspace, by bytes, one after the other."""
    ends = [0, *itertools.accumulate(places.values())]
    return {
        "workspace": tuple(zip(places, ends, strict=False)),
        "workspace_bytes": ends[-1],
    }


def accumulator_bytes(problem: Problem) -> int:
    """Of one number of the statistics and sums."""
    return ITEMSIZE[stats_dtype(str(problem.dtype("x")))]


def wanted(problem: Problem) -> tuple[bool, bool, bool]:
    """Which of dx, dweight and dbias a backward is to give."""
    return problem.has("dx"), bool(problem.dtype("dweight")), bool(problem.dtype("dbias"))


def copied_bytes(vecs: int, rows: int, arrivals: int) -> int:
    """Bytes for `rows` rows of `vecs` vectors and for mbarriers.

    A row that begins at no 16-byte boundary takes a granule more.
    """
    return rows * VEC_BYTES * (vecs + 1) + arrivals * _ARRIVAL_BYTES


def next_row_bytes(vecs: int) -> int:
    """Bytes for the next row of a backward: of x, of dy, its mean and rstd, and an mbarrier."""
    return copied_bytes(vecs, rows=2, arrivals=1) + VEC_BYTES


def make_stage(
    problem: Problem,
    kind: str,
    constants: tuple[int, ...] = (),
    label: str = "",
    *,
    family: str,
    grid: int,
    threads: int,
    blocks_per_sm: int,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> Stage:
    """Make the stage of a kernel of `kernels/`; of an aligned one where the pitches of x allow it.

    A launch of more than 2**31 - 1 blocks is a ValueError.
    """
    if grid > MAX_GRID_X:
        verb = "Differentiate" if problem.backward else "Normalize"
        msg = (
            f"x has {problem.rows} rows of {problem.N} columns, which needs {grid} blocks; "
            f"a launch takes at most {MAX_GRID_X}. {verb} x in slices along its first axis"
        )
        raise ValueError(msg)
    dtype, weight, bias = (problem.dtype(array) for array in ("x", "weight", "bias"))
    dtype = str(dtype)
    template = f"{'bwd' if problem.backward else 'fwd'}_{kind}"
    if template == "bwd_split_merge":  # which sees sums alone
        dtype = stats_dtype(dtype)
    if kind in ("split_stats", "split_merge"):
        weight = bias = None
    asks = family in ROW_FAMILIES and template != "bwd_split_merge"
    aligned = asks and _in_whole_vectors(problem)
    op, results = problem.op, ""
    if problem.backward:  # where a residual is seen by what else flows into the sum
        op = replace(op, residual=problem.has("dsum") and problem.has("dx"))
    if problem.backward and kind not in ("split_sums", "split_merge"):
        flags = wanted(problem)
        constants = (*constants, *map(int, flags))
        gives = zip(("dx", "dw", "db", "dsum"), (*flags, op.residual), strict=True)
        results = "_".join(n for n, want in gives if want)
    name = f"{problem.op.name}_{template}"
    name = _entry_name(name, CODES[dtype], label, results, w=weight, b=bias)
    return Stage(
        template=template.replace("_cluster", "_shared"),
        family=f"{family}_bwd" if problem.backward else family,
        constants=constants,
        name=name + ALIGNED * aligned,
        x_dtype=dtype,
        weight_dtype=weight,
        bias_dtype=bias,
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=shared_bytes,
        blocks_per_sm=blocks_per_sm,
        cluster=cluster,
        op=op,
        aligned=aligned if asks else None,
    )


def _in_whole_vectors(problem: Problem) -> bool:
    """Whether rows end with whole vectors, and all begin on a boundary where the first does."""
    steps = [s for _, strides in problem.strides for s in strides[:2]]
    return all(n * ITEMSIZE[str(problem.dtype("x"))] % VEC_BYTES == 0 for n in (problem.N, *steps))


def _entry_name(*parts: str, **dtypes: str | None) -> str:
    """Join what tells an entry from all others; two entries of one name would be one kernel."""
    named = [f"{label}_{CODES[dtype]}" for label, dtype in dtypes.items() if dtype]
    return "_".join([*(part for part in parts if part), *named])


def totals_stages(problem: Problem) -> tuple[Stage, ...]:
    """Add up the partials of a backward; nothing where neither dweight nor dbias is wanted."""
    dweight, dbias = problem.dtype("dweight"), problem.dtype("dbias")
    if dweight is None and dbias is None:
        return ()
    kind = stats_dtype(str(problem.dtype("x")))  # of the partials
    stage = Stage(
        template="column_totals",
        family="totals_bwd",
        constants=(),
        name=_entry_name("column_totals", CODES[kind], dw=dweight, db=dbias),
        x_dtype=kind,
        weight_dtype=dweight,
        bias_dtype=dbias,
        grid=(((dweight is not None) + (dbias is not None)) * -(-problem.N // 32), 1, 1),
        block=(TOTALS_THREADS, 1, 1),
        shared_bytes=32 * 33 * ITEMSIZE[kind],
        blocks_per_sm=1,
    )
    return (stage,)
