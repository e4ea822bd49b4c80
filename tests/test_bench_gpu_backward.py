"""The GPU benchmark of the backward, on the simulated device: it must reject, and not invent."""

import csv
import functools
import itertools
import math
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from bench import gpu, gpu_backward, gpu_clock, gpu_training, gpu_tune_backward, peers, plots
from bench.gpu_check import EPSILON
from bench.gpu_check_backward import gradient_errors, statistics, worst_of
from bench.gpu_contender import Contender, Result, Unavailable
from bench.gpu_data_backward import make_gradient_inputs
from bench.gpu_grid import BIG, BOTH, BWD, Case
from bench.gpu_grid_backward import full, quick, tiny
from bench.gpu_session import Session
from bench.gpu_simulated import simulated_session_cupy
from bench.gpu_summary import claims
from bench.gpu_table import TIMED, Table, rows_of
from bench.peers_backward import BACKWARD_PEERS, Tensors, backward_call
from cupynorm._cuda.plan_bwd import BWD_TABLE
from cupynorm._problem import GradientProblem
from tests import oracle
from tests.gpu_backend import SM90

MACHINE = {"gpu": "Drawn by a test", "driver": "0", "commit": "0" * 40, "date": "2026-01-01"}
CASE = Case("float32", 5, 32, BIG, op=BWD)
TOGETHER = Case("float32", 5, 32, BIG, op=BOTH)


def table_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def session():
    with simulated_session_cupy() as cupy:
        yield Session(cupy, dict(MACHINE), simulated=True)


def random(dtype, *shape, seed=0, center=0.0):
    np_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return (np.random.default_rng(seed).standard_normal(shape) * 1.5 + center).astype(np_dtype)


# --- the check sees what is wrong -----------------------------------------------------------------


@pytest.fixture(params=EPSILON)
def right(request):
    """dy, x, weight and gradients rounded once from the oracle's."""
    dtype = request.param
    dy, x = random(dtype, 60, 500, seed=1), random(dtype, 60, 500, seed=2, center=1.0)
    weight = random(dtype, 500, seed=3)
    exact = oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5)
    return dy, x, weight, [a.astype(x.dtype) for a in exact]


def test_gradients_that_are_rounded_once_pass(right):
    dy, x, weight, grads = right
    errors = gradient_errors(np, dy, x, weight, grads)
    # A half by rounding; the reference of float64 rounds as often as what it judges.
    assert max(errors.values()) <= (3 if x.dtype == np.float64 else 0.51)
    error, allowed = worst_of(errors, dict.fromkeys(errors, str(x.dtype)), x.shape, ours=True)
    assert error <= allowed


@pytest.mark.parametrize("label", ["dx", "dweight", "dbias"])
def test_a_few_units_in_one_element_are_seen(right, label):
    dy, x, weight, grads = right
    wrong = grads[["dx", "dweight", "dbias"].index(label)]
    place = np.unravel_index(np.argmax(np.abs(wrong.astype(float))), wrong.shape)
    # The unit of a sum of 60 terms is at most the sum of their sizes.
    units = 8 if wrong.ndim == 2 else 200
    wrong[place] += wrong.dtype.type(units * EPSILON[str(x.dtype)]) * wrong[place]
    errors = gradient_errors(np, dy, x, weight, grads)
    assert errors[label] > 2.5
    assert all(e <= 3 for k, e in errors.items() if k != label)
    wrong[place] = np.nan
    errors = gradient_errors(np, dy, x, weight, grads)
    assert math.isnan(errors[label])
    error, allowed = worst_of(errors, dict.fromkeys(errors, str(x.dtype)), x.shape, ours=False)
    assert not error <= allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_left_out_of_twenty_thousand_is_seen(dtype):
    dy, x = random(dtype, 20_000, 64, seed=4), random(dtype, 20_000, 64, seed=5)
    for row in (slice(0, None), slice(1, None)):
        exact = oracle.layer_norm_backward(dy[row], x[row], (1,), None, 1e-5)
        grads = None, *(a.astype(x.dtype) for a in exact[1:])
        errors = gradient_errors(np, dy, x, None, grads)
        assert set(errors) == {"dweight", "dbias"}
        error, allowed = worst_of(errors, dict.fromkeys(errors, dtype), x.shape, ours=True)
        assert (error <= allowed) == (row.start == 0)


def test_the_check_adds_up_its_blocks(right, monkeypatch):
    dy, x, weight, grads = right
    whole = gradient_errors(np, dy, x, weight, grads)
    monkeypatch.setattr("bench.gpu_check_backward.BLOCK", 7 * 500)
    parts = gradient_errors(np, dy, x, weight, grads)
    bound = 1e-3 if x.dtype != np.float64 else 1.0
    assert parts == pytest.approx(whole, abs=bound)
    assert statistics(np, x)[0].shape == (60, 1)


def test_statistics_are_those_of_the_oracle(right):
    _, x, _, _ = right
    wide = "float64" if x.dtype == np.float64 else "float32"
    for made, exact in zip(
        statistics(np, x), oracle.layer_norm(x, (1,), None, None, 1e-5)[1:], strict=True
    ):
        assert made.dtype == wide
        np.testing.assert_allclose(made, exact, rtol=4 * EPSILON[wide])


def gradients(inputs, i, **changed):
    given = {"mean": inputs.mean[i], "rstd": inputs.rstd[i], "weight": inputs.weight} | changed
    return tuple(cn.layer_norm_backward(inputs.dy[i], inputs.x[i], inputs.case.N, **given))


def no_weight_in_dx(session, inputs, i):
    dx, *_ = gradients(inputs, i, weight=None)
    return (dx, *gradients(inputs, i)[1:])


def another_rstd(session, inputs, i):
    host = session.cupy.asnumpy(inputs.rstd[i]) * np.float32(1.00001)
    return gradients(inputs, i, rstd=session.cupy.asarray(host))


def totals_of_the_other_buffer(session, inputs, i):
    return (gradients(inputs, i)[0], *gradients(inputs, 1 - i)[1:])


def last_row_unwritten(session, inputs, i):
    whole = session.cupy.empty(inputs.x[i].shape, np.float32)
    whole[:-1] = gradients(inputs, i)[0][:-1]
    return (whole, *gradients(inputs, i)[1:])


def swapped(session, inputs, i):
    dx, dweight, dbias = gradients(inputs, i)
    return dx, dbias, dweight


WRONG = (no_weight_in_dx, another_rstd, totals_of_the_other_buffer, last_row_unwritten, swapped)


def run_beside(session, folder, name, call, case=CASE):
    """Rows of ours and of a contender on one case, in a table that would show times."""

    def build(session, case, inputs):
        return Contender(name, lambda i: call(session, inputs, i))

    table = Table(folder / "t.csv", MACHINE, simulated=False)
    gpu_backward.backward(session, table, [case], (), ((name, build),))
    return {r["peer"]: r for r in table_rows(folder / "t.csv")}


@pytest.mark.parametrize("fault", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_backward_gets_no_number(session, tmp_path, fault):
    rows = run_beside(session, tmp_path, fault.__name__, fault)
    wrong, ours = rows[fault.__name__], rows["cupynorm"]
    assert wrong["status"] == "wrong"
    assert "allowed" in wrong["note"]
    assert all(wrong[column] == "" for column in TIMED)
    assert ours["status"] == "ok"
    assert float(ours["median_us"]) > 0


def test_who_leaves_a_gradient_out_gets_no_number(session, tmp_path):
    rows = run_beside(
        session, tmp_path, "less", lambda s, inputs, i: (*gradients(inputs, i)[:2], None)
    )
    assert rows["less"]["status"] == "error"
    assert "no dbias came back" in rows["less"]["note"]


def test_a_wrong_y_of_forward_and_backward_gets_no_number(session, tmp_path):
    def call(session, inputs, i, eps):
        N, weight, bias = inputs.case.N, inputs.weight, inputs.bias
        return cn.layer_norm(inputs.x[i], N, weight, bias, eps), *gradients(inputs, i)

    for eps, status in ((1e-3, "wrong"), (1e-5, "ok")):
        beside = functools.partial(call, eps=eps)
        rows = run_beside(session, tmp_path, "it", beside, TOGETHER)
        assert (rows["it"]["status"], rows["cupynorm"]["status"]) == (status, "ok")


def test_results_are_spoilt_before_the_check(session, tmp_path):
    """What a call left when it was captured, or before, must not pass for what a replay leaves."""
    kept = {}

    def call(session, inputs, i):
        if i not in kept:
            kept[i] = gradients(inputs, i)
            for a in kept[i]:
                a.fill(0)
        return kept[i]

    def eager(session, inputs, i):
        call(session, inputs, i)
        return kept[i]

    assert run_beside(session, tmp_path, "once", eager)["once"]["status"] == "wrong"


# --- inputs, bytes, grids -------------------------------------------------------------------------


def test_inputs_are_distinct_and_whole(session):
    case = Case("float16", 7, 100, BIG, layout="pitch", op=BWD)
    inputs = make_gradient_inputs(session, case)
    x, dy = (session.cupy.asnumpy(a[0]).astype(float) for a in (inputs.x, inputs.dy))
    assert x.shape == dy.shape == (7, 100)
    assert abs(np.corrcoef(x.ravel(), dy.ravel())[0, 1]) < 0.2
    assert abs(dy.mean()) < 0.3 < x.mean()
    assert inputs.copy_from[0].nbytes == inputs.copy_to[0].nbytes == 7 * 100 * 2 * 3 // 2
    assert inputs.wanted == (True, True, True)
    plain = make_gradient_inputs(session, Case("float16", 7, 100, BIG, None, op=BWD))
    assert plain.wanted == (True, False, False)


def test_bytes_of_the_floor():
    mixed = Case("bfloat16", 1000, 4096, BIG, "float32", op=BWD)
    assert mixed.copy_bytes == 3 * 1000 * 4096 * 2
    assert mixed.moved_bytes == mixed.copy_bytes + 2 * 1000 * 4 + 3 * 4096 * 4
    bare = Case("float64", 10, 64, BIG, None, op=BWD)
    assert bare.moved_bytes == 3 * 10 * 64 * 8 + 2 * 10 * 8
    whole = Case("float16", 1000, 4096, BIG, op=BOTH)
    assert whole.moved_bytes == 5 * 1000 * 4096 * 2 + 4 * 1000 * 4 + 5 * 4096 * 2


def test_grids_hold_what_the_claims_need():
    for cases in (quick(), full()):
        assert len(set(cases)) == len(cases)
        assert {c.op for c in cases} == {BWD, BOTH}
        for case in cases:
            if case.group == BIG:
                assert 0.9e9 < case.copy_bytes < 1.2e9, case
            assert case.copy_bytes < 8e9, case
    assert set(quick()) <= set(full())
    big = {(c.dtype, c.N) for c in quick() if c.group == BIG and c.op == BWD}
    columns = (64, 256, 1000, 1024, 4095, 4096, 16384)
    assert set(itertools.product(("bfloat16", "float32"), columns)) <= big
    small = {(c.dtype, c.N) for c in full() if c.group == "33MB" and c.op == BWD}
    assert set(itertools.product(("float16", "bfloat16", "float32"), columns)) <= small
    for op in (BWD, BOTH):
        assert {c.N for c in full() if c.op == op and c.dtype == "float64"} >= {64, 4095, 2**20}
    few = {(c.rows, c.N) for c in full() if c.group == "few rows"}
    assert set(itertools.product((1, 2, 4, 8), (2**20, 2**26))) <= few


def test_every_case_of_ours_was_checked(tmp_path):
    command = ["--simulate", "--steps", "backward", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    rows = [r for r in table_rows(tmp_path / "backward.csv") if r["op"] in (BWD, BOTH)]
    assert not (tmp_path / "forward.csv").exists()
    ours = [r for r in rows if r["peer"] == "cupynorm"]
    assert len(ours) == len(tiny())
    for row, case in zip(ours, tiny(), strict=True):
        assert (row["status"], row["op"]) == ("simulated", case.op), row
        assert 0 < float(row["error"]) <= 8
        assert row["method"] == "graph"
        assert int(row["bytes"]) == case.moved_bytes
    families = {name.split("_")[3] for r in ours for name in r["kernel"].split("+")[:1]}
    assert {"warp", "cluster"} <= families
    assert all(("column_totals" in r["kernel"]) == bool(r["weight_dtype"]) for r in ours)
    copied = [r for r in rows if r["peer"] in ("copy-stride", "copy-block")]
    assert {r["status"] for r in copied} == {"simulated"}
    assert [int(r["bytes"]) for r in copied[::2]] == [c.copy_bytes // 32 * 32 for c in tiny()]
    foreign = [r for r in rows if r["peer"] in BACKWARD_PEERS]
    assert len(foreign) == len(BACKWARD_PEERS) * len(tiny())
    assert all(r["status"] == "skipped" and r["note"] for r in foreign)
    assert all(r[column] == "" for r in rows for column in TIMED)


# --- claims, figures ------------------------------------------------------------------------------


def timed(name, median, ours=False, kernel=""):
    times = gpu_clock.Times(median, 0.9 * median, 1.1 * median, 15)
    return Result(name, "ok", kernel, times=times, ours=ours)


def measured(case, share, kernel="layer_norm_bwd_block", eager=2.0):
    """Rows in which ours has this share of the copy's bandwidth, and eager takes so much longer."""
    t = case.moved_bytes / share / 1e6
    results = [timed("cupynorm", t, True, kernel), timed("copy-block", case.copy_bytes / 1e6)]
    return rows_of(
        case, [*results, timed("cupynorm.torch", 1.01 * t, True), timed("torch-eager", eager * t)]
    )


def test_summary_of_the_backward():
    rows = measured(Case("bfloat16", 2**20, 128, BIG, op=BWD), 0.93)
    rows += measured(Case("bfloat16", 2**12, 16384, BIG, op=BWD), 0.88, eager=0.8)
    rows += measured(Case("float64", 2**12, 4096, BIG, op=BWD), 0.5)
    rows += measured(
        Case("bfloat16", 2**10, 65536, BIG, op=BWD), 0.55, "layer_norm_bwd_split_apply"
    )
    rows += measured(Case("bfloat16", 2**12, 4096, BIG, op=BOTH), 0.9)
    said = claims(rows)
    assert "1 of 2 reach 90%, least 88.0% (bfloat16, N = 16384)" in said[0]
    assert said[1] == "backward: share of the copy of K5: least 55.0% (bfloat16, N = 65536)"
    assert "time over cupynorm.torch's: 0.990" in said[2]
    assert "worst 1.250 (bfloat16, 4096x16384)" in said[3]
    assert [s.partition(":")[0] for s in said] == ["backward"] * 4 + ["forward and backward"] * 3
    assert "reach" not in said[4]


def test_figures_of_each_op(tmp_path):
    pytest.importorskip("matplotlib")
    table = Table(tmp_path / "t.csv", MACHINE, simulated=False)
    for op, N in itertools.product((BWD, BOTH), (256, 1024, 4096)):
        table.add(measured(Case("bfloat16", 2**27 // N, N, BIG, op=op), 0.9))
    made = plots.draw(plots.read(table.path), tmp_path, ("svg",))
    stems = (
        "backward-bandwidth",
        "backward-peers",
        "forward-backward-bandwidth",
        "forward-backward-peers",
    )
    assert [p.stem for p in made] == list(stems)
    text = made[0].read_text()
    for name in ("cupynorm.torch", "torch-eager", "copy"):
        assert f"<!-- {name} -->" in text
    assert "layer_norm backward · Drawn by a test" in text


# --- peers ----------------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    torch = pytest.importorskip("torch")
    hosts = SimpleNamespace(
        x=[random("float32", 9, 200, seed=i, center=0.5) for i in (1, 2)],
        dy=[random("float32", 9, 200, seed=i) for i in (3, 4)],
        weight=random("float32", 200, seed=5),
        bias=random("float32", 200, seed=6),
    )
    made = [statistics(np, a) for a in hosts.x]
    hosts.mean, hosts.rstd = ([pair[k] for pair in made] for k in (0, 1))
    names = ("x", "dy", "mean", "rstd")
    lists = ([peers.as_torch(torch, a) for a in getattr(hosts, name)] for name in names)
    affine = (peers.as_torch(torch, a) for a in (hosts.weight, hosts.bias))
    return torch, hosts, Tensors(200, *lists, *affine)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["cupynorm.torch", "torch-eager", "torch-compile"])
def test_peers_agree_with_float64_on_the_cpu(tensors, monkeypatch, name, both):
    torch, hosts, t = tensors
    # Inductor takes half a minute; what is compiled, and that it is called rightly, shows without.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with torch.no_grad():
        call = backward_call(name, torch, t, both)
        for i in (0, 1, 0):
            *y, dx, dweight, dbias = (a.numpy() for a in call(i))
            grads = dx, dweight, dbias
            errors = gradient_errors(np, hosts.dy[i], hosts.x[i], hosts.weight, grads)
            assert set(errors) == {"dx", "dweight", "dbias"}
            assert max(errors.values()) < 8
            assert len(y) == both


@pytest.mark.parametrize("name", ["cupynorm.torch", "torch-eager"])
def test_peers_without_weight_give_dx_alone(tensors, name):
    torch, hosts, t = tensors
    t = Tensors(t.N, t.x, t.dy, t.mean, t.rstd, None, None)
    with torch.no_grad():
        dx, *totals = backward_call(name, torch, t, False)(0)
    assert totals == [None, None]
    assert gradient_errors(np, hosts.dy[0], hosts.x[0], None, (dx.numpy(), None, None))["dx"] < 8


def test_liger_is_missed_by_name(tensors):
    torch, _, t = tensors
    pytest.importorskip("torch")
    with pytest.raises(Unavailable, match="liger_kernel"):
        backward_call("liger", torch, t, False)


# --- candidates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", BWD_TABLE, ids=lambda r: f"{r.family}{r.max_vecs}")
def test_every_candidate_has_a_plan(row):
    made = gpu_tune_backward.candidates(row)
    assert made[0].row == row
    assert len(made) > 3
    assert len({gpu_tune_backward.label(c) for c in made}) == len(made)
    N = min(row.max_vecs, 8192) * 8
    strides = (0, N, 1)
    halves = ["bfloat16"] * 4
    problem = GradientProblem(*halves, True, 1, 700, N, strides, strides, strides)
    for candidate in made:
        plan = gpu_tune_backward.plan_of(candidate, problem, SM90)
        assert plan.family == candidate.family
        assert plan.stages[0].block[0] == candidate.row.threads
        if candidate.family != "split":
            rows = 700 / plan.partials / plan.rows_per_block
            assert rows >= 0.9 * candidate.rows_per_partial


def test_candidates_run_without_a_time(tmp_path):
    command = ["--simulate", "--tune", "--steps", "backward", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    rows = [r for r in table_rows(tmp_path / "tune.csv") if "/" in r["peer"]]
    assert len(rows) == 3
    assert {(r["op"], r["status"]) for r in rows} == {(BWD, "simulated")}
    assert "µs" not in (tmp_path / "tune-backward.md").read_text()


def test_a_candidate_of_rows_per_partial_is_written_as_such():
    row = BWD_TABLE[0]
    other = gpu_tune_backward.Candidate(row, 16)
    assert gpu_tune_backward.written(other, "x.csv").startswith(
        "`ROWS_PER_PARTIAL = 16` for `Table"
    )
    today = gpu_tune_backward.Candidate(row)
    assert gpu_tune_backward.written(today, "x.csv").endswith("'x.csv')`")


# --- deadlines ------------------------------------------------------------------------------------


def test_each_step_gets_its_share_of_the_time(monkeypatch):
    spent = {}
    session = SimpleNamespace(deadline=time.monotonic() + 1000)
    session.time_left = lambda: session.deadline - time.monotonic()
    session.until = functools.partial(Session.until, session)
    for step, name in (
        ("calls", "python_cost"), ("training", "training"),
        ("forward", "forwards"), ("backward", "backwards"), ("layouts", "strided"),
    ):  # fmt: skip
        monkeypatch.setattr(
            gpu, name, lambda run, s=step: spent.__setitem__(s, run.session.time_left())
        )

    def run(*steps):
        spent.clear()
        gpu.measurements(SimpleNamespace(session=session, given=SimpleNamespace(steps=steps)))
        return spent

    assert run("backward") == {"backward": pytest.approx(1000, abs=5)}
    both = run("forward", "backward")  # nothing was spent by the first
    assert both["forward"] == pytest.approx(1000 * 0.3 / 0.65, abs=5)
    assert both["backward"] == pytest.approx(1000, abs=5)
    assert list(run(*gpu.SHARES)) == list(gpu.SHARES)


# --- training -------------------------------------------------------------------------------------


def curve(ours=0.0, nudged=1e-7, last=2.0, mode="float32"):
    rows = []
    for i, v in enumerate(np.linspace(4.0, last, 16).tolist()):
        losses = {"loss_torch": v, "loss_cupynorm": v + ours * i, "loss_nudged": v + nudged * i}
        rows.append({"mode": mode, "step": i, **losses})
    return rows


def test_losses_may_part_as_rounding_lets_them():
    assert gpu_training.verdict(curve())[0]
    assert gpu_training.verdict(curve(ours=1e-6))[0]  # below the floor
    assert gpu_training.verdict(curve(ours=3e-3, nudged=1e-3))[0]
    good, sentence = gpu_training.verdict(curve(ours=1e-3))
    assert not good
    assert "ours apart by 0.015 at most, the nudged by 1.5e-06" in sentence
    assert gpu_training.verdict(curve(ours=1e-3, mode="bfloat16"))[0]
    assert not gpu_training.verdict(curve(last=3.9))[0]  # nobody learnt
    assert not gpu_training.verdict(curve(ours=math.nan))[0]


FLOAT32 = ("float32",)
SMALL = gpu_training.Size(1, 2, 16, 16, 4, 6, 2e-2)


def test_training_on_the_cpu(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(gpu_training, "WARM_STEPS", 0)
    found, sentence = gpu_training.train(tmp_path, SMALL, "cpu", {"gpu": "none"}, modes=FLOAT32)
    assert found == "ok", sentence
    rows = table_rows(tmp_path / "training.csv")
    assert [r["step"] for r in rows] == [str(i) for i in range(6)]
    assert list(rows[0]) == list(gpu_training.COLUMNS)
    assert rows[0]["loss_torch"] != rows[1]["loss_torch"]
    assert any(r["loss_nudged"] != r["loss_torch"] for r in rows)
    assert all(float(r["ms_cupynorm"]) > 0 for r in rows)
    pytest.importorskip("matplotlib")
    assert plots.main([str(tmp_path / "training.csv")]) == 0
    assert "float32: loss" in (tmp_path / "training.svg").read_text()


def test_a_wrong_norm_fails_the_training(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import cupynorm.torch

    def wrong(x, shape, weight, bias, eps):
        y = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
        return y + 0.05 * (y.detach() - y)  # the gradients alone are off

    monkeypatch.setattr(cupynorm.torch, "layer_norm", wrong)
    found, sentence = gpu_training.train(tmp_path, SMALL, "cpu", {}, timed=False, modes=FLOAT32)
    assert found == "failed", sentence
    assert all(r["ms_torch"] == "" for r in table_rows(tmp_path / "training.csv"))


def test_training_is_left_out_at_the_deadline(tmp_path):
    pytest.importorskip("torch")
    found, sentence = gpu_training.train(tmp_path, SMALL, "cpu", {}, deadline=0.0)
    assert found == "skipped"
    assert "left out" in sentence
    assert not (tmp_path / "training.csv").exists()
