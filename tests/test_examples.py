"""The examples run, learn, share memory, and say truthfully what they did."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend
from tests.cpu.programs import module_of, run_python

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BACKENDS = (Backend.CUPY_SIMULATED, Backend.CUPY)
RESULT = re.compile(
    r"^(with|without) layer norm: train loss (\S+) -> (\S+), test accuracy (\S+)$", re.MULTILINE
)
SCANNED = re.compile(
    r"^(with layer norm|without): test accuracy (\S+), from another scanner (\S+)$", re.MULTILINE
)

torch = pytest.importorskip("torch")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    return module_of(EXAMPLES / "train_digits.py")


@pytest.fixture(scope="module")
def parquet():
    return module_of(EXAMPLES / "parquet_to_torch.py")


def results(text, pattern=RESULT):
    """Numbers of each line of results: first loss, last loss and accuracy; or two accuracies."""
    return {m[1]: tuple(map(float, m.groups()[1:])) for m in pattern.finditer(text)}


def test_tqdm_draws_a_bar_where_it_is(digits, parquet, monkeypatch):
    drawn = []

    def trange(n, *, desc, **_):
        drawn.append((desc, n))
        return range(n)

    def tqdm(steps, *, desc, total, **_):
        drawn.append((desc, total))
        return steps

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(trange=trange, tqdm=tqdm))
    assert list(digits.progress("some name", 3)) == [0, 1, 2]
    assert list(parquet.progress("name", iter("abc"), 3)) == ["a", "b", "c"]
    assert drawn == [("some name", 3), ("name", 3)]


def test_without_tqdm_and_torch(digits, parquet, capsys, monkeypatch):
    for name in ("tqdm.auto", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list(parquet.progress("name", iter(range(40)), 40)) == list(range(40))
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["name: batch 1 of 40", "name: batch 5 of 40"]
    assert len(told) == 10
    digits.main(["--device", "cpu", "--epochs", "2"])
    out = capsys.readouterr().out
    assert "with layer norm: epoch 1 of 2" in out
    assert "torch is not installed" in out
    assert len(results(out)) == 2


def test_the_digits_are_learned(tmp_path):
    path = tmp_path / "norm.npz"
    given = ["train_digits.py", "--device", "cpu", "--epochs", "8", "--save", str(path)]
    run = f"runpy.run_path({str(EXAMPLES / given[0])!r}, run_name='__main__')"
    out = run_python(f"import runpy, sys; sys.argv = {given}; {run}")
    told = results(out)
    assert set(told) == {"with", "without"}, out
    for first, last, right in told.values():
        assert 2.0 < first < 4.0  # knows nothing: log(10) or worse
        assert last < 0.15
        assert right > 0.94
    assert told["with"][1] < told["without"][1]
    difference = re.search(r"largest difference (\S+), memory shared: True", out)
    assert difference, out
    assert float(difference[1]) < 1e-5
    norm = cn.LayerNorm(128)
    norm.load(path)
    assert min(np.ptp(norm.weight), np.ptp(norm.bias)) > 0.05  # it has learned too


def test_a_seed_fixes_the_result(digits, capsys):
    told = []
    for seed in ("1", "1", "2"):
        digits.main(["--device", "cpu", "--epochs", "1", "--seed", seed])
        told.append(results(capsys.readouterr().out))
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("with_norm", [True, False])
def test_the_gradients_written_out_are_those_of_the_loss(digits, with_norm):
    norm = cn.LayerNorm(digits.HIDDEN, dtype="float64") if with_norm else None
    network = digits.Network(np, 0, norm)
    network.p = {name: array.astype(np.float64) for name, array in network.p.items()}
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(6, digits.PIXELS)), np.eye(digits.CLASSES)[:6]

    def loss():
        return digits.cross_entropy(np, network.forward(x, keep=False), labels)[0]

    _, dlogits = digits.cross_entropy(np, network.forward(x), labels)
    gradients = network.backward(dlogits)
    assert set(gradients) == set(network.parameters())
    for name, array in network.parameters().items():
        at = np.unravel_index(np.abs(gradients[name]).argmax(), array.shape)
        before, h = array[at], 1e-5
        array[at] = before + h
        above = loss()
        array[at] = before - h
        slope = (above - loss()) / (2 * h)
        array[at] = before
        np.testing.assert_allclose(gradients[name][at], slope, rtol=1e-6, atol=1e-9)


def test_the_digits_are_learned_on_a_gpu(cupy_lib, digits, capsys):
    if not cupy_lib.backend.on_gpu or digits.pick_device() != "cuda":
        pytest.skip("needs a GPU and CuPy with cuBLAS")
    digits.main(["--device", "cuda", "--epochs", "8"])
    for first, last, right in results(capsys.readouterr().out).values():
        assert last < 0.15 < first
        assert right > 0.94


@pytest.fixture(scope="module")
def table(parquet, tmp_path_factory):
    """Pixels and labels, written and read by the script."""
    path = tmp_path_factory.mktemp("parquet") / "digits.parquet"
    parquet.write_parquet(path, seed=0)
    return parquet.read_parquet(path, "cpu")


def test_the_table_is_learned_and_memory_shared(parquet, tmp_path, capsys):
    kept = tmp_path / "kept.parquet"
    parquet.main(["--device", "cpu", "--epochs", "4", "--file", str(kept)])
    out = capsys.readouterr().out
    assert "1797 rows, 64 columns of uint8[pyarrow] in a pandas table; torch on cpu" in out
    steps = re.findall(r"^  (\S+ -> \S+): memory shared: (\S+)$", out, re.MULTILINE)
    names = "table -> cupynorm", "cupynorm -> torch", "torch -> batch", "logits -> NumPy"
    assert steps == [(name, "True") for name in names], out
    told = results(out, SCANNED)
    assert min(told["with layer norm"]) > 0.93, out
    assert told["without"][0] > 0.9, out
    assert told["with layer norm"][1] > told["without"][1] + 0.03, out
    assert pd.read_parquet(kept).shape == (1797, 65)
    assert pd.read_parquet(kept)["label"].nunique() == 10


def exact(pixels):
    return oracle.layer_norm(pixels.to_numpy("float64"), (1,), None, None, 1e-5)[0]


def test_the_matrix_is_the_layer_norm_of_the_table(parquet, table):
    pixels, _ = table
    got = parquet.to_torch(pixels, "cpu", normalize=True)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    oracle.assert_close(got.numpy(), exact(pixels), 64)
    same = cn.layer_norm(pixels).to_numpy()  # as the script says of it
    np.testing.assert_array_equal(got.numpy(), same)
    plain = parquet.to_torch(pixels, "cpu", False).numpy()
    np.testing.assert_array_equal(plain, pixels.to_numpy("float64") / 16)


def test_the_matrix_made_on_a_gpu(cupy_lib, parquet, table):
    pixels = table[0].iloc[:40]
    got = cupy_lib.to_numpy(parquet.matrix_of(pixels, "cuda", normalize=True))
    oracle.assert_close(got, exact(pixels), 64)


def test_batches_are_views_that_hold_every_row_once(parquet, table):
    x = parquet.to_torch(table[0], "cpu", normalize=True)
    numbers = torch.arange(len(x))
    options = SimpleNamespace(batch=50)
    seen = []
    for rows, which in parquet.batches(x, numbers, options, torch.Generator().manual_seed(1)):
        assert rows.data_ptr() == x.data_ptr() + int(which[0]) * 64 * 4
        seen += which.tolist()
    assert sorted(seen) == numbers.tolist()
    assert seen != numbers.tolist()


def test_addresses_tell_a_copy(parquet, table, monkeypatch, capsys):
    pixels, labels = table
    options = SimpleNamespace(batch=32, seed=0)
    parquet.print_hand_offs(pixels.iloc[7:], labels, "cpu", options)  # a slice, with an offset
    assert capsys.readouterr().out.count("memory shared: True") == 4
    taken = torch.from_dlpack
    monkeypatch.setattr(torch, "from_dlpack", lambda x: taken(x).clone())
    parquet.print_hand_offs(pixels, labels, "cpu", options)
    assert "cupynorm -> torch: memory shared: False" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_whole_on_a_gpu(parquet, capsys):
    pytest.importorskip("cupy")
    parquet.main(["--device", "cuda", "--epochs", "4"])
    out = capsys.readouterr().out
    assert "torch on cuda" in out
    for step in ("cupynorm -> torch", "torch -> batch", "logits -> CuPy"):
        assert f"{step}: memory shared: True" in out
    assert min(results(out, SCANNED)["with layer norm"]) > 0.93
