"""The CPU comparison with torch refuses wrong results, times what is right, keeps where it ran."""

import csv
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
pytest.importorskip("numba")

# As a program it sets the number of threads for itself; the other tests shall not see that.
_before = os.environ.get("CUPYNORM_NUM_THREADS")
from bench import cpu, torch_cpu  # noqa: E402

if _before is None:
    os.environ.pop("CUPYNORM_NUM_THREADS", None)

TORCH = torch.nn.functional.layer_norm


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "2")


def eager(x, shape, weight, bias, eps):
    """Layer norm by the definition, as a second contender that autograd can differentiate."""
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt((d * d).mean(-1, keepdim=True) + eps) * weight + bias


def check(op, layer_norm, M=40, N=30):
    given = torch_cpu.arrays(M, N)
    with torch.set_grad_enabled(op == "fwd+bwd"):
        torch_cpu.check(op, given, torch_cpu.calls_of(op, given, {"it": layer_norm}))


@pytest.mark.parametrize("op", ["fwd", "fwd+bwd"])
def test_right_results_pass(op, monkeypatch):
    check(op, TORCH)
    check(op, eager)
    monkeypatch.setattr(torch_cpu, "_BLOCK", 300)  # the oracle's blocks are added up
    check(op, TORCH, M=45)


WRONG = {
    "forward": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) * 1.0001,
    "unbiased": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) * (29 / 30) ** 0.5,
    "one row": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) + (torch.arange(40) == 39)[:, None],
}
# (x, weight, bias) whose gradient is lost or wrong, with a y that is right.
WRONG_GRADIENTS = {
    "dx": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) + 1e-3 * (x - x.detach()),
    "dw": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) + 0.1 * (w - w.detach()),
    "db": lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) + 0.01 * (b - b.detach()),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_forward_gets_no_time(name):
    with pytest.raises(SystemExit, match="it is wrong on"):
        check("fwd", WRONG[name])


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_gets_no_time(name):
    check("fwd", WRONG_GRADIENTS[name])
    with pytest.raises(SystemExit, match=f"it: {name} of .* is wrong"):
        check("fwd+bwd", WRONG_GRADIENTS[name])


def test_a_nan_is_wrong():
    with pytest.raises(SystemExit, match="wrong"):
        check("fwd+bwd", lambda x, s, w, b, eps: TORCH(x, s, w, b, eps) * float("nan"))


def test_gradients_are_wanted_where_the_case_says_so():
    seen = []

    def watched(x, shape, weight, bias, eps):
        seen.append((torch.is_grad_enabled(), x.requires_grad, weight.requires_grad))
        return TORCH(x, shape, weight, bias, eps)

    check("fwd", watched)
    assert set(seen) == {(False, False, True)}
    seen.clear()
    check("fwd+bwd", watched)
    assert set(seen) == {(True, True, True)}


def test_bytes_that_cannot_be_avoided():
    assert torch_cpu.moved("fwd", 10, 3) == 4 * (30 + 30 + 6)
    assert torch_cpu.moved("fwd+bwd", 10, 3) == 4 * (5 * 30 + 5 * 3)


def test_geometric_mean():
    assert cpu.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_a_run_writes_its_table(tmp_path, monkeypatch, capsys):
    norms = {"torch": TORCH, "cupynorm": eager}
    monkeypatch.setattr(torch_cpu, "layer_norms", lambda: norms)
    monkeypatch.setattr(torch_cpu, "CASES", [("fwd+bwd", 16, 8), ("fwd", 8, 64), ("fwd", 16, 8)])
    monkeypatch.setattr(cpu, "PAUSE", 0.0)
    before = torch.get_num_threads()
    try:
        torch_cpu.main(["--seconds", "0.01", "--to", str(tmp_path)])
        assert torch.get_num_threads() == int(cpu.machine()["threads"])
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.glob("torch-cpu-*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["op"], r["M"], r["N"]) for r in rows] == [
        ("fwd+bwd", "16", "8"),
        ("fwd", "8", "64"),
        ("fwd", "16", "8"),
    ]
    for row in rows:
        for name in norms:
            low, middle, high = (float(row[f"{name}{q} us"]) for q in (" q1", "", " q3"))
            assert 0 < float(row[f"{name} best us"]) <= low <= middle <= high
        ratio = float(row["cupynorm us"]) / float(row["torch us"])
        assert float(row["cupynorm/torch"]) == pytest.approx(ratio, abs=2e-3)
        assert {k: row[k] for k in cpu.machine()} == cpu.machine()
        assert float(row["load"]) >= 0
    said = capsys.readouterr().out
    # The geometric mean leaves out the case that measures what a call costs.
    ratio = float(rows[2]["cupynorm/torch"])
    assert f"fwd: geometric mean {ratio:.2f}, worst {ratio:.2f}" in said
    ratio = float(rows[2]["cupynorm best us"]) / float(rows[2]["torch best us"])
    assert float(rows[2]["best cupynorm/torch"]) == pytest.approx(ratio, abs=2e-3)
    assert str(path) in said


def test_the_contender_is_ours():
    import cupynorm.torch

    assert torch_cpu.layer_norms()["cupynorm"] is cupynorm.torch.layer_norm
    assert torch_cpu.layer_norms()["torch"] is TORCH
    for M, N in ((512, 768), (3, 5)):
        for op in ("fwd", "fwd+bwd"):
            given = torch_cpu.arrays(M, N)
            with torch.set_grad_enabled(op == "fwd+bwd"):
                calls = torch_cpu.calls_of(op, given, torch_cpu.layer_norms())
                torch_cpu.check(op, given, calls)
                assert set(calls) == {"torch", "cupynorm"}


def test_arrays_are_the_same_in_every_run():
    first, second = torch_cpu.arrays(4, 3), torch_cpu.arrays(4, 3)
    assert [a.shape for a in first] == [(4, 3), (3,), (3,), (4, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
