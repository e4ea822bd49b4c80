"""The plan table and what is chosen from it, over every row length."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from cupynorm._cuda import plan as _plan
from cupynorm._cuda.plan import CHUNK_VECS, MAX_GRID_X, MAX_SECTIONS, TABLE, VEC_BYTES, Device
from cupynorm._cuda.source import source_of
from cupynorm._problem import ITEMSIZE, Problem
from tests.simt.limits import DeviceLimits

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = ("75", "80", "86", "89", "90", "100", "120")
SM90 = Device(compute_capability=90, sm_count=132, shared_bytes=227 * 1024)
BEFORE = dataclasses.replace(SM90, max_cluster=1)  # K3 where sm_90 has K4
MANY = 10_000  # rows enough for every multiprocessor
EVERY_N = 1_000_000


def problem(N, dtype="float32", weight=None, bias=None, M=MANY, stats=True):
    return Problem(
        "layer_norm_fwd", dtype, weight, bias, 1, M, N, (M * N, N, 1), (M * N, N, 1), stats
    )


def plan_of(N, dtype="float32", M=MANY, device=SM90, weight=None, bias=None):
    """A fresh choice: no sweep over a million lengths goes through the cache."""
    return _plan.choose_plan.__wrapped__(problem(N, dtype, weight, bias, M), device)


def device_of(capability, sm_count=100):
    limits = DeviceLimits.of(capability)
    return Device(int(capability), sm_count, limits.opt_in_shared)


def vecs_of(N, dtype):
    return -(-N * ITEMSIZE[dtype] // VEC_BYTES)


def check_capacity(plan, N, dtype, device=SM90):
    """The plan's lanes, shared memory and sections hold a row, and none of them is idle."""
    vecs = vecs_of(N, dtype)
    chunks = -(-vecs // CHUNK_VECS)
    if plan.family in ("warp", "block"):
        held = plan.threads_per_row * plan.vecs_per_thread
        assert held * VEC_BYTES >= N * ITEMSIZE[dtype]
        assert plan.threads_per_row * (plan.vecs_per_thread - 1) < vecs
        assert plan.stages[0].constants[1:3] == (plan.threads_per_row, plan.vecs_per_thread)
    elif plan.family == "shared":
        assert chunks <= 15  # of 32 lanes that merge them
        assert vecs * VEC_BYTES < plan.stages[0].shared_bytes <= device.shared_bytes
    elif plan.family == "cluster":
        stage = plan.stages[0]
        assert chunks >= stage.cluster // 2  # no two blocks without a chunk
        most = -(-chunks // stage.cluster)
        assert most * CHUNK_VECS * VEC_BYTES < stage.shared_bytes <= device.shared_bytes
    else:
        assert plan.sections * plan.chunks_per_section >= chunks
        assert (plan.sections - 1) * plan.chunks_per_section < chunks
        assert plan.sections <= MAX_SECTIONS
        assert 1 <= plan.parts <= chunks


# --- every N ------------------------------------------------------------------------------------


def test_limits_rise_and_the_last_row_has_none():
    limits = [row.max_vecs for row in TABLE]
    assert limits == sorted(set(limits))
    assert limits[-1] * VEC_BYTES >= 2**63
    families = [family for family, _ in itertools.groupby(row.family for row in TABLE)]
    assert families == ["warp", "block", "shared", "split"]


@pytest.mark.parametrize("itemsize", sorted(set(ITEMSIZE.values())))
def test_every_length_has_exactly_one_row(itemsize):
    """An interval for each row: (limit of the one before, its own limit]."""
    vecs = -(-np.arange(1, EVERY_N + 1, dtype=np.int64) * itemsize // VEC_BYTES)
    hits = np.zeros(EVERY_N, np.int64)
    chosen = np.empty(EVERY_N, np.int64)
    below = 0
    for i, row in enumerate(TABLE):
        inside = (vecs > below) & (vecs <= row.max_vecs)
        hits += inside
        chosen[inside] = i
        below = row.max_vecs
    assert (hits == 1).all()
    edges = vecs[np.flatnonzero(np.diff(chosen))]
    for v in np.unique(np.concatenate([vecs[:: EVERY_N // 997], edges])):
        for near in (v, v + 1):
            if near <= vecs[-1]:
                assert _plan.table_row(int(near)) is TABLE[chosen[np.searchsorted(vecs, near)]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_length_in_registers_is_held(dtype):
    """K1 and K2, whose launch changes with every few columns: each N is planned."""
    for N in range(1, 2048 * VEC_BYTES // ITEMSIZE[dtype] + 1):
        plan = plan_of(N, dtype)
        assert plan.family == _plan.table_row(vecs_of(N, dtype)).family
        check_capacity(plan, N, dtype)


@pytest.mark.parametrize("device", [SM90, BEFORE], ids=["sm_90", "before"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_chunk_edge_is_held(dtype, device):
    """K3 to K5 change with the number of chunks alone: each edge up to a million columns."""
    per_chunk = CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]
    for edge in range(2 * per_chunk, EVERY_N + per_chunk, per_chunk):
        before = None
        for N in (edge - 1, edge, edge + 1, edge + per_chunk // 2):
            plan = plan_of(N, dtype, device=device)
            check_capacity(plan, N, dtype)
            if before is not None and vecs_of(N, dtype) == before[0]:
                assert plan == before[1]  # the same vectors, the same plan
            before = vecs_of(N, dtype), plan


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("exponent", [20, 24, 30, 31, 32, 33])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_edges_far_beyond(dtype, exponent, delta):
    N = 2**exponent + delta
    plan = plan_of(N, dtype, M=1)
    assert plan.family == "split"
    check_capacity(plan, N, dtype)
    # A section's first column, its end and a row's bytes stay in 64 bits, workspace in megabytes.
    assert plan.sections * plan.chunks_per_section * CHUNK_VECS * VEC_BYTES < 2**62
    assert plan.workspace_bytes <= 3 * 8 * MAX_SECTIONS


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if int(c) < 90])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_shared_memory_is_used_up_to_the_last_vector(capability, dtype):
    """K3 ends where the device's shared memory does, and K5 begins with the next vector."""
    device = device_of(capability)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    low, high = 2048, 15 * CHUNK_VECS + 1  # the last row that fits lies between
    while high - low > 1:
        middle = (low + high) // 2
        fits = plan_of(middle * per_vec, dtype, device=device).family == "shared"
        low, high = (middle, high) if fits else (low, middle)
    last = plan_of(low * per_vec, dtype, device=device)
    assert last.family == "shared"
    check_capacity(last, low * per_vec, dtype, device)
    assert last.stages[0].shared_bytes + VEC_BYTES + 24 * 8 > device.shared_bytes
    assert plan_of(low * per_vec + 1, dtype, device=device).family == "split"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_halves_are_planned_alike(dtype):
    for N in (1, 64, 65, 1000, 5000, 20_000, 60_000, 200_000):
        mine, other = plan_of(N, dtype), plan_of(N, "float16")
        renamed = [dataclasses.replace(s, name="", x_dtype="") for s in mine.stages]
        assert renamed == [dataclasses.replace(s, name="", x_dtype="") for s in other.stages]


# --- the number of rows -------------------------------------------------------------------------


def without_rows(plan):
    """What may not depend on the number of rows: all but the grid, and what changes no bit."""
    stages = tuple(dataclasses.replace(stage, grid=()) for stage in plan.stages)
    return dataclasses.replace(plan, stages=stages, workspace_bytes=0, parts=0)


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_rows_choose_only_between_shared_and_split(dtype):
    """On sm_90 and newer between K4 and K5: tests/test_plan_cluster.py."""
    edges = {row.max_vecs for row in TABLE[:-1]} | {_plan.SPLIT_MIN_VECS, 14_300, 40_000}
    for vecs, more in itertools.product(edges, (0, 1)):
        N = (vecs + more) * VEC_BYTES // ITEMSIZE[dtype]
        plans = [plan_of(N, dtype, M, BEFORE) for M in (1, 2, 66, 67, 1000, 10**6)]
        if {plan.family for plan in plans} == {"shared", "split"}:
            assert vecs + more >= _plan.SPLIT_MIN_VECS
            # Split below the threshold, shared above it.
            assert [plan.family for plan in plans] == ["split"] * 3 + ["shared"] * 3
            # One section per chunk, so that the trees over the chunks are the same.
            assert all(p.chunks_per_section == 1 for p in plans if p.family == "split")
        for family in {plan.family for plan in plans}:
            same = [without_rows(plan) for plan in plans if plan.family == family]
            assert all(plan == same[0] for plan in same)


def test_grid_covers_the_rows():
    for N, M in itertools.product((3, 64, 100, 1000, 3000, 8000, 20_000), (1, 2, 31, 33, 1000)):
        plan = plan_of(N, "float32", M)
        blocks = plan.stages[0].grid[0]
        if plan.family == "split":
            assert blocks == M * plan.sections
            assert plan.stages[1].grid[0] == M * plan.parts
        elif plan.family == "cluster":
            assert blocks == M * plan.stages[0].cluster
        else:
            assert (blocks - 1) * plan.rows_per_block < M <= blocks * plan.rows_per_block


def test_workspace_holds_three_numbers_per_section():
    for dtype, size in (("float16", 4), ("float32", 4), ("float64", 8)):
        plan = plan_of(3_000_000, dtype, M=7)
        assert plan.workspace_bytes == 7 * plan.sections * 3 * size
        assert plan.workspace_bytes < 0.002 * 7 * 3_000_000 * ITEMSIZE[dtype]


@pytest.mark.parametrize(
    ("N", "most"),
    [
        (8, 32 * MAX_GRID_X),  # 32 rows a block
        (1024, 4 * MAX_GRID_X),
        (8192, MAX_GRID_X),
        (50_000, MAX_GRID_X // 4),  # clusters of 4
        (2**20, MAX_GRID_X // 256),  # 256 sections a row
    ],
)
def test_too_many_rows(N, most):
    assert plan_of(N, M=most).stages[0].grid[0] <= MAX_GRID_X
    message = rf"x has {most + 1} rows of {N} columns.*at most {MAX_GRID_X}.*in slices"
    with pytest.raises(ValueError, match=message):
        plan_of(N, M=most + 1)


# --- launches -----------------------------------------------------------------------------------


def lengths_of_every_plan(dtype):
    """One N for each distinct launch of the table."""
    vecs = [*range(1, 65, 8), *range(32, 257, 32), *range(320, 513, 64)]
    vecs += [*range(640, 1025, 128), *range(1280, 2049, 256), 2049, 4000, 7168, 7169, 14_000]
    return [v * VEC_BYTES // ITEMSIZE[dtype] for v in (*vecs, 200_000, 2_000_000)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_device_can_launch(capability):
    limits, device = DeviceLimits.of(capability), device_of(capability)
    for dtype, M in itertools.product(ITEMSIZE, (1, MANY)):
        for N in lengths_of_every_plan(dtype):
            for stage in plan_of(N, dtype, M, device).stages:
                threads = stage.block[0]
                resident = threads * stage.blocks_per_sm
                registers = min(255, limits.registers // resident // 8 * 8)
                refusal = limits.refuse(
                    stage.grid, stage.block, stage.shared_bytes, 0, stage.shared_bytes, registers,
                    (stage.cluster, 1, 1),
                )  # fmt: skip
                assert not refusal
                assert threads % 32 == 0
                # What __launch_bounds__ promises to the compiler must fit a multiprocessor.
                assert resident <= limits.threads_per_multiprocessor
                reserved = limits.shared_per_multiprocessor - limits.opt_in_shared  # per block
                used = (stage.shared_bytes + reserved) * stage.blocks_per_sm
                assert used <= limits.shared_per_multiprocessor
                assert registers >= 40


# --- names --------------------------------------------------------------------------------------

NAME = re.compile(
    r"layer_norm_fwd_(?P<kernel>warp|block|shared|cluster|split_stats|split_normalize)"
    r"_(?P<x>f16|bf16|f32|f64)(?:_c(?P<c>[248]))?(?:_t(?P<t>\d+))?(?P<s>_async|_bulk)?"
    r"(?:_v(?P<v>\d+))?(?:_r(?P<r>\d+))?"
    r"(?:_w_(?P<w>f16|bf16|f32|f64))?(?:_b_(?P<b>f16|bf16|f32|f64))?"
)
CODES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64", None: None}


def test_a_name_states_its_specialization():
    for dtype, weight in itertools.product(ITEMSIZE, (None, "float32", "bfloat16")):
        for N, bias in itertools.product(lengths_of_every_plan(dtype), (None, "float64")):
            plan = plan_of(N, dtype, weight=weight, bias=bias)
            for stage in plan.stages:
                said = NAME.fullmatch(stage.name)
                assert said is not None, stage.name
                assert said["x"] == CODES[dtype]
                if said["kernel"] == "split_stats":
                    assert (said["w"], said["b"]) == (None, None)
                else:
                    assert (said["w"], said["b"]) == (CODES[weight], CODES[bias])
                if said["kernel"] in ("warp", "block", "shared"):
                    assert int(said["t"]) == plan.threads_per_row
                assert said["s"] == ("_bulk" if said["kernel"] == "shared" else None)
                assert int(said["c"] or 1) == stage.cluster
                if said["kernel"] == "cluster":
                    assert int(said["t"]) == stage.block[0]
                if said["kernel"] in ("warp", "block"):
                    assert int(said["v"]) == plan.vecs_per_thread


def test_one_source_per_name_and_one_name_per_source():
    by_name, by_source = {}, {}
    affine = (None, *ITEMSIZE)
    for dtype, weight, bias in itertools.product(ITEMSIZE, affine, affine):
        for N, device in itertools.product(lengths_of_every_plan(dtype), (SM90, BEFORE)):
            for stage in plan_of(N, dtype, MANY, device, weight, bias).stages:
                source = source_of(dataclasses.replace(stage, grid=(1, 1, 1), shared_bytes=0))
                assert by_name.setdefault(stage.name, source) == source
                # Without the name: two names must not hide one kernel.
                body = source.replace(f"{stage.name}(", "entry(")
                assert by_source.setdefault(body, stage.name) == stage.name
                assert source.count(f"{stage.name}(") == 1
    assert len(by_name) > 1000


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.family}-{row.max_vecs}")
def test_every_row_names_where_it_was_measured(row):
    names = re.findall(r"bench/results/[\w./-]+", row.source)
    assert names, row.source
    assert all((ROOT / name).is_file() for name in names), row.source


# --- the cache ----------------------------------------------------------------------------------


def test_plans_are_cached():
    first = _plan.choose_plan(problem(12_345), SM90)
    hits = _plan.choose_plan.cache_info().hits
    assert _plan.choose_plan(problem(12_345), dataclasses.replace(SM90)) is first
    assert _plan.choose_plan.cache_info().hits == hits + 1


def test_problems_hash_by_value():
    base = problem(100, weight="float32")
    assert problem(100, weight="float32") == base
    assert hash(problem(100, weight="float32")) == hash(base)
    others = [
        dataclasses.replace(base, **{field: value})
        for field, value in {
            "op": "layer_norm_bwd", "x_dtype": "float16", "weight_dtype": None,
            "bias_dtype": "float32", "outer": 2, "M": 3, "N": 101,
            "x_strides": (0, 128, 1), "y_strides": (0, 128, 1), "stats": False,
        }.items()
    ]  # fmt: skip
    assert len(others) == len(dataclasses.fields(Problem))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("value", [problem(100), SM90, plan_of(100), plan_of(100).stages[0]])
def test_decisions_are_immutable(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
