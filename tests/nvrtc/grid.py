"""Every entry that the plan can ask for, by asking it; and the part each test run compiles."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from functools import cache

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device, Stage
from cupynorm._cuda.rows import FORWARD as TABLE
from cupynorm._cuda.source import source_of
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import ITEMSIZE
from tests.nvrtc import grid_bwd, grid_column
from tests.nvrtc.build import CUPY_OPTIONS, without_comments
from tests.ptx.limits import DeviceLimits

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
DTYPES = tuple(ITEMSIZE)
FORWARD = ("warp", "block", "shared", "split", "cluster")
FAMILIES = (*FORWARD, *grid_bwd.FAMILIES, *grid_column.FAMILIES)
# What a test run compiles: every dtype for one architecture, one for each other. The kept table has
# every entry, and a test holds it to the text.
RUNS = [
    (arch, dtype)
    for arch, usual in zip(ARCHS, itertools.cycle(DTYPES))
    for dtype in (DTYPES if arch == "90" else [usual])
]

Flags = tuple[str | None, str | None]  # dtypes of weight and bias
FEW, MANY = 1, 2**20  # rows
_HELD = max(row.max_vecs for row in TABLE if row.family in ("warp", "block"))
_LONGEST = max(row.max_vecs for row in TABLE if row.family == "shared")
_MOST_CHUNKS = max(row.max_vecs for row in TABLE if row.cluster > 1) // CHUNK_VECS


def stages(
    arch: str, x_dtype: str, vecs: int, rows: int, flags: Flags, max_cluster: int = 8
) -> tuple[Stage, ...]:
    """What launches rows of `vecs` whole vectors."""
    N = vecs * VEC_BYTES // ITEMSIZE[x_dtype]
    dtypes = zip(("x", "weight", "bias"), (x_dtype, *flags), strict=True)
    problem = Problem(
        LAYER_NORM, False, tuple((a, d) for a, d in dtypes if d), 1, rows, N,
        (("x", (0, N, 1)), ("y", (0, N, 1))), (rows, 1), stats=True,
    )  # fmt: skip
    limits = DeviceLimits.of(arch)
    device = Device(int(arch), 100, limits.opt_in_shared, max_cluster)
    return choose_plan(problem, device).stages


def sampled_vecs() -> Iterator[tuple[int, int]]:
    """(vecs, rows): every length held in registers; beyond, ends of chunks, and a row of 1 GiB."""
    yield from ((vecs, MANY) for vecs in range(1, _HELD + 1))
    for rows in (FEW, MANY):
        for vecs in (*range(_HELD + 1, _LONGEST + 2, CHUNK_VECS // 8), _LONGEST + 1, 2**26):
            yield vecs, rows
        yield from ((chunks * CHUNK_VECS, rows) for chunks in range(3, _MOST_CHUNKS + 1))


@cache
def shapes(arch: str, x_dtype: str, max_cluster: int = 8) -> dict[str, tuple[int, int]]:
    """By entry without weight and bias: the largest (vecs, rows) that runs it."""
    found = {}
    for vecs, rows in sampled_vecs():
        for stage in stages(arch, x_dtype, vecs, rows, (None, None), max_cluster):
            found[stage.name] = vecs, rows
    return found


def longest(arch: str, x_dtype: str, max_cluster: int = 8) -> dict[str, tuple[int, int]]:
    """Of `shapes`, the longest of each kernel."""
    last = {}
    every = shapes(arch, x_dtype, max_cluster)
    for name, (vecs, rows) in sorted(every.items(), key=lambda item: item[1]):
        for stage in stages(arch, x_dtype, vecs, rows, (None, None), max_cluster):
            if stage.name == name:
                last[stage.kernel] = name
    return {name: every[name] for name in last.values()}


def usual_flags(x_dtype: str) -> tuple[Flags, ...]:
    """The heaviest first: weight and bias of x's dtype, of float32, none."""
    return tuple(dict.fromkeys([(x_dtype, x_dtype), ("float32", "float32"), (None, None)]))


def rare_flags(x_dtype: str) -> tuple[Flags, ...]:
    """Tried on one entry only: the code is the same everywhere."""
    mixed = [("float64", "float64"), (x_dtype, "float32")] if x_dtype == "float16" else []
    return ((x_dtype, None), (None, x_dtype), *mixed)


def entries(arch: str, x_dtype: str, family: str, *, everything: bool = False) -> list[Stage]:
    """Stages to compile, without repeats: every one, or the longest of each kernel."""
    for other in (grid_bwd, grid_column):
        if family in other.FAMILIES:
            return other.entries(arch, x_dtype, family, everything)
    # K3 is what a device without clusters takes: its copies differ by architecture all the same.
    most = 1 if family == "shared" else 8
    some = longest(arch, x_dtype, most)
    first, *others = usual_flags(x_dtype)
    wanted = [(some, first)]
    if everything:
        every = shapes(arch, x_dtype, most)
        one = {name: shape for name, shape in some.items() if "_fwd_warp_" in name}
        wanted = [(every, flags) for flags in (first, *others)]
        wanted += [(one, flags) for flags in rare_flags(x_dtype)]
    chosen = {}
    for names, flags in wanted:
        for vecs, rows in names.values():
            for stage in stages(arch, x_dtype, vecs, rows, flags, most):
                if stage.family == family:
                    chosen[stage.name] = stage
    return list(chosen.values())


def all_entries(arch: str) -> list[Stage]:
    """The exhaustive grid of one architecture."""
    return [
        stage
        for x_dtype in DTYPES
        for family in FAMILIES
        for stage in entries(arch, x_dtype, family, everything=True)
    ]


def state_of_the_text() -> str:
    """Hash of what the exhaustive grid compiles: plans, and kernel text without comments."""
    went_in = hashlib.sha256("\0".join(CUPY_OPTIONS).encode())
    for arch in ARCHS:
        for stage in all_entries(arch):
            went_in.update(f"{arch} {stage.name} {stage.block} {stage.blocks_per_sm}\n".encode())
            went_in.update(_hash_of(source_of(stage)))
    return went_in.hexdigest()[:16]


@cache
def _hash_of(source: str) -> bytes:
    return hashlib.sha256(without_comments(source).encode()).digest()
