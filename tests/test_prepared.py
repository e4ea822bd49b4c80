"""`prepare`: what `layer_norm` gives, bit for bit, for less; and what is refused."""

import numpy as np
import pytest

import cupynorm as cn
from tests.conftest import Backend, np_dtype
from tests.cuda.calls import Spent

BACKENDS = (
    Backend.NUMPY,
    Backend.NUMPY_PLAIN,
    Backend.CUPY_SIMULATED,
    Backend.CUPY,
    Backend.TORCH,
    Backend.TORCH_CUDA,
)
RNG = np.random.default_rng(20261125)


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 3).astype(np_dtype(dtype))


def bits(lib, y):
    host = np.asarray(lib.to_numpy(y))
    return host.view(f"u{host.dtype.itemsize}").tolist()


def empty_like(lib, x):
    return lib.from_numpy(np.zeros_like(lib.to_numpy(x)))


# --- the same bits ------------------------------------------------------------------------------

CALLS = {
    "rows": ((5, 77), {}),
    "one row": ((77,), {}),
    "two axes": ((2, 5, 7), {"normalized_shape": (5, 7)}),
    "axis turned": ((2, 5, 7), {"axis": (2, 1)}),
    "strided axis": ((6, 5), {"axis": 0}),
    "order F": ((6, 77), {"order": "F"}),
    "no eps": ((5, 77), {"eps": 0.0}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_same_bits(lib, name, affine):
    shape, arguments = CALLS[name]
    x = lib.from_numpy(numbers(*shape))
    axes = arguments.get("axis", -1)
    if "normalized_shape" in arguments:
        inner = arguments["normalized_shape"]
    else:
        inner = tuple(shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)))
    if affine:
        arguments = arguments | {k: lib.from_numpy(numbers(*inner)) for k in ("weight", "bias")}
    f = cn.prepare(x, **arguments)
    for _ in range(2):
        x = lib.from_numpy(numbers(*shape))
        want = cn.layer_norm(x, **arguments)
        got = f(x)
        assert type(got) is type(want)
        assert bits(lib, got) == bits(lib, want)
        assert lib.strides(got) == lib.strides(want)
        if "order" not in arguments:
            out = empty_like(lib, x)
            assert f(x, out=out) is out
            assert bits(lib, out) == bits(lib, want)


def test_same_bits_in_every_dtype(lib, dtype):
    x, weight = (lib.from_numpy(numbers(*shape, dtype=dtype)) for shape in ((6, 77), (77,)))
    f = cn.prepare(x, 77, weight, weight)
    out = empty_like(lib, x)
    assert (
        bits(lib, f(x))
        == bits(lib, f(x, out=out))
        == bits(lib, cn.layer_norm(x, 77, weight, weight))
    )


@pytest.mark.parametrize("cut", [np.s_[::2], np.s_[:, 3:80], np.s_[::-1], "transposed"], ids=str)
def test_views(lib, cut):
    if lib.name.startswith("torch") and cut == np.s_[::-1]:
        pytest.skip("torch has no negative strides")
    whole = lib.from_numpy(numbers(6, 90))
    x = whole.T if cut == "transposed" else whole[cut]
    f = cn.prepare(x)
    want = bits(lib, cn.layer_norm(x))
    assert bits(lib, f(x)) == want
    out = empty_like(lib, x)
    assert bits(lib, f(x, out=out)) == want


def test_statistics(lib):
    x = lib.from_numpy(numbers(5, 77))
    f = cn.prepare(x, return_stats=True)
    got, want = f(x), cn.layer_norm(x, return_stats=True)
    assert type(got) is cn.LayerNormResult
    assert [bits(lib, a) for a in got] == [bits(lib, a) for a in want]
    out = empty_like(lib, x)
    assert f(x, out=out).y is out


@pytest.mark.parametrize("rows", [700, 3])
def test_large_and_long(lib, rows):
    """Beyond what the small way takes: threads on a CPU, two launches on a GPU."""
    if lib.backend.compiles and rows == 700:
        rows = 2
    x = lib.from_numpy(numbers(rows, 768 if rows == 700 else 36_001))
    f = cn.prepare(x)
    assert bits(lib, f(x)) == bits(lib, cn.layer_norm(x))


@pytest.mark.parametrize("shape", [(0, 77), (5, 0)])
def test_empty(lib, shape):
    x = lib.from_numpy(numbers(*shape))
    y, mean, _ = cn.prepare(x, return_stats=True)(x)
    assert y.shape == shape
    assert np.isnan(lib.to_numpy(mean)).all()
    assert cn.prepare(x)(x).shape == shape


# --- what is held -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "strided", "other dtype"])
def test_weight_is_held_by_reference(lib, kind):
    x = lib.from_numpy(numbers(4, 12))
    dtype = "float64" if kind == "other dtype" else "float32"
    memory = lib.from_numpy(numbers(24, dtype=dtype))
    weight = memory[::2] if kind == "strided" else memory[:12]
    f = cn.prepare(x, 12, weight)
    before = bits(lib, f(x))
    memory[...] = (
        memory * 2 if lib.name != "cupy-simulated" else lib.from_numpy(lib.to_numpy(memory) * 2)
    )
    assert bits(lib, f(x)) == bits(lib, cn.layer_norm(x, 12, weight)) != before


def test_repr(lib):
    x = lib.from_numpy(numbers(4, 12))
    text = repr(cn.prepare(x, 12, lib.from_numpy(numbers(12)), eps=1e-3))
    for part in ("PreparedLayerNorm", "float32 (4, 12)", "axes (1,)", "weight,", "eps 0.001"):
        assert part in text, text
    assert isinstance(cn.prepare(x), cn.PreparedLayerNorm)


# --- what is refused ----------------------------------------------------------------------------


def refused(f, *words, **arguments):
    with pytest.raises(ValueError) as caught:
        f(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_another_x_is_refused_with_both_values(lib):
    x = lib.from_numpy(numbers(4, 12))
    f = cn.prepare(x)
    way_out = ("prepare again", "cupynorm.layer_norm(x, ...)")
    refused(f, "shape (5, 12)", "shape (4, 12)", *way_out, x=lib.from_numpy(numbers(5, 12)))
    refused(f, "float64", "float32", *way_out, x=lib.from_numpy(numbers(4, 12, dtype="float64")))
    turned = lib.from_numpy(numbers(12, 4)).T
    refused(f, "strides", *way_out, x=turned)
    refused(f, "type builtins.list", *way_out, x=[1.0])


def test_out_that_does_not_fit(lib):
    x = lib.from_numpy(numbers(4, 12))
    f = cn.prepare(x)
    refused(f, "out has shape (4, 13)", x=x, out=lib.from_numpy(numbers(4, 13)))
    refused(f, "out has dtype", x=x, out=lib.from_numpy(numbers(4, 12, dtype="float64")))


def test_overlap(lib):
    memory = lib.from_numpy(numbers(9, 12))
    x, weight = memory[:4], memory[5]
    f = cn.prepare(x, 12, weight)
    want = bits(lib, f(x))
    refused(f, "out shares memory with x in part", x=x, out=memory[1:5])
    refused(f, "out shares memory with weight", x=x, out=memory[4:8])
    assert bits(lib, f(x)) == want  # nothing was written
    assert f(x, out=x) is x
    assert bits(lib, x) == want


def test_out_of_another_layout(lib):
    x = lib.from_numpy(numbers(4, 12))
    f = cn.prepare(x)
    padded = lib.from_numpy(numbers(4, 20))
    before = lib.to_numpy(padded).copy()
    out = padded[:, 3:15]
    assert f(x, out=out) is out
    assert bits(lib, out) == bits(lib, f(x))
    after = lib.to_numpy(padded)
    np.testing.assert_array_equal(
        np.delete(after, np.s_[3:15], 1), np.delete(before, np.s_[3:15], 1)
    )


def test_libraries_without_prepared_calls():
    import pandas as pd

    jax = pytest.importorskip("jax")
    dask = pytest.importorskip("dask.array")
    given = jax.numpy.ones((2, 3)), dask.ones((2, 3)), pd.DataFrame({"a": [1.0]})
    for x in given:
        with pytest.raises(TypeError, match=r"nothing can be prepared.*cupynorm\.layer_norm"):
            cn.prepare(x)
    with pytest.raises(TypeError, match="no array"):
        cn.prepare([1.0])


# --- torch --------------------------------------------------------------------------------------


def test_gradients_are_refused_and_no_grad_is_not():
    torch = pytest.importorskip("torch")
    x, norm = torch.randn(4, 12), torch.nn.LayerNorm(12)
    f = cn.prepare(x, 12, norm.weight, norm.bias)
    refused(f, "requires grad", "torch.no_grad()", "cupynorm.torch.layer_norm", x=x)
    with torch.no_grad():
        got = f(x)
        assert not got.requires_grad
        torch.testing.assert_close(got, norm(x))
        norm.weight.data = torch.zeros(12)  # the memory that was prepared stays
        torch.testing.assert_close(f(x), got)


def test_transforms_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.randn(4, 12)
    f = cn.prepare(x)
    with pytest.raises(ValueError, match=r"torch\.func.*cupynorm\.torch\.layer_norm"):
        torch.func.vmap(f)(x[None])

    class Other(torch.Tensor):
        pass

    Other.__module__ = "torch.other"  # as DTensor's: a tensor of torch's own that is not plain
    with pytest.raises(TypeError, match="plain tensors alone"):
        cn.prepare(x.as_subclass(Other))


def test_into_a_tensor_without_another_one():
    """`layer_norm(out=)` of tensors writes there at once, and so refuses what it would spoil."""
    torch = pytest.importorskip("torch")
    memory = torch.randn(8, 12)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        cn.layer_norm(memory[:4], 12, memory[5], out=memory[4:])
    with pytest.raises(ValueError, match="two elements at one address"):
        cn.layer_norm(memory, out=torch.zeros(1, 12).expand(8, 12))
    out = torch.empty(12, 8).T
    assert cn.layer_norm(memory, out=out) is out
    torch.testing.assert_close(out, cn.layer_norm(memory))


# --- what a call costs --------------------------------------------------------------------------


@pytest.fixture
def sim():
    from tests.simt.cupy_stand_in import simulated_cupy

    with simulated_cupy(devices=2, reload=("cupynorm._cuda.arrays",)) as module:
        yield module


@pytest.mark.parametrize(
    ("M", "N", "launches"),
    [(3, 77, 1), (3, 9_001, 1), (1, 270_001, 2)],
    ids=["warp", "cluster", "split"],
)
def test_a_prepared_call_launches_and_does_nothing_else(sim, M, N, launches):
    x, weight = sim.asarray(numbers(M, N)), sim.asarray(numbers(N))
    y = sim.empty_like(x)
    with Spent(sim) as first:
        f = cn.prepare(x, N, weight)
    assert first.compilations == launches and not first.launches
    for call, allocations in ((lambda: f(x, out=y), launches - 1), (lambda: f(x), launches)):
        with Spent(sim) as spent:
            call()
        assert len(spent.launches) == launches
        assert (spent.compilations, spent.synchronizations) == (0, 0)
        assert spent.allocations == allocations  # the split kernel's workspace, and y
    for label in spent.names:
        assert label in repr(f)


def test_a_warm_call_with_out_allocates_nothing(sim):
    x = sim.asarray(numbers(3, 77))
    y = sim.empty_like(x)
    cn.layer_norm(x, out=y)
    for _ in range(2):
        with Spent(sim) as spent:
            cn.layer_norm(x, out=y)
        assert len(spent.launches) == 1
        assert (spent.compilations, spent.allocations, spent.synchronizations) == (0, 0, 0)


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
