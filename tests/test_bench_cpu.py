"""The CPU benchmark refuses wrong results, times what is right, and says what it did."""

import csv
import dataclasses
import math
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
pytest.importorskip("numba")

from bench import (  # noqa: E402
    cpu,
    cpu_clock,
    cpu_contender,
    cpu_data,
    cpu_grid,
    cpu_machine,
    cpu_peers_numpy,
    cpu_summary,
    cpu_table,
    plots,
    plots_cpu,
    progress,
)
from bench.cpu_contender import CpuContender, CpuResult  # noqa: E402
from bench.cpu_grid import CpuCase  # noqa: E402
from bench.gpu_clock import Times  # noqa: E402
from bench.gpu_grid import BOTH, BWD, FWD  # noqa: E402

OPS = (FWD, BWD, BOTH)


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    """One turn of one call, without a pause."""
    monkeypatch.setenv(cpu_machine.THREADS, "2")
    for name, value in {
        "PAUSE": 0.0,
        "TURN": 0.0,
        "FEWEST": 1,
        "MOST": 1,
        "FEWEST_SLOW": 1,
    }.items():
        monkeypatch.setattr(cpu_clock, name, value)


def results(case, builders):
    return {r.name: r for r in cpu_contender.measure(cpu_data.make_inputs(case), builders, 0.0)}


def everybody(case):
    inputs = cpu_data.make_inputs(case)
    return {r.name: r for r in cpu_contender.measure(inputs, cpu.builders(inputs, cpu.PEERS), 0.0)}


# --- who takes part -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_everybody_is_right_or_says_why_not(op):
    found = everybody(CpuCase(op, "shapes", (37, 50)))
    skipped = {name for name, r in found.items() if r.status == "skipped"}
    never = {"scikit-learn"}
    without = {"onnxruntime", "onnxruntime out="}
    assert skipped == never | (set() if op == FWD else without) | (
        {"cupynorm.torch"} if op == BWD else set()
    )
    assert all(found[name].note for name in skipped)
    for name in set(found) - skipped:
        assert (found[name].status, found[name].note) == ("ok", ""), name
        assert found[name].times.median > 0
    assert {"torch", "jax", "numpy formula", "cupynorm", "cupynorm numpy", "copyto"} <= set(found)


def test_onnxruntime_takes_part():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = everybody(CpuCase(FWD, "shapes", (5, 33)))
    assert [found[n].status for n in ("onnxruntime", "onnxruntime out=")] == ["ok", "ok"]
    assert found["onnxruntime out="].kept


def test_half_precision():
    found = everybody(CpuCase(FWD, "shapes", (9, 40), "bfloat16"))
    for name in ("torch", "jax", "numpy formula", "cupynorm", "cupynorm out="):
        assert found[name].status == "ok", (name, found[name].note)


@pytest.mark.parametrize("op", [FWD, BWD])
@pytest.mark.parametrize(
    ("shape", "axis", "order"), [((70, 13), -1, "F"), ((3, 7, 4, 5), 1, "C")], ids=str
)
def test_strided_axes_in_every_way(op, shape, axis, order):
    found = everybody(CpuCase(op, "layouts", shape, axis=axis, order=order))
    ways = ["torch-view", "torch-contiguous", "torch-back", "cupynorm", "cupynorm numpy"]
    if op == FWD:
        ways += ["torch-composed", "cupynorm out="]
    ways += ["cupynorm C"] if order == "F" and op == FWD else []
    for name in ways:
        assert (found[name].status, found[name].note) == ("ok", ""), name


def test_torch_back_leaves_the_layout_of_x():
    inputs = cpu_data.make_inputs(CpuCase(FWD, "layouts", (70, 13), order="F"))
    made = dict(cpu.builders(inputs, ("torch-back", "cupynorm", "cupynorm C")))
    strides = {n: made[n]().arrays(made[n]().call())[0].strides for n in made}
    assert strides["torch-back"] == strides["cupynorm"] == inputs.x.strides
    assert strides["cupynorm C"] == (13 * 4, 4)


def test_scale_is_compared_without_affine_and_eps():
    case = next(iter(cpu_grid.scale()))
    found = everybody(dataclasses.replace(case, shape=(60, 50)))
    assert (case.affine, case.eps) == (False, 0.0)
    for name in ("scikit-learn", "torch", "cupynorm", "numpy formula"):
        assert found[name].status == "ok", (name, found[name].note)
    assert "needs a scale" in found["onnxruntime"].note


# --- the check ------------------------------------------------------------------------------------


def formula(inputs):
    """Contender of the formula in NumPy: right, and easily made wrong."""
    return cpu_peers_numpy.formula(inputs)


def one(case, call, **about):
    return results(case, [("it", lambda: CpuContender(call, **about))])["it"]


@pytest.mark.parametrize("op", OPS)
def test_each_result_is_looked_at(op):
    case = CpuCase(op, "shapes", (60, 30))
    right = [a.copy() for a in formula(cpu_data.make_inputs(case)).call()]
    assert one(case, lambda: tuple(right), ours=True).status == "ok"
    for k, a in enumerate(right):
        for place, factor in (((59,) if a.ndim == 2 else (7,), 1 + 1e-4), ((0,), np.nan)):
            wrong = [b.copy() for b in right]
            wrong[k][place] = wrong[k][place] * factor + 1e-3
            result = one(case, lambda w=wrong: tuple(w))
            assert result.status == "wrong", (k, place)
            assert result.times is None
            assert "allowed" in result.note
        missing = [None if j == k else b for j, b in enumerate(right)]
        assert one(case, lambda m=missing: tuple(m)).status == "error"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_left_out_of_the_totals_is_seen(dtype):
    case = CpuCase(BWD, "shapes", (5000, 8), dtype)
    inputs = cpu_data.make_inputs(case)
    dx, *totals = (a.copy() for a in formula(inputs).call())
    wide = inputs.dy.astype(np.float64)
    fewer = (wide.sum(0) - wide[123]).astype(inputs.x.dtype)
    assert one(case, lambda: (dx, *totals)).status == "ok"
    assert one(case, lambda: (dx, totals[0], fewer), ours=True).status == "wrong"


def test_memory_that_is_kept_is_spoilt_first():
    case = CpuCase(FWD, "shapes", (60, 30))
    out = formula(cpu_data.make_inputs(case)).call()[0].copy()
    assert one(case, lambda: out).status == "ok"
    assert one(case, lambda: out, kept=out).status == "wrong"


def test_a_copy_must_have_arrived():
    case = CpuCase(BWD, "shapes", (6, 5), "bfloat16")
    source = np.arange(40, dtype=np.float32)
    assert one(case, source.copy, source=source).status == "ok"
    assert one(case, lambda: source[::-1].copy(), source=source).status == "wrong"


def test_who_raises_leaves_the_others():
    case = CpuCase(FWD, "shapes", (6, 5))
    inputs = cpu_data.make_inputs(case)

    def broken():
        msg = "not for this dtype"
        raise TypeError(msg)

    def missing():
        raise ModuleNotFoundError("No module named 'gone'")

    found = results(case, [("a", broken), ("b", missing), ("c", lambda: formula(inputs))])
    assert [found[n].status for n in "abc"] == ["error", "skipped", "ok"]
    assert found["a"].note == "TypeError: not for this dtype"


# --- the clock ------------------------------------------------------------------------------------


def test_turns_are_interleaved_and_slow_ones_fewer(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(cpu_clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu_clock, "settle", lambda: order.append("|"))
    for name, value in {"TURN": 2e-3, "FEWEST": 5, "MOST": 12, "FEWEST_SLOW": 3}.items():
        monkeypatch.setattr(cpu_clock, name, value)

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    calls = {"a": call("a", 2e-3), "b": call("b", 1e-3), "slow": call("slow", 0.3)}
    times = cpu_clock.interleave(calls, 1.0)
    assert [len(times[n]) for n in calls] == [12, 12, 3]
    assert times["a"] == pytest.approx([2e-3] * 12)
    turns = [turn[0] for turn in "".join(n[0] for n in order).split("|") if turn][3:]
    assert [k for k, t in enumerate(turns) if t == "s"][-1] > 20  # not all at the beginning
    assert "a" in turns[:3] and "b" in turns[:3]
    assert turns[0] != turns[turns.index("s") + 1] or len(set(turns[:4])) > 1


def test_settle_waits_for_threads_that_spin(monkeypatch):
    spent = iter([0.0, 0.005, 0.005, 0.010, 0.010, 0.0101, 9.0, 9.0])
    slept = []
    monkeypatch.setattr(cpu_clock, "PAUSE", 0.005)
    monkeypatch.setattr(cpu_clock.time, "process_time", lambda: next(spent))
    monkeypatch.setattr(cpu_clock.time, "sleep", slept.append)
    cpu_clock.settle()
    assert slept == [0.005] * 3
    assert time.perf_counter() > 0


def test_spread():
    times, best = cpu_clock.spread([3e-6, 1e-6, 2e-6])
    assert (times.median, times.rounds, best) == (pytest.approx(2.0), 3, pytest.approx(1.0))
    assert best < times.p10 < times.median < times.p90


# --- table and summary ----------------------------------------------------------------------------


def timed(name, median, best=None, kept=False):
    times = Times(median, 0.9 * median, 1.2 * median, 9)
    return CpuResult(name, "ok", 0.5, times, best or 0.8 * median, kept=kept)


def table(ratio=1.0, shape=(100, 50), op=FWD):
    case = CpuCase(op, "shapes", shape)
    return case, cpu_table.rows_of(
        case,
        [
            timed("torch-view", 30.0),
            timed("torch-contiguous", 20.0, 19.0),
            timed("cupynorm", 10.0 * ratio, 9.5 * ratio),
            timed("cupynorm out=", 8.0, kept=True),
            timed("copyto", 4.0, kept=True),
            timed("copyto fresh", 5.0),
            CpuResult("jax", "wrong", 99.0, note="error 99, allowed 16"),
        ],
    )


def test_ratios_of_a_case():
    case, rows = table()
    by = {r["peer"]: r for r in rows}
    assert case.copy_bytes == 2 * 5000 * 4
    assert case.moved_bytes == 2 * 5000 * 4 + 2 * 50 * 4
    assert by["cupynorm"]["over_torch"] == pytest.approx(0.5)
    assert by["cupynorm"]["best_over_torch"] == pytest.approx(0.5)
    assert by["torch-view"]["over_torch"] == pytest.approx(1.5)
    share = case.moved_bytes / case.copy_bytes
    assert by["cupynorm out="]["fraction_of_copy"] == pytest.approx(share * 4 / 8, rel=1e-4)
    assert by["cupynorm"]["fraction_of_copy"] == pytest.approx(share * 5 / 10, rel=1e-4)
    assert by["copyto"]["gb_per_s"] == pytest.approx(case.copy_bytes / 4e3, rel=1e-4)
    assert by["jax"]["median_us"] == "" and "allowed" in by["jax"]["note"]
    assert set(rows[0]) == set(cpu_table.CPU_COLUMNS)


def test_bytes_of_the_floor():
    both = CpuCase(BOTH, "dtypes", (10, 4, 3), "float16", axis=1)
    assert (both.M, both.N) == (30, 4)
    assert both.copy_bytes == 5 * 120 * 2
    assert both.moved_bytes == 5 * 120 * 2 + 5 * 4 * 2 + 4 * 30 * 4
    assert CpuCase(FWD, "scale", (10, 4), affine=False).moved_bytes == 2 * 40 * 4


def test_summary_has_means_and_the_worst():
    rows = [
        r for ratio, shape in ((1.0, (100, 50)), (4.0, (9, 50))) for r in table(ratio, shape)[1]
    ]
    said = {(line[3], line[4]): line[5:] for line in cpu_summary.summary(rows)}
    assert said["cupynorm", "torch"] == ("2", "1.00", "1.00", "2.00", "9x50")
    assert said["cupynorm out=", "copyto"][0] == "2"
    assert ("cupynorm", "jax") not in said
    text = cpu_summary.lines(cpu_summary.summary(rows))
    assert text[0].startswith("op ") and "9x50" in text[1]
    page = cpu_summary.markdown(cpu_summary.summary(rows), {"cpu": "Drawn"}, "t.csv")
    assert "| fwd | shapes | float32 | cupynorm | torch | 2 | 1.00 |" in page
    assert cpu_summary.fixed_cost(rows) == ""
    small = [r | {"group": "small"} for r in table(1.0, (1, 8))[1] if r["median_us"] != ""]
    assert cpu_summary.fixed_cost(small).startswith(
        "Fixed cost of a call (1x8), us: fwd: copyto 4,"
    )
    assert cpu_summary.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_grid_holds_what_the_claims_need():
    cases = cpu_grid.grid(cpu_grid.GROUPS)
    assert len(set(cases)) == len(cases)
    for op in OPS:
        mine = [c.shape for c in cases if c.op == op and c.group == "shapes"]
        assert mine == list(cpu_grid.SHAPES)
    assert {c.dtype for c in cases} == {"float16", "bfloat16", "float32", "float64"}
    assert {c.shape for c in cases if c.group == "layouts"} == {
        (200000, 64), (20000, 500), (32, 96, 56, 56),
    }  # fmt: skip
    assert cases[0].group == "shapes"
    assert (8, 64) in {c.shape for c in cases}
    assert all(math.prod(c.shape) == cpu_grid.SWEEP for c in cases if c.group == "columns")


def test_page_lists_the_columns():
    page = (cpu_machine.ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for column, meaning in cpu_table.CPU_COLUMNS.items():
        assert f"| `{column}` | {meaning} |" in page


# --- the command, its bar and its figures ---------------------------------------------------------


def test_a_run_writes_table_and_summary(tmp_path, monkeypatch, capsys):
    small = lambda: iter([CpuCase(FWD, "shapes", (16, 8)), CpuCase(BOTH, "shapes", (16, 8))])  # noqa: E731
    monkeypatch.setitem(cpu_grid.GROUPS, "shapes", small)
    before = torch.get_num_threads()
    command = [
        "--groups",
        "shapes",
        "--seconds",
        "0",
        "--peers",
        "torch,cupynorm,copyto,copyto fresh",
    ]
    try:
        assert cpu.main([*command, "--out", str(tmp_path)]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.glob("cpu-*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["peer"] for r in rows] == ["torch", "cupynorm", "copyto", "copyto fresh"] * 2
    assert {k: rows[0][k] for k in cpu_machine.machine()} == cpu_machine.machine()
    ratio = float(rows[1]["median_us"]) / float(rows[0]["median_us"])
    assert float(rows[1]["over_torch"]) == pytest.approx(ratio, rel=1e-3)
    captured = capsys.readouterr()
    assert "geometric mean" in captured.out and str(path) in captured.out
    assert "| cupynorm | torch |" in path.with_suffix(".md").read_text()
    assert "bench.cpu 2/2" in captured.err
    assert cpu.main([*command, "--minutes", "-1"]) == 0
    assert "2 cases left out" in capsys.readouterr().out


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch):
    case = CpuCase(FWD, "shapes", (16, 8))
    monkeypatch.setitem(cpu_grid.GROUPS, "shapes", lambda: iter([case]))
    wrong = [("cupynorm", lambda: CpuContender(lambda: np.zeros((16, 8), np.float32), ours=True))]
    monkeypatch.setattr(cpu, "builders", lambda inputs, names: wrong)
    assert cpu.main(["--groups", "shapes", "--seconds", "0"]) == 1


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--peers", "torch,numpie"])
    assert "numpie is not one of" in capsys.readouterr().err


def test_bar_where_there_is_a_terminal(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.progress(["one", "two"], "label")) == ["one", "two"]
    progress.say("between")
    captured = capsys.readouterr()
    assert "label: 100%" in captured.err and "2/2" in captured.err
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert list(progress.progress(["one", "two"], "lines")) == ["one", "two"]
    assert "lines 2/2: two" in capsys.readouterr().err


def test_figures_show_who_was_measured(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    host = {"cpu": "Drawn", "threads": "2", "commit": "0" * 9, "date": "2026-01-01", "torch": "1"}
    rows = []
    for group, shapes in {
        "shapes": [(2**k, 50) for k in range(5)],
        "columns": [(2**14 // N, N) for N in (16, 256, 4096)],
        "rows": [(4**k, 1024) for k in range(3)],
    }.items():
        for shape in shapes:
            rows += [r | host | {"group": group} for r in table(1.5, shape)[1]]
    rows = [r | {"peer": r["peer"].removesuffix("-view")} for r in rows]
    path = cpu_machine.write(rows, tmp_path, "cpu")
    assert plots_cpu.main([str(path), "--out", str(tmp_path / "drawn")]) == 0
    for name in ("cpu-shapes-forward", "cpu-bandwidth", "cpu-bytes"):
        pixels = matplotlib.image.imread(tmp_path / "drawn" / f"{name}.png")[..., :3]
        assert pixels.shape[1] == plots_cpu.WIDTH * plots_cpu.DPI
        shown = [plots_cpu.PEER_COLORS["cupynorm"], plots_cpu.PEER_COLORS["torch"]]
        shown += [plots.COLORS["copy"]] if "shapes" not in name else []
        for text in shown:
            color = np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert (np.abs(pixels - color).max(axis=2) < 0.03).sum() > 100, (name, text)
    with pytest.raises(ValueError, match="no timed rows"):
        plots_cpu.read(cpu_machine.write([r for r in rows if r["peer"] == "jax"], tmp_path, "none"))
