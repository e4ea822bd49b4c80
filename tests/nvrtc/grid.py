"""Every entry that the plan can ask for, by asking it; and the part each test run compiles."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device, Stage
from cupynorm._cuda.rows import BACKWARD as TABLE_BWD
from cupynorm._cuda.rows import FORWARD as TABLE
from cupynorm._cuda.source import source_of
from cupynorm._layout import Problem
from cupynorm._ops import ADD_LAYER_NORM, LAYER_NORM, RMS_NORM, Op
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.nvrtc.build import CUPY_OPTIONS, Entry, without_comments
from tests.ptx.limits import DeviceLimits

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
# Of which every entry is compiled; of the others the longest of each kernel.
WHOLE: tuple[str, ...] = ("90",)
DTYPES = tuple(ITEMSIZE)
# Every entry of the first; of others the longest of each kernel, whose code differs by a type.
OPS = (LAYER_NORM, RMS_NORM, ADD_LAYER_NORM)
# By kind of problem: row-major rows forward and backward, and K6 and K7.
KINDS = {
    "rows": ("warp", "block", "shared", "split", "cluster"),
    "rows_bwd": ("warp_bwd", "block_bwd", "shared_bwd", "split_bwd", "cluster_bwd", "totals_bwd"),
    "columns": ("column", "lanes", "columns", "column_bwd"),
}
FAMILIES = tuple(itertools.chain(*KINDS.values()))

# M, N, and how arrays lie: C or F of x and y, of K7 y alone; "d" is the backward's, of x and dy.
Shape = tuple[int, int, str]
Flags = tuple[str | None, str | None]  # dtypes of weight and bias, which no backward has
Wanted = tuple[bool, bool, bool]  # dx, dweight, dbias
Asked = tuple[str, Shape]  # a kernel, and what runs it
NONE: Flags = (None, None)
ALL: Wanted = (True, True, True)
FEW, MANY = 1, 2**20  # rows
NO: Shape = (0, 0, "")

_WAYS = ("FF", "FC", "CF", "F", "C", "F_omit", "C_omit", "FFd", "FCd", "CFd")
_TIGHT = 16  # columns of the registers' kernel
_STEP = 16  # of sampled sizes, the fewest between which plans do not change to and fro
# 72 as well: the widest tile of rows is asked for where registers end.
_COLUMNS = (*range(8, 73, 8), *range(80, 2400, 24), 10_000)


def row_major(x_dtype: str, vecs: int, rows: int = MANY, way: str = "CC") -> Shape:
    """Rows of `vecs` whole vectors."""
    return rows, vecs * VEC_BYTES // ITEMSIZE[x_dtype], way


@cache
def stages(
    arch: str,
    x_dtype: str,
    shape: Shape,
    flags: Flags = NONE,
    wanted: Wanted = ALL,
    max_cluster: int = 8,
    op: Op = LAYER_NORM,
) -> tuple[Stage, ...]:
    """What launches a matrix of that shape."""
    M, N, way = shape
    backward, letters = way.endswith("d"), way.removesuffix("_omit").rstrip("d")
    dtypes = {"x": x_dtype, "weight": flags[0]}
    names: tuple[str, ...] = ("x", "y")[-len(letters) :]
    if backward:
        totals = flags[0] or stats_dtype(x_dtype)
        sums = zip(("dweight", "dbias"), wanted[1:], strict=True)
        dtypes |= {name: totals for name, want in sums if want}
        names, letters = ("x", "dy", "dx")[: 2 + wanted[0]], letters + letters[0]
        if op.residual:
            names, letters = (*names, "dsum"), letters + letters[0]
    else:
        dtypes["bias"] = flags[1]
        if op.residual:
            names, letters = (*names, "residual", "sum"), letters + "CC"
    steps = {"F": (0, 1, M), "C": (0, N, 1)}
    problem = Problem(
        op, backward, tuple((a, d) for a, d in dtypes.items() if d), 1, M, N,
        tuple((a, steps[letter]) for a, letter in zip(names, letters, strict=False)), (M, 1),
        stats=way == "CC", omit=way.endswith("omit"),
    )  # fmt: skip
    planned = choose_plan(problem, _device(arch, max_cluster)).stages
    return tuple(dict.fromkeys(s for stage in planned for s in (stage, stage.skewed)))


def _device(arch: str, max_cluster: int) -> Device:
    return Device(int(arch), 100, DeviceLimits.of(arch).opt_in_shared, max_cluster)


def sampled(kind: str, x_dtype: str) -> Iterator[Shape]:
    """Shapes enough to meet every entry, of rows by ascending length."""
    if kind == "columns":
        yield from itertools.product((64, 2**20), _COLUMNS, _WAYS)
    elif kind == "rows":
        yield from (row_major(x_dtype, *sizes) for sizes in _sampled_forward())
    else:
        yield from (
            row_major(x_dtype, vecs, way="CCd") for vecs in sorted(set(_sampled_backward()))
        )


def _sampled_forward() -> Iterator[tuple[int, int]]:
    """(vecs, rows): every length held in registers; beyond, ends of chunks, and a row of 1 GiB."""
    held = max(row.max_vecs for row in TABLE if row.family in ("warp", "block"))
    longest = max(row.max_vecs for row in TABLE if row.family == "shared")
    most = max(row.max_vecs for row in TABLE if row.cluster > 1) // CHUNK_VECS
    yield from ((vecs, MANY) for vecs in range(1, held + 1))
    for rows in (FEW, MANY):
        for vecs in (*range(held + 1, longest + 2, CHUNK_VECS // 8), longest + 1, 2**26):
            yield vecs, rows
        yield from ((chunks * CHUNK_VECS, rows) for chunks in range(3, most + 1))


def _sampled_backward() -> Iterator[int]:
    """Each table row's longest, each number of vectors per thread of K3, and beyond."""
    alone = [row for row in TABLE_BWD if row.cluster == 1]
    for row in alone[:-1]:
        yield from range(row.threads_per_row, row.max_vecs + 1, row.threads_per_row)
    most = max(row.max_vecs for row in TABLE_BWD if row.cluster > 1) // CHUNK_VECS
    yield from range(2 * CHUNK_VECS, most * CHUNK_VECS + 1, CHUNK_VECS // 4)
    yield from (alone[-2].max_vecs + 1, 2**20)


def _met(
    sizes: list[Shape], ask: Callable[[Shape], tuple[Stage, ...]]
) -> dict[Shape, tuple[Stage, ...]]:
    """Stages of every `_STEP`th size, and of both next to where an entry takes another's place."""
    met = {shape: ask(shape) for shape in (*sizes[::_STEP], sizes[-1])}

    def halve(some: list[Shape]) -> None:
        names = [[stage.name for stage in met[shape]] for shape in (some[0], some[-1])]
        if len(some) > 2 and names[0] != names[1]:
            middle = len(some) // 2
            met[some[middle]] = ask(some[middle])
            halve(some[: middle + 1])
            halve(some[middle:])

    for begin in range(0, len(sizes), _STEP):
        halve(sizes[begin : begin + _STEP + 1])
    return met


def shapes(
    kind: str, arch: str, x_dtype: str, max_cluster: int = 8, op: Op = LAYER_NORM
) -> dict[str, Asked]:
    """By entry of the plainest call: its kernel, and the longest shape that runs it."""
    devices = {arch: _device(arch, max_cluster) for arch in ARCHS}
    facts = {a: (d.shared_bytes, d.staging, d.clusters) for a, d in devices.items()}
    # Of architectures that plans cannot tell apart, one is asked.
    first = next(a for a in ARCHS if facts[a] == facts[arch])
    return _shapes(kind, first, x_dtype, max_cluster, op)


@cache
def _shapes(kind: str, arch: str, x_dtype: str, max_cluster: int, op: Op) -> dict[str, Asked]:
    flags: Flags = (x_dtype, None) if kind == "rows_bwd" else NONE

    def ask(shape: Shape) -> tuple[Stage, ...]:
        return stages(arch, x_dtype, shape, flags, ALL, max_cluster, op)

    every, lines = _lines(kind, x_dtype)
    met: dict[Shape, tuple[Stage, ...]] = {}
    if op is OPS[0]:
        for line in lines:
            met |= _met(line, ask)
    else:  # where the first's entries end, as the plans are much the same, and between
        longest = [shape for _, shape in _shapes(kind, arch, x_dtype, max_cluster, OPS[0]).values()]
        met = {
            shape: ask(shape)
            for line in (longest, *(line[:: 4 * _STEP] for line in lines))
            for shape in line
        }
    found: dict[str, Asked] = {}
    for shape in (shape for shape in every if shape in met):
        for stage in met[shape]:
            if stage.family in KINDS[kind] and shape[1] >= found.get(stage.name, ("", NO))[1][1]:
                found[stage.name] = kind_of(stage), shape
    return found


@cache
def _lines(kind: str, x_dtype: str) -> tuple[list[Shape], list[list[Shape]]]:
    """The sampled shapes, and those that differ by their length alone, by ascending length."""
    every = list(dict.fromkeys(sampled(kind, x_dtype)))
    lines: dict[tuple[int, str], list[Shape]] = {}
    for shape in sorted(every, key=lambda shape: shape[1]):
        lines.setdefault((shape[0], shape[2]), []).append(shape)
    return every, list(lines.values())


def kind_of(stage: Stage) -> str:
    """The kernel, and which of its two."""
    return stage.template + "_aligned" * bool(stage.aligned)


def rare(family: str, x_dtype: str) -> list[tuple[Flags, Wanted]]:
    """Tried on the longest of a kernel alone: the code is the same everywhere."""
    if family == "warp":
        mixed = [("float64", "float64"), (x_dtype, "float32")] if x_dtype == "float16" else []
        return [(flags, ALL) for flags in ((x_dtype, None), (None, x_dtype), *mixed)]
    if family in KINDS["rows_bwd"]:
        some = ((True, False, False), (False, True, True), (True, True, False))
        return [((x_dtype, None), wanted) for wanted in some]
    return []


def entries(
    arch: str, x_dtype: str, family: str, op: Op = LAYER_NORM, *, everything: bool = False
) -> list[Stage]:
    """Stages to compile, without repeats: every one, or the longest of each kernel."""
    kind = next(kind for kind, families in KINDS.items() if family in families)
    if op.residual and kind == "columns":
        return []  # through row-major copies
    # K3 is what a device without clusters takes: its copies differ by architecture all the same.
    most = 1 if family.startswith("shared") else 8
    every = shapes(kind, arch, x_dtype, most, op).values()
    longest = dict(sorted(every, key=lambda asked: asked[1][1::-1])).values()  # of each kernel
    # The heaviest first: weight and bias of x's dtype, of float32, none.
    usual = [((d, d), ALL) for d in dict.fromkeys((x_dtype, "float32", None))]
    if not everything:
        usual = usual[:1]
    all_shapes = dict.fromkeys(shape for _, shape in every)
    if kind == "columns":
        wanted = [(shape, how) for shape in all_shapes for how in usual]
    elif everything:
        wanted = [(shape, how) for how in usual for shape in all_shapes]
        wanted += [(shape, how) for how in rare(family, x_dtype) for shape in longest]
    else:
        wanted = [(shape, usual[0]) for shape in longest]
    chosen: dict[str, Stage] = {}
    for shape, how in wanted:
        for stage in stages(arch, x_dtype, shape, *how, most, op):
            most_shared = chosen.get(stage.name, stage).shared_bytes
            if stage.family == family and stage.shared_bytes >= most_shared:
                chosen[stage.name] = stage
    found = list(chosen.values())
    if everything or kind != "columns":
        return found
    # Of lanes that with the fewest registers to spare, of tiles the widest.
    if family == "lanes":
        return [stage for stage in found if stage.constants[1] == _TIGHT][:1]
    return sorted(found, key=lambda stage: stage.constants[1])[-1:]


def whole(arch: str, op: Op) -> bool:
    """Whether every entry is compiled."""
    return op is OPS[0] and arch in WHOLE


def all_entries(arch: str) -> list[Stage]:
    """What the kept table has of one architecture."""
    return [
        stage
        for x_dtype in DTYPES
        for family in FAMILIES
        for op in OPS
        for stage in entries(arch, x_dtype, family, op, everything=whole(arch, op))
    ]


def state_of_the_text() -> str:
    """Hash of what the exhaustive grid compiles: plans, and kernel text without comments."""
    went_in = hashlib.sha256("\0".join(CUPY_OPTIONS).encode())
    for arch in ARCHS:
        for stage in all_entries(arch):
            entry = Entry(stage.name, source_of(stage), (arch,))
            went_in.update(f"{arch} {stage.name} {stage.block} {stage.blocks_per_sm}\n".encode())
            went_in.update(_hash_of(entry.head) + entry.text.encode())
    return went_in.hexdigest()[:16]


@cache
def _hash_of(head: str) -> bytes:
    return hashlib.sha256(without_comments(head).encode()).digest()
