"""The benchmarks' one protocol: it rejects what is wrong, and invents nothing; on any device."""

import csv
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

import cupynorm as cn
from bench import cases, contender, plots, sweep, table
from bench.cases import BIG, BOTH, BWD, FWD, OPS, Case
from bench.check import EPSILON, NAMES, Given, judge
from bench.contender import Contender, Result, measure
from bench.data import make_inputs
from bench.device import Device, Gpu, simulated_cupy
from bench.machine import GPU_FACTS, LIBRARIES
from bench.peers import contenders, names
from tests import oracle
from tests.conftest import np_dtype

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


# --- the check ------------------------------------------------------------------------------------


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


# --- a wrong contender never gets a number --------------------------------------------------------


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


# --- turns, cases ---------------------------------------------------------------------------------


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
    cpu = cases.cpu_cases(cases.GROUPS)
    gpu = [c for step in cases.QUICK for c in cases.gpu_cases(step)]
    for found in (cpu, gpu):
        assert len(set(found)) == len(found)
        assert {c.dtype for c in found} == set(EPSILON)
    for op in OPS:
        assert [c.shape for c in cpu if (c.op, c.group) == (op, "shapes")] == list(cases.SHAPES)
        big = [c for c in gpu if c.op == op and c.group == BIG]
        assert all(0.9e9 < c.copy_bytes < 1.2e9 for c in big)
        assert {1024, 4096, 16384} <= {c.N for c in big if c.dtype == "float32"}
    assert {*cases.COLUMN_LAYOUTS, "NCHW"} == {c.layout for c in gpu if c.group == "layouts"}
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


# --- table, summary, figures ----------------------------------------------------------------------


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
    monkeypatch.setattr(sweep, "make_inputs", lambda *_: 1 / 0)
    assert sweep.sweep(device, made, found, lambda i: []) == "2 cases"
    assert [r["note"].partition(":")[0] for r in made.rows] == ["ZeroDivisionError"] * 2
    assert len(table.faults(made.rows)) == 2
    device.deadline = 0.0
    assert "2 left out" in sweep.sweep(device, made, found, lambda i: [])
    assert "bench 2/2: forward float32 7x32" in capsys.readouterr().err
