"""The tables of K1 to K5 and what is chosen from them, over every row length."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import CHUNK_VECS, CODES, MAX_GRID_X, VEC_BYTES, Device
from cupynorm._cuda.rows import (
    APPLY_VECS,
    BACKWARD,
    FORWARD,
    MAX_SECTIONS,
    ROWS_PER_PARTIAL,
    SPLIT_MIN_VECS,
    choose_row,
    resident_clusters,
)
from cupynorm._cuda.source import kernels_folder, source_of
from cupynorm._layout import Problem
from cupynorm._ops import Op
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.cuda.rows import EACH, SHAPED, problem_of
from tests.simt.limits import DeviceLimits

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = ("75", "80", "86", "89", "90", "100", "120")
SM90 = Device(compute_capability=90, sm_count=132, shared_bytes=227 * 1024)
BEFORE = dataclasses.replace(SM90, max_cluster=1)  # K3 and K5 where sm_90 has K4
MANY = 10_000  # rows enough for every multiprocessor
EVERY_N = 1_000_000
BOTH, NEITHER = ("float32", "float32"), (None, None)
TABLES = {"forward": FORWARD, "backward": BACKWARD}
FLOATS = ("float16", "float32", "float64")
REGISTERS = ("warp", "block")
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


def device_of(capability, sm_count=100):
    limits = DeviceLimits.of(capability)
    return Device(int(capability), sm_count, limits.opt_in_shared)


def vecs_of(N, dtype):
    return -(-N * ITEMSIZE[dtype] // VEC_BYTES)


def check_capacity(direction, plan, N, dtype, device=SM90):
    """The plan's lanes, shared memory and sections hold a row, and none of them is idle."""
    vecs, stage = vecs_of(N, dtype), plan.stages[0]
    chunks = -(-vecs // CHUNK_VECS)
    if plan.family in REGISTERS or (direction == "backward" and plan.family == "shared"):
        lanes, held = plan.threads_per_row, plan.vecs_per_thread
        assert lanes * (held - 1) < vecs <= lanes * held
        told = (lanes, held) if direction == "forward" or plan.family == "warp" else (held,)
        assert stage.constants[: 1 + len(told)] == (stage.block[0], *told)
        if direction == "backward":
            assert plan.rows_per_block * lanes == stage.block[0]
    elif plan.family == "shared":
        assert chunks <= 15  # of 32 lanes that merge them
        assert vecs * VEC_BYTES < stage.shared_bytes <= device.shared_bytes
    elif plan.family == "cluster":
        assert chunks >= stage.cluster // 2  # no two blocks without a chunk
        most = -(-chunks // stage.cluster)
        assert most * CHUNK_VECS * VEC_BYTES < stage.shared_bytes <= device.shared_bytes
    else:
        assert plan.sections * plan.chunks_per_section >= chunks
        assert (plan.sections - 1) * plan.chunks_per_section < chunks
        assert plan.sections <= MAX_SECTIONS
        assert 1 <= plan.parts <= (chunks if direction == "forward" else MANY)


# --- every N ------------------------------------------------------------------------------------


@EACH
def test_limits_rise_and_the_last_row_has_none(direction):
    alone = [row for row in TABLES[direction] if row.cluster == 1]
    limits = [row.max_vecs for row in alone]
    assert limits == sorted(set(limits))
    assert limits[-1] * VEC_BYTES >= 2**63
    families = [family for family, _ in itertools.groupby(row.family for row in alone)]
    assert families == ["warp", "block", "shared", "split"]


@EACH
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length_has_exactly_one_row(direction, dtype):
    """Without clusters, in memory enough: an interval for each row, from the one before on."""
    table = [row for row in TABLES[direction] if row.cluster == 1]
    device = dataclasses.replace(BEFORE, shared_bytes=2**30)
    vecs = -(-np.arange(1, EVERY_N + 1, dtype=np.int64) * ITEMSIZE[dtype] // VEC_BYTES)
    hits, chosen = np.zeros(EVERY_N, np.int64), np.empty(EVERY_N, np.int64)
    below = 0
    for i, row in enumerate(table):
        inside = (vecs > below) & (vecs <= row.max_vecs)
        hits += inside
        chosen[inside] = i
        below = row.max_vecs
    assert (hits == 1).all()
    edges = vecs[np.flatnonzero(np.diff(chosen))]
    for v in np.unique(np.concatenate([vecs[:: EVERY_N // 997], edges])):
        for near in (v, v + 1):
            if near <= vecs[-1]:
                N = int(near) * VEC_BYTES // ITEMSIZE[dtype]
                row = choose_row(problem(direction, N, dtype), device)
                assert row is table[chosen[np.searchsorted(vecs, near)]]


@EACH
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length_in_registers_is_held(direction, dtype):
    """K1 and K2, and the backward's K3, whose launch changes with every few columns."""
    most, step = (2048, 1) if direction == "forward" else (4097, 5)
    for N in range(1, most * VEC_BYTES // ITEMSIZE[dtype] + 1, step):
        plan, vecs = plan_of(direction, N, dtype, BEFORE), vecs_of(N, dtype)
        row = next(r for r in TABLES[direction] if r.cluster == 1 and vecs <= r.max_vecs)
        assert plan.family in (row.family, "split" if row.family == "shared" else row.family)
        check_capacity(direction, plan, N, dtype, BEFORE)


@pytest.mark.parametrize("device", [SM90, BEFORE], ids=["sm_90", "before"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_chunk_edge_is_held(dtype, device):
    """K3 to K5 change with the number of chunks alone: each edge up to a million columns."""
    per_chunk = CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]
    for edge in range(2 * per_chunk, EVERY_N + per_chunk, per_chunk):
        before = None
        for N in (edge - 1, edge, edge + 1, edge + per_chunk // 2):
            plan = plan_of("forward", N, dtype, device)
            check_capacity("forward", plan, N, dtype)
            if before is not None and vecs_of(N, dtype) == before[0]:
                assert plan == before[1]  # the same vectors, the same plan
            before = vecs_of(N, dtype), plan


@EACH_DTYPE
@pytest.mark.parametrize("exponent", [20, 24, 30, 31, 32, 33])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_edges_far_beyond(dtype, exponent, delta):
    N = 2**exponent + delta
    plan = plan_of("forward", N, dtype, rows=1)
    assert plan.family == "split"
    check_capacity("forward", plan, N, dtype)
    # A section's first column, its end and a row's bytes stay in 64 bits, workspace in megabytes.
    assert plan.sections * plan.chunks_per_section * CHUNK_VECS * VEC_BYTES < 2**62
    assert plan.workspace_bytes <= 3 * 8 * MAX_SECTIONS


@EACH_DTYPE
def test_sections_and_runs_hold_a_row(dtype):
    for vecs, rows in itertools.product((4097, 8191, 8192, 2**20 + 1, 2**31, 2**36), (1, 7)):
        N = vecs * VEC_BYTES // ITEMSIZE[dtype]
        plan = plan_of("backward", N, dtype, BEFORE, rows=rows)
        assert plan.family == "split"
        check_capacity("backward", plan, N, dtype)
        runs = plan.stages[2].grid[0] // plan.partials
        per_run = plan.stages[2].block[0] * APPLY_VECS
        assert (runs - 1) * per_run < vecs <= runs * per_run
        assert plan.stages[0].grid[0] == rows * plan.sections
        assert plan.stages[1].grid[0] * plan.stages[1].block[0] // 32 >= rows


@EACH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_halves_are_planned_alike(direction, dtype):
    for N in (1, 64, 65, 1000, 5000, 20_000, 60_000, 200_000):
        mine, other = (
            [dataclasses.replace(s, name="", x_dtype="") for s in plan_of(direction, N, d).stages]
            for d in (dtype, "float16")
        )
        assert mine == other


# --- shared memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if int(c) < 90])
@EACH_DTYPE
def test_shared_memory_is_used_up_to_the_last_vector(capability, dtype):
    """K3 ends where the device's shared memory does, and K5 begins with the next vector."""
    device = device_of(capability)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    low, high = 2048, 15 * CHUNK_VECS + 1  # the last row that fits lies between
    while high - low > 1:
        middle = (low + high) // 2
        fits = plan_of("forward", middle * per_vec, dtype, device).family == "shared"
        low, high = (middle, high) if fits else (low, middle)
    last = plan_of("forward", low * per_vec, dtype, device)
    assert last.family == "shared"
    check_capacity("forward", last, low * per_vec, dtype, device)
    assert last.stages[0].shared_bytes + VEC_BYTES + 24 * 8 > device.shared_bytes
    assert plan_of("forward", low * per_vec + 1, dtype, device).family == "split"


def kept_by_shared(dtype, device, totals):
    """Vectors of a thread for which K3 runs, and the stage of the most."""
    device = dataclasses.replace(device, max_cluster=1)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    plans = {
        v: plan_of("backward", 512 * v * per_vec, dtype, device, totals=totals)
        for v in range(3, 10)
    }
    held = [v for v, plan in plans.items() if plan.family == "shared"]
    return held, plans[held[-1]].stages[0] if held else None


@pytest.mark.parametrize("capability", CAPABILITIES)
@EACH_DTYPE
@EACH_TOTALS
def test_shared_memory_is_used_up_backward(capability, dtype, totals):
    """K3 ends where its sums for dweight and dbias fill the device, or at 64 KiB of x.

    With 64 KiB of shared memory and float16 it has no row: K5 follows K2.
    """
    device = device_of(capability)
    held, stage = kept_by_shared(dtype, device, totals)
    assert held == list(range(3, 3 + len(held)))
    if held:
        assert stage.shared_bytes <= device.shared_bytes
    if len(held) < 6:
        roomy = dataclasses.replace(device, shared_bytes=2**20, max_cluster=1)
        N = 512 * (3 + len(held)) * VEC_BYTES // ITEMSIZE[dtype]
        a_vector_more = plan_of("backward", N, dtype, roomy, totals=totals).stages[0]
        assert a_vector_more.shared_bytes > device.shared_bytes


def test_which_sums_are_wanted_decides_what_fits():
    """float16 on sm_86, in vectors of a thread: one sum takes half the memory of two."""
    ends = {
        sum(t is not None for t in totals): kept_by_shared("float16", device_of("86"), totals)[0]
        for totals in (BOTH, ("float16", None), NEITHER)
    }
    assert {wanted: held[-1] for wanted, held in ends.items()} == {2: 3, 1: 6, 0: 8}


# --- the number of rows -------------------------------------------------------------------------


def without_rows(plan):
    """What may not depend on the number of rows: all but the grid, and what changes no bit."""
    stages = tuple(dataclasses.replace(stage, grid=()) for stage in plan.stages)
    free = {"workspace_bytes": 0, "workspace": (), "parts": 0, "partials": 0}
    return dataclasses.replace(plan, stages=stages, **free)


@EACH_DTYPE
def test_rows_choose_only_between_shared_and_split(dtype):
    """On sm_90 and newer between K4 and K5: test_plan_cluster.py."""
    edges = {row.max_vecs for row in FORWARD[:-1] if row.cluster == 1}
    for vecs, more in itertools.product(edges | {SPLIT_MIN_VECS, 14_300, 40_000}, (0, 1)):
        N = (vecs + more) * VEC_BYTES // ITEMSIZE[dtype]
        many = (1, 2, 66, 67, 1000, 10**6)
        plans = [plan_of("forward", N, dtype, BEFORE, rows=rows) for rows in many]
        if {plan.family for plan in plans} == {"shared", "split"}:
            assert vecs + more >= SPLIT_MIN_VECS
            # Split below the threshold, shared above it.
            assert [plan.family for plan in plans] == ["split"] * 3 + ["shared"] * 3
            # One section per chunk, so that the trees over the chunks are the same.
            assert all(p.chunks_per_section == 1 for p in plans if p.family == "split")
        for family in {plan.family for plan in plans}:
            same = [without_rows(plan) for plan in plans if plan.family == family]
            assert all(plan == same[0] for plan in same)


@EACH_DTYPE
@EACH_TOTALS
def test_rows_choose_no_family_backward(dtype, totals):
    """Nor anything else but grids: the bits of a row of dx are the same in every batch.

    But for K4 and K5, whose dx has the same bits: test_plan_cluster.py.
    """
    many = [(BEFORE, rows) for rows in (1, 2, 133, 10**6)]
    many.append((dataclasses.replace(BEFORE, sm_count=16), MANY))
    for N in lengths("backward", dtype):
        plans = [
            without_rows(plan_of("backward", N, dtype, device, rows=rows, totals=totals))
            for device, rows in many
        ]
        assert all(plan == plans[0] for plan in plans)


def test_grid_covers_the_rows():
    for N, rows in itertools.product((3, 64, 100, 1000, 3000, 8000, 20_000), (1, 2, 31, 33, 1000)):
        plan = plan_of("forward", N, rows=rows)
        blocks = plan.stages[0].grid[0]
        if plan.family == "split":
            assert blocks == rows * plan.sections
            assert plan.stages[1].grid[0] == rows * plan.parts
        elif plan.family == "cluster":
            assert blocks == rows * plan.stages[0].cluster
        else:
            assert (blocks - 1) * plan.rows_per_block < rows <= blocks * plan.rows_per_block


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_grid_is_what_the_device_holds_backward(dtype):
    """No more blocks than that, and each has rows for its partial."""
    tried = itertools.product((1, 3, 5, 100, 3000, 10**6), (BOTH, NEITHER))
    for N, (rows, totals) in itertools.product(lengths("backward", dtype), tried):
        plan = plan_of("backward", N, dtype, rows=rows, totals=totals)
        stage = plan.stages[0]
        if plan.family == "split":
            assert 1 <= plan.partials <= rows
            blocks = plan.stages[2].grid[0]
            runs = blocks // plan.partials
            assert blocks <= max(2 * SM90.sm_count + runs, runs)
        else:
            most = stage.blocks_per_sm * SM90.sm_count
            if plan.family == "cluster":
                most = resident_clusters(stage.cluster, stage.blocks_per_sm, SM90.sm_count)
            assert plan.partials * stage.cluster == stage.grid[0]
            per_block = plan.rows_per_block * (ROWS_PER_PARTIAL if totals == BOTH else 1)
            assert plan.partials == min(-(-rows // per_block), most)
        if totals == BOTH and rows >= ROWS_PER_PARTIAL:
            assert plan.partials * ROWS_PER_PARTIAL < rows + ROWS_PER_PARTIAL


def test_totals_have_a_block_for_32_columns():
    for N, totals in itertools.product((1, 32, 33, 5000, 40_000), (BOTH, (None, "float16"))):
        stage = plan_of("backward", N, totals=totals).stages[-1]
        wanted = sum(t is not None for t in totals)
        assert stage.kernel == "column_totals"
        assert stage.grid == (wanted * -(-N // 32), 1, 1)
    without = plan_of("backward", 5000, totals=NEITHER)
    assert all(stage.kernel != "column_totals" for stage in without.stages)


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


# --- workspace ------------------------------------------------------------------------------------


def test_workspace_holds_three_numbers_per_section():
    for dtype, size in (("float16", 4), ("float32", 4), ("float64", 8)):
        plan = plan_of("forward", 3_000_000, dtype, rows=7)
        assert plan.workspace_bytes == 7 * plan.sections * 3 * size
        assert dict(plan.workspace)["moments"] == 0
        assert plan.workspace_bytes < 0.002 * 7 * 3_000_000 * ITEMSIZE[dtype]


@EACH_DTYPE
@pytest.mark.parametrize("totals", [BOTH, ("float16", None), (None, "bfloat16"), NEITHER])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_workspace_backward(dtype, totals, rows):
    """Partials first, of whole vectors; each part of K5's begins at a whole number of them."""
    size, wanted = ITEMSIZE[stats_dtype(dtype)], sum(t is not None for t in totals)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    for N in (*lengths("backward", dtype), 3, 40_001):
        plan = plan_of("backward", N, dtype, totals=totals, rows=rows)
        assert plan.pitch == vecs_of(N, dtype) * per_vec >= N
        partials = wanted * plan.partials * plan.pitch * size
        assert partials % 16 == dict(plan.workspace)["partials"] == 0
        if plan.family == "split":
            sums, gradients = 3 * size * rows * plan.sections, 3 * size * rows
            assert (dict(plan.workspace)["sums"], dict(plan.workspace)["gradients"]) == (
                partials,
                partials + sums,
            )
            assert (
                dict(plan.workspace)["sums"] % size == dict(plan.workspace)["gradients"] % size == 0
            )
            assert plan.workspace_bytes == partials + sums + gradients
        else:
            assert plan.workspace_bytes == partials
        assert plan.passes == (4 if plan.family == "split" else 2) + 1
        without = plan_of("backward", N, dtype, totals=totals, rows=rows, dx=False)
        assert without.passes == plan.passes - 1


def test_workspace_of_huge_problems_stays_small():
    for N, rows in ((64, 10**8), (768, 10**7), (8192, 10**6), (10**6, 10**4), (10**9, 4)):
        plan = plan_of("backward", N, rows=rows)
        assert plan.workspace_bytes <= 0.7 * 4 * N * rows
        assert plan.workspace_bytes < 2 * 1024**3 or N > 10**8


# --- launches -----------------------------------------------------------------------------------


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


@EACH
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_device_can_launch(direction, capability):
    """Threads, registers, shared memory: what __launch_bounds__ promise fits a multiprocessor."""
    limits, device = DeviceLimits.of(capability), device_of(capability)
    for dtype, totals, rows in itertools.product(ITEMSIZE, (BOTH, NEITHER), (1, MANY)):
        for N in lengths(direction, dtype):
            for stage in plan_of(direction, N, dtype, device, totals=totals, rows=rows).stages:
                threads = stage.block[0]
                resident = threads * stage.blocks_per_sm
                registers = min(255, limits.registers // resident // 8 * 8)
                refusal = limits.refuse(
                    stage.grid, stage.block, stage.shared_bytes, 0, stage.shared_bytes, registers,
                    (stage.cluster, 1, 1),
                )  # fmt: skip
                assert not refusal
                assert threads % 32 == 0
                assert resident <= limits.threads_per_multiprocessor
                if not stage.family.startswith(("shared", "cluster")):
                    assert stage.shared_bytes <= 48 * 1024  # without opting in
                reserved = limits.shared_per_multiprocessor - limits.opt_in_shared  # per block
                used = (stage.shared_bytes + reserved) * stage.blocks_per_sm
                assert used <= limits.shared_per_multiprocessor
                assert registers >= 40


def test_constants_agree_with_the_kernel_text():
    text = (kernels_folder() / "layer_norm_split_bwd.cuh").read_text(encoding="utf-8")
    assert f"APPLY_VECS = {APPLY_VECS}," in text
    chunk = (kernels_folder() / "chunk.cuh").read_text(encoding="utf-8")
    warps, vecs = (
        int(re.search(pattern, chunk)[1])
        for pattern in (r"CHUNK_WARPS = (\d+),", r"CHUNK_VECS = (\d+),")
    )
    assert 32 * warps * vecs == CHUNK_VECS
    assert plan_of("backward", 10**6).stages[2].block == (32 * warps, 1, 1)


# --- names --------------------------------------------------------------------------------------

CODE = "(?:f16|bf16|f32|f64)"
AFFINE = rf"(?:_w_(?P<w>{CODE}))?(?:_b_(?P<b>{CODE}))?"
GIVES = r"(?:_dx)?(?:_dw)?(?:_db)?"
NAMES = [
    rf"layer_norm_fwd_(?:warp|block|shared|cluster|split_stats|split_normalize)"
    rf"_(?P<x>{CODE})(?:_c(?P<c>[248]))?(?:_t(?P<t>\d+))?(?P<s>_async|_bulk)?"
    rf"(?:_v(?P<v>\d+))?(?:_r(?P<r>\d+))?{AFFINE}",
    rf"layer_norm_bwd_(?:warp|block|shared)_(?P<x>{CODE})_t(?P<t>\d+)_v(?P<v>\d)(?P<s>_bulk)?"
    rf"{GIVES}{AFFINE}",
    rf"layer_norm_bwd_cluster_(?P<x>{CODE})_c(?P<c>[248])_t(?P<t>\d+)_v(?P<v>\d){GIVES}{AFFINE}",
    rf"layer_norm_bwd_split_apply_(?P<x>{CODE}){GIVES}{AFFINE}",
    rf"layer_norm_bwd_split_sums_(?P<x>{CODE}){AFFINE}",
    rf"layer_norm_bwd_split_merge_(?P<x>{CODE})",
    rf"column_totals_(?P<x>{CODE})(?:_dw_{CODE})?(?:_db_{CODE})?",
]


def told(name):
    """What an entry's name states; all that it may state is there, or None."""
    found = next(m.groupdict() for pattern in NAMES if (m := re.fullmatch(pattern, name)))
    return dict.fromkeys("xctsvwb") | found


def test_a_name_states_its_specialization():
    for dtype, weight in itertools.product(ITEMSIZE, (None, "float32", "bfloat16")):
        for N, bias in itertools.product(lengths("forward", dtype), (None, "float64")):
            plan = plan_of("forward", N, dtype, weight=weight, bias=bias)
            for stage in plan.stages:
                said = told(stage.name)
                assert said["x"] == CODES[dtype]
                affine = (None, None) if stage.kernel.endswith("split_stats") else (weight, bias)
                assert (said["w"], said["b"]) == tuple(CODES.get(d) for d in affine)
                if plan.family in (*REGISTERS, "shared"):
                    assert int(said["t"]) == plan.threads_per_row
                assert said["s"] == ("_bulk" if plan.family == "shared" else None)
                assert int(said["c"] or 1) == stage.cluster
                if plan.family == "cluster":
                    assert int(said["t"]) == stage.block[0]
                if plan.family in REGISTERS:
                    assert int(said["v"]) == plan.vecs_per_thread


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
        assert told(stage.name)
        # Without the name: two names must not hide one kernel.
        body = source.replace(f"{stage.name}(", "entry(")
        assert by_source.setdefault(body, stage.name) == stage.name
        assert source.count(f"{stage.name}(") == 1
    assert len(by_name) > least


@pytest.mark.parametrize(
    "row", (*FORWARD, *BACKWARD), ids=lambda row: f"{row.family}-{row.max_vecs}-{row.threads}"
)
def test_every_row_names_where_it_was_measured(row):
    names = re.findall(r"bench/results/[\w./-]+", row.source)
    assert names, row.source
    assert all((ROOT / name).is_file() for name in names), row.source


# --- values ---------------------------------------------------------------------------------------


def test_problems_hash_by_value():
    base, same = (problem("forward", 100, weight="float32") for _ in range(2))
    assert base == same and hash(base) == hash(same)
    changes = {
        "op": Op("rms_norm"), "backward": True, "dtypes": (("x", "float16"),), "outer": 2, "M": 3,
        "N": 101, "strides": (("x", (0, 128, 1)),), "stats_strides": (1, 5), "stats": False,
        "omit": True, "copies": (("x", "why"),),
    }  # fmt: skip
    others = [dataclasses.replace(base, **{name: value}) for name, value in changes.items()]
    assert len(others) == len(dataclasses.fields(Problem))
    assert len({base, *others}) == len(others) + 1


PLAN = plan_of("forward", 100)


@pytest.mark.parametrize("value", [problem("forward", 100), SM90, PLAN, PLAN.stages[0], FORWARD[0]])
def test_decisions_are_immutable(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
