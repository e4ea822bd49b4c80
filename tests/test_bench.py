"""The benchmarks' one protocol, which rejects what is wrong and invents nothing; and each program.

Those run end to end on small cases, and tell a failure from a success.
"""

import csv
import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from bench import calls, contender, cpu, gpu, model, peers, plots, sanitize, table, training
from bench import cases as cases_of
from bench.cases import BIG, BOTH, BWD, FWD, GROUPS, OPS, TINY, Case
from bench.check import EPSILON, NAMES, Given, judge
from bench.contender import Contender, Result, measure
from bench.device import Device, Gpu, make_inputs, simulated_cupy
from bench.machine import GPU_FACTS, LIBRARIES
from bench.peers import contenders, names, tensors
from tests import oracle
from tests.conftest import np_dtype

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"cpu": "Drawn by a test", "commit": "0" * 9, "date": "2026-01-01"}


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    """One turn of one call, without a pause, on two threads."""
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "2")
    for name in ("PAUSE", "TURN"):
        monkeypatch.setattr(contender, name, 0.0)
    for name in ("FEWEST", "MOST", "FEWEST_SLOW"):
        monkeypatch.setattr(contender, name, 1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The host, and a GPU that is simulated, but whose times would show."""
    if request.param == "cpu":
        yield Device()
    else:
        with simulated_cupy() as cupy:
            yield Gpu(cupy, simulated=True)


def measured(inputs, builders):
    return {r.name: r for r in measure(inputs.device, inputs, builders, 0.0)}


def table_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def random(dtype, *shape, seed, center=0.0):
    values = np.random.default_rng(seed).standard_normal(shape) * 1.5 + center
    return values.astype(np_dtype(dtype))


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("block", [2**25, 7 * 500])  # in one piece, and added up
def test_one_element_that_is_off_is_seen(dtype, block, monkeypatch):
    monkeypatch.setattr("bench.check.BLOCK", block)
    x, dy = random(dtype, 60, 500, seed=1, center=1.0), random(dtype, 60, 500, seed=2)
    weight, bias = random(dtype, 500, seed=3), random(dtype, 500, seed=4)
    y, *_ = oracle.layer_norm(x, (1,), weight, bias, 1e-5)
    exact = y, *(a.squeeze() for a in oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5))
    right, case = [a.astype(x.dtype) for a in exact], Case(BOTH, BIG, dtype, x.shape)

    def judged(made, ours=True):
        return judge(case, Given(np, x, dy, weight, bias), tuple(made), ours)

    error, allowed = judged(right)
    # A half by rounding; the reference of float64 rounds as often as what it judges.
    assert error <= (3 if dtype == "float64" else 0.51) <= allowed
    for k, name in enumerate(NAMES["both"]):
        made = [a.copy() for a in right]
        place = np.unravel_index(np.argmax(np.abs(made[k].astype(float))), made[k].shape)
        units = 40 if made[k].ndim == 2 else 200  # of a sum of 60 terms
        made[k][place] += made[k].dtype.type(units * EPSILON[dtype]) * made[k][place]
        error, allowed = judged(made)
        assert not error <= allowed
        made[k][place] = np.nan
        assert math.isnan(judged(made, ours=False)[0])
        made[k] = None
        with pytest.raises(ValueError, match=f"no {name} of shape"):
            judged(made)


def test_a_row_left_out_and_a_long_row_that_is_off_are_seen():
    dy, x = random("bfloat16", 20_000, 64, seed=4), random("bfloat16", 20_000, 64, seed=5)
    dx, *_ = oracle.layer_norm_backward(dy, x, (1,), None, 1e-5)
    for first in (0, 1):
        totals = oracle.layer_norm_backward(dy[first:], x[first:], (1,), None, 1e-5)[1:]
        made = tuple(a.astype(x.dtype) for a in (dx, *(t.reshape(-1) for t in totals)))
        error, allowed = judge(Case(BWD, BIG, "bfloat16", x.shape), Given(np, x, dy), made, True)
        assert (error <= allowed) == (first == 0)
    x = random("float32", 1, 2**20, seed=3)
    y = oracle.layer_norm(x, (1,), None, None, 1e-5)[0].astype(np.float32)
    assert Given(np, x).error_of_y(y) <= 0.51
    assert Given(np, x).error_of_y(y * np.float32(1 + 1e-5)) > 8


def other_eps(inputs, i):
    return cn.layer_norm(inputs.x[i], None, inputs.weight, inputs.bias, 1e-3, axis=inputs.case.axis)


def no_bias(inputs, i):
    return cn.layer_norm(inputs.x[i], None, inputs.weight, axis=inputs.case.axis)


def unwritten(inputs, i):
    return inputs.y[i]


def last_row_unwritten(inputs, i):
    y = inputs.y[i][:-1]
    cn.layer_norm(inputs.x[i][:-1], None, inputs.weight, inputs.bias, axis=inputs.case.axis, out=y)
    return inputs.y[i]


def broken(inputs, i):
    msg = "too many resources requested"
    raise RuntimeError(msg)


def missing(inputs, i):
    raise ModuleNotFoundError("No module named 'gone'")


def of_faults(inputs, *faults):
    return [(f.__name__, lambda f=f: Contender(lambda i: f(inputs, i))) for f in faults]


@pytest.mark.parametrize("layout", ["C", "F-C", "NCHW"])
def test_a_wrong_forward_gets_no_number(device, layout):
    shape, axis = ((2, 9, 3, 4), 1) if layout == "NCHW" else ((24, 9), -1)
    inputs = make_inputs(device, Case(FWD, BIG, "float32", shape, axis, layout))
    copies = [n for n in names(device.kind) if n.startswith("copy") and n != "copy-memcpy"]
    right = contenders(inputs, ("cupynorm", "cupynorm out=", *copies))
    absent = {"call": lambda i: inputs.copy_to[i]}  # a copy that never arrives
    made = [(n + "?", lambda b=b: dataclasses.replace(b(), **absent)) for n, b in right[2:]]
    wrong = of_faults(inputs, other_eps, no_bias, unwritten, last_row_unwritten, broken, missing)
    found = measured(inputs, [*right, *made, *wrong])
    status = {"broken": "error", "missing": "skipped", **dict.fromkeys(dict(right), "ok")}
    for name, result in found.items():
        assert result.status == status.get(name, "wrong"), (name, result.note)
        assert bool(result.times) == (name in dict(right))
    assert found["broken"].note == "RuntimeError: too many resources requested"
    assert 0 < found["cupynorm"].error <= 8 and found["cupynorm"].times.median > 0


def gradients(inputs, i, **changed):
    given = {"mean": inputs.mean[i], "rstd": inputs.rstd[i], "weight": inputs.weight} | changed
    return tuple(cn.layer_norm_backward(inputs.dy[i], inputs.x[i], inputs.case.N, **given))


def swapped(inputs, i):
    dx, dweight, dbias = gradients(inputs, i)
    return dx, dbias, dweight


def no_weight_in_dx(inputs, i):
    return gradients(inputs, i, weight=None)[0], *gradients(inputs, i)[1:]


def less(inputs, i):
    return *gradients(inputs, i)[:2], None


def test_a_wrong_backward_gets_no_number(device):
    """Nor what a capture left and no replay does."""
    kept = {}

    def once(inputs, i):
        if i not in kept:
            kept[i] = gradients(inputs, i)
            for a in kept[i]:
                a.fill(0)
        return kept[i]

    inputs = make_inputs(device, Case(BWD, BIG, "float32", (5, 32)))
    made = of_faults(inputs, swapped, no_weight_in_dx, once, less)
    found = measured(inputs, [*made, *contenders(inputs, ("cupynorm",))])
    assert [r.status for r in found.values()] == ["wrong"] * 3 + ["error", "ok"]
    assert "no dbias" in found["less"].note
    assert [r.times is None for r in found.values()] == [True] * 4 + [False]


def test_turns_are_interleaved_and_slow_ones_fewer():
    now, order = [0.0], []

    def batch(name, *seconds):
        durations = itertools.cycle(seconds)

        def replay():
            order.append(name)
            now[0] += next(durations)

        return contender.Batch(replay, 10, "graph")

    def turn(one):
        before = now[0]
        one.replay()
        return now[0] - before

    batches = {"a": batch("a", 2e-3, 2e-3, 4e-3), "b": batch("b", 1e-3), "s": batch("s", 0.2)}
    times = contender.interleave(batches, turn, lambda once, share: 3 if once > 0.1 else 12, 1.0)
    assert times["a"].median == pytest.approx(200) and times["a"].p90 == pytest.approx(400)
    assert [times["b"].median, times["b"].best] == pytest.approx([100, 100])
    assert [times[n].rounds for n in batches] == [12, 12, 3]
    timed = "".join(order[6:])  # each ran twice before, cold and to see how long it takes
    assert "aaa" not in timed.replace("s", "") and "bbb" not in timed.replace("s", "")
    assert timed.index("s") < 10 and timed.rindex("s") > 20  # not all at the beginning


def test_cases_hold_what_the_claims_need():
    cpu = cases_of.cpu_cases(GROUPS)
    gpu = [c for step in cases_of.QUICK for c in cases_of.gpu_cases(step)]
    for found in (cpu, gpu):
        assert len(set(found)) == len(found)
        assert {c.dtype for c in found} == set(EPSILON)
    for op in OPS:
        assert [c.shape for c in cpu if (c.op, c.group) == (op, "shapes")] == list(cases_of.SHAPES)
        big = [c for c in gpu if c.op == op and c.group == BIG]
        assert all(0.9e9 < c.copy_bytes < 1.2e9 for c in big)
        assert {1024, 4096, 16384} <= {c.N for c in big if c.dtype == "float32"}
    assert {*cases_of.COLUMN_LAYOUTS, "NCHW"} == {c.layout for c in gpu if c.group == "layouts"}
    inputs = make_inputs(Device(), Case(BWD, BIG, "float16", (70, 100), layout="pitch"))
    x, dy = (a[0].astype(float) for a in (inputs.x, inputs.dy))
    assert abs(np.corrcoef(x.ravel(), dy.ravel())[0, 1]) < 0.1 and abs(dy.mean()) < 0.1 < x.mean()
    assert inputs.x[0].strides == (2 * 108, 2)


def test_bytes_of_the_floor():
    mixed = Case(BWD, BIG, "bfloat16", (1000, 4096), weight_dtype="float32")
    assert mixed.moved_bytes == 3 * 1000 * 4096 * 2 + 2 * 1000 * 4 + 3 * 4096 * 4
    both = Case(BOTH, "dtypes", "float16", (10, 4, 3), axis=1)
    assert both.moved_bytes == 5 * 120 * 2 + 5 * 4 * 2 + 4 * 30 * 4
    forward, vectors = Case(FWD, BIG, "float16", (1000, 4096)), [np.empty(4096, np.float16)] * 2
    e = cn.explain(np.empty((1000, 4096), np.float16), None, *vectors, device="sm_90")
    assert e.bytes_floor == forward.moved_bytes == forward.copy_bytes + 2 * 4096 * 2


def timed(name, median, fresh=False):
    times = contender.Times(median, 0.9 * median, 1.2 * median, 0.8 * median, 9)
    return Result(name, "ok", "layer_norm_fwd_warp", "graph", 0.5, times, fresh=fresh)


def drawn_table(case=None, ratio=1.0, path=None):
    made = table.Table(path, MACHINE)
    case = case or Case(FWD, "shapes", "float32", (100, 50))
    found = [timed("torch-view", 30.0), timed("torch", 20.0), timed("cupynorm", 10 * ratio, True),
             timed("cupynorm out=", 8.0), timed("copyto", 4.0), timed("copyto fresh", 5.0, True),
             Result("jax", "wrong", error=99.0, note="error 99, allowed 16")]  # fmt: skip
    made.add(table.rows_of(case, found))
    return made, case


def test_rows_have_one_schema_and_ratios_of_the_same_run(tmp_path):
    _, case = drawn_table(path=tmp_path / "t.csv")
    rows = {r["peer"]: r for r in table_rows(tmp_path / "t.csv")}
    assert all(list(r) == list(table.COLUMNS) for r in rows.values())
    assert rows["jax"]["median_us"] == "" and "allowed" in rows["jax"]["note"]
    share, ours, kept = case.moved_bytes / case.copy_bytes, rows["cupynorm"], rows["cupynorm out="]
    assert float(ours["fraction_of_copy"]) == pytest.approx(share * 5 / 10, rel=1e-4)
    assert float(kept["fraction_of_copy"]) == pytest.approx(share * 4 / 8, rel=1e-4)
    assert float(ours["over_torch"]) == float(ours["best_over_torch"]) == 0.5
    assert float(rows["torch-view"]["over_torch"]) == 1.5
    assert float(rows["torch"]["ratio_to_peer"]) == 0.5
    assert {k: ours[k] for k in MACHINE} == MACHINE
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8").partition("## Columns")[2]
    told, versions = re.findall(r"^\| `(\w+)` \| .", page, re.MULTILINE), ("python", *LIBRARIES)
    assert told == [name for name in table.COLUMNS if name not in (*GPU_FACTS[1:], *versions)]


def test_summary_names_the_worst_case_and_the_targets():
    rows = drawn_table()[0].rows
    rows += drawn_table(Case(FWD, "shapes", "float32", (9, 50)), 4.0)[0].rows
    said = {line[3:5]: line[5:] for line in table.summary(rows)}
    assert said["cupynorm", "torch"] == ("2", "1.00", "1.00", "2.00", "9x50")
    assert ("cupynorm", "jax") not in said and ("cupynorm", "copyto") not in said
    big = [drawn_table(Case(FWD, BIG, "float32", (2**20, N)), r)[0].rows
           for N, r in ((256, 0.5), (4096, 1.0))]  # fmt: skip
    (claim,) = table.claims(itertools.chain(*big))
    assert claim.startswith("forward: 1 of 2 reach 95% of the copy, least 50.0% (float32, 1048576x")
    assert not table.faults(rows)
    rows[2] |= {"status": "wrong"}
    assert table.faults(rows) == [rows[2]]


def test_figures_show_who_was_measured(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    made = table.Table(tmp_path / "t.csv", MACHINE)
    shapes = [("shapes", (2**k, 50)) for k in range(5)]
    for group, shape in shapes + [("columns", (2**14 // N, N)) for N in (16, 100, 256, 4096)]:
        made.add(drawn_table(Case(FWD, group, "float32", shape), 1.5)[0].rows)
    assert plots.main([str(made.path), "--out", str(tmp_path)]) == 0
    for name in ("cpu-shapes-forward", "cpu-bandwidth-forward"):
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        for text in (plots.COLORS["cupynorm"], plots.COLORS["torch"]):
            color = np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert (np.abs(pixels - color).max(axis=2) < 0.03).sum() > 100, (name, text)
        assert (tmp_path / f"{name}.svg").is_file()


def test_a_sweep_ends_at_its_deadline_and_says_what_failed(monkeypatch, capsys):
    device, made = Device(), table.Table(None, MACHINE)
    found = [Case(FWD, BIG, "float32", (6, 32)), Case(FWD, BIG, "float32", (7, 32))]
    monkeypatch.setattr(table, "make_inputs", lambda *_: 1 / 0)
    assert table.sweep(device, made, found, lambda i: []) == "2 cases"
    assert [r["note"].partition(":")[0] for r in made.rows] == ["ZeroDivisionError"] * 2
    assert len(table.faults(made.rows)) == 2
    device.deadline = 0.0
    assert "2 left out" in table.sweep(device, made, found, lambda i: [])
    assert "bench 2/2: forward float32 7x32" in capsys.readouterr().err


# --- the programs ---------------------------------------------------------------------------------

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


def test_a_result_lies_as_the_layout_says():
    inputs = make_inputs(Device(), Case(FWD, "layouts", "float32", (70, 13), layout="F-C"))
    for _, make in contenders(inputs, ("torch-back", "cupynorm")):
        assert make().arrays(make().call(0)).strides == (13 * 4, 4)


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
    assert list(rows[0]) == list(table.COLUMNS)
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
        assert list(rows[0]) == list(table.COLUMNS)
        assert all(r[column] == "" for r in rows for column in table.TIMED)
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
