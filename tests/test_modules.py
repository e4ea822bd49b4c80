"""`cn.LayerNorm` and `cn.RMSNorm`: against torch's and the oracle, memory, state, files."""

import copy
import inspect
import os
import pickle
import stat
import subprocess
import sys
import time
import tracemalloc
import weakref
import zipfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
import cupynorm.torch
from cupynorm import modules
from tests import oracle
from tests.conftest import ALL_DTYPES, Backend, np_dtype
from tests.directions import run

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

BACKENDS = (Backend.NUMPY, Backend.NUMPY_PLAIN, Backend.CUPY_SIMULATED, Backend.CUPY)
RNG = np.random.default_rng(20261122)
ENDINGS = (".safetensors", ".npz")
VARIANTS = {
    "affine": {},
    "no-bias": {"bias": False},
    "plain": {"elementwise_affine": False},
    "eps": {"eps": 0.5},
}
KINDS = {"LayerNorm": VARIANTS, "RMSNorm": {k: v for k, v in VARIANTS.items() if k != "no-bias"}}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_variant = pytest.mark.parametrize(
    ("kind", "variant"), [(kind, name) for kind, variants in KINDS.items() for name in variants]
)


def values(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 0.5).astype(np_dtype(dtype))


def as_bits(a):
    """The bytes of a NumPy array or a torch tensor."""
    if not isinstance(a, np.ndarray):
        a = a.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(a).tobytes()


def random_layer(dtype="float32", shape=5, **variant):
    layer = cn.LayerNorm(shape, dtype=dtype, **variant)
    for array in layer.state_dict().values():
        array[...] = values(*array.shape, dtype=dtype)
    return layer


# --- as torch's ---------------------------------------------------------------------------------


@each_kind
def test_name_and_signature_are_torchs(kind):
    assert modules.__all__ == [*KINDS]
    assert getattr(cn, kind) is getattr(modules, kind)
    ours = inspect.signature(getattr(cn, kind)).parameters
    theirs = inspect.signature(getattr(torch.nn, kind)).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


SHAPES = [64, (3, 4), [3, 4], (7,), torch.Size([2, 5]), np.int64(6), 0]
MORE = [{"eps": 1}, {"eps": 1e-12}, {"dtype": torch.bfloat16}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", [*VARIANTS.values(), *MORE], ids=str)
@each_kind
def test_attributes_state_and_repr_are_torchs(kind, shape, variant):
    """Of ours, and of those that are torch's modules too."""
    if kind == "RMSNorm" and "bias" in variant:
        return
    theirs = getattr(torch.nn, kind)(shape, **variant)
    layers = [getattr(library, kind)(shape, **variant) for library in (cn, cupynorm.torch)]
    for ours in layers:
        assert repr(ours).replace("np.int64(6)", "6") == repr(theirs).replace("np.int64(6)", "6")
        for name in ("normalized_shape", "eps", "elementwise_affine"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            a = ours.state_dict()[name]
            assert (a.shape, as_bits(a)) == (tensor.shape, as_bits(tensor))
            assert str(a.dtype).removeprefix("torch.") == str(tensor.dtype).removeprefix("torch.")
    assert isinstance(layers[1], type(theirs)) and vars(layers[1]).keys() == vars(theirs).keys()
    nowhere = getattr(cupynorm.torch, kind)(shape, device="meta", **variant)
    assert {p.device.type for p in nowhere.parameters()} <= {"meta"}


def test_a_subclass_keeps_its_class_and_its_forward():
    class Norm(cn.LayerNorm):
        def forward(self, x, *, keep=True):
            return 2 * super().forward(x, keep=keep)

    class Theirs(torch.nn.LayerNorm):
        pass

    assert repr(Norm(3)) == "Norm((3,), eps=1e-05, elementwise_affine=True, bias=True)"
    x = values(2, 5)
    np.testing.assert_array_equal(Norm(5)(x), 2 * cn.LayerNorm(5)(x))
    assert type(Norm.from_torch(Theirs(3))) is Norm


@each_variant
def test_a_layer_has_the_bits_of_the_functions(lib, kind, variant):
    """Whose values of every dtype are drawn in test_any_call."""
    if lib.backend.compiles and variant not in ("affine", "no-bias"):
        return
    device = "cuda" if lib.name.startswith("cupy") else "cpu"
    layer = getattr(cn, kind)((4, 6), device=device, **VARIANTS[variant])
    for array in layer.state_dict().values():
        array[...] = lib.array(RNG.standard_normal((4, 6)))
    x, dy = (lib.from_numpy(values(3, 5, 4, 6)) for _ in range(2))
    way, affine = "rms " * (kind == "RMSNorm"), (layer.weight, getattr(layer, "bias", None))
    how = {"eps": 2.0**-23 if layer.eps is None else layer.eps, "normalized_shape": (4, 6)}
    found = layer(x), layer.backward(dy), *layer.grad.values()
    y = run(f"{way}forward", None, x, *affine, **how)[0]
    gradients = run(f"{way}backward", dy, x, affine[0], **how)
    assert set(layer.grad) == set(layer.state_dict())
    for a, want in zip(found, (y, *gradients), strict=False):
        assert as_bits(lib.to_numpy(a)) == as_bits(lib.to_numpy(want))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_dtype_by_any_name(dtype):
    names = [dtype, np_dtype(dtype), np_dtype(dtype).type, getattr(torch, dtype)]
    for name in names:
        layer = cn.LayerNorm(3, dtype=name)
        assert layer.weight.dtype == layer.bias.dtype == np_dtype(dtype)
    assert cn.LayerNorm(3, dtype=float).weight.dtype == np.float64


REFUSED = {
    "dtype": ["int32", np.int64, bool, "complex64", torch.int8, "longdouble", "f3"],
    "normalized_shape": [(), -1, (3, -4), 2.5, "3", True, None, (3, 4.0)],
    "eps": [float("nan"), float("inf"), "1", None, True],
    "device": ["tpu", "cuda:", "cuda:x", "gpu", 0, SimpleNamespace(id=0)],
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("affine", [True, False])
def test_arguments_that_are_refused(name, affine):
    """Whose sentences are held by test_advice and frozen.json."""
    for wrong in REFUSED[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            cn.LayerNorm(**{"normalized_shape": 3, "elementwise_affine": affine, name: wrong})


# --- devices ------------------------------------------------------------------------------------


def test_parameters_are_in_the_library_of_the_device(cupy_lib):
    import cupy

    for device in ("cuda", "cuda:0", torch.device("cuda"), cupy.cuda.Device(0)):
        layer = cn.LayerNorm(5, device=device, dtype="float16")
        for array, value in ((layer.weight, 1), (layer.bias, 0)):
            assert isinstance(array, cupy.ndarray)
            assert array.device.id == 0
            np.testing.assert_array_equal(cupy.asnumpy(array), np.full(5, value, np.float16))


def test_parameters_are_on_the_gpu_that_was_named(sim):
    layer = cn.LayerNorm(5, device="cuda:1")
    assert layer.weight.device.id == layer.bias.device.id == 1
    assert sim.cuda.runtime.getDevice() == 0
    with sim.cuda.Device(1):
        assert cn.LayerNorm(5, device="cuda").weight.device.id == 1
    with pytest.raises(RuntimeError, match=r"'cuda:2' cannot be used .*invalid device"):
        cn.LayerNorm(5, device="cuda:2")


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), np.ones(1).device])
def test_parameters_on_the_host(device):
    assert type(cn.LayerNorm(5, device=device).weight) is np.ndarray


def test_without_parameters_x_may_be_of_any_library():
    layer, x = cn.LayerNorm(5, elementwise_affine=False), torch.from_numpy(values(2, 5))
    y, dx = layer(x), layer.backward(x)
    assert isinstance(y, torch.Tensor) and isinstance(dx, torch.Tensor)
    slope = oracle.layer_norm_backward(x.numpy(), x.numpy(), (1,), None, 1e-5)[0]
    np.testing.assert_allclose(dx.numpy(), slope, atol=1e-6)
    assert layer.grad == {}


# --- what forward keeps -------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["backward", "forward", "keep=False", "failing forward"])
def test_x_is_kept_once_and_released(way):
    layer, x = cn.LayerNorm(5), values(3, 5)
    layer(x)
    held, dy = weakref.ref(x), np.ones_like(x)
    del x
    assert held() is not None
    if way == "failing forward":
        with pytest.raises(ValueError, match="normalized_shape"):
            layer(dy.T)
    else:
        call = {"backward": layer.backward, "forward": layer}
        call.get(way, lambda x: layer(x, keep=False))(dy)
    assert held() is None


def test_the_last_forward_is_what_backward_goes_through():
    layer, last, dy = random_layer(), values(4, 5), values(4, 5)
    without = layer.forward(last, keep=False)
    layer(values(3, 5))
    np.testing.assert_array_equal(layer(last), without, strict=True)
    slope = oracle.layer_norm_backward(dy, last, (1,), layer.weight, 1e-5)[0]
    np.testing.assert_allclose(layer.backward(dy), slope, atol=1e-5)


def test_backward_with_nothing_kept_says_so_and_a_wrong_dy_can_be_mended():
    layer, x = cn.LayerNorm(5), values(3, 5)
    with pytest.raises(RuntimeError, match=r"Call forward\(x\) first"):
        layer.backward(x)
    layer(x)
    for wrong in (x[:2], torch.from_numpy(x)):
        with pytest.raises(ValueError, match="dy"):
            layer.backward(wrong)
    assert layer.grad == {"weight": None, "bias": None}
    assert layer.backward(x).shape == x.shape
    before = layer.grad["weight"].copy()
    with pytest.raises(RuntimeError, match="serves one backward"):
        layer.backward(x)
    layer.forward(x, keep=False)
    with pytest.raises(RuntimeError, match="without keep=False"):
        layer.backward(x)
    np.testing.assert_array_equal(layer.grad["weight"], before)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_gradients_add_up_until_zero_grad(dtype):
    layer, parts = random_layer(dtype), []
    for _ in range(2):
        x, alone = values(3, 5, dtype=dtype), copy.deepcopy(layer)
        alone.zero_grad()
        kept = layer.grad["weight"]
        for each in (layer, alone):
            each.backward(each(x))
        parts.append(alone.grad)
    for name in ("weight", "bias"):
        want = parts[0][name] + parts[1][name]
        np.testing.assert_array_equal(layer.grad[name], want, strict=True)
    assert layer.grad["weight"] is kept  # in place, as torch
    copied = kept.copy()
    layer.zero_grad()
    assert layer.grad == {"weight": None, "bias": None}
    layer.backward(layer(x))
    np.testing.assert_array_equal(kept, copied)  # an array that was taken stays as it was
    np.testing.assert_array_equal(layer.grad["weight"], parts[1]["weight"])


def test_assigned_parameters_are_used():
    layer, x = cn.LayerNorm(5), values(3, 5)
    layer.weight, layer.bias = layer.weight * 2, None
    np.testing.assert_array_equal(layer(x), cn.layer_norm(x, 5, np.full(5, 2, np.float32)))
    layer.backward(x)
    assert layer.grad["bias"] is None
    assert list(layer.state_dict()) == ["weight"]
    layer.weight = np.ones(6, np.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        layer(x)


# --- the object ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_parameters_of_their_own_and_no_batch(way, dtype):
    layer, x = random_layer(dtype, eps=0.25), values(1000, 5, dtype=dtype)
    layer(x)
    layer.backward(x)
    layer(x)
    data = pickle.dumps(layer)
    assert len(data) < x.nbytes / 2
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(data)
    assert repr(twin) == repr(layer)
    assert {layer: 1}[layer] and layer != twin  # equals itself only
    for ours, theirs in ((layer.state_dict(), twin.state_dict()), (layer.grad, twin.grad)):
        for name, array in ours.items():
            np.testing.assert_array_equal(theirs[name], array, strict=True)
            assert not np.shares_memory(theirs[name], array)
    np.testing.assert_array_equal(twin(x), layer(x))
    fresh = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="nothing to go back through"):
        fresh.backward(x)
    layer.backward(x)  # the original still has its batch


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ALL_DTYPES)
@pytest.mark.parametrize("target", ALL_DTYPES)
def test_loading_copies_into_the_arrays(source, target):
    layer, other = cn.LayerNorm(5, dtype=target), random_layer(source)
    before = layer.state_dict()
    assert before["weight"] is layer.weight
    assert layer.load_state_dict(other.state_dict()) == ([], [])
    for name, array in layer.state_dict().items():
        assert array is before[name]
        assert not np.shares_memory(array, getattr(other, name))
        wanted = getattr(other, name).astype(np_dtype(target))
        np.testing.assert_array_equal(array, wanted, strict=True)


@pytest.mark.parametrize("library", ["jax.numpy", "array_api_strict", "torch"])
def test_state_may_be_of_any_library(library):
    xp = pytest.importorskip(library)
    layer, wanted = cn.LayerNorm(5), values(5)
    given = xp.asarray(wanted, copy=True)
    layer.load_state_dict({"weight": given, "bias": xp.zeros(5, dtype=xp.float32)})
    np.testing.assert_array_equal(layer.weight, wanted)
    layer.weight[:] = 0
    np.testing.assert_array_equal(np.asarray(given), wanted)
    module = torch.nn.LayerNorm(5, dtype=torch.bfloat16)
    layer.load_state_dict(dict(module.named_parameters()))  # which require grad
    assert (layer.weight == 1).all()


def test_state_and_files_go_between_the_host_and_a_gpu(cupy_lib, tmp_path):
    host = random_layer("float16")
    there, twin = cn.LayerNorm(5, device="cuda"), cn.LayerNorm(5, device="cuda")
    there.load_state_dict(host.state_dict())
    back = cn.LayerNorm(5, dtype="float16")
    back.load_state_dict(there.state_dict())
    assert type(back.weight) is np.ndarray
    np.testing.assert_array_equal(back.weight, host.weight)
    np.testing.assert_array_equal(cupy_lib.to_numpy(there.bias), host.bias.astype(np.float32))
    for ending in ENDINGS:
        there.save(tmp_path / f"norm{ending}")
        twin.load(tmp_path / f"norm{ending}")
        np.testing.assert_array_equal(cupy_lib.to_numpy(twin.weight), host.weight)


def test_every_fault_of_a_state_is_told_and_nothing_is_changed():
    layer = cn.LayerNorm((2, 3))
    before = copy.deepcopy(layer.state_dict())
    faulty = {"weight": np.zeros(6, np.float32), "gamma": 1, "running_mean": 2}
    told = r"weight has shape \(6,\), .*\(2, 3\).*lacks 'bias'.*no 'gamma', 'running_mean'.*strict="
    with pytest.raises(ValueError, match=told):
        layer.load_state_dict(faulty)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\)") as alone:
        layer.load_state_dict({"weight": np.zeros((2, 3)), "bias": np.zeros(7)})
    assert "strict" not in str(alone.value)  # it would not help
    layer.bias = before["bias"]
    layer.bias.setflags(write=False)
    with pytest.raises(ValueError, match="bias is read-only"):
        layer.load_state_dict({"weight": np.zeros((2, 3)), "bias": np.ones((2, 3))})
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_not_strict_takes_what_is_common():
    layer = cn.LayerNorm(3)
    keys = layer.load_state_dict({"weight": np.full(3, 5.0), "gamma": None}, strict=False)
    assert keys == (keys.missing_keys, keys.unexpected_keys) == (["bias"], ["gamma"])
    np.testing.assert_array_equal(layer.weight, [5, 5, 5])
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        layer.load_state_dict({"weight": np.ones(4)}, strict=False)


@pytest.mark.parametrize("wrong", [1.0, "1", None, [1.0, 1.0, 1.0], np.ones(3, np.int32),
                                   np.ones(3, bool), np.ones(3, np.complex64), torch.ones(3).int(),
                                   np.array([1, 2, None])])  # fmt: skip
def test_values_that_are_no_floating_array_are_refused(wrong):
    layer = cn.LayerNorm(3)
    with pytest.raises(TypeError, match="bias"):
        layer.load_state_dict({"weight": np.zeros(3), "bias": wrong})
    np.testing.assert_array_equal(layer.weight, [1, 1, 1])


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded(tmp_path, ending, dtype, variant):
    layer = random_layer(dtype, (2, 5), **VARIANTS[variant])
    path = tmp_path / f"norm{ending}"
    layer.save(path)
    for where in (path, str(path)):
        twin = cn.LayerNorm((2, 5), dtype=dtype, **VARIANTS[variant])
        assert twin.load(where) == ([], [])
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(twin.state_dict()[name], array, strict=True)
    assert os.listdir(tmp_path) == [path.name]  # no file beside it stays
    if ending == ".npz" and layer.state_dict():  # numbers that NumPy reads, and that it has written
        kind = np.dtype("f4") if dtype == "bfloat16" else np_dtype(dtype)
        with np.load(path, allow_pickle=False) as stored:
            assert sorted(stored.files) == sorted(layer.state_dict())
            wanted = layer.weight.astype(kind)
            np.testing.assert_array_equal(stored["weight"], wanted, strict=True)
        np.savez(path, **{name: np.full((2, 5), 3.0) for name in layer.state_dict()})
        layer.load(path)
        assert layer.weight.dtype == np_dtype(dtype) and (layer.weight == 3).all()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_one_layer_of_a_models_file(tmp_path, dtype):
    """Its bits go from torch's file into the layer, and from the layer's into the model."""
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dtype=getattr(torch, dtype))
    model = torch.nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    module = model.layers[1].norm2
    torch.nn.init.normal_(module.weight)
    others = {"steps": torch.tensor(3), "small": torch.ones(2).to(torch.float8_e4m3fn)}
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(model.state_dict() | others, path)
    layer = cn.LayerNorm(8, dtype=dtype)
    assert layer.load(path, prefix="layers.1.norm2.") == ([], [])
    assert as_bits(layer.weight) == as_bits(module.weight)
    with pytest.raises(ValueError, match=r"lacks 'weight', 'bias'.*and \d+ more"):
        layer.load(path)
    with pytest.raises(ValueError, match=r"lacks 'layers.1.norm2weight'"):
        layer.load(path, prefix="layers.1.norm2")
    assert layer.load(path, prefix="layers.1.norm9.", strict=False).missing_keys == [
        "layers.1.norm9.weight",
        "layers.1.norm9.bias",
    ]
    layer.weight += 1
    layer.save(path, prefix="layers.1.norm2.")
    model.load_state_dict(safetensors_torch.load_file(path), strict=False)
    assert as_bits(layer.weight) == as_bits(module.weight)


@pytest.mark.parametrize("ending", ENDINGS)
def test_parameters_are_saved_by_value_and_fit_their_shape_alone(tmp_path, ending):
    layer, path = cn.LayerNorm(5), tmp_path / f"norm{ending}"
    layer.weight, layer.bias = values(10)[::2], values(5).astype(">f4")  # strided, and swapped
    layer.save(path)
    twin = cn.LayerNorm(5)
    twin.load(path)
    np.testing.assert_array_equal(twin.weight, layer.weight)
    np.testing.assert_array_equal(twin.bias, layer.bias)
    with pytest.raises(
        ValueError, match=r"weight has shape \(5,\), the layer's has \(4,\)"
    ) as told:
        cn.LayerNorm(4).load(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "norm.npz"
    cn.LayerNorm(5).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        random_layer().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_is_as_open_would_make_it(tmp_path):
    path, link, plain = tmp_path / "norm.npz", tmp_path / "link.npz", tmp_path / "plain"
    plain.touch()
    cn.LayerNorm(5).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o600)
    cn.LayerNorm(5).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # what the old one allowed
    link.symlink_to(path)
    random_layer(shape=6).save(link)
    assert link.is_symlink()
    cn.LayerNorm(6).load(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_file_and_no_such_format(tmp_path, ending):
    layer, path = cn.LayerNorm(5), tmp_path / f"norm{ending}"
    with pytest.raises(FileNotFoundError):
        layer.load(path)
    layer.save(path)
    for wrong in (b"neither of the two", path.read_bytes()[:-20]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"is not a {ending} file that can be read"):
            layer.load(path)


class Trap:
    """Its pickle runs code when it is read."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


def test_a_pickle_is_never_read(tmp_path):
    inside, outside = tmp_path / "inside.npz", tmp_path / "outside.npz"
    np.savez(inside, weight=np.array([Trap()], dtype=object), bias=np.zeros(1))
    outside.write_bytes(pickle.dumps(Trap()))
    for path, told in ((inside, "dtype object"), (outside, "can be read")):
        with pytest.raises((TypeError, ValueError), match=told):
            cn.LayerNorm(1).load(path)
    assert not Trap.sprung


def entry_of(shape="(5,)", kind="<f4", data=bytes(20)):
    """The bytes of a .npy file that claims what it likes."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


HOSTILE = {
    "more than memory holds": (entry_of("(1000000000000000,)"), "has shape \\(1000000000000000,"),
    "a shape that overflows": (entry_of("(4611686018427387904, 4)"), "can be read"),
    "a negative shape": (entry_of("(-5,)"), "can be read"),
    "cut": (entry_of(data=bytes(12)), "expected 20 bytes got 12"),
    "a bomb": (entry_of(data=bytes(50_000_000)), "holds more bytes than those of its shape"),
    "a large one": (entry_of("(12500000,)", data=bytes(50_000_000)), "has shape \\(12500000,"),
    "objects": (entry_of(kind="|O"), "dtype object"),
    "a program": (entry_of("(5,)} or print() or {"), "can be read"),
    "no array": (b"neither", "can be read"),
    "another version": (entry_of().replace(b"\x01\x00", b"\x03\x00", 1), "can be read"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_that_claims_what_it_does_not_hold(tmp_path, kind):
    path, layer = tmp_path / "norm.npz", random_layer(bias=True)
    before = {name: array.copy() for name, array in layer.state_dict().items()}
    entry, told = HOSTILE[kind]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bias.npy", entry_of())
        archive.writestr("weight.npy", entry)
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError), match=told):
            layer.load(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    for name, array in before.items():
        np.testing.assert_array_equal(layer.state_dict()[name], array)


SAVING = """
import itertools, sys
import numpy as np
import cupynorm as cn
layer = cn.LayerNorm(200_000, bias=False)
for i in itertools.count(1):
    layer.weight[:] = i
    layer.save(sys.argv[1])
    print(i, flush=True)
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_killed_while_saving_leaves_one_file_or_the_other(tmp_path, ending):
    path, layer = tmp_path / f"norm{ending}", cn.LayerNorm(200_000, bias=False)
    for k in range(5):
        command = [sys.executable, "-c", SAVING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as saving:
            saving.stdout.readline()
            time.sleep(0.003 * k)
            saving.kill()
        layer.load(path)
        assert layer.weight[0] >= 1
        assert (layer.weight == layer.weight[0]).all()


# --- whatever raises has changed nothing -------------------------------------------------------


def test_parameters_can_be_swapped():
    layer = random_layer(bias=True)
    weight, bias = layer.weight.copy(), layer.bias.copy()
    layer.load_state_dict({"weight": layer.bias, "bias": layer.weight})
    np.testing.assert_array_equal(layer.weight, bias)
    np.testing.assert_array_equal(layer.bias, weight)


LOCKED = np.broadcast_to(np.float32(1), 5)


@pytest.mark.parametrize("wrong", [LOCKED, np.ones(6, np.float32), np.ones(5, int)])
def test_a_gradient_that_cannot_be_added_to(wrong):
    layer = cn.LayerNorm(5)
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    y, before = layer(x), np.zeros(5, np.float32)
    layer.grad = {"weight": before.copy(), "bias": wrong}
    with pytest.raises(ValueError, match=r"grad\['bias'\] .* zero_grad\(\)"):
        layer.backward(y)
    np.testing.assert_array_equal(layer.grad["weight"], before)
    layer.zero_grad()  # the way out; x is kept still
    layer.backward(y)
    assert layer.grad["weight"].any()


def test_dtypes_in_a_file_that_are_none_of_the_four(tmp_path):
    layer = cn.LayerNorm(3)
    st, npz = tmp_path / "norm.safetensors", tmp_path / "norm.npz"
    for tensor in (torch.ones(3).int(), torch.ones(3).to(torch.float8_e4m3fn)):
        safetensors_torch.save_file({"weight": tensor, "bias": torch.zeros(3)}, st)
        with pytest.raises(TypeError, match=r"weight has dtype (I32|F8_E4M3)"):
            layer.load(st)
    # What numpy.savez makes of bfloat16 has lost the name of its dtype; it must not be guessed.
    for array in (np.ones(3, np.int64), np.ones(3, ml_dtypes.bfloat16)):
        np.savez(npz, weight=array, bias=np.zeros(3))
        with pytest.raises(TypeError, match=r"weight has dtype (int64|void16)"):
            layer.load(npz)
    np.testing.assert_array_equal(layer.weight, [1, 1, 1])


# --- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@each_variant
def test_memory_is_shared_with_torch(dtype, kind, variant):
    of_torch, dtype_of_torch = getattr(torch.nn, kind), getattr(torch, dtype)
    module = of_torch((2, 3), dtype=dtype_of_torch, **VARIANTS[variant])
    layer = getattr(cn, kind).from_torch(module)
    back = layer.to_torch()
    with pytest.raises(TypeError, match=rf"takes a torch\.nn\.{kind}"):
        getattr(cn, kind).from_torch(torch.nn.BatchNorm1d(3))
    assert repr(layer) == repr(module) == repr(back)
    assert type(back) is of_torch
    assert list(layer.state_dict()) == list(module.state_dict()) == list(back.state_dict())
    for name, array in layer.state_dict().items():
        theirs, again = getattr(module, name), getattr(back, name)
        assert array.dtype == np_dtype(dtype)
        assert array.ctypes.data == theirs.data_ptr() == again.data_ptr()
        assert isinstance(again, torch.nn.Parameter) and again.requires_grad
        assert again.dtype == dtype_of_torch
        array[...] = 3
        assert (theirs == 3).all()
        with torch.no_grad():
            again.fill_(4)
        assert (array.astype(np.float32) == 4).all()


def test_memory_is_shared_with_torch_on_a_gpu(cupy_lib):
    if not cupy_lib.backend.on_gpu or not torch.cuda.is_available():
        pytest.skip("needs a GPU that CuPy and torch both reach")
    for kind in (torch.float32, torch.bfloat16):
        module = torch.nn.LayerNorm(5, device="cuda", dtype=kind)
        layer = cn.LayerNorm.from_torch(module)
        assert layer.weight.data.ptr == module.weight.data_ptr()
        assert layer.to_torch().weight.data_ptr() == module.weight.data_ptr()
