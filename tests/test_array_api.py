"""`cn.layer_norm` inside other libraries: the array API, JAX's tracing, a user's own classes."""

import functools
import types
import warnings

import array_api_compat.numpy
import numpy as np
import pytest

import cupynorm as cn
from cupynorm import _reference
from tests import oracle

RNG = np.random.default_rng(20260103)
X = (RNG.standard_normal((5, 3, 8)) * 2 + 1).astype(np.float32)
WEIGHT, BIAS = RNG.standard_normal((2, 3, 8)).astype(np.float32)
WANT = oracle.layer_norm(X, (1, 2), WEIGHT, BIAS, 1e-5)
PLAIN = oracle.layer_norm(X, (1, 2), None, None, 1e-5)
VERSIONS = ["2021.12", "2022.12", "2023.12", "2024.12", "2025.12"]


@pytest.fixture
def strict():
    module = pytest.importorskip("array_api_strict")
    yield module
    module.reset_array_api_strict_flags()


def place_of(strict, name):
    try:
        return strict.Device(name)
    except ValueError:
        pytest.skip(f"array_api_strict {strict.__version__} has no device {name}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("device", ["CPU_DEVICE", "device1"])
def test_every_version_and_device_of_the_standard(strict, version, device):
    assert set(strict._flags.supported_versions) <= set(VERSIONS)
    if version not in strict._flags.supported_versions:
        pytest.skip(f"array_api_strict {strict.__version__} does not offer {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases announce the newest version as a draft
        strict.set_array_api_strict_flags(
            api_version=version, boolean_indexing=False, data_dependent_shapes=False
        )
    place = place_of(strict, device)
    x, weight, bias = (strict.asarray(a, device=place) for a in (X, WEIGHT, BIAS))
    result = cn.layer_norm(x, (3, 8), weight, bias, return_stats=True)
    for got, want in zip(result, WANT, strict=True):
        assert (got.device, got.dtype) == (place, strict.float32)
        host = np.asarray(got.to_device(strict.Device("CPU_DEVICE")))
        oracle.assert_close(host, want, 24)
    turned = strict.permute_dims(weight, (1, 0))
    y = cn.layer_norm(x, weight=turned, bias=strict.permute_dims(bias, (1, 0)), axis=(2, 1))
    assert bool(strict.all(y == result.y))
    wide = cn.layer_norm(strict.zeros((2, 0), dtype=strict.float64, device=place))
    assert (wide.shape, wide.dtype) == ((2, 0), strict.float64)


@pytest.mark.parametrize("device", ["no_float64", "no_x64"])
def test_devices_without_float64(strict, device):
    place = place_of(strict, device)
    for array in cn.layer_norm(strict.asarray(X, device=place), return_stats=True):
        assert (array.device, array.dtype) == (place, strict.float32)


def test_a_namespace_needs_no_more_than_seven_names():
    names = ("float32", "astype", "sum", "sqrt", "reshape", "permute_dims", "concat")
    least = types.ModuleType("least")
    vars(least).update({name: getattr(array_api_compat.numpy, name) for name in names})
    found = [
        _reference.normalize(_reference.Rows(xp, X, (1, 2)), WEIGHT, BIAS, 1e-5)[0]
        for xp in (least, array_api_compat.numpy)
    ]
    np.testing.assert_array_equal(*found)


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_jax_jit(jax):
    """Of arguments, of a weight that is closed over, and of the backward."""
    x, weight, bias = (jax.numpy.asarray(a) for a in (X, WEIGHT, BIAS))
    for traced, given in (
        (lambda x, w, b: cn.layer_norm(x, (3, 8), w, b, return_stats=True), (x, weight, bias)),
        (lambda x: cn.layer_norm(x, (3, 8), weight, bias, return_stats=True), (x,)),
    ):
        result = jax.jit(traced)(*given)
        assert isinstance(result, cn.LayerNormResult)
        for got, want in zip(result, WANT, strict=True):
            assert isinstance(got, jax.Array)
            oracle.assert_close(np.asarray(got), want, 24)
    back = jax.jit(lambda *given: cn.layer_norm_backward(*given[:2], (3, 8), *given[2:]))
    found = back(x[::-1], x, *result[1:], weight)
    assert isinstance(found, cn.LayerNormGradients)
    oracle.assert_gradients([np.asarray(a) for a in found], X[::-1], X, (1, 2), WEIGHT)


def test_jax_float64_where_it_is_enabled(jax):
    with jax.enable_x64(True):
        x = jax.numpy.asarray(X.astype(np.float64))
        for got, want in zip(cn.layer_norm(x, (3, 8), return_stats=True), PLAIN, strict=True):
            assert str(got.dtype) == "float64"
            oracle.assert_close(np.asarray(got), want, 24)


def test_jax_rules_hold_while_tracing(jax):
    x = jax.numpy.asarray(X)
    with pytest.raises(ValueError, match=r"normalized_shape=\(7,\).*\(5, 3, 8\)"):
        jax.jit(lambda x: cn.layer_norm(x, 7))(x)
    with pytest.raises(ValueError, match="weight is a numpy array"):
        jax.jit(lambda x: cn.layer_norm(x, weight=np.ones(8, np.float32)))(x)


def test_jax_grad_and_vmap(jax):
    x = jax.numpy.asarray(X)
    slope = jax.grad(lambda x: (cn.layer_norm(x, (3, 8)) ** 3).sum())
    x_hat = PLAIN[0]
    want = oracle.layer_norm_backward(3 * x_hat**2, X, (1, 2), None, 1e-5)[0]
    for gradient in (slope, jax.jit(slope)):
        np.testing.assert_allclose(np.asarray(gradient(x)), want, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda sample: cn.layer_norm(sample, (3, 8)))(x)
    np.testing.assert_allclose(np.asarray(mapped), x_hat, atol=1e-5)


@functools.cache
def subclass_of(kind):
    return type("Mine", (kind,), {})


def of_strict(plain):
    mine = object.__new__(subclass_of(type(plain)))
    for name in ("_array", "_dtype", "_device"):
        setattr(mine, name, getattr(plain, name))
    return mine


MINE = {
    "numpy": lambda plain: plain.view(subclass_of(np.ndarray)),
    "torch": lambda plain: plain.as_subclass(subclass_of(type(plain))),
    "array_api_strict": of_strict,
}


@pytest.mark.parametrize("library", MINE)
@pytest.mark.parametrize("which", ["xwb", "x", "w"])
def test_a_subclass_is_of_the_library_that_it_descends_from(library, which):
    given = [pytest.importorskip(library).asarray(a) for a in (X, WEIGHT, BIAS)]
    for i, name in enumerate("xwb"):
        given[i] = MINE[library](given[i]) if name in which else given[i]
    y = cn.layer_norm(given[0], (3, 8), *given[1:])
    oracle.assert_close(np.asarray(y), WANT[0], 24)
