"""The tables of K1 to K5 and what is chosen from them, over every row length."""

import bisect
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from cupynorm._cuda.arguments import ENTRIES, entry_of
from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import (
    CHUNK_PARTIALS,
    CHUNK_VECS,
    MAX_GRID_X,
    VEC_BYTES,
    Device,
)
from cupynorm._cuda.rows import (
    APPLY_VECS,
    BACKWARD,
    FORWARD,
    MAX_SECTIONS,
    REGISTERS,
    ROWS_PER_PARTIAL,
    choose_row,
    resident_clusters,
)
from cupynorm._cuda.source import kernels_folder, source_of
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.cuda.rows import EACH, SHAPED, problem_of
from tests.ptx.limits import DeviceLimits

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = ("75", "80", "86", "89", "90", "100", "120")
SM90 = Device(compute_capability=90, sm_count=132, shared_bytes=227 * 1024)
BEFORE = dataclasses.replace(SM90, max_cluster=1)  # K3 and K5 where sm_90 has K4
MANY = 10_000  # rows enough for every multiprocessor
EVERY_N = 1_000_000
BOTH, NEITHER = ("float32", "float32"), (None, None)
TABLES = {"forward": FORWARD, "backward": BACKWARD}
FLOATS = ("float16", "float32", "float64")
EACH_DTYPE = pytest.mark.parametrize("dtype", ITEMSIZE)
EACH_TOTALS = pytest.mark.parametrize("totals", [BOTH, ("float32", None), NEITHER])


def problem(
    direction, N, dtype="float32", *, rows=MANY, weight=None, bias=None, totals=BOTH, dx=True
):
    dtypes = {"x": dtype, "weight": weight}
    names = SHAPED[direction] if dx else ("dy", "x")
    strides = dict.fromkeys(names, (rows * N, N))
    if direction == "backward":
        dtypes |= dict(zip(("dweight", "dbias"), totals, strict=True))
        return problem_of(dtypes, (1, rows, N), strides, backward=True)
    return problem_of(dtypes | {"bias": bias}, (1, rows, N), strides, stats=True)


def plan_of(direction, N, dtype="float32", device=SM90, **options):
    return choose_plan(problem(direction, N, dtype, **options), device)


def of_chunks(direction, chunks, dtype, *, more=0, **options):
    N = (chunks * CHUNK_VECS + more) * VEC_BYTES // ITEMSIZE[dtype]
    return plan_of(direction, N, dtype, **options)


def device_of(capability, sm_count=100):
    return Device(int(capability), sm_count, DeviceLimits.of(capability).opt_in_shared)


def vecs_of(N, dtype):
    return -(-N * ITEMSIZE[dtype] // VEC_BYTES)


def lengths(direction, dtype):
    """An N for each distinct launch: ends of the tables' rows, of what a thread may hold."""
    if direction == "forward":
        vecs = {*range(1, 65, 8), *range(32, 257, 32), *range(320, 513, 64)}
        vecs |= {*range(640, 1025, 128), *range(1280, 2049, 256), 2049, 4000, 7168, 7169, 14_000}
        far = [200_000, 2_000_000]
    else:
        vecs = {1, 2, 2**16, 10**6} | {512 * v for v in range(2, 9)}
        vecs |= {row.max_vecs for row in BACKWARD[:-1] if row.cluster == 1}
        vecs |= {v + 1 for v in vecs}
        far = []
    return [v * VEC_BYTES // ITEMSIZE[dtype] for v in (*sorted(vecs), *far)]


# --- what holds of every plan ---------------------------------------------------------------------


def checked(direction, N, dtype="float32", device=SM90, **options):
    """The plan, of which everything has been checked that any plan promises."""
    call = problem(direction, N, dtype, **options)
    plan = choose_plan(call, device)
    check_capacity(call, plan, device)
    check_grids(call, plan, device)
    check_workspace(call, plan)
    for stage in plan.stages:
        check_launch(stage, device)
    return plan


def check_capacity(call, plan, device):
    """The plan's lanes, shared memory and sections hold a row, and none of them is idle."""
    dtype, backward, stage = call.dtype("x"), call.backward, plan.stages[0]
    vecs, number = vecs_of(call.N, dtype), ITEMSIZE[stats_dtype(dtype)]
    chunks = -(-vecs // CHUNK_VECS)
    if plan.family in REGISTERS or (backward and plan.family == "shared"):
        lanes, held = plan.threads_per_row, plan.vecs_per_thread
        assert lanes * (held - 1) < vecs <= lanes * held
        shape = (stage.block[0], lanes, held) if plan.family == "warp" else (stage.block[0], held)
        shape = (1, *shape) if plan.family == "shared" else shape
        assert stage.constants[: len(shape)] == shape
        assert not backward or plan.rows_per_block * lanes == stage.block[0]
    elif plan.family == "shared":
        assert chunks <= 15  # of 32 lanes that merge them
        assert vecs * VEC_BYTES < stage.shared_bytes <= device.shared_bytes
    elif plan.family == "cluster" and not backward:
        assert chunks >= stage.cluster // 2  # no two blocks without a chunk
        most = -(-chunks // stage.cluster)
        assert most * stage.cluster <= stage.block[0]  # one thread sends to one block
        staged = most * (CHUNK_VECS * VEC_BYTES + CHUNK_PARTIALS * number)
        staged += VEC_BYTES + 8 * most  # the granule more, and a chunk's mbarrier
        assert stage.shared_bytes == staged + 3 * chunks * number
    elif plan.family == "cluster":
        cluster, threads, held, staging, *_ = stage.constants
        slots = threads * held // CHUNK_VECS
        assert -(-chunks // cluster) <= slots
        wanted = sum(bool(call.dtype(name)) for name in ("dweight", "dbias"))
        totals = wanted * slots * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype] * number
        room = stage.shared_bytes - totals - 3 * (8 * slots + 2 * 32) * number
        most = -(-chunks // cluster)  # of a block, which the next row's x and dy are copied to
        assert room == (2 * (most * CHUNK_VECS + 1) * VEC_BYTES + 16 + 8 if staging else 0)
    else:
        assert plan.sections * plan.chunks_per_section >= chunks
        assert (plan.sections - 1) * plan.chunks_per_section < chunks
        assert plan.sections <= MAX_SECTIONS
        # A section's first column, its end and a row's bytes stay in 64 bits.
        assert plan.sections * plan.chunks_per_section * CHUNK_VECS * VEC_BYTES < 2**62
        assert 1 <= plan.parts <= (call.rows if backward else chunks)


def check_grids(call, plan, device):
    """Blocks for every row; of a backward no more than the device holds, each with rows enough."""
    rows, stage = call.rows, plan.stages[0]
    blocks = stage.grid[0]
    wanted = sum(bool(call.dtype(name)) for name in ("dweight", "dbias"))
    if plan.family == "split":
        assert blocks == rows * plan.sections
    if not call.backward:
        assert len(plan.stages) == (3 if plan.family == "split" else 1)
        if plan.family == "split":
            assert [s.grid[0] for s in plan.stages[1:]] == [rows, rows * plan.parts]
        elif plan.family == "cluster":
            assert blocks == rows * stage.cluster
        else:
            assert (blocks - 1) * plan.rows_per_block < rows <= blocks * plan.rows_per_block
        return
    if plan.family == "split":
        assert plan.stages[1].grid[0] * plan.stages[1].block[0] // 32 >= rows
        assert 1 <= plan.partials <= rows
        apply, per_run = plan.stages[2].grid[0], plan.stages[2].block[0] * APPLY_VECS
        runs = apply // plan.partials
        assert (runs - 1) * per_run < vecs_of(call.N, call.dtype("x")) <= runs * per_run
        assert apply <= max(2 * device.sm_count + runs, runs)
    else:
        most = stage.blocks_per_sm * device.sm_count
        if plan.family == "cluster":
            most = resident_clusters(stage.cluster, stage.blocks_per_sm, device.sm_count)
        assert plan.partials * stage.cluster == blocks
        per_block = plan.rows_per_block * (ROWS_PER_PARTIAL if wanted else 1)
        assert plan.partials == min(-(-rows // per_block), most)
    if wanted and rows >= ROWS_PER_PARTIAL:
        assert plan.partials * ROWS_PER_PARTIAL < rows + ROWS_PER_PARTIAL
    last = plan.stages[-1]
    assert (last.template == "column_totals") == bool(wanted)
    assert not wanted or last.grid == (wanted * -(-call.N // 32), 1, 1)


def check_workspace(call, plan):
    """Partials first, of whole vectors; each part of K5's begins at a whole number of them."""
    dtype = call.dtype("x")
    size, per_vec = ITEMSIZE[stats_dtype(dtype)], VEC_BYTES // ITEMSIZE[dtype]
    split, places, own = plan.family == "split", dict(plan.workspace), 0
    sums = 3 * size * call.rows * plan.sections
    if not call.backward:
        assert places == ({"moments": 0, "stats": sums} if split else {})
        assert plan.workspace_bytes == sums + 4 * size * call.rows * split
        return
    assert plan.pitch == vecs_of(call.N, dtype) * per_vec >= call.N
    wanted = sum(bool(call.dtype(name)) for name in ("dweight", "dbias"))
    partials = wanted * plan.partials * plan.pitch * size
    assert partials % 16 == places.pop("partials") == 0
    if split:
        assert places == {"sums": partials, "gradients": partials + sums}
        assert sums % size == 0
        own = sums + 3 * size * call.rows
    assert plan.workspace_bytes == partials + own
    assert plan.passes == (4 if split else 2) + call.has("dx")


def check_launch(stage, device):
    """Threads, registers, shared memory: what __launch_bounds__ promise fits a multiprocessor."""
    limits = DeviceLimits.of(str(device.compute_capability))
    resident = stage.block[0] * stage.blocks_per_sm
    registers = min(255, limits.registers // resident // 8 * 8)
    refusal = limits.refuse(
        stage.grid, stage.block, stage.shared_bytes, 0, stage.shared_bytes, registers,
        (stage.cluster, 1, 1),
    )  # fmt: skip
    assert not refusal
    assert registers >= 40 and stage.block[0] % 32 == 0
    assert resident <= limits.threads_per_multiprocessor
    if not stage.family.startswith(("shared", "cluster")):
        assert stage.shared_bytes <= 48 * 1024  # without opting in
    reserved = limits.shared_per_multiprocessor - limits.opt_in_shared  # per block
    used = (stage.shared_bytes + reserved) * stage.blocks_per_sm
    assert used <= limits.shared_per_multiprocessor
    assert device.clusters > 1 or "__cluster_dims__" not in source_of(stage)


@EACH
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_device_can_launch(direction, capability):
    device = device_of(capability)
    for dtype, totals, rows in itertools.product(ITEMSIZE, (BOTH, NEITHER), (1, 3, MANY)):
        for N in (*lengths(direction, dtype), 3, 40_001):
            checked(direction, N, dtype, device, totals=totals, rows=rows)


@EACH_DTYPE
def test_what_is_wanted_and_how_many_rows(dtype):
    sums = (("float16", None), (None, "bfloat16"))
    for N in lengths("backward", dtype):
        for totals, rows, dx in itertools.product(sums, (1, 5, 100, 10**6), (True, False)):
            checked("backward", N, dtype, totals=totals, rows=rows, dx=dx)


@EACH
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length_has_its_row_and_is_held(direction, dtype):
    """Without clusters each row has an interval; K1, K2 and K3 backward hold what they take."""
    table = [row for row in TABLES[direction] if row.cluster == 1]
    limits = np.array([row.max_vecs for row in table])
    assert (np.diff(limits) > 0).all() and limits[-1] >= 2**60
    families = [family for family, _ in itertools.groupby(row.family for row in table)]
    assert families == ["warp", "block", "shared", "split"]
    roomy = dataclasses.replace(BEFORE, shared_bytes=2**30)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    most, step = (2048, 3) if direction == "forward" else (4097, 11)
    ends = [int(vecs) * per_vec for vecs in (*limits[:-1], *(limits[:-1] + 1))]
    for N in (*range(1, most * per_vec + 1, step), *ends):
        row = table[np.searchsorted(limits, vecs_of(N, dtype))]
        assert choose_row(problem(direction, N, dtype), roomy) is row
        plan = checked(direction, N, dtype, BEFORE)
        assert plan.family in (row.family, "split" if row.family == "shared" else row.family)


def for_any_address(plan):
    """Without what whole vectors allow."""
    return dataclasses.replace(plan, stages=tuple(stage.skewed for stage in plan.stages))


@pytest.mark.parametrize("device", [SM90, BEFORE, device_of("120")], ids=["90", "before", "120"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_chunk_edge_is_held(dtype, device):
    """K3 to K5 change with the number of chunks alone: each edge up to a million columns.

    Far beyond it is K5 for any number of rows.
    """
    per_chunk = CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]
    for edge in range(2 * per_chunk, EVERY_N + per_chunk, per_chunk):
        before = None
        for N in (edge - 1, edge, edge + 1, edge + per_chunk // 2):
            plan = checked("forward", N, dtype, device)
            if before is not None and vecs_of(N, dtype) == before[0]:
                assert for_any_address(plan) == before[1]  # the same vectors, the same plan
            before = vecs_of(N, dtype), for_any_address(plan)
        if edge < 130 * per_chunk:
            checked("backward", edge + 1, dtype, device)
            checked("backward", edge + per_chunk, dtype, device)
    far = itertools.product(TABLES, (20, 24, 30, 31, 32, 33), (-1, 0, 1), (1, 7))
    for direction, exponent, delta, rows in far:
        plan = checked(direction, 2**exponent + delta, dtype, device, rows=rows)
        assert plan.family == "split"
        if direction == "forward" and rows == 1:
            assert plan.workspace_bytes <= 8 * (3 * MAX_SECTIONS + 4)


def test_workspace_of_huge_problems_stays_small():
    for N, rows in ((64, 10**8), (768, 10**7), (8192, 10**6), (10**6, 10**4), (10**9, 4)):
        plan = plan_of("backward", N, rows=rows)
        assert plan.workspace_bytes <= 0.7 * 4 * N * rows
        assert plan.workspace_bytes < 2 * 1024**3 or N > 10**8
    assert plan_of("forward", 3_000_000, rows=7).workspace_bytes < 0.002 * 7 * 3_000_000 * 4


@pytest.mark.parametrize(
    ("direction", "N", "most"),
    [
        ("forward", 8, 32 * MAX_GRID_X),  # 32 rows a block
        ("forward", 1024, 4 * MAX_GRID_X),
        ("forward", 8192, MAX_GRID_X),
        ("forward", 50_000, MAX_GRID_X // 4),  # clusters of 4
        ("forward", 2**20, MAX_GRID_X // 256),  # 256 sections a row
        ("backward", 200_000, MAX_GRID_X // 49),  # only K5 has blocks for each row
        ("backward", 2**20, MAX_GRID_X // 256),
    ],
)
def test_too_many_rows(direction, N, most):
    assert plan_of(direction, N, rows=most).stages[0].grid[0] <= MAX_GRID_X
    verb = "Normalize" if direction == "forward" else "Differentiate"
    message = rf"x has {most + 1} rows of {N} columns.*at most {MAX_GRID_X}. {verb} x in slices"
    with pytest.raises(ValueError, match=message):
        plan_of(direction, N, rows=most + 1)
    for short in (8, 1024, 8192):
        plan_of("backward", short, rows=2**40)


# --- the tables -----------------------------------------------------------------------------------


def test_no_more_clusters_than_run_at_once():
    """Quack publishes what an RTX 5090 holds: 85, 41 and 19 clusters of 2, 4 and 8."""
    for cluster, held in ((2, 85), (4, 41), (8, 19)):
        assert 0.9 * held <= resident_clusters(cluster, 1, 170) <= held
    assert resident_clusters(8, 1, 4) == 1


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if 80 <= int(c) < 90])
@EACH_DTYPE
def test_shared_memory_is_used_up_to_the_last_vector(capability, dtype):
    """K3 ends where the device's shared memory does, and K5 begins with the next vector."""
    device, per_vec = device_of(capability), VEC_BYTES // ITEMSIZE[dtype]

    def is_split(vecs):
        return plan_of("forward", vecs * per_vec, dtype, device).family == "split"

    first = bisect.bisect_left(range(15 * CHUNK_VECS + 1), True, lo=2048, key=is_split)
    last = checked("forward", (first - 1) * per_vec, dtype, device)
    assert last.family == "shared"
    assert last.stages[0].shared_bytes + VEC_BYTES + 24 * 8 > device.shared_bytes
    assert plan_of("forward", (first - 1) * per_vec + 1, dtype, device).family == "split"


@pytest.mark.parametrize("capability", CAPABILITIES)
@EACH_DTYPE
@EACH_TOTALS
def test_shared_memory_is_used_up_backward(capability, dtype, totals):
    """K3 ends where its sums for dweight and dbias fill the device, or at 64 KiB of x.

    With 64 KiB of shared memory and float16 it has no row: K5 follows K2.
    """
    device = dataclasses.replace(device_of(capability), max_cluster=1)
    roomy = dataclasses.replace(device, shared_bytes=2**20)

    def plan(vecs, device):  # of a thread
        N = 512 * vecs * VEC_BYTES // ITEMSIZE[dtype]
        return plan_of("backward", N, dtype, device, totals=totals)

    held = [vecs for vecs in range(3, 10) if plan(vecs, device).family == "shared"]
    more = 3 + len(held)
    assert held == list(range(3, more))
    assert more >= 9 or plan(more, roomy).stages[0].shared_bytes > device.shared_bytes


# --- the number of rows -------------------------------------------------------------------------


def without_rows(plan):
    """What may not depend on the number of rows: all but the grid, and what changes no bit."""
    stages = tuple(dataclasses.replace(stage, grid=()) for stage in plan.stages)
    free = {"workspace_bytes": 0, "workspace": (), "parts": 0, "partials": 0}
    return dataclasses.replace(plan, stages=stages, **free)


# Numbers of rows, of which the first few take K5 where a row has so many vectors.
FEW_ROWS = {
    "forward without clusters": ((1, 2, 66), (67, 1000, 10**6), BEFORE, 8 * CHUNK_VECS),
    "forward": ((1, 2, 8), (9, 1000, 10**6), SM90, 64 * CHUNK_VECS),
    "backward without clusters": ((), (1, 2, 133, 10**6), BEFORE, None),
}


@pytest.mark.parametrize("name", FEW_ROWS)
@EACH_DTYPE
def test_rows_change_grids_alone(name, dtype):
    """A row has the same bits in every batch; K5, which takes few long rows, gives them too."""
    few, more, device, long = FEW_ROWS[name]
    direction, backward = name.split()[0], long is None
    vecs = {row.max_vecs for row in FORWARD[:-1] if row.cluster == 1}
    vecs |= {long or 0, 14_300, 40_000, *(n * CHUNK_VECS for n in (20, 63, 100))}
    ends = [(v + k) * VEC_BYTES // ITEMSIZE[dtype] for v in vecs for k in (0, 1)]
    every = lengths(direction, dtype) if backward else ends
    sums = (BOTH, ("float32", None), NEITHER) if backward else (BOTH,)
    for N, totals in itertools.product(every, sums):
        how = {"dtype": dtype, "totals": totals}
        plans = [plan_of(direction, N, device=device, rows=rows, **how) for rows in (*few, *more)]
        if backward:  # nor does the device's size
            smaller = dataclasses.replace(device, sm_count=16)
            plans.append(plan_of(direction, N, device=smaller, rows=MANY, **how))
        families = [plan.family for plan in plans]
        if len(set(families)) == 2:
            assert vecs_of(N, dtype) >= long
            assert {*families[: len(few)]} == {"split"} and "split" not in families[len(few) :]
            # One section per chunk, so that the trees over the chunks are the same.
            assert all(p.chunks_per_section == 1 for p in plans[: len(few)])
        for family in set(families):
            same = [without_rows(plan) for plan in plans if plan.family == family]
            assert all(plan == same[0] for plan in same)


@pytest.mark.parametrize("totals", [BOTH, NEITHER])
def test_rows_choose_between_cluster_and_split_backward(totals):
    """Where clusters would take less than a quarter of the device: its 33rd block is enough."""
    per_cluster = 4 if totals == BOTH else 1
    for chunks, cluster in ((7, 4), (8, 4), (16, 8)):
        enough = 1 if chunks < 8 else -(-33 // cluster)
        for clusters in (enough - 1, enough, 2 * enough):
            if clusters:
                rows = clusters * per_cluster
                plan = of_chunks("backward", chunks, "float32", rows=rows, totals=totals)
                assert plan.family == ("cluster" if clusters >= enough else "split")


# --- names and texts ------------------------------------------------------------------------------


KERNELS_TEXT = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted(kernels_folder().iterdir(), key=str)
)


def declared(text):
    """(type, name) of each C declaration; several may share a type."""
    found = []
    for line in re.sub(r"//.*", "", text).replace(",\n", ", ").split(";"):
        kind, names = re.fullmatch(r"\s*((?:const )?\w+\*?)\s+([\w, ]+?)\s*", line).groups()
        found += [(kind, name) for name in names.split(", ")]
    return found


def parameters(entry):
    return [tuple(p.replace("{", "").replace("}", "").rsplit(" ", 1)) for p in entry.split(", ")]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel", sorted(ENTRIES))
def test_fields_and_parameters_are_those_of_the_kernel(kernel, residual):
    """By name, order and type: the struct's, and what the kernel takes beside it or without one."""
    entry = entry_of(kernel, residual)
    mine = parameters(entry.parameters)
    signature = re.search(rf"void (?:norm_)?{kernel}\(([^)]*)\)", KERNELS_TEXT)[1]
    taken = [tuple(p.rsplit(" ", 1)) for p in re.split(r",\s+(?![^<]*>)", signature.strip())]
    if entry.struct:
        body = re.search(
            rf"struct {entry.struct} {{\n(?:    typedef[^\n]*\n)?(.*?)\n}};", KERNELS_TEXT, re.S
        )[1]
        fields = declared(body.rstrip().removesuffix(";"))[: len(entry.fields)]
        assert mine[: len(fields)] == fields
        types = ", ".join(entry.types.split())
        assert taken[0][0] == f"const {entry.struct}<{types}>&"
        mine, taken = mine[len(fields) :], taken[1:]
    assert len(mine) == len(taken)
    for (kind, name), (theirs, called) in zip(mine, taken, strict=True):
        there = theirs.replace(" __restrict__", "").replace("Y*", "X*")  # K7 calls y's type Y
        assert there in (kind, f"const {kind}"), name  # what is written to is not const
        assert name == called or "*" in kind  # an address may have a name of its own there


def every_stage(direction):
    """Of each length, on a device with clusters and one without, of all mixtures of dtypes."""
    affine = (None, *ITEMSIZE)
    if direction == "forward":
        mixed = [{"weight": w, "bias": b} for w, b in itertools.product(affine, affine)]
        devices = (SM90, BEFORE)
    else:
        sums = (BOTH, NEITHER, ("float16", None), (None, "float64"))
        mixed = [
            {"weight": w, "totals": t, "dx": dx}
            for w, t, dx in itertools.product((None, "float16", "float32"), sums, (True, False))
            if dx or t != NEITHER
        ]
        devices = (SM90,)
    for dtype, options, device in itertools.product(ITEMSIZE, mixed, devices):
        for N in lengths(direction, dtype):
            yield from plan_of(direction, N, dtype, device, **options).stages


@pytest.mark.parametrize(("direction", "least"), [("forward", 1000), ("backward", 500)])
def test_one_source_per_name_and_one_name_per_source(direction, least):
    by_name, by_source, seen = {}, {}, set()
    for stage in every_stage(direction):
        stage = dataclasses.replace(stage, grid=(1, 1, 1), shared_bytes=0)
        if stage in seen:
            continue
        seen.add(stage)
        source = source_of(stage)
        assert by_name.setdefault(stage.name, source) == source
        # Without the name: two names must not hide one kernel.
        body = source.replace(f"{stage.name}(", "entry(")
        assert by_source.setdefault(body, stage.name) == stage.name
        assert source.count(f"{stage.name}(") == 1
        dims = f"__cluster_dims__({stage.cluster}, 1, 1) " if stage.cluster > 1 else ""
        assert f"__global__ void {dims}__launch_bounds__({stage.block[0]}, " in source
    assert len(by_name) > least


@pytest.mark.parametrize(
    "row", (*FORWARD, *BACKWARD), ids=lambda row: f"{row.family}-{row.max_vecs}-{row.threads}"
)
def test_every_row_names_where_it_was_measured(row):
    names = re.findall(r"bench/results/[\w./-]+", row.source)
    assert names, row.source
    assert all((ROOT / name).is_file() for name in names), row.source
