"""The example from Parquet to torch: it runs, learns, shares memory, and says so truthfully."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle

ROOT = Path(cn.__file__).resolve().parents[1]
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "parquet_to_torch.py"
RESULT = re.compile(
    r"^(with layer norm|without): test accuracy (\S+), from another scanner (\S+)$", re.MULTILINE
)

torch = pytest.importorskip("torch")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("parquet_to_torch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(example, tmp_path_factory):
    """Pixels and labels, written and read by the script."""
    path = tmp_path_factory.mktemp("parquet") / "digits.parquet"
    example.write_parquet(path, seed=0)
    return example.read_parquet(path, "cpu")


def test_the_script_learns_and_shares_memory(tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # a bare checkout as well
    done = subprocess.run(
        [sys.executable, SCRIPT,
         "--device", "cpu", "--epochs", "4", "--file", tmp_path / "kept.parquet"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    out = done.stdout
    assert "1797 rows, 64 columns of uint8[pyarrow] in a pandas table; torch on cpu" in out
    steps = re.findall(r"^  (\S+ -> \S+): memory shared: (\S+)$", out, re.MULTILINE)
    assert [name for name, _ in steps] == [
        "table -> cupynorm", "cupynorm -> torch", "torch -> batch", "logits -> NumPy",
    ]  # fmt: skip
    assert {shared for _, shared in steps} == {"True"}, out
    told = {m[1]: (float(m[2]), float(m[3])) for m in RESULT.finditer(out)}
    assert min(told["with layer norm"]) > 0.93, out
    assert told["without"][0] > 0.9, out
    assert told["with layer norm"][1] > told["without"][1] + 0.03, out
    kept = pd.read_parquet(tmp_path / "kept.parquet")
    assert kept.shape == (1797, 65)
    assert kept["label"].nunique() == 10


def test_the_matrix_is_the_layer_norm_of_the_table(example, table):
    pixels, _ = table
    x = pixels.to_numpy("float64")
    got = example.to_torch(pixels, "cpu", normalize=True)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    want = oracle.layer_norm(x, (1,), None, None, 1e-5)[0]
    bound = oracle.tolerance("float32", 64)
    np.testing.assert_allclose(got.numpy(), want, rtol=bound, atol=bound)
    same = cn.layer_norm(pixels).to_numpy()  # as the script says of it
    np.testing.assert_array_equal(got.numpy(), same)
    np.testing.assert_array_equal(example.to_torch(pixels, "cpu", False).numpy(), x / 16)


def test_the_matrix_made_on_a_gpu(cupy_lib, example, table):
    pixels = table[0].iloc[:40]
    got = cupy_lib.to_numpy(example.matrix_of(pixels, "cuda", normalize=True))
    want = oracle.layer_norm(pixels.to_numpy("float64"), (1,), None, None, 1e-5)[0]
    bound = oracle.tolerance("float32", 64)
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


def test_batches_are_views_that_hold_every_row_once(example, table):
    x = example.to_torch(table[0], "cpu", normalize=True)
    numbers = torch.arange(len(x))
    options = SimpleNamespace(batch=50)
    seen = []
    for rows, which in example.batches(x, numbers, options, torch.Generator().manual_seed(1)):
        assert rows.data_ptr() == x.data_ptr() + int(which[0]) * 64 * 4
        seen += which.tolist()
    assert sorted(seen) == numbers.tolist()
    assert seen != numbers.tolist()


def test_addresses_tell_a_copy(example, table, monkeypatch, capsys):
    pixels, labels = table
    options = SimpleNamespace(batch=32, seed=0)
    example.print_hand_offs(pixels.iloc[7:], labels, "cpu", options)  # a slice, with an offset
    assert capsys.readouterr().out.count("memory shared: True") == 4
    taken = torch.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda x: taken(x).clone())
    example.print_hand_offs(pixels, labels, "cpu", options)
    assert "cupynorm -> torch: memory shared: False" in capsys.readouterr().out


def test_without_tqdm_lines_count_the_batches(example, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(example.progress("name", iter(range(40)), 40)) == list(range(40))
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["name: batch 1 of 40", "name: batch 5 of 40"]
    assert len(out) == 10


def test_tqdm_draws_a_bar_where_it_is(example, monkeypatch):
    drawn = []

    def tqdm(steps, *, desc, total, **_):
        drawn.append((desc, total))
        return steps

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=tqdm))
    assert list(example.progress("name", iter("abc"), 3)) == ["a", "b", "c"]
    assert drawn == [("name", 3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_is_taken(example):
    assert example.pick_device() == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_whole_on_a_gpu(example, capsys):
    pytest.importorskip("cupy")
    example.main(["--device", "cuda", "--epochs", "4"])
    out = capsys.readouterr().out
    assert "torch on cuda" in out
    for step in ("cupynorm -> torch", "torch -> batch", "logits -> CuPy"):
        assert f"{step}: memory shared: True" in out
    told = {m[1]: (float(m[2]), float(m[3])) for m in RESULT.finditer(out)}
    assert min(told["with layer norm"]) > 0.93
