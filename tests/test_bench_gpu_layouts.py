"""The benchmark's table of layouts on the simulated device: checked, and nothing invented."""

import csv
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from bench import gpu, gpu_layouts, peers, peers_layouts
from bench.gpu_check import largest_error, limit
from bench.gpu_clock import Times
from bench.gpu_contender import Contender, Result
from bench.gpu_data_layouts import make_layout_inputs, rows_of_layout
from bench.gpu_grid_layouts import COLUMN_LAYOUTS, LAYOUTS, LayoutCase, full, quick, tiny
from bench.gpu_session import Session
from bench.gpu_simulated import simulated_session_cupy
from bench.gpu_summary import claims
from bench.gpu_table import TIMED, Table, rows_of

MACHINE = {"gpu": "Drawn by a test"}
CASE = LayoutCase("float32", 41, 9, LAYOUTS, "same", "F-C")


def table_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def session():
    with simulated_session_cupy() as cupy:
        yield Session(cupy, dict(MACHINE), simulated=True)


def test_every_layout_is_checked(tmp_path):
    assert gpu.main(["--simulate", "--steps", "layouts", "--out", str(tmp_path)]) == 0
    rows = table_rows(tmp_path / "layouts.csv")
    assert all(r[column] == "" for r in rows for column in TIMED)
    ours = [r for r in rows if r["peer"] == "cupynorm"]
    assert [r["layout"] for r in ours] == [*COLUMN_LAYOUTS, "NCHW"]
    for row, case in zip(ours, tiny(), strict=True):
        assert row["status"] == "simulated"
        assert 0 < float(row["error"]) <= limit(case.dtype, case.N, ours=True)
        affine = 2 * 4 * case.N if case.weight_dtype else 0
        assert int(row["bytes"]) == 2 * 4 * case.rows * case.N + affine
        assert row["method"] == ("launches" if case.layout == "columns" else "graph")
        kind = "columns" if case.layout == "columns" else "column"
        assert row["kernel"].split("_")[3] == kind
    status = {(r["layout"], r["peer"]): r["status"] for r in rows}
    assert status.pop(("F-C", "contiguous-then-rows")) == "simulated"
    foreign = [r for r in rows if r["peer"] in peers_layouts.LAYOUT_PEERS]
    assert len(foreign) == 5 * len(tiny())
    assert all(r["note"] for r in foreign if r["status"] == "skipped")
    assert {status.get((r["layout"], r["peer"]), "skipped") for r in foreign} == {"skipped"}
    text = (tmp_path / "summary.md").read_text()
    assert "| layouts | ok |" in text and "share of the copy" not in text


def rows_reversed(session, case, inputs, i):
    cn.layer_norm(inputs.x[i], weight=inputs.weight, bias=inputs.bias, axis=1, out=inputs.y[i])
    return inputs.y[i][::-1]


def other_eps(session, case, inputs, i):
    x, weight, bias = inputs.x[i], inputs.weight, inputs.bias
    return cn.layer_norm(x, weight=weight, bias=bias, eps=1e-3, axis=1, out=inputs.y[i])


@pytest.mark.parametrize("fault", [rows_reversed, other_eps], ids=lambda f: f.__name__)
def test_a_wrong_kernel_gets_no_number(session, tmp_path, fault):
    def build(session, case, inputs):
        return Contender(fault.__name__, lambda i: fault(session, case, inputs, i))

    table = Table(tmp_path / "t.csv", MACHINE, simulated=False)  # so that times would show
    gpu_layouts.layouts(session, table, [CASE], (), ((fault.__name__, build),))
    rows = {r["peer"]: r for r in table_rows(tmp_path / "t.csv")}
    assert rows[fault.__name__]["status"] == "wrong"
    assert rows[fault.__name__]["median_us"] == ""
    assert rows["cupynorm"]["status"] == "ok" and float(rows["cupynorm"]["median_us"]) > 0


@pytest.mark.parametrize(
    ("ddof", "eps", "status"), [(0, 0, "ok"), (1, 0, "wrong"), (0, 1, "wrong")]
)
def test_cuml_is_checked_for_what_it_computes(session, tmp_path, monkeypatch, ddof, eps, status):
    """The biased deviation and no eps, on a case without weight and bias."""
    packages = {name: ModuleType(name) for name in ("cuml", "cuml.preprocessing")}

    def scale(x, axis):
        host = session.cupy.asnumpy(x).astype(np.float64)
        spread = np.sqrt(host.var(axis, keepdims=True, ddof=ddof) + eps)
        y = ((host - host.mean(axis, keepdims=True)) / spread).astype(np.float32)
        return session.cupy.asarray(y)

    packages["cuml.preprocessing"].scale = scale
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    case = LayoutCase("float32", 30, 9, LAYOUTS, None, "F-C")
    table = Table(tmp_path / "t.csv", MACHINE, simulated=False)
    gpu_layouts.layouts(session, table, [case, CASE], ("cuml-scale",))
    first, second = (r for r in table.rows if r["peer"] == "cuml-scale")
    assert (first["status"], first["method"]) == (status, "launches")
    assert second["status"] == "skipped" and "neither weight nor bias" in second["note"]


@pytest.mark.parametrize("case", tiny(), ids=lambda c: c.layout)
def test_the_peers_formulas_are_layer_norm(session, case):
    torch = pytest.importorskip("torch")
    inputs = make_layout_inputs(session, case)
    x, weight, bias = (
        None if a is None else session.plain(a) for a in (inputs.x[0], inputs.weight, inputs.bias)
    )
    flat = session.plain(inputs.flat_x[0])
    tensors = [peers.as_torch(torch, a) for a in (flat, weight, bias)]
    permuted = peers_layouts.permuted(torch, case, *tensors)
    assert tuple(permuted.shape) == case.shape
    by_column = case.layout[-1] == "F"
    assert permuted.stride(0) == (1 if by_column else permuted[0].numel())
    for y in (permuted.numpy(), peers_layouts.composite(np, x, weight, bias)):
        rows = [rows_of_layout(case, a) for a in (x, y)]
        error = largest_error(np, rows[0], weight, bias, rows[1])
        assert error <= limit(case.dtype, case.N, ours=True)
    if case.layout == "columns":
        stacked = np.stack([session.plain(c) for c in inputs.columns[0]], axis=1)
        assert (stacked == x).all()


def test_composite_of_half_precision():
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 4)).astype(ml_dtypes.bfloat16)
    y = peers_layouts.composite(np, x, x[0, :, 0, 0], x[1, :, 0, 0])
    assert y.dtype == x.dtype and np.isfinite(y.astype(np.float32)).all()


def test_grids_hold_what_the_claims_need():
    for cases in (quick(), full()):
        assert len(set(cases)) == len(cases)
        for case in cases:
            assert 0.9e9 < case.copy_bytes < 1.1e9, case
            assert case.rows * case.N == np.prod(case.shape)
    assert set(quick()) <= set(full())
    to_rows = {c.N for c in quick() if c.layout == "F-C"}
    assert {8, 64, 900} <= to_rows and any(N % 2 for N in to_rows)
    assert any(c.rows % 2 for c in quick()) and {"columns", "NCHW"} < {c.layout for c in quick()}


def test_summary_tells_the_share_by_layout():
    rows = []
    for layout, median in (("F-C", 10.0), ("F-C", 20.0), ("F-F", 9.0)):
        case = LayoutCase("float32", 10**6, 64, LAYOUTS, None, layout)
        results = [
            Result(name, "ok", times=Times(t, t, t, 3), ours=name == "cupynorm")
            for name, t in (("cupynorm", median), ("copy-block", 9.0), ("stack-then-rows", 30.0))
        ]
        rows += rows_of(case, results)
    first, second, ratio = claims(rows)
    assert "F-C: 1 of 2 reach 85%, least 45.0% (float32, N = 64)" in first
    assert "F-F: least 100.0%" in second
    assert "stack-then-rows" in ratio and "worst 0.667" in ratio
