"""The cost model: bytes as the simulator counts them, roofs that hold, files up to date."""

import csv
import dataclasses
import math
import re

import numpy as np
import pytest

import cupynorm as cn
from bench import model, model_code, model_plots
from bench.gpu_clock import Times
from bench.gpu_contender import Result
from bench.gpu_grid import BIG, BWD, FEW, Case, case
from bench.gpu_table import Table, rows_of
from bench.model_cases import NAMES, planned, predicted, predictions
from bench.model_checks import RESULTS, measured, published
from bench.model_choices import choices, crossovers
from bench.model_gpus import GPUS, gpu_named
from bench.model_launches import FAMILIES, FAR, Launch, Moved, launches_of
from bench.model_occupancy import blocks_of, most_registers, resident_blocks
from bench.model_report import page
from bench.model_targets import targets
from bench.model_time import LOADS, STORES, copy_time, predict, run_efficiency
from cupynorm._cuda.plan import TABLE, VEC_BYTES
from cupynorm._cuda.plan_bwd import BWD_TABLE
from cupynorm._cuda.plan_column import ColumnProblem, ColumnsProblem, choose_plan_columns
from cupynorm._problem import GradientProblem, Problem
from tests import gradient_rows, row_cases
from tests.gpu_backend import SIMULATED
from tests.nvrtc.check import blocks_by_registers
from tests.simt.limits import DeviceLimits
from tests.test_kernels_column import SMALL, normalize

H100 = gpu_named("NVIDIA H100 80GB HBM3")
ONE_TRIP = dataclasses.replace(H100, t0=0.0)


# --- bytes ----------------------------------------------------------------------------------------


def agree(launches, traffic, but=()):
    """Every buffer of every launch; what is near is counted once per block."""
    for launch, counted in zip(launches, traffic, strict=True):
        moved = launch.moved
        assert launch.stage.grid[0] == launch.blocks or launch.units >= launch.blocks
        for buffer in counted.buffers:
            name = buffer.name
            if name in but:
                continue
            assert buffer.written_bytes == moved.written.get(name, 0), name
            read = moved.read.get(name, 0) + moved.again.get(name, 0)
            if name in moved.near:
                assert buffer.distinct_read_bytes == moved.near[name], name
                assert read <= moved.near[name]
            elif name in ("mean", "rstd"):
                assert buffer.distinct_read_bytes == read, name
            else:
                assert buffer.read_bytes == read, name


@pytest.mark.parametrize("family", row_cases.FAMILIES)
def test_forward_bytes(family):
    N = row_cases.length(family, "float32")
    x, (weight, bias) = row_cases.values(9, N), row_cases.affine(N)
    result = row_cases.run(SIMULATED, family, x, weight, bias)
    strides = (9 * N, N, 1)
    dtypes = ("float32",) * 3
    problem = Problem("layer_norm_fwd", *dtypes, 1, 9, N, strides, strides, stats=True)
    agree(launches_of(problem, result.plan, H100), result.traffic)


@pytest.mark.parametrize("family", row_cases.FAMILIES)
def test_backward_bytes(family):
    N, rows = row_cases.length(family, "float32"), {"warp": 150, "block": 11}.get(family, 5)
    if family in ("shared", "split"):
        N = gradient_rows.length(family, "float32")
    (dy, x), weight = gradient_rows.pair(rows, N), row_cases.affine(N)[0]
    result = gradient_rows.run(SIMULATED, family, dy, x, weight, sm_count=1)
    strides = (rows * N, N, 1)
    problem = GradientProblem(*("float32",) * 4, True, 1, rows, N, strides, strides, strides)
    agree(launches_of(problem, result.plan, H100), result.traffic)


@pytest.mark.parametrize(("N", "device"), [(64, SIMULATED.device), (768, SMALL)])
def test_bytes_of_tiles(N, device):
    """One panel; three, of which two are read again."""
    M = 512 if N == 64 else 64
    x = np.random.default_rng(N).standard_normal((1, M, N)).astype(np.float32)
    weight, bias = row_cases.affine(N) if N == 64 else (None, None)
    *_, plan, traffic = normalize(SIMULATED, x, "FF", weight, bias, device=device)
    dtypes = [None if a is None else "float32" for a in (weight, bias)]
    strides = (M * N, 1, M)
    problem = ColumnProblem("float32", *dtypes, 1, M, N, strides, strides, (M, 1))
    agree(launches_of(problem, plan, H100), [traffic], but=("mean", "rstd"))


def test_bytes_of_columns_of_their_own(cupy_lib):
    if not cupy_lib.backend.name.endswith("SIMULATED"):
        pytest.skip("nothing is counted on a GPU")
    import cupy

    M, N = 512, 24
    columns = [cupy_lib.from_numpy(np.full(M, j, np.float32)) for j in range(N)]
    cn.layer_norm_columns(columns)
    launch = cupy.simulator.launches[-1]
    problem = ColumnsProblem("float32", None, None, M, N, (N, 1), False)
    (told,) = launches_of(problem, choose_plan_columns(problem, SIMULATED.device), H100)
    counted = launch.traffic.buffers
    table = max(counted, key=lambda b: b.distinct_read_bytes if b.read_widths.keys() != {4} else 0)
    read = sum(b.read_bytes for b in counted if b is not table)
    assert read == told.moved.read["columns"]
    assert sum(b.written_bytes for b in counted) == told.moved.written["y"]
    assert table.distinct_read_bytes == told.moved.near["table"]


def test_backward_bytes_of_tiles(cupy_lib):
    if not cupy_lib.backend.name.endswith("SIMULATED"):
        pytest.skip("nothing is counted on a GPU")
    import cupy

    x = np.asfortranarray(np.random.default_rng(0).standard_normal((256, 40)), np.float32)
    device = cupy_lib.from_numpy(x)
    _, mean, rstd = cn.layer_norm(device, axis=1, return_stats=True)
    cn.layer_norm_backward(device, device, None, mean, rstd, None, axis=1)
    main, totals = cupy.simulator.launches[-2:]
    c = Case("float32", 256, 40, BIG, None, "FF", BWD)
    ((problem, plan),) = planned(c, dataclasses.replace(H100, sm_count=132))
    problem = dataclasses.replace(problem, dbias_dtype="float32")
    assert plan.partials >= main.grid[0]
    plan = dataclasses.replace(plan, partials=main.grid[0], workspace_bytes=main.grid[0] * 40 * 4)
    told = launches_of(problem, plan, H100)
    total = {way: sum(getattr(told[0].moved, way).values()) for way in ("read", "written")}
    assert sum(b.read_bytes for b in main.traffic.buffers) == total["read"]
    assert sum(b.written_bytes for b in main.traffic.buffers) == total["written"]
    del totals


# --- occupancy and instructions -------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.name)
def test_gpus_have_the_limits_of_their_architecture(gpu):
    limits = DeviceLimits.of(str(gpu.compute_capability))
    assert gpu.shared_per_block == limits.opt_in_shared
    assert gpu.shared_per_sm == limits.shared_per_multiprocessor
    assert gpu.threads_per_sm == limits.threads_per_multiprocessor
    for threads, registers in ((32, 90), (64, 90), (128, 32), (128, 65), (512, 72), (768, 80)):
        found = blocks_of(gpu, threads, registers, 0)
        by_threads = min(limits.threads_per_multiprocessor // threads, gpu.blocks_per_sm)
        assert found == min(blocks_by_registers(limits, registers, threads), by_threads)
    assert blocks_of(gpu, 32, 16, 40 * 1024) == gpu.shared_per_sm // (41 * 1024)
    assert blocks_of(gpu, 32, 16, 0) == gpu.blocks_per_sm


def test_launch_bounds_and_blocks_fit_each_other():
    for threads, blocks in ((128, 8), (256, 3), (768, 1)):
        most = most_registers(threads, blocks)
        assert blocks_of(H100, threads, most, 0) >= blocks
        assert most == 255 or blocks_of(H100, threads, most + 8, 0) < blocks


def test_no_plan_holds_fewer_blocks_than_it_states():
    for p in predictions([case(d, N) for d in ("bfloat16", "float32") for N in (64, 4096, 2**16)]):
        for _, plan in planned(p.case, p.gpu):
            for stage in plan.stages:
                assert resident_blocks(stage, p.gpu) >= stage.blocks_per_sm


def test_instructions_are_those_of_the_machine_code():
    pytest.importorskip("cupy", reason="cupy brings the way to NVRTC")
    for way, n in model_code.counted(90, "bfloat16").items():
        kept = model_code.instructions_of(90, "bfloat16", way)
        assert n.per_element == pytest.approx(kept.per_element, rel=0.1), (
            "python -m bench.model_code"
        )
        assert n.per_row == pytest.approx(kept.per_row, rel=0.2), "python -m bench.model_code"


# --- time -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class OnePlan:
    family: str = "made up"


STAGE = dataclasses.replace(
    planned(case("float32", 64), H100)[0][1].stages[0], name="", shared_bytes=0
)


@pytest.fixture
def time_of(monkeypatch):
    """Microseconds of a made-up launch on an H100 without a fixed cost."""

    def time(moved, **options):
        values = {"units": 1, "blocks": 1, "trips": 1, "cycles": 0, "instructions": 0} | options
        launch = Launch(stage=STAGE, moved=moved, **values)
        monkeypatch.setitem(FAMILIES, ("OnePlan", "made up"), lambda *_: [launch])
        floor = sum(moved.read.values()) + sum(moved.written.values())
        return predict(OnePlan(), OnePlan(), ONE_TRIP, floor)

    return time


def test_many_bytes_take_what_the_bandwidth_allows(time_of):
    half = 2 * 10**9
    p = time_of(Moved({"x": half}, {"y": half}), units=10**5, blocks=10**5)
    assert p.us == pytest.approx(2 * half / H100.supply, rel=0.02)
    assert p.bottleneck in ("bandwidth", "bytes in flight")


def test_one_block_takes_its_waits_and_its_work(time_of):
    p = time_of(Moved({"x": 4096}, {"y": 4096}), trips=3, cycles=1980)
    assert p.us == pytest.approx(3 * H100.latency + 1.0, rel=0.01)


def test_loads_ahead_hide_the_shorter_of_both(time_of):
    moved = Moved({"x": 4096}, {"y": 4096})
    assert time_of(moved, cycles=198, ahead=True).us == pytest.approx(H100.latency, rel=0.01)
    assert time_of(moved, cycles=19800, ahead=True).us == pytest.approx(10.0, rel=0.01)


def test_instructions_are_a_roof(time_of):
    per_us = H100.sm_count * H100.lanes * H100.clock * 1e3
    p = time_of(Moved({"x": 4096}), units=1000, blocks=1000, instructions=500 * per_us)
    assert p.us == pytest.approx(500)
    assert p.bottleneck == "instructions"


def test_gaps_and_second_reads_cost(time_of):
    x = 10**9
    many = {"units": 20_000, "blocks": 20_000}
    whole = time_of(Moved({"x": x}, {"y": x}), **many).us
    gaps = time_of(Moved({"x": x}, {"y": x}), **many, write_run=(16, 128)).us
    assert gaps == pytest.approx(whole * (1 + 3175 / 2973) / 2, rel=0.02)
    again = time_of(Moved({"x": x}, {"y": x}, again={"x": x}), **many)
    # The half of L2 that keeps it spares the memory.
    assert again.us == pytest.approx(whole * 1.5 - 0.5 * H100.l2_bytes / H100.supply, rel=0.02)
    assert again.bottleneck == "extra bytes"


def test_a_last_round_that_is_short_counts(time_of):
    at_once = resident_blocks(STAGE, H100) * H100.sm_count

    def rounds(units):
        moved = Moved({"x": 64 * units}, {"y": 64 * units})  # so few bytes that only waits count
        return time_of(moved, units=units, blocks=units).us

    full, more = rounds(2 * at_once), rounds(2 * at_once + 1)
    assert more > full * 1.3


def test_shares_of_short_pieces_are_the_published_ones():
    for table in (LOADS, STORES):
        for run, share in table:
            assert run_efficiency(run, table) == pytest.approx(share)
        found = [run_efficiency(run, table) for run in range(8, 600, 8)]
        assert found == sorted(found)
        assert run_efficiency(FAR, table) == 1.0


def test_copies_of_many_bytes_reach_the_supply():
    for gpu in GPUS:
        assert copy_time(10**10, gpu) == pytest.approx(gpu.t0 + 1e10 / gpu.supply, rel=0.01)
        assert copy_time(1024, gpu) < gpu.t0 + 2 * gpu.latency


def test_nothing_beats_the_copy():
    for p in predictions():
        assert 0 < p.fraction_of_copy < 1.03, p
        parts = dataclasses.astuple(p.time)[1:]
        assert p.time.us == pytest.approx(sum(parts))
        assert min(parts) >= -1e-6 * p.time.us, p


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*TABLE, *BWD_TABLE], ids=lambda r: f"{r.family}-{r.max_vecs}")
def test_every_row_of_the_tables_is_measured_or_predicted(row):
    """A row that names model.md has its family there, and a prediction at its longest row."""
    names = re.findall(r"bench/results/[\w./-]+", row.source)
    assert names and all((RESULTS.parents[1] / name).is_file() for name in names), row.source
    if row.source.startswith("predicted"):
        assert names == ["bench/results/model.md"]
        assert f" {NAMES[row.family]} " in (RESULTS / "model.md").read_text(encoding="utf-8")
        op = "layer_norm_fwd" if row in TABLE else BWD
        vecs = min(row.max_vecs, 2**24)
        found = predictions([case("float32", vecs * VEC_BYTES // 4, op=op)])
        assert len(found) == len(GPUS)
        assert all(math.isfinite(p.time.us) and p.time.us > p.gpu.t0 for p in found)


def test_every_plan_of_every_case_names_a_file_that_is_there():
    """Tiles too, whose shapes stand in no table of rows."""
    for p in predictions():
        for _, plan in planned(p.case, p.gpu):
            names = re.findall(r"bench/results/[\w./-]+", plan.source)
            assert names and all((RESULTS.parents[1] / name).is_file() for name in names)
            assert ("model.md" in plan.source) == plan.source.startswith("predicted")


def test_a_family_that_the_model_does_not_know_is_named():
    ((problem, plan),) = planned(case("float32", 64), H100)
    with pytest.raises(ValueError, match="knows no family"):
        launches_of(problem, dataclasses.replace(plan, family="future"), H100)


def test_choices_are_never_slower_than_today():
    for c in choices():
        assert c.mean <= 1.0, c
        assert c.model == c.today or c.mean < 1.0
    assert any(x.ratios for x in crossovers())


def test_claims_that_the_model_denies_say_why():
    for t in targets():
        assert set(t.least) == {g.name for g in GPUS}
        assert all(why for _, why in t.least.values())
        for name, (value, _) in t.least.items():
            assert (t.free[name] >= value - 1e-9) == t.upward
    few = next(t for t in targets() if t.number == "3a")
    assert "H100" in few.missed() and "extra bytes" in few.least["H100"][1]


# --- measurements ---------------------------------------------------------------------------------


def test_names_of_gpus():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA L4": "L4", "NVIDIA L40S": "L40S",
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H200": "H200", "NVIDIA B200": "B200",
    }  # fmt: skip
    for driver, name in names.items():
        assert gpu_named(driver).name == name
    assert gpu_named("NVIDIA GeForce RTX 3060") is None


def made_run(folder, gpu="NVIDIA H100 80GB HBM3", slower=1.25):
    """A folder as `make gpu` leaves one, with times that are the model's, `slower` times."""
    run = folder / "made-up-2026-01-01"
    run.mkdir()
    cases = {
        "forward.csv": [case("bfloat16", 4096), Case("bfloat16", 1, 2**20, FEW, None)],
        "backward.csv": [
            case("float32", 1024, op=BWD),
            case("float32", 1024, op="layer_norm_fwd_bwd"),
        ],
        "layouts.csv": [Case("float32", 2**16, 64, "layout", layout="FC")],
    }
    for name, some in cases.items():
        table = Table(run / name, {"gpu": gpu, "commit": "0" * 40}, simulated=False)
        for c in some:
            us = slower * predicted(c, H100).time.us
            times, copy = (Times(t, t, t, 15) for t in (us, copy_time(c.copy_bytes, H100)))
            ours = Result("cupynorm", "ok", times=times, ours=True)
            others = [Result("copy-block", "ok", times=copy), Result("liger", "skipped")]
            table.add(rows_of(c, [ours, *others]))
    return run


def test_runs_stand_beside_the_predictions(tmp_path, capsys):
    run = made_run(tmp_path)
    found = list(measured(sorted(run.glob("*.csv"))))
    assert len(found) == 5
    for m in found:
        assert m.error == pytest.approx(-0.2, abs=1e-4)
        assert m.measured_fraction * 1.25 == pytest.approx(m.predicted_fraction, rel=1e-3)
    text = page([], found)
    assert "5 cases, off by 25%" in text
    assert text.count("| made-up-2026-01-01/") == 5
    assert model.main(["--measured", str(run)]) == 0
    assert "off by 25%" in capsys.readouterr().out


def test_what_was_not_timed_or_is_unknown_is_left_out(tmp_path, capsys):
    run = made_run(tmp_path, gpu="NVIDIA GeForce RTX 3060")
    assert not list(measured(run.glob("*.csv")))
    assert model.main(["--measured", str(run)]) == 0
    assert "no timed row" in capsys.readouterr().out


def test_roofs_are_where_others_have_been_seen():
    """Register rows of the lengths that Quack's kernels hold too: the same two passes."""
    near = [p for p in published() if p.what.startswith("Quack RMS") and 512 <= p.case.N <= 16384]
    assert len(near) == 6
    assert all(abs(p.error) < 0.1 for p in near)


# --- files ----------------------------------------------------------------------------------------


def test_committed_files_are_what_the_code_gives():
    for path, text in model.files().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name}: python -m bench.model --markdown"
        )


def test_committed_figures_show_what_the_code_gives():
    for op, name in model_plots.OPS.items():
        drawn = (RESULTS / f"model-{name}.svg").read_text(encoding="utf-8")
        assert model_plots.state(op) in drawn, "python -m bench.model_plots"
        assert "predicted by the cost model, not measured" in drawn
        assert (RESULTS / f"model-{name}.png").is_file()


def test_figures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = model_plots.draw(BWD, tmp_path, ("svg",))
    drawn = path.read_text(encoding="utf-8")
    assert model_plots.state(BWD) in drawn
    assert all(f">{name}<" in drawn for name in (*model_plots.SHOWN, "K1", "K5", "copy"))


def test_command_line(capsys):
    assert model.main([]) == 0
    assert "| bfloat16, 4096 | K2 0." in capsys.readouterr().out
    assert model.main(["--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {r["gpu"] for r in rows} == {g.name for g in GPUS}
    assert {"K1", "K2", "K3", "K5", "K6", "K7"} <= {r["kernels"] for r in rows}
