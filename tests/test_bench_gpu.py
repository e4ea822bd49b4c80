"""The GPU benchmark's own logic on the simulated device: it must reject, and not invent."""

import csv
import itertools
import json
import math
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from bench import gpu, gpu_clock, gpu_forward, gpu_proofs, gpu_tune, peers, plots, sanitize
from bench.gpu_check import EPSILON, largest_error, limit
from bench.gpu_contender import Contender, Result, Unavailable
from bench.gpu_grid import BIG, Case, full, quick, tiny
from bench.gpu_session import Session
from bench.gpu_simulated import simulated_session_cupy
from bench.gpu_summary import claims, verdict
from bench.gpu_table import COLUMNS, TIMED, Table, rows_of
from cupynorm._cuda.plan import TABLE
from tests.gpu_backend import SM90

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"gpu": "Drawn by a test", "driver": "0", "commit": "0" * 40, "date": "2026-01-01"}
CASE = Case("float32", 5, 32, BIG)


def table_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def session():
    with simulated_session_cupy() as cupy:
        yield Session(cupy, dict(MACHINE), simulated=True)


# --- the whole command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench.gpu", "--simulate", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_simulated_run_leaves_every_file(simulated_run):
    names = {p.name for p in simulated_run.iterdir()}
    tables = {"forward.csv", "backward.csv", "layouts.csv", "training.csv"}
    assert names == {"summary.md", "machine.json", "checks.txt"} | tables
    assert json.loads((simulated_run / "machine.json").read_text())["gpu"].startswith("Simulated")
    assert "0 wrong" in (simulated_run / "checks.txt").read_text()


def test_simulated_table_has_all_columns_and_no_time(simulated_run):
    rows = table_rows(simulated_run / "forward.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert {r["op"] for r in rows} == {"layer_norm_fwd", "empty_kernel", "python_call"}
    assert all(r[column] == "" for r in rows for column in TIMED)
    assert not any(r["status"] == "ok" for r in rows)


def test_simulated_run_checked_every_case(simulated_run):
    rows = [r for r in table_rows(simulated_run / "forward.csv") if r["op"] == "layer_norm_fwd"]
    ours = [r for r in rows if r["peer"] == "cupynorm"]
    assert len(ours) == len(tiny())
    for row, case in zip(ours, tiny(), strict=True):
        assert row["status"] == "simulated", row
        assert 0 < float(row["error"]) <= limit(case.dtype, case.N, ours=True)
        assert row["method"] == "graph"
        assert int(row["bytes"]) == 2 * 4 * case.N * (case.rows + 1)
    assert {"warp", "cluster"} <= {r["kernel"].split("_")[3] for r in ours}
    copied = [r for r in rows if r["peer"] in ("copy-stride", "copy-block")]
    assert len(copied) == 2 * len(tiny())
    assert {r["status"] for r in copied} == {"simulated"}
    foreign = [r for r in rows if r["peer"] in peers.PEERS]
    assert {r["status"] for r in foreign} == {"skipped"}
    assert all(r["note"] for r in foreign)


def test_simulated_summary_makes_no_claim(simulated_run):
    text = (simulated_run / "summary.md").read_text()
    assert "says nothing about time" in text
    assert "share of the copy" not in text
    assert "µs" not in text


def test_simulated_run_refuses_the_results_folder(capsys):
    target = ROOT / "bench" / "results" / "simulated"
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--simulate", "--out", str(target)])
    assert stop.value.code == 2
    assert "measures nothing" in capsys.readouterr().err
    assert not target.exists()


def test_no_gpu_is_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--simulate" in capsys.readouterr().err


def test_a_wrong_kernel_of_ours_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_forward, "EPS", 1.01e-5)
    monkeypatch.setattr(gpu, "GRIDS", {"tiny": lambda: [CASE]})
    assert gpu.main(["--simulate", "--steps", "forward", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(gpu_forward, "EPS", 1e-3)
    assert gpu.main(["--simulate", "--steps", "forward", "--out", str(tmp_path)]) == 1
    assert "| forward | failed |" in (tmp_path / "summary.md").read_text()


def test_a_step_that_raises_is_an_outcome(tmp_path, monkeypatch):
    def broken(*_):
        msg = "out of cheese"
        raise RuntimeError(msg)

    monkeypatch.setattr(gpu, "calls", broken)
    monkeypatch.setattr(gpu, "GRIDS", {"tiny": lambda: [CASE]})
    assert gpu.main(["--simulate", "--steps", "calls,forward", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| Python cost | failed | RuntimeError: out of cheese" in text
    assert "| forward | ok |" in text


def test_tune_runs_its_candidates_without_a_time(tmp_path):
    command = ["--simulate", "--tune", "--steps", "forward", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    rows = [r for r in table_rows(tmp_path / "tune.csv") if "/" in r["peer"]]
    assert len(rows) == 3
    assert {r["status"] for r in rows} == {"simulated"}
    assert "µs" not in (tmp_path / "tune-forward.md").read_text()


# --- the check rejects ----------------------------------------------------------------------------


def other_eps(session, case, inputs, i):
    return cn.layer_norm(inputs.x[i], case.N, inputs.weight, inputs.bias, 1e-3, out=inputs.y[i])


def last_row_unwritten(session, case, inputs, i):
    x, y = inputs.x[i][:-1], inputs.y[i][:-1]
    cn.layer_norm(x, case.N, inputs.weight, inputs.bias, out=y)
    return inputs.y[i]


def first_buffer_only(session, case, inputs, i):
    if i == 0:
        cn.layer_norm(inputs.x[i], case.N, inputs.weight, inputs.bias, out=inputs.y[i])
    return inputs.y[i]


def no_bias(session, case, inputs, i):
    return cn.layer_norm(inputs.x[i], case.N, inputs.weight, out=inputs.y[i])


WRONG = (other_eps, last_row_unwritten, first_buffer_only, no_bias)


@pytest.mark.parametrize("fault", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_kernel_gets_no_number(session, tmp_path, fault):
    def build(session, case, inputs):
        return Contender(fault.__name__, lambda i: fault(session, case, inputs, i))

    table = Table(tmp_path / "t.csv", MACHINE, simulated=False)  # so that times would show
    gpu_forward.forward(session, table, [CASE], (), ((fault.__name__, build),))
    rows = {r["peer"]: r for r in table_rows(tmp_path / "t.csv")}
    wrong, right = rows[fault.__name__], rows["cupynorm"]
    assert wrong["status"] == "wrong"
    assert "allowed" in wrong["note"]
    assert all(wrong[column] == "" for column in TIMED)
    assert right["status"] == "ok"
    assert float(right["median_us"]) > 0


def test_a_contender_that_raises_leaves_the_others(session, tmp_path):
    def build(session, case, inputs):
        msg = "too many resources requested for launch"
        raise RuntimeError(msg)

    table = Table(tmp_path / "t.csv", MACHINE, simulated=False)
    gpu_forward.forward(session, table, [CASE], (), (("broken", build),))
    rows = {r["peer"]: r for r in table.rows}
    assert rows["broken"]["status"] == "error"
    assert "too many resources" in rows["broken"]["note"]
    assert rows["cupynorm"]["median_us"] > 0


def test_deadline_leaves_cases_out(session, tmp_path):
    session.deadline = 0.0
    table = Table(tmp_path / "t.csv", MACHINE, simulated=True)
    assert "4 left out" in gpu_forward.forward(session, table, tiny(), ())


@pytest.mark.parametrize("dtype", EPSILON)
def test_error_sees_one_unit_in_the_last_place(dtype):
    np_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((6, 500)) * 3 + 1).astype(np_dtype)
    weight, bias = (rng.standard_normal(500).astype(np_dtype) for _ in "wb")
    wide = x.astype(np.longdouble)
    x_hat = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    y = (x_hat * weight + bias).astype(np.float64).astype(np_dtype)
    # A half by rounding y; the reference of float64 rounds as often as what it judges.
    assert largest_error(np, x, weight, bias, y) <= (3 if dtype == "float64" else 0.51)
    y[3, 77] += np_dtype.type(8 * EPSILON[dtype]) * max(np_dtype.type(1), abs(y[3, 77]))
    assert largest_error(np, x, weight, bias, y) > 3
    y[5, 0] = np.nan
    assert math.isnan(largest_error(np, x, weight, bias, y))
    assert not largest_error(np, x, weight, bias, y) <= limit(dtype, 500, ours=False)


def test_error_of_a_long_row():
    x = np.random.default_rng(3).standard_normal((1, 2**20)).astype(np.float32)
    wide = x.astype(np.longdouble)
    y = ((wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)).astype(np.float32)
    assert largest_error(np, x, None, None, y) <= 0.51
    assert largest_error(np, x, None, None, y * np.float32(1 + 1e-5)) > 8


def test_short_set_counts_what_is_wrong(session, monkeypatch):
    lines = []
    assert sanitize.run(session.cupy, sanitize.TINY, lines.append) == 0
    assert len(lines) == 2 * (7 + 5)
    assert sum("backward" in line for line in lines) == 2 * 5
    assert sum("column-major" in line for line in lines) == 2 * 3
    monkeypatch.setattr(sanitize, "EPS", 1e-3)  # of the call and of the check's statistics
    lines.clear()
    assert sanitize.run(session.cupy, sanitize.TINY[1:], lines.append) == 7 + 5
    assert all(line.startswith("WRONG") for line in lines)


# --- arithmetic -----------------------------------------------------------------------------------


def timed(name, median, ours=False, status="ok"):
    times = gpu_clock.Times(median, 0.9 * median, 1.1 * median, 15)
    return Result(name, status, times=times, ours=ours)


def test_rows_divide_by_the_fastest_copy_and_by_the_peer():
    case = Case("float16", 1000, 4096, BIG)
    copied, floor = 1000 * 4096 * 2 * 2, 1000 * 4096 * 2 * 2 + 2 * 4096 * 2
    assert (case.copy_bytes, case.moved_bytes) == (copied, floor)
    results = [
        timed("cupynorm", 10.0, ours=True),
        timed("copy-block", 9.0),
        timed("copy-stride", 8.0),
        timed("torch-eager", 20.0),
        Result("liger", "wrong"),
    ]
    rows = {r["peer"]: r for r in rows_of(case, results)}
    assert rows["cupynorm"]["gb_per_s"] == pytest.approx(floor / 10e-6 / 1e9)
    assert rows["cupynorm"]["fraction_of_copy"] == pytest.approx(floor / 10 / (copied / 8))
    assert rows["torch-eager"]["ratio_to_peer"] == pytest.approx(0.5)
    assert "median_us" not in rows["liger"]


def test_summary_names_the_worst_case():
    rows = []
    for N, ours, eager in ((256, 10.0, 20.0), (4096, 10.0, 8.0)):
        case = Case("bfloat16", 2**28 // N, N, BIG)
        results = [timed("cupynorm", ours, ours=True), timed("copy-block", 9.9)]
        rows += rows_of(case, [*results, timed("torch-eager", eager)])
    copy, torch = claims(rows)
    assert "2 of 2 reach 95%" in copy
    assert copy.startswith("forward: ")
    assert "worst 1.250 (bfloat16, 65536x4096)" in torch
    assert verdict(rows, "done")[0] == "ok"
    rows[1] |= {"status": "wrong", "peer": "torch-eager"}
    assert verdict(rows, "done")[0] == "ok"
    rows[0] |= {"status": "wrong"}
    assert verdict(rows, "done")[0] == "failed"


class FakeSession:
    """A clock that says how long each replay took; keeps the order of replays."""

    simulated = False
    stream = None

    def __init__(self):
        self.now, self.order = 0.0, []
        clock = self

        class Event:
            def record(self, stream):
                self.at = clock.now

            def synchronize(self):
                pass

        elapsed = lambda a, b: 1e3 * (b.at - a.at)  # noqa: E731
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(Event=Event, get_elapsed_time=elapsed))

    def batch(self, name, seconds, calls):
        durations = itertools.cycle(seconds)

        def replay():
            self.order.append(name)
            self.now += next(durations)

        return gpu_clock.Batch(replay, calls, "graph")


def test_interleaved_medians_and_order():
    session = FakeSession()
    batches = {
        "a": session.batch("a", [2e-3, 2e-3, 4e-3], 10),
        "b": session.batch("b", [1e-3], 10),
        "slow": session.batch("slow", [0.2], 1),
    }
    times = gpu_clock.interleave(session, batches, 12)
    assert times["a"].median == pytest.approx(200)
    assert times["a"].p90 == pytest.approx(400)
    assert times["b"].median == pytest.approx(100)
    assert (times["a"].rounds, times["slow"].rounds) == (12, 3)
    pairs = "".join(n for n in session.order if n != "slow")[2:]
    assert "aaa" not in pairs
    assert "bbb" not in pairs
    assert "ab" in pairs
    assert "ba" in pairs


def test_batches_last_long_enough():
    session = SimpleNamespace(simulated=False)
    assert gpu_clock.passes_for(session, 2, 10**9) <= 4
    assert gpu_clock.passes_for(session, 8, 33 * 10**6) * 8 * 33e6 / 3e12 > 1e-3


# --- grids and candidates -------------------------------------------------------------------------


def test_grids_hold_what_the_claims_need():
    for cases in (quick(), full()):
        assert len(set(cases)) == len(cases)
        for case in cases:
            if case.group == BIG:
                assert 0.9e9 < case.copy_bytes < 1.2e9, case
            assert case.copy_bytes < 8e9, case
    assert set(quick()) <= set(full())
    wide = {(c.dtype, c.N) for c in full() if c.group == BIG}
    assert {(d, N) for d in ("float16", "bfloat16", "float32") for N in (256, 1000, 2**20)} <= wide
    few = {(c.rows, c.N) for c in full() if c.group == "few rows"}
    assert set(itertools.product((1, 2, 4, 8), (2**20, 2**26))) <= few
    assert {c.N for c in full() if c.dtype == "float64"} >= {64, 4095, 2**20}


@pytest.mark.parametrize("row", TABLE[:-1], ids=lambda r: f"{r.family}{r.max_vecs}")
def test_every_candidate_has_a_plan(row):
    made = gpu_tune.candidates(row)
    assert made[0] == row
    assert len(made) > 3
    assert len({gpu_tune.label(r) for r in made}) == len(made)
    for candidate in made:
        problem = SimpleNamespace(
            x_dtype="bfloat16", weight_dtype=None, bias_dtype=None, rows=7, N=row.max_vecs * 8
        )
        plan = gpu_tune.plan_of(candidate, problem, SM90)
        assert plan.stages[0].block == (candidate.threads, 1, 1)
        assert plan.stages[0].grid[0] * plan.rows_per_block >= 7


def test_proposal_changes_only_for_a_gain():
    row = TABLE[0]
    other = gpu_tune.candidates(row)[1]

    def lines(median):
        times = {gpu_tune.label(row): timed("a", 10.0), gpu_tune.label(other): timed("b", median)}
        trial = gpu_tune.Trial("row 0: warp", [row, other], [])
        source = "bench/results/h200/tune.csv, row 0"
        return gpu_tune._proposal(trial, [times, times], gpu_tune.FORWARD, source)[-1]

    assert lines(9.95).startswith("keep")
    assert lines(9.0).startswith(f"change to `TableRow('{other.family}', {other.max_vecs},")
    assert "'bench/results/h200/tune.csv, row 0'" in lines(9.0)


def test_a_proposal_names_the_folder_that_will_be_committed(tmp_path):
    inside = ROOT / "bench" / "results" / "h200" / "tune-forward"
    assert gpu_tune._shown(inside) == "bench/results/h200/tune-forward"
    assert gpu_tune._shown(tmp_path) == f"bench/results/{tmp_path.name}"


# --- peers ----------------------------------------------------------------------------------------


def test_peers_agree_with_float64_on_the_cpu():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((9, 200), 200, 200))
        tensors = [peers.as_torch(torch, a) for a in (x, weight, bias)]
        assert tensors[0].data_ptr() == x.ctypes.data
        y = peers.torch_function("torch-eager", torch, 200)(*tensors)
        eager = y.view(torch.uint8).numpy().view(dtype)
        composed = peers.composition(np, x, weight, bias)
        for result in (eager, composed):
            assert result.dtype == x.dtype
            assert largest_error(np, x, weight, bias, result) <= limit(str(x.dtype), 200, ours=True)


def test_missing_peers_say_why(session):
    with pytest.raises(Unavailable, match="no_such_module cannot be imported"):
        peers.load("no_such_module")
    with pytest.raises(Unavailable, match="at most 65536"):
        peers.torch_function("liger", None, 65537)
    with pytest.raises(Unavailable, match="quack"):
        peers.torch_function("quack", None, 64)


# --- steps that call other programs ---------------------------------------------------------------


def test_gpu_tests_run_pytest(tmp_path):
    path = tmp_path / "test_one.py"
    path.write_text("def test_one(): pass\n\ndef test_two(): raise ValueError(2)\n")
    found, sentence = gpu_proofs.run_tests(tmp_path / "log", 60, (str(path),))
    assert (found, sentence.split(" in ")[0]) == ("failed", "1 failed, 1 passed")
    log = (tmp_path / "log").read_text()
    assert log.startswith("$ python -m pytest")
    assert "ValueError: 2" in log


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [
        (0, "12 passed, 3 skipped in 1.00s", "ok"),
        (1, "1 failed, 11 passed in 1.00s", "failed"),
        (0, "15 skipped in 1.00s", "failed"),
        (5, "200 deselected in 1.00s", "failed"),
        (None, "", "failed"),
    ],
)
def test_gpu_tests_must_have_passed(tmp_path, monkeypatch, code, last, status):
    monkeypatch.setattr(gpu_proofs, "_logged", lambda *_: (code, f"...\n{last}\n"))
    assert gpu_proofs.run_tests(tmp_path / "log", 60)[0] == status


def test_missing_test_tools_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proofs, "TEST_NEEDS", ("pytest", "no_such_module"))
    found, sentence = gpu_proofs.run_tests(tmp_path / "log", 60)
    assert found == "skipped"
    assert "no_such_module" in sentence


@pytest.mark.parametrize(
    ("script", "status", "word"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "ok", "0 errors"),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 9", "failed", "3 errors"),
        ("echo '========= Error: Device not supported'; exit 1", "skipped", "not supported"),
        ("exit 0", "failed", "no summary"),
        ("echo started; sleep 5", "failed", "out of time"),
    ],
)
def test_sanitizer_outcomes(tmp_path, monkeypatch, script, status, word):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found, sentence = gpu_proofs.run_sanitizer("memcheck", tmp_path / "log", 1)
    assert found == status, sentence
    assert word in sentence


def test_no_sanitizer_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_proofs.run_sanitizer("memcheck", tmp_path / "log", 1)
    assert found == ("skipped", "compute-sanitizer is not on the PATH")


# --- figures and page -----------------------------------------------------------------------------


def synthetic(path):
    """A table with made-up times, of every group and dtype, to draw from."""
    table = Table(path, MACHINE, simulated=False)
    for dtype, group in itertools.product(("bfloat16", "float32"), ("1GB", "few rows")):
        for N in (256, 1000, 1024, 4096, 16384, 65536, 262144, 2**20):
            nbytes = 10**9 if group == "1GB" else 33 * 10**6
            rows = 1 if group == "few rows" else nbytes // (8 * N)
            affine = None if group == "few rows" else "same"
            case = Case(dtype, rows, N, group, affine)
            t = case.copy_bytes / 4.2e6 + 3
            results = [timed("cupynorm", 1.03 * t, ours=True), timed("copy-block", t)]
            results += [timed("torch-eager", 1.6 * t), timed("torch-compile", 1.1 * t)]
            table.add(rows_of(case, results))
    return path


def test_figures_show_every_peer(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    assert plots.main([str(synthetic(tmp_path / "t.csv")), "--out", str(tmp_path / "drawn")]) == 0
    for name in ("bandwidth", "peers"):
        pixels = matplotlib.image.imread(tmp_path / "drawn" / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 400
        for peer in ("cupynorm", "torch-eager", "torch-compile", "copy"):
            color = np.array([int(plots.COLORS[peer][i : i + 2], 16) / 255 for i in (1, 3, 5)])
            near = (np.abs(pixels - color).max(axis=2) < 0.03).sum()
            assert near > 100, (name, peer, near)
        text = (tmp_path / "drawn" / f"{name}.svg").read_text()
        assert "<!-- 1K -->" in text
        assert "<!-- 1M -->" in text


def test_nothing_timed_is_not_drawn(simulated_run):
    with pytest.raises(ValueError, match="no timed rows"):
        plots.read(simulated_run / "forward.csv")


def test_page_lists_the_columns():
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for column, meaning in COLUMNS.items():
        assert f"| `{column}` | {meaning} |" in page
