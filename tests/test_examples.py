"""The examples run, learn, and say what they did."""

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
from tests.conftest import Backend

ROOT = Path(cn.__file__).resolve().parents[1]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BACKENDS = (Backend.CUPY_SIMULATED, Backend.CUPY)
RESULT = re.compile(
    r"^(with|without) layer norm: train loss (\S+) -> (\S+), test accuracy (\S+)$", re.MULTILINE
)

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    """The script train_digits.py as a module."""
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLES / "train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(text):
    """First loss, last loss and accuracy, with and without the norm."""
    return {m[1]: tuple(float(m[i]) for i in (2, 3, 4)) for m in RESULT.finditer(text)}


def test_the_digits_are_learned(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "norm.npz"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # a bare checkout as well
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_digits.py",
         "--device", "cpu", "--epochs", "8", "--save", path],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    told = results(done.stdout)
    assert set(told) == {"with", "without"}, done.stdout
    for first, last, right in told.values():
        assert 2.0 < first < 4.0  # knows nothing: log(10) or worse
        assert last < 0.15
        assert right > 0.94
    assert told["with"][1] < told["without"][1]
    difference = re.search(r"largest difference (\S+), memory shared: True", done.stdout)
    assert difference, done.stdout
    assert float(difference[1]) < 1e-5
    norm = cn.LayerNorm(128)
    norm.load(path)
    assert np.ptp(norm.weight) > 0.05  # it has learned too
    assert np.ptp(norm.bias) > 0.05


def test_a_seed_fixes_the_result(digits, capsys):
    told = []
    for seed in ("1", "1", "2"):
        digits.main(["--device", "cpu", "--epochs", "1", "--seed", seed])
        told.append(results(capsys.readouterr().out))
    assert told[0] == told[1] != told[2]


def test_it_does_without_tqdm_and_torch(digits, capsys, monkeypatch):
    for name in ("tqdm.auto", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    digits.main(["--device", "cpu", "--epochs", "2"])
    out = capsys.readouterr().out
    assert "with layer norm: epoch 1 of 2" in out
    assert "torch is not installed" in out
    assert len(results(out)) == 2


def test_tqdm_draws_a_bar_where_it_is(digits, monkeypatch):
    drawn = []

    def trange(n, *, desc, **_):
        drawn.append(desc)
        return range(n)

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(trange=trange))
    assert list(digits.progress("some name", 3)) == [0, 1, 2]
    assert drawn == ["some name"]


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


class NormOnGpu:
    """A norm on the GPU between dense layers on the host: the stand-in for CuPy has no products."""

    def __init__(self, lib, size):
        self.lib, self.norm = lib, cn.LayerNorm(size, device="cuda")
        self.host = {name: lib.to_numpy(a) for name, a in self.norm.state_dict().items()}

    def __call__(self, h, keep):
        self.norm.load_state_dict(self.host)
        return self.lib.to_numpy(self.norm(self.lib.from_numpy(h), keep=keep))

    def zero_grad(self):
        self.norm.zero_grad()

    def backward(self, dy):
        return self.lib.to_numpy(self.norm.backward(self.lib.from_numpy(dy)))

    @property
    def grad(self):
        return {name: self.lib.to_numpy(g) for name, g in self.norm.grad.items()}

    def state_dict(self, prefix):
        return {prefix + name: array for name, array in self.host.items()}


def test_steps_with_the_norm_on_a_gpu(cupy_lib, digits):
    options = digits.read_options(["--batch", "16"])
    (x, labels), _ = digits.digits(np, 0)
    trained = []
    for norm in (cn.LayerNorm(digits.HIDDEN), NormOnGpu(cupy_lib, digits.HIDDEN)):
        network = digits.Network(np, 0, norm)
        velocity = {name: np.zeros_like(a) for name, a in network.parameters().items()}
        before, _ = digits.measure(network, (x[:32], labels[:32]))
        for rows in (slice(0, 16), slice(16, 32)):
            digits.step(network, velocity, x[rows], labels[rows], options)
        after, _ = digits.measure(network, (x[:32], labels[:32]))
        assert after < before
        trained.append(network.parameters())
    for name, array in trained[0].items():
        np.testing.assert_allclose(trained[1][name], array, rtol=1e-4, atol=1e-6)


def test_the_digits_are_learned_on_a_gpu(cupy_lib, digits, capsys):
    if not cupy_lib.backend.on_gpu or digits.pick_device() != "cuda":
        pytest.skip("needs a GPU and CuPy with cuBLAS")
    digits.main(["--device", "cuda", "--epochs", "8"])
    for first, last, right in results(capsys.readouterr().out).values():
        assert last < 0.15 < first
        assert right > 0.94
