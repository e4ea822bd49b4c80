"""Each program of bench/ runs end to end on small cases, and tells a failure from a success."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from bench import calls, contender, cpu, gpu, model, peers, sanitize, training
from bench.cases import BIG, BOTH, BWD, FWD, GROUPS, TINY, Case
from bench.contender import measure
from bench.data import make_inputs
from bench.device import Device, Gpu, simulated_cupy
from bench.peers import contenders, tensors
from bench.table import COLUMNS, TIMED
from tests.test_bench import in_no_time, table_rows  # noqa: F401 - in every test of this file

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
CASE = Case(FWD, BIG, "float32", (5, 32))


def everybody(case, chosen=None, device=None):
    inputs = make_inputs(device or Device(), case)
    chosen = chosen or [n for n in peers.names("cpu") if n not in peers.OPTIONAL]
    builders = contenders(inputs, chosen)
    return {r.name: r for r in measure(inputs.device, inputs, builders, 0.0)}


# --- who takes part -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [FWD, BWD, BOTH])
def test_everybody_on_the_cpu_is_right_or_says_why_not(op):
    for library in ("jax", "onnxruntime", "onnx"):
        pytest.importorskip(library)
    found = everybody(Case(op, "shapes", "float32", (37, 50)))
    refused = {"scikit-learn"}
    if op != FWD:
        refused |= {"cupynorm out=", "onnxruntime", "onnxruntime out=", "formula"}
    assert {n for n, r in found.items() if r.status == "skipped"} == refused
    for name, result in found.items():
        assert name in refused or (result.status, result.note) == ("ok", ""), name
        assert name not in refused or result.note
    assert {"torch", "cupynorm.torch", "jax", "cupynorm", "copyto", "copyto fresh"} <= set(found)


STRIDED = [(FWD, (70, 13), -1, "F-F"), (FWD, (70, 13), -1, "F-C"), (FWD, (3, 7, 4, 5), 1, "NCHW"),
           (BWD, (70, 13), -1, "F-F"), (BWD, (3, 7, 4, 5), 1, "NCHW")]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "axis", "layout"), STRIDED, ids=str)
def test_strided_axes_in_every_way(op, shape, axis, layout):
    found = everybody(Case(op, "layouts", "float32", shape, axis, layout))
    ways = ["torch-view", "torch-contiguous", "torch-back", "cupynorm"]
    ways += ["torch-composed", "cupynorm out=", "contiguous-then-rows"] if op == FWD else []
    for name in ways:
        assert (found[name].status, found[name].note) == ("ok", ""), name
    assert "torch" not in found and "onnxruntime" not in found


def test_results_lie_as_the_layout_says():
    inputs = make_inputs(Device(), Case(FWD, "layouts", "float32", (70, 13), layout="F-C"))
    made = dict(contenders(inputs, ("torch-back", "cupynorm")))
    strides = {n: made[n]().arrays(made[n]().call(0)).strides for n in made}
    assert strides == dict.fromkeys(made, (13 * 4, 4))
    listed = everybody(Case(FWD, "layouts", "float32", (41, 9), layout="columns"))
    assert listed["cupynorm"].status == listed["contiguous-then-rows"].status == "ok"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_formulas_fused_or_not_in_other_dtypes(dtype):
    device, given = Device(), ("sqrt", "empty", "asarray", "copyto", "from_dlpack")
    device.lib = SimpleNamespace(**{n: getattr(np, n) for n in given})
    device.lib.fuse = lambda kernel_name: lambda function: function
    chosen = ("formula", "cupy-fuse", "cupynorm", "torch")
    found = everybody(Case(FWD, BIG, dtype, (9, 200)), chosen, device)
    assert [r.status for r in found.values()] == ["ok"] * 4, found


# --- bench.cpu ------------------------------------------------------------------------------------


def test_a_cpu_run_writes_table_summary_and_figures(tmp_path, monkeypatch, capsys):
    small = lambda: [Case(op, "shapes", "float32", (16, 8)) for op in (FWD, BOTH)]  # noqa: E731
    monkeypatch.setitem(GROUPS, "shapes", small)
    chosen = "torch,cupynorm,copyto,copyto fresh"
    command = ["--groups", "shapes", "--seconds", "0", "--peers", chosen]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: print(n, "threads of torch"))
    assert cpu.main([*command, "--plots", "--out", str(tmp_path)]) == 0
    assert "2 threads of torch" in capsys.readouterr().out
    (path,) = tmp_path.glob("cpu-*.csv")
    rows = table_rows(path)
    assert list(rows[0]) == list(COLUMNS)
    assert [r["peer"] for r in rows] == ["cupynorm", "torch", "copyto", "copyto fresh"] * 2
    assert rows[0]["threads"] == "2" and rows[0]["commit"]
    assert "| cupynorm | torch | 1 |" in path.with_suffix(".md").read_text()
    assert (tmp_path / "cpu-shapes-both.png").is_file()
    monkeypatch.setattr(cn, "layer_norm", lambda x, *_, **__: 0 * x)
    assert cpu.main([*command, "--ops", "forward"]) == 1  # a wrong result of ours fails the run
    with pytest.raises(SystemExit):
        cpu.main(["--peers", "torch,numpie"])
    assert "numpie is not one of" in capsys.readouterr().err


# --- bench.gpu ------------------------------------------------------------------------------------


def test_a_simulated_run_checks_every_case_and_times_none(tmp_path):
    command = ["--simulate", "--only", "sanitize,calls,forward,backward,layouts,tune"]
    assert gpu.main([*command, "--out", str(tmp_path)]) == 0
    tables = {n: table_rows(tmp_path / f"{n}.csv") for n in (*TINY, "tune")}
    for step, rows in tables.items():
        assert list(rows[0]) == list(COLUMNS)
        assert all(r[column] == "" for r in rows for column in TIMED)
        assert not any(r["status"] in ("ok", "wrong") for r in rows)
        ours = [r for r in rows if r["peer"] == "cupynorm" and r["group"] != "python"]
        assert [r["shape"] for r in ours] == [c.label for c in TINY.get(step, ())]
        for row, case in zip(ours, TINY.get(step, ()), strict=True):
            assert row["status"] == "simulated" and 0 < float(row["error"]) <= 8
            assert row["method"] == ("launches" if case.layout == "columns" else "graph")
            assert row["kernel"] and int(row["bytes"]) == case.moved_bytes
        foreign = [r for r in rows if r["peer"] in tensors.FUNCTIONS]
        assert all(r["status"] == "skipped" and r["note"] for r in foreign)
    python = {r["peer"] for r in tables["forward"] if r["method"] == "host"}
    assert {"cupynorm", "cupynorm prepared out=", "cupynorm graph replay"} <= python
    assert len([r for r in tables["tune"] if "/" in r["peer"]]) == 6
    assert "none was timed" in (tmp_path / "tune.md").read_text()
    text = (tmp_path / "summary.md").read_text()
    assert "and no time" in text and "of the copy" not in text and "| forward | ok |" in text
    assert json.loads((tmp_path / "machine.json").read_text())["gpu"].startswith("Simulated")


def test_a_wrong_kernel_and_a_step_that_raises_fail_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(TINY, "forward", [CASE])
    command = ["--simulate", "--out", str(tmp_path), "--only"]
    monkeypatch.setattr(peers, "EPS", 1e-3)
    assert gpu.main([*command, "forward"]) == 1
    assert "| forward | failed |" in (tmp_path / "summary.md").read_text()
    monkeypatch.setattr(peers, "EPS", 1e-5)
    monkeypatch.setattr(calls, "on_gpu", lambda *_: 1 / 0)
    assert gpu.main([*command, "calls,forward"]) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| Python cost | failed | ZeroDivisionError" in text and "| forward | ok |" in text
    assert gpu.main([*command, "sanitize"]) == 1  # nothing but a skip is a failure


def test_where_a_run_is_refused(tmp_path, monkeypatch, capsys):
    target = ROOT / "bench" / "results" / "simulated"
    for wrong in (["--out", str(target)], ["--only", "forwards"]):
        with pytest.raises(SystemExit):
            gpu.main(["--simulate", *wrong])
    assert "measures nothing" in capsys.readouterr().err and not target.exists()
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu.main(["--out", str(tmp_path)]) == 2


def test_gpu_tests_are_spread_over_processes(tmp_path):
    one, two = (tmp_path / f"test_{name}.py" for name in ("one", "two"))
    one.write_text("def test_one(): pass\n\ndef test_two(): raise ValueError(2)\n")
    two.write_text("import pytest\n\ndef test_skip(): pytest.skip('no')\n")
    log = tmp_path / "log"
    assert gpu.run_tests(log, 100, [str(one), str(two)]) == (
        "failed",
        "1 passed, 1 failed, 1 skipped",
    )
    assert "$ python -m pytest" in log.read_text() and "ValueError: 2" in log.read_text()


@pytest.mark.parametrize(
    ("code", "last", "status"),
    [(0, "12 passed, 3 skipped in 1.00s", "ok"), (1, "1 failed, 11 passed in 1.00s", "failed"),
     (0, "15 skipped in 1.00s", "failed"), (5, "200 deselected in 1.00s", "failed"),
     (None, "", "failed")],
)  # fmt: skip
def test_gpu_tests_must_have_passed(tmp_path, monkeypatch, code, last, status):
    monkeypatch.setattr(gpu, "logged", lambda *_: (code, f"...\n{last}\n"))
    assert gpu.run_tests(tmp_path / "log", 60)[0] == status


@pytest.mark.parametrize(
    ("script", "status", "word"),
    [("echo '========= ERROR SUMMARY: 0 errors'", "ok", "0 errors"),
     ("echo '========= ERROR SUMMARY: 3 errors'; exit 9", "failed", "3 errors"),
     ("echo '========= Error: Device not supported'; exit 1", "skipped", "not supported"),
     ("exit 0", "failed", "no summary"), ("echo started; sleep 5", "failed", "out of time")],
)  # fmt: skip
def test_sanitizer_outcomes(tmp_path, monkeypatch, script, status, word):
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.run_sanitizer("memcheck", tmp_path / "log", 1)[0] == "skipped"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o700)
    found, sentence = gpu.run_sanitizer("memcheck", tmp_path / "log", 1)
    assert found == status and word in sentence


def test_the_short_set_counts_what_is_wrong(monkeypatch):
    lines, tiny = [], sanitize.TINY[1:]
    with simulated_cupy() as cupy:
        device = Gpu(cupy, simulated=True)
        assert sanitize.run(device, tiny, lines.append) == 0
        monkeypatch.setattr(peers, "EPS", 1e-3)  # of the call alone
        assert sanitize.run(device, tiny, lines.append) == len(sanitize.WAYS) == 11
    assert [line.startswith("WRONG") for line in lines] == [False] * 11 + [True] * 11


# --- tune, training, calls, model, frames, Dask ---------------------------------------------------


def test_candidates_and_proposals():
    rows = pytest.importorskip("cupynorm._cuda.rows")
    from bench import tune

    for trial in tune.trials(SimpleNamespace(clusters=8, sm_count=132)):
        labels = [c.label for c in trial.candidates]
        assert len(set(labels)) == len(labels) > 1, trial.name
    first, other = (tune.Candidate(row) for row in rows.FORWARD[:2])
    trial = tune.Trial("forward row 0: warp", [first, other], [])
    for median, verdict in ((9.95, "keep"), (9.0, "change to")):
        times = {c.label: SimpleNamespace(times=contender.Times(t, t, t, t, 9))
                 for c, t in ((first, 10.0), (other, median))}  # fmt: skip
        last = tune.proposal(trial, [times, times], "bench/results/h200")[-1]
        assert last.startswith(f"{verdict} `Row(") and "h200/tune.csv, forward row 0'" in last


def curve(ours=0.0, nudged=1e-7, last=2.0, mode="float32"):
    rows = []
    for i, v in enumerate(np.linspace(4.0, last, 16).tolist()):
        losses = {"loss_torch": v, "loss_cupynorm": v + ours * i, "loss_nudged": v + nudged * i}
        rows.append({"mode": mode, "step": i, **losses, "ms_torch": 1.0, "ms_cupynorm": 1.0})
    return rows


def test_losses_may_part_as_rounding_lets_them(tmp_path, monkeypatch):
    good = ({}, {"ours": 1e-6}, {"ours": 3e-3, "nudged": 1e-3}, {"ours": 1e-3, "mode": "bfloat16"})
    assert all(training.verdict(curve(**about))[0] for about in good)
    bad = ({"ours": 1e-3}, {"last": 3.9}, {"ours": math.nan})
    assert not any(training.verdict(curve(**about))[0] for about in bad)
    given, modes = (tmp_path, training.Size(1, 2, 16, 16, 4, 6, 2e-2), "cpu", {}), ("float32",)
    assert training.train(*given, modes=modes, deadline=0.0)[0] == "skipped"
    status, sentence = training.train(*given, modes=modes)
    assert status == "ok", sentence
    rows = table_rows(tmp_path / "training.csv")
    assert [r["step"] for r in rows] == [str(i) for i in range(6)]
    assert rows[0]["loss_torch"] != rows[1]["loss_torch"]
    import cupynorm.torch

    def wrong(x, shape, weight, bias, eps):
        y = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
        return y + 0.05 * (y.detach() - y)  # the gradients alone are off

    monkeypatch.setattr(cupynorm.torch, "layer_norm", wrong)
    assert training.train(*given, modes=modes)[0] == "failed"


def test_small_calls_are_checked_timed_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "COUNT", 2)
    assert calls.main(["--seconds", "0", "--to", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("launch-cost-*.csv")
    rows = {(r["library"], r["call"]): r for r in table_rows(path)}
    assert {library for library, _ in rows} == {"NumPy", "torch", "CuPy"}
    assert float(rows["torch", "torch"]["over torch"]) == 1.0
    kept = {"instructions": {calls.sys.version[:4]: {"a": 100, "b": 100}}}
    monkeypatch.setattr(calls, "BUDGETS", tmp_path / "budgets.json")
    calls.BUDGETS.write_text(json.dumps(kept))
    monkeypatch.setattr(calls.shutil, "which", lambda name: name)
    for count, status in ((120, 0), (130, 1)):
        monkeypatch.setattr(calls, "instructions", lambda c=count: {"a": 100, "b": c})
        assert calls.main(["--instructions"]) == status


def test_predictions_are_below_the_copy_and_committed():
    for case in (c for *_, cases in model.CLAIMS for c in cases[::3]):
        for g in model.GPUS:
            p = model.predict(case, g)
            assert 0 < p.fraction_of_copy < 1.03 and p.us > g.t0, (case, g.name)
    a100, many = model.GPUS[0], 10**10
    assert model.flow(many, 32768, 8 * 108, a100) == pytest.approx(many / a100.supply, rel=0.01)
    assert model.flow(4096, 4096, 1, a100) == pytest.approx(a100.latency, rel=0.01)
    assert model.resident("", 128, 100 * 1024, a100) == 1
    for path, text in model.files().items():
        assert path.read_text(encoding="utf-8") == text, "python -m bench.model --markdown"


def test_frames_are_timed_and_their_peaks_told(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("CUPYNORM_NUMBA", "0")  # of the processes whose memory is told
    frames = pytest.importorskip("bench.frames")
    command = ["--rows", "300", "--frames", "mixed", "--seconds", "0", "--to", str(tmp_path)]
    assert frames.main(command) == 0
    (row,) = table_rows(next(tmp_path.glob("frames-*.csv")))
    assert float(row["frame ms"]) > 0 and float(row["numpy peak"]) > 0
    wrong = {"frame": lambda: np.zeros((300, 100))}
    with pytest.raises(SystemExit):
        frames.check(wrong, frames.frame("mixed", 300), np.dtype(np.float64))


def test_dask_blocks_are_checked_and_take_turns():
    pytest.importorskip("distributed")
    bench_dask = pytest.importorskip("bench.dask")
    for grid in ((2, 1), (1, 2)):
        made = bench_dask.contenders((8, 20), grid, {})
        times = bench_dask.measure({n: made[n] for n in ("loop", "dask sync")}, 2)
        rows = list(bench_dask.rows_of("case", (8, 20), grid, times))
        assert [r["contender"] for r in rows] == ["loop", "dask sync"]
        assert rows[0]["over loop"] == 1.0 and rows[1]["bytes"] == 2 * 2 * 8 * 20 * 4
