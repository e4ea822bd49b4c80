"""The array-API path by itself: exactness, bits, gradients, moments, what it asks of a library.

Values in every dtype and library are held by test_layer_norm, whose JAX and strict arrays take it.
"""

import types

import array_api_compat
import numpy as np
import pytest

from cupynorm import _reference
from cupynorm._reference import Rows
from tests import oracle
from tests.conftest import Backend, np_dtype

# The stand-in for CuPy has no arithmetic, and numba is of no concern here.
BACKENDS = [b for b in Backend if b not in (Backend.CUPY_SIMULATED, Backend.NUMPY_PLAIN)]
RNG = np.random.default_rng(20260101)
ROWS, COLS = 5, 37
VALUES = RNG.standard_normal((ROWS, COLS)) * 3 + 2
WEIGHT = RNG.standard_normal(COLS)
BIAS = RNG.standard_normal(COLS)


def run(x, axes=(1,), weight=None, bias=None, eps=1e-5):
    xp = array_api_compat.array_namespace(x)
    with _reference.quiet(xp):
        return _reference.normalize(Rows(xp, x, axes), weight, bias, eps)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 1023, 1024, 1025, 4097])
def test_every_length_of_the_summation_tree(lib, n, assert_close):
    if lib.backend is Backend.JAX and n not in (1, 9, 1025):
        pytest.skip("each is compiled anew, from the same sums")
    x = lib.array(RNG.standard_normal((2, n)) + 5)
    want = oracle.layer_norm(lib.to_numpy(x), (1,), None, None, 1e-5)
    for got, its in zip(run(x)[:2], want[:2], strict=True):
        assert_close(lib.to_numpy(got), its, "float32", n)


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 768, 5000])
def test_constant_rows_are_zero(lib, n):
    for value in (1e-20, 1.0, 3e8 + 32, 1e18, 3e38):
        y, mean, _ = run(lib.array(np.full((2, n), value)))
        assert not lib.to_numpy(y).any()
        np.testing.assert_array_equal(lib.to_numpy(mean), np.float32(value))


def test_squares_do_not_overflow_the_sum(lib):
    values = 1e19 * (1 - 2.0 * (np.arange(20000).reshape(2, -1) % 2))
    y, _, rstd = run(lib.array(values))
    np.testing.assert_allclose(lib.to_numpy(y), np.sign(values), rtol=1e-6)
    np.testing.assert_allclose(lib.to_numpy(rstd), 1e-19, rtol=1e-6)
    values = np.zeros((1, 4096))
    values[0, 7] = 1e20  # its square is 1e40, the variance 2.4e36
    y, _, rstd = run(lib.array(values))
    want_y, _, want_rstd = oracle.layer_norm(np.float32(values), (1,), None, None, 1e-5)
    np.testing.assert_allclose(lib.to_numpy(y), want_y, rtol=1e-5)
    np.testing.assert_allclose(lib.to_numpy(rstd), want_rstd, rtol=1e-5)


@pytest.mark.needs("same_bits")
@pytest.mark.parametrize("n", [7, 100, 768, 1000, 40_001])
def test_bits_of_a_row_do_not_depend_on_its_batch_or_strides(lib, n):
    if lib.name.startswith("torch"):
        pytest.skip("torch gets its own sums, whose order is its own affair")
    values = (RNG.standard_normal((30, n)) + 3).astype(np.float32)
    y = lib.to_numpy(run(lib.array(values))[0])
    single = [lib.to_numpy(run(lib.array(values[i : i + 1]))[0])[0] for i in (0, 17, 29)]
    np.testing.assert_array_equal(single, y[[0, 17, 29]])
    np.testing.assert_array_equal(lib.to_numpy(run(lib.array(values[3]), (0,))[0]), y[3])
    turned = lib.from_numpy(np.ascontiguousarray(values.T))
    xp = array_api_compat.array_namespace(turned)
    np.testing.assert_array_equal(lib.to_numpy(run(xp.permute_dims(turned, (1, 0)))[0]), y)
    np.testing.assert_array_equal(lib.to_numpy(run(turned, (0,))[0]).T, y)


# --- its gradient, and moments of parts ----------------------------------------------------------


@pytest.mark.parametrize("axes", [(1,), (0, 2), (0, 1, 2)])
def test_gradients_and_tangents(lib, axes, assert_close):
    values, slopes = RNG.standard_normal((2, 3, 4, 5))
    scale = RNG.standard_normal([(3, 4, 5)[a] for a in axes])
    x, dy, weight = (lib.array(v) for v in (values, slopes, scale))
    exact = [lib.to_numpy(a).astype(np.float64) for a in (x, dy, weight)]
    rows = Rows(array_api_compat.array_namespace(x), x, axes)
    x_hat, mean, rstd = rows.standardized(1e-5)
    want = oracle.layer_norm_backward(exact[1], exact[0], axes, exact[2], 1e-5)
    for hat in ((x_hat, rstd), (rows.restored(mean, rstd), rstd)):
        got = _reference.gradients(rows, (dy, None, None), weight, hat)
        for mine, its in zip(got, want, strict=True):
            assert_close(lib.to_numpy(mine), its, "float32", 60)
    assert _reference.gradients(rows, (dy, None, None), weight, hat, (False,) * 3) == (None,) * 3
    # <dy, J dx> = <J' dy, dx>, of y and of both statistics
    moved = lib.array(RNG.standard_normal((3, 4, 5)))
    ones = (mean * 0 + 1, rstd * 0 + 1)
    tangents = _reference.tangents(rows, (moved, None, None), weight, hat)
    pulled = _reference.gradients(rows, (dy, *ones), weight, hat)[0]
    pairs = zip(tangents, (slopes, 1, 1), strict=True)
    left = sum(float((lib.to_numpy(t) * g).sum()) for t, g in pairs)
    right = float((lib.to_numpy(pulled) * lib.to_numpy(moved)).sum())
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_moments_of_parts_make_whole_rows(dtype, offset, assert_close):
    x = (VALUES + offset).astype(np_dtype(dtype))
    xp = array_api_compat.array_namespace(x)
    cuts = slice(0, 20), slice(20, 20), slice(20, None)
    parts = [_reference.moments(xp, x[:, cut], (1,)) for cut in cuts]
    whole = _reference.merge(xp, parts)
    rstd = _reference.rstd_of(xp, whole, 1e-5)
    y = _reference.apply(Rows(xp, x, (1,)), whole, rstd, WEIGHT, BIAS)
    want = oracle.layer_norm(x.astype(np.float64), (1,), WEIGHT, BIAS, 1e-5)
    stats = "float64" if dtype == "float64" else "float32"
    for got, its, kind in zip((y, whole.mean, rstd), want, (dtype, stats, stats), strict=True):
        assert_close(got, its, kind, COLS)
    nothing = _reference.merge(xp, parts[1:2])
    assert np.isnan(_reference.rstd_of(xp, nothing, 1e-5)).all()


def test_a_namespace_needs_no_more_than_seven_names():
    import array_api_compat.numpy as full

    names = ("float32", "astype", "sum", "sqrt", "reshape", "permute_dims", "concat")
    least = types.ModuleType("least")
    vars(least).update({name: getattr(full, name) for name in names})
    x = VALUES.astype(np.float32)
    y, _, _ = _reference.normalize(Rows(least, x, (1,)), WEIGHT, BIAS, 1e-5)
    np.testing.assert_array_equal(y, run(x, (1,), WEIGHT, BIAS)[0])


# --- torch and JAX differentiate it themselves ----------------------------------------------------


def test_jax_float64_where_it_is_enabled(assert_close):
    jax = pytest.importorskip("jax")
    want = oracle.layer_norm(VALUES, (1,), None, None, 1e-5)
    with jax.enable_x64(True):
        for got, its in zip(run(jax.numpy.asarray(VALUES)), want, strict=True):
            assert str(got.dtype) == "float64"
            assert_close(np.asarray(got), its, "float64", COLS)
