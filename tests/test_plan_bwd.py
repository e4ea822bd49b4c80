"""The backward's plan: families, grids, partials, workspace, names, over lengths and devices."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from cupynorm._cuda import plan_bwd as _plan_bwd
from cupynorm._cuda.plan import CHUNK_VECS, MAX_GRID_X, MAX_SECTIONS, VEC_BYTES, Device
from cupynorm._cuda.plan_bwd import APPLY_VECS, BWD_TABLE, ROWS_PER_PARTIAL
from cupynorm._cuda.plan_cluster import resident_clusters
from cupynorm._cuda.source import kernels_folder, source_of
from cupynorm._problem import ITEMSIZE, GradientProblem, stats_dtype
from tests.simt.limits import DeviceLimits

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = ("75", "80", "86", "89", "90", "100", "120")
SM90 = Device(compute_capability=90, sm_count=132, shared_bytes=227 * 1024)
BEFORE = dataclasses.replace(SM90, max_cluster=1)  # K3 and K5 where sm_90 has K4
MANY = 10_000
BOTH, NEITHER = ("float32", "float32"), (None, None)


def problem(N, dtype="float32", weight=None, totals=BOTH, rows=MANY, dx=True):
    return GradientProblem(
        dtype, weight, *totals, dx, 1, rows, N, *((rows * N, N, 1) for _ in range(3))
    )


def plan_of(N, dtype="float32", device=SM90, **options):
    """A fresh choice: no sweep goes through the cache."""
    return _plan_bwd.choose_plan_bwd.__wrapped__(problem(N, dtype, **options), device)


def device_of(capability, sm_count=100):
    limits = DeviceLimits.of(capability)
    return Device(int(capability), sm_count, limits.opt_in_shared)


def vecs_of(N, dtype):
    return -(-N * ITEMSIZE[dtype] // VEC_BYTES)


def lengths(dtype):
    """The ends of every row of the table and of every number of vectors a thread may hold."""
    vecs = {1, 2, 2**16, 10**6}
    vecs |= {row.max_vecs for row in BWD_TABLE[:-1]}
    vecs |= {512 * v for v in range(2, 9)}
    vecs |= {v + 1 for v in vecs}
    return [v * VEC_BYTES // ITEMSIZE[dtype] for v in sorted(vecs)]


# --- families -----------------------------------------------------------------------------------


def test_limits_rise_and_the_last_row_has_none():
    limits = [row.max_vecs for row in BWD_TABLE]
    assert limits == sorted(set(limits))
    assert limits[-1] * VEC_BYTES >= 2**63
    families = [family for family, _ in itertools.groupby(row.family for row in BWD_TABLE)]
    assert families == ["warp", "block", "shared", "split"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_length_on_chip_is_held(dtype):
    """K1 to K3: the lanes hold the row's vectors, and no vector of theirs is idle."""
    for N in range(1, 4097 * VEC_BYTES // ITEMSIZE[dtype], 5):
        plan, vecs = plan_of(N, dtype, BEFORE), vecs_of(N, dtype)
        row = next(row for row in BWD_TABLE if vecs <= row.max_vecs)
        if plan.family == "split":
            assert row.family in ("shared", "split")
            continue
        assert plan.family == row.family
        assert plan.threads_per_row * plan.vecs_per_thread >= vecs
        assert plan.threads_per_row * (plan.vecs_per_thread - 1) < vecs
        threads = plan.stages[0].block[0]
        assert plan.rows_per_block * plan.threads_per_row == threads
        lanes = {"warp": (plan.threads_per_row,)}.get(plan.family, ())
        assert plan.stages[0].constants[: 2 + len(lanes)] == (
            threads, *lanes, plan.vecs_per_thread,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_sections_and_runs_hold_a_row(dtype):
    for vecs, rows in itertools.product((4097, 8191, 8192, 2**20 + 1, 2**31, 2**36), (1, 7)):
        plan = plan_of(vecs * VEC_BYTES // ITEMSIZE[dtype], dtype, BEFORE, rows=rows)
        chunks = -(-vecs // CHUNK_VECS)
        assert plan.family == "split"
        assert plan.sections * plan.chunks_per_section >= chunks
        assert (plan.sections - 1) * plan.chunks_per_section < chunks
        assert plan.sections <= MAX_SECTIONS
        runs = plan.stages[2].grid[0] // plan.partials
        per_run = plan.stages[2].block[0] * APPLY_VECS
        assert (runs - 1) * per_run < vecs <= runs * per_run
        assert plan.stages[0].grid[0] == rows * plan.sections
        assert plan.stages[1].grid[0] * plan.stages[1].block[0] // 32 >= rows


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("totals", [BOTH, ("float32", None), NEITHER])
def test_rows_choose_no_family(dtype, totals):
    """Nor anything else but grids: the bits of a row of dx are the same in every batch.

    But for K4 and K5, whose dx has the same bits: tests/test_plan_cluster.py.
    """
    for N in lengths(dtype):
        many = [(BEFORE, rows) for rows in (1, 2, 133, 10**6)]
        many.append((dataclasses.replace(BEFORE, sm_count=16), MANY))
        plans = [plan_of(N, dtype, device, rows=rows, totals=totals) for device, rows in many]
        same = [
            (p.family, p.threads_per_row, p.vecs_per_thread, p.sections, p.chunks_per_section,
             [dataclasses.replace(s, grid=()) for s in p.stages])
            for p in plans
        ]  # fmt: skip
        assert all(plan == same[0] for plan in same)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("totals", [BOTH, ("float32", None), NEITHER])
def test_shared_memory_is_used_up_to_the_last_vector(capability, dtype, totals):
    """K3 ends where its sums for dweight and dbias fill the device, or at 64 KiB of x.

    With 64 KiB of shared memory and float16 it has no row: K5 follows K2.
    """
    device = device_of(capability)
    held, stage = kept_by_shared(dtype, device, totals)
    assert held == list(range(3, 3 + len(held)))
    if held:
        assert stage.shared_bytes <= device.shared_bytes
    if len(held) < 6:
        roomy = dataclasses.replace(device, shared_bytes=2**20)
        N = 512 * (3 + len(held)) * VEC_BYTES // ITEMSIZE[dtype]
        roomy = dataclasses.replace(roomy, max_cluster=1)
        a_vector_more = plan_of(N, dtype, roomy, totals=totals).stages[0]
        assert a_vector_more.shared_bytes > device.shared_bytes


def test_which_sums_are_wanted_decides_what_fits():
    """float16 on sm_86, in vectors of a thread: one sum takes half the memory of two."""
    ends = {
        sum(t is not None for t in totals): kept_by_shared("float16", device_of("86"), totals)[0]
        for totals in (BOTH, ("float16", None), NEITHER)
    }
    assert {wanted: held[-1] for wanted, held in ends.items()} == {2: 3, 1: 6, 0: 8}


def kept_by_shared(dtype, device, totals):
    """Vectors of a thread for which K3 runs, and the stage of the most."""
    device = dataclasses.replace(device, max_cluster=1)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    plans = {v: plan_of(512 * v * per_vec, dtype, device, totals=totals) for v in range(3, 10)}
    held = [v for v, plan in plans.items() if plan.family == "shared"]
    return held, plans[held[-1]].stages[0] if held else None


# --- grids and partials -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_grid_is_what_the_device_holds(dtype):
    """No more blocks than that, and each has rows for its partial."""
    for N, rows in itertools.product(lengths(dtype), (1, 3, 5, 100, 3000, 10**6)):
        for totals in (BOTH, NEITHER):
            plan = plan_of(N, dtype, rows=rows, totals=totals)
            if plan.family == "split":
                assert 1 <= plan.partials <= rows
                blocks = plan.stages[2].grid[0]
                runs = blocks // plan.partials
                assert blocks <= max(2 * SM90.sm_count + runs, runs)
            else:
                stage = plan.stages[0]
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
        stage = plan_of(N, totals=totals).stages[-1]
        wanted = sum(t is not None for t in totals)
        assert stage.kernel == "column_totals"
        assert stage.grid == (wanted * -(-N // 32), 1, 1)
    assert all(stage.kernel != "column_totals" for stage in plan_of(5000, totals=NEITHER).stages)


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("totals", [BOTH, ("float16", None), (None, "bfloat16"), NEITHER])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_workspace(dtype, totals, rows):
    """Partials first, of whole vectors; each part of K5's begins at a whole number of them."""
    size, wanted = ITEMSIZE[stats_dtype(dtype)], sum(t is not None for t in totals)
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    for N in (*lengths(dtype), 3, 40_001):
        plan = plan_of(N, dtype, totals=totals, rows=rows)
        assert plan.pitch == vecs_of(N, dtype) * per_vec >= N
        partials = wanted * plan.partials * plan.pitch * size
        assert partials % 16 == 0
        if plan.family == "split":
            sums, gradients = 3 * size * rows * plan.sections, 3 * size * rows
            assert (plan.sums_at, plan.gradients_at) == (partials, partials + sums)
            assert plan.sums_at % size == plan.gradients_at % size == 0
            assert plan.workspace_bytes == partials + sums + gradients
        else:
            assert plan.workspace_bytes == partials
        assert plan.passes == (4 if plan.family == "split" else 2) + 1
        without = plan_of(N, dtype, totals=totals, rows=rows, dx=False)
        assert without.passes == plan.passes - 1


def test_workspace_of_huge_problems_stays_small():
    for N, rows in ((64, 10**8), (768, 10**7), (8192, 10**6), (10**6, 10**4), (10**9, 4)):
        plan = plan_of(N, rows=rows)
        assert plan.workspace_bytes <= 0.7 * 4 * N * rows
        assert plan.workspace_bytes < 2 * 1024**3 or N > 10**8


@pytest.mark.parametrize(("N", "most"), [(200_000, MAX_GRID_X // 49), (2**20, MAX_GRID_X // 256)])
def test_too_many_rows(N, most):
    """Only K5 has blocks for each row."""
    assert plan_of(N, rows=most).stages[0].grid[0] <= MAX_GRID_X
    message = rf"x has {most + 1} rows of {N} columns.*at most {MAX_GRID_X}.*in slices"
    with pytest.raises(ValueError, match=message):
        plan_of(N, rows=most + 1)
    for short in (8, 1024, 8192):
        plan_of(short, rows=2**40)


# --- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_device_can_launch(capability):
    """Threads, registers, shared memory: what __launch_bounds__ promise fits a multiprocessor."""
    limits, device = DeviceLimits.of(capability), device_of(capability)
    for dtype, totals, rows in itertools.product(ITEMSIZE, (BOTH, NEITHER), (1, MANY)):
        for N in lengths(dtype):
            for stage in plan_of(N, dtype, device, totals=totals, rows=rows).stages:
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
                reserved = limits.shared_per_multiprocessor - limits.opt_in_shared
                used = (stage.shared_bytes + reserved) * stage.blocks_per_sm
                assert used <= limits.shared_per_multiprocessor


def test_constants_agree_with_the_kernel_text():
    text = (kernels_folder() / "layer_norm_split_bwd.cuh").read_text(encoding="utf-8")
    assert f"APPLY_VECS = {APPLY_VECS}," in text
    chunk = (kernels_folder() / "chunk.cuh").read_text(encoding="utf-8")
    warps, vecs = (
        int(re.search(pattern, chunk)[1])
        for pattern in (r"CHUNK_WARPS = (\d+),", r"CHUNK_VECS = (\d+),")
    )
    assert 32 * warps * vecs == CHUNK_VECS
    assert plan_of(10**6).stages[2].block == (32 * warps, 1, 1)


# --- names --------------------------------------------------------------------------------------

CODE = r"(?:f16|bf16|f32|f64)"
NAMES = (
    rf"layer_norm_bwd_(?:warp|block|shared)_{CODE}_t\d+_v\d(?:_bulk)?(?:_dx)?(?:_dw)?(?:_db)?"
    rf"(?:_w_{CODE})?",
    rf"layer_norm_bwd_cluster_{CODE}_c[248]_t\d+_v\d(?:_dx)?(?:_dw)?(?:_db)?(?:_w_{CODE})?",
    rf"layer_norm_bwd_split_apply_{CODE}(?:_dx)?(?:_dw)?(?:_db)?(?:_w_{CODE})?",
    rf"layer_norm_bwd_split_sums_{CODE}(?:_w_{CODE})?",
    rf"layer_norm_bwd_split_merge_{CODE}",
    rf"column_totals_{CODE}(?:_dw_{CODE})?(?:_db_{CODE})?",
)


def test_one_source_per_name_and_one_name_per_source():
    by_name, by_source = {}, {}
    weights = (None, "float16", "float32")
    all_totals = (BOTH, NEITHER, ("float16", None), (None, "float64"))
    for dtype, weight, totals in itertools.product(ITEMSIZE, weights, all_totals):
        for N, dx in itertools.product(lengths(dtype), (True, False)):
            if not dx and totals == NEITHER:
                continue
            for stage in plan_of(N, dtype, weight=weight, totals=totals, dx=dx).stages:
                source = source_of(dataclasses.replace(stage, grid=(1, 1, 1), shared_bytes=0))
                assert by_name.setdefault(stage.name, source) == source
                assert any(re.fullmatch(name, stage.name) for name in NAMES), stage.name
                body = source.replace(f"{stage.name}(", "entry(")
                assert by_source.setdefault(body, stage.name) == stage.name
                assert source.count(f"{stage.name}(") == 1
    assert len(by_name) > 500


@pytest.mark.parametrize("row", BWD_TABLE, ids=lambda row: f"{row.family}-{row.max_vecs}")
def test_every_row_names_where_it_was_measured(row):
    names = re.findall(r"bench/results/[\w./-]+", row.source)
    assert names, row.source
    assert all((ROOT / name).is_file() for name in names), row.source


# --- the cache ----------------------------------------------------------------------------------


def test_plans_are_cached():
    first = _plan_bwd.choose_plan_bwd(problem(12_345), SM90)
    hits = _plan_bwd.choose_plan_bwd.cache_info().hits
    assert _plan_bwd.choose_plan_bwd(problem(12_345), dataclasses.replace(SM90)) is first
    assert _plan_bwd.choose_plan_bwd.cache_info().hits == hits + 1


def test_problems_hash_by_value():
    base = problem(100, weight="float32")
    assert hash(problem(100, weight="float32")) == hash(base)
    others = [
        dataclasses.replace(base, **{field: value})
        for field, value in {
            "x_dtype": "float16", "weight_dtype": None, "dweight_dtype": None,
            "dbias_dtype": "float16", "dx": False, "outer": 2, "M": 3, "N": 101,
            "dy_strides": (0, 128, 1), "x_strides": (0, 128, 1), "dx_strides": (0, 128, 1),
        }.items()
    ]  # fmt: skip
    assert len(others) == len(dataclasses.fields(GradientProblem))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize("value", [problem(100), plan_of(100)], ids=["problem", "plan"])
def test_decisions_are_immutable(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
