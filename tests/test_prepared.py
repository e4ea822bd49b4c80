"""`prepare`: what a prepared call holds, refuses and costs; its bits are held in test_calls."""

import copy
import pickle

import numpy as np
import pytest

import cupynorm as cn
from tests.cuda.calls import Spent
from tests.directions import check
from tests.test_calls import BACKENDS, numbers  # noqa: F401


def bits(lib, y):
    host = np.asarray(lib.to_numpy(y))
    return host.view(f"u{host.dtype.itemsize}").tolist()


def refused(f, *words, **arguments):
    with pytest.raises(ValueError) as caught:
        f(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "strided", "other dtype"])
def test_weight_is_held_by_reference(lib, kind):
    x = lib.from_numpy(numbers(4, 12))
    memory = lib.from_numpy(numbers(24, dtype="float64" if kind == "other dtype" else "float32"))
    weight = memory[::2] if kind == "strided" else memory[:12]
    f = cn.prepare(x, 12, weight)
    before = f(x)
    check(lib, before, None, x, weight)
    memory[...] = lib.from_numpy(lib.to_numpy(memory) * 2)
    check(lib, f(x), None, x, weight)
    assert bits(lib, f(x)) == bits(lib, cn.layer_norm(x, 12, weight)) != bits(lib, before)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    "cloudpickle": lambda f: pickle.loads(pytest.importorskip("cloudpickle").dumps(f)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_does_the_same_with_a_weight_of_its_own(lib, way):
    """But for `copy.copy`, which shares it."""
    if lib.backend.compiles and way != "copy":
        pytest.skip("arrays of CuPy's stand-in have no copies of their own")
    x, weight, bias = (lib.from_numpy(numbers(*shape)) for shape in ((4, 12), (12,), (12,)))
    f = cn.prepare(x, 12, weight, bias, return_stats=True)
    g, want = WAYS[way](f), f(x)
    got = g(x)
    assert type(got) is cn.LayerNormResult
    assert [bits(lib, a) for a in got] == [bits(lib, a) for a in want]
    old = lib.from_numpy(lib.to_numpy(weight).copy())
    weight[...] = lib.from_numpy(numbers(12))
    check(lib, f(x).y, None, x, weight, bias)
    out = lib.from_numpy(np.empty((4, 12), np.float32))
    assert g(x, out=out).y is out
    check(lib, out, None, x, weight if way == "copy" else old, bias)
    refused(g, "shape (5, 12)", "shape (4, 12)", x=lib.from_numpy(numbers(5, 12)))
    assert isinstance(g, cn.PreparedLayerNorm) and repr(g) == repr(f)
    words = "PreparedLayerNorm of", "float32 (4, 12)", "axes (1,)", "weight and bias", "eps 1e-05"
    assert not [word for word in words if word not in repr(f)], repr(f)


def test_what_does_not_fit_is_refused(lib):
    """With both values and the way out; nothing is written."""
    memory = lib.from_numpy(numbers(9, 12))
    x, weight = memory[:4], memory[5]
    f = cn.prepare(x, 12, weight)
    want, way_out = bits(lib, f(x)), ("prepare again", "cupynorm.layer_norm(x, ...)")
    refused(f, "shape (5, 12)", "shape (4, 12)", *way_out, x=lib.from_numpy(numbers(5, 12)))
    refused(f, "float64", "float32", *way_out, x=lib.from_numpy(numbers(4, 12, dtype="float64")))
    refused(f, "strides", *way_out, x=lib.from_numpy(numbers(12, 4)).T)
    refused(f, "type builtins.list", *way_out, x=[1.0])
    refused(f, "out has shape (4, 13)", x=x, out=lib.from_numpy(numbers(4, 13)))
    refused(f, "out has dtype", x=x, out=lib.from_numpy(numbers(4, 12, dtype="float64")))
    refused(f, "out shares memory with x in part", x=x, out=memory[1:5])
    refused(f, "out shares memory with weight", x=x, out=memory[4:8])
    assert bits(lib, f(x)) == want
    assert f(x, out=x) is x
    assert bits(lib, x) == want


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_gradients_are_refused_and_no_grad_is_not(torch):
    """The memory that a parameter has been given since is what counts."""
    x, norm = torch.randn(4, 12), torch.nn.LayerNorm(12)
    f = cn.prepare(x, 12, norm.weight, norm.bias)
    refused(f, "requires grad", "torch.no_grad()", "cupynorm.torch.layer_norm", x=x)
    with torch.no_grad():
        assert not f(x).requires_grad
        torch.testing.assert_close(f(x), norm(x))
        norm.weight.data = torch.randn(12)
        torch.testing.assert_close(f(x), norm(x))
        out = torch.empty_like(x)
        torch.testing.assert_close(f(x, out=out), norm(x))
        norm.share_memory()  # which moves it to other memory
        norm.bias.fill_(0.5)
        torch.testing.assert_close(f(x), norm(x))


def test_a_weight_of_another_size_is_never_read(torch):
    x, weight = torch.randn(4, 12), torch.ones(12)
    f = cn.prepare(x, 12, weight)
    for size in (13, 3, 0):
        weight.resize_(size)
        for out in (None, torch.empty_like(x)):
            refused(f, f"weight has shape ({size},)", "(12,)", x=x, out=out)
    weight.resize_(12).fill_(2.0)
    torch.testing.assert_close(f(x), 2 * torch.nn.functional.layer_norm(x, (12,)))


def test_transforms_are_refused(torch):
    x = torch.randn(4, 12)
    with pytest.raises(ValueError, match=r"torch\.func.*cupynorm\.torch\.layer_norm"):
        torch.func.vmap(cn.prepare(x))(x[None])

    class Other(torch.Tensor):
        pass

    Other.__module__ = "torch.other"  # as DTensor's: a tensor of torch's own that is not plain
    with pytest.raises(TypeError, match="plain tensors alone"):
        cn.prepare(x.as_subclass(Other))


@pytest.mark.parametrize(
    ("M", "N", "launches"),
    [(3, 77, 1), (3, 9_001, 1), (1, 270_001, 3)],
    ids=["warp", "cluster", "split"],
)
def test_a_prepared_call_launches_and_does_nothing_else(sim, M, N, launches):
    x, weight = sim.asarray(numbers(M, N)), sim.asarray(numbers(N))
    y = sim.empty_like(x)
    with Spent(sim) as first:
        f = cn.prepare(x, N, weight)
    assert first.compilations == launches and not first.launches
    workspace = launches > 1
    for call, allocations in ((lambda: f(x, out=y), workspace), (lambda: f(x), 1 + workspace)):
        with Spent(sim) as spent:
            call()
        assert len(spent.launches) == launches
        assert (spent.compilations, spent.synchronizations) == (0, 0)
        assert spent.allocations == allocations  # the split kernel's workspace, and y
    for label in spent.names:
        assert label in repr(f)


def test_streams_and_devices(sim):
    host = numbers(3, 77)
    with sim.cuda.Device(1):
        x = sim.asarray(host)
    f = cn.prepare(x)  # compiles on x's device
    with Spent(sim) as spent:
        assert f(x).device.id == 1  # whatever device is current
        with sim.cuda.Device(1), sim.cuda.Stream(non_blocking=True) as stream:
            f(x)
    assert [launch.device for launch in spent.launches] == [1, 1]
    assert spent.launches[1].stream == stream.ptr
    assert spent.compilations == 0
    refused(f, "device <CUDA Device 0>", "device <CUDA Device 1>", x=sim.asarray(host))
