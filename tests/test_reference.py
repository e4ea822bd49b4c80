"""The array-API path by itself: values, gradients, tracing, what it asks of a library."""

import types
import warnings

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


# --- values -------------------------------------------------------------------------------------


def test_values_and_statistics(lib, dtype, assert_close):
    x, weight, bias = (lib.array(v, dtype) for v in (VALUES, WEIGHT, BIAS))
    exact = [lib.to_numpy(a).astype(np.float64) for a in (x, weight, bias)]
    y, mean, rstd = run(x, (1,), weight, bias)
    stats = "float64" if dtype == "float64" else "float32"
    assert [lib.dtype(a) for a in (y, mean, rstd)] == [dtype, stats, stats]
    assert tuple(mean.shape) == tuple(rstd.shape) == (ROWS, 1)
    for got, want, kind in zip(
        (y, mean, rstd),
        oracle.layer_norm(exact[0], (1,), *exact[1:], 1e-5),
        (dtype, stats, stats),
        strict=True,
    ):
        assert_close(lib.to_numpy(got), want, kind, COLS)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_any_axes(lib, axes, assert_close):
    values = RNG.standard_normal((3, 4, 5))
    shape = tuple(values.shape[a] for a in axes)
    x, weight, bias = (
        lib.array(v) for v in (values, RNG.standard_normal(shape), RNG.random(shape))
    )
    exact = [lib.to_numpy(a).astype(np.float64) for a in (x, weight, bias)]
    want = oracle.layer_norm(exact[0], axes, *exact[1:], 1e-5)
    for got, expected in zip(run(x, axes, weight, bias), want, strict=True):
        assert tuple(got.shape) == expected.shape
        assert_close(lib.to_numpy(got), expected, "float32", int(np.prod(shape)))


def test_weight_of_another_dtype_is_used_in_the_compute_dtype(lib, dtype, assert_close):
    x = lib.array(VALUES, dtype)
    for other in lib.backend.dtypes:
        weight, bias = lib.array(WEIGHT, other), lib.array(BIAS, other)
        y, _, _ = run(x, (1,), weight, bias)
        assert lib.dtype(y) == dtype
        exact = [lib.to_numpy(a).astype(np.float64) for a in (x, weight, bias)]
        assert_close(
            lib.to_numpy(y), oracle.layer_norm(exact[0], (1,), *exact[1:], 1e-5)[0], dtype, COLS
        )


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 1023, 1024, 1025, 4097])
def test_every_length_of_the_summation_tree(lib, n, assert_close):
    x = lib.array(RNG.standard_normal((2, n)) + 5)
    exact = lib.to_numpy(x).astype(np.float64)
    y, mean, _ = run(x)
    want_y, want_mean, _ = oracle.layer_norm(exact, (1,), None, None, 1e-5)
    assert_close(lib.to_numpy(y), want_y, "float32", n)
    assert_close(lib.to_numpy(mean), want_mean, "float32", n)


def test_empty_rows_have_the_mean_of_nothing(lib):
    y, mean, rstd = run(lib.array(np.empty((2, 0))))
    assert tuple(y.shape) == (2, 0)
    assert np.isnan(lib.to_numpy(mean)).all()
    assert np.isnan(lib.to_numpy(rstd)).all()


def test_empty_batch(lib):
    y, mean, rstd = run(lib.array(np.empty((0, 4))), (1,), lib.array(np.ones(4)))
    assert [tuple(a.shape) for a in (y, mean, rstd)] == [(0, 4), (0, 1), (0, 1)]


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 768, 5000])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_common_offset_costs_no_accuracy(lib, n, offset):
    x = lib.array(RNG.standard_normal((4, n)) + offset)
    want, _, _ = oracle.layer_norm(lib.to_numpy(x).astype(np.float64), (1,), None, None, 1e-5)
    error = np.abs(lib.to_numpy(run(x)[0]) - want).max()
    assert error < 4 * np.finfo(np.float32).eps * np.abs(want).max()


@pytest.mark.parametrize("value", [1e-20, 1.0, 3e8 + 32, 1e18, 3e38])
@pytest.mark.parametrize("n", [3, 768, 5000])
def test_constant_rows_are_zero(lib, value, n):
    y, mean, _ = run(lib.array(np.full((2, n), value)))
    assert not lib.to_numpy(y).any()
    np.testing.assert_array_equal(lib.to_numpy(mean), np.float32(value))


def test_squares_of_large_values_do_not_overflow_the_sum(lib):
    values = 1e19 * (1 - 2.0 * (np.arange(20000).reshape(2, -1) % 2))
    y, _, rstd = run(lib.array(values))
    np.testing.assert_allclose(lib.to_numpy(y), np.sign(values), rtol=1e-6)
    np.testing.assert_allclose(lib.to_numpy(rstd), 1e-19, rtol=1e-6)


def test_one_square_beyond_float32_does_not_overflow(lib):
    values = np.zeros((1, 4096))
    values[0, 7] = 1e20  # its square is 1e40, the variance 2.4e36
    y, _, rstd = run(lib.array(values))
    want_y, _, want_rstd = oracle.layer_norm(np.float32(values), (1,), None, None, 1e-5)
    np.testing.assert_allclose(lib.to_numpy(y), want_y, rtol=1e-5)
    np.testing.assert_allclose(lib.to_numpy(rstd), want_rstd, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_spoil_their_row_only(lib, dtype, bad):
    values = VALUES.copy()
    values[2, 5] = bad
    y = lib.to_numpy(run(lib.array(values, dtype))[0]).astype(np.float64)
    clean = lib.to_numpy(run(lib.array(VALUES, dtype))[0]).astype(np.float64)
    assert np.isnan(y[2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(y[others], clean[others])


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
    scale = RNG.standard_normal([3 if a == 0 else 4 if a == 1 else 5 for a in axes])
    x, dy, weight = (lib.array(v) for v in (values, slopes, scale))
    exact = [lib.to_numpy(a).astype(np.float64) for a in (x, dy, weight)]
    rows = Rows(array_api_compat.array_namespace(x), x, axes)
    x_hat, mean, rstd = rows.standardized(1e-5)
    want = oracle.layer_norm_backward(exact[1], exact[0], axes, exact[2], 1e-5)
    for hat in ((x_hat, rstd), (rows.restored(mean, rstd), rstd)):
        got = _reference.gradients(rows, (dy, None, None), weight, hat)
        for mine, its in zip(got, want, strict=True):
            assert tuple(mine.shape) == its.shape
            assert_close(lib.to_numpy(mine), its, "float32", 60)
    assert _reference.gradients(rows, (dy, None, None), weight, hat, (False,) * 3) == (None,) * 3
    # <dy, J dx> = <J' dy, dx>, of y and of both statistics
    moved = lib.array(RNG.standard_normal((3, 4, 5)))
    ones = (mean * 0 + 1, rstd * 0 + 1)
    tangents = _reference.tangents(rows, (moved, None, None), weight, hat)
    pulled = _reference.gradients(rows, (dy, *ones), weight, hat)[0]
    left = sum(
        float((lib.to_numpy(t) * g).sum()) for t, g in zip(tangents, (slopes, 1, 1), strict=True)
    )
    right = float((lib.to_numpy(pulled) * lib.to_numpy(moved)).sum())
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_moments_of_parts_make_whole_rows(dtype, offset, assert_close):
    x = (VALUES + offset).astype(np_dtype(dtype))
    xp = array_api_compat.array_namespace(x)
    parts = [
        _reference.moments(xp, x[:, s], (1,))
        for s in (slice(0, 20), slice(20, 20), slice(20, None))
    ]
    whole = _reference.merge(xp, parts)
    rstd = _reference.rstd_of(xp, whole, 1e-5)
    y = _reference.apply(Rows(xp, x, (1,)), whole, rstd, WEIGHT, BIAS)
    want = oracle.layer_norm(x.astype(np.float64), (1,), WEIGHT, BIAS, 1e-5)
    stats = "float64" if dtype == "float64" else "float32"
    for got, its, kind in zip((y, whole.mean, rstd), want, (dtype, stats, stats), strict=True):
        assert_close(got, its, kind, COLS)
    nothing = _reference.merge(xp, parts[1:2])
    assert np.isnan(_reference.rstd_of(xp, nothing, 1e-5)).all()


# --- what it asks of a namespace ----------------------------------------------------------------


@pytest.fixture
def strict_flags():
    strict = pytest.importorskip("array_api_strict")
    yield strict
    strict.reset_array_api_strict_flags()


@pytest.mark.parametrize("version", ["2021.12", "2022.12", "2023.12", "2024.12", "2025.12"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_version_of_the_standard(strict_flags, version, dtype, assert_close):
    strict = strict_flags
    if version not in strict._flags.supported_versions:
        pytest.skip(f"array_api_strict {strict.__version__} does not offer {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2025.12 is announced as a draft by some releases
        strict.set_array_api_strict_flags(
            api_version=version, boolean_indexing=False, data_dependent_shapes=False
        )
    x, weight, bias = (strict.asarray(v.astype(dtype)) for v in (VALUES, WEIGHT, BIAS))
    result = run(x, (1,), weight, bias)
    assert [a.dtype for a in result] == [getattr(strict, dtype)] * 3
    exact = [np.asarray(a, dtype=np.float64) for a in (x, weight, bias)]
    assert_close(
        np.asarray(result[0]), oracle.layer_norm(exact[0], (1,), *exact[1:], 1e-5)[0], dtype, COLS
    )
    empty = run(strict.zeros((2, 0), dtype=getattr(strict, dtype)))
    assert [a.dtype for a in empty] == [getattr(strict, dtype)] * 3


@pytest.mark.parametrize("name", ["device1", "device2", "no_float64", "no_x64"])
def test_results_stay_on_the_device(name):
    strict = pytest.importorskip("array_api_strict")
    try:
        device = strict.Device(name)
    except ValueError:
        pytest.skip(f"array_api_strict {strict.__version__} has no device {name}")
    x, weight, bias = (
        strict.asarray(v.astype(np.float32), device=device) for v in (VALUES, WEIGHT, BIAS)
    )
    for array in run(x, (1,), weight, bias):
        assert array.device == device
        assert array.dtype == strict.float32


def test_a_namespace_needs_no_more_than_seven_names():
    import array_api_compat.numpy as full

    names = ("float32", "astype", "sum", "sqrt", "reshape", "permute_dims", "concat")
    least = types.ModuleType("least")
    vars(least).update({name: getattr(full, name) for name in names})
    x = VALUES.astype(np.float32)
    y, _, _ = _reference.normalize(Rows(least, x, (1,)), WEIGHT, BIAS, 1e-5)
    np.testing.assert_array_equal(y, run(x, (1,), WEIGHT, BIAS)[0])


def test_dask_stays_lazy():
    da = pytest.importorskip("dask.array")
    values = VALUES.astype(np.float32)
    result = run(da.from_array(values, chunks=(2, 10)), (1,))
    assert all(isinstance(a, da.Array) for a in result)
    for got, want in zip(result, oracle.layer_norm(values, (1,), None, None, 1e-5), strict=True):
        np.testing.assert_allclose(got.compute(), want, rtol=1e-5, atol=1e-6)


# --- torch: autograd, functorch, compile --------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def leaves(torch):
    """x (3, 2, 5), weight and bias (2, 5), in float64."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((3, 2, 5), (2, 5), (2, 5))
    ]


# torch's own forward-mode rules are compiled with the function that it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_gradcheck(torch, leaves):
    def all_three(x, weight, bias):
        return run(x, (1, 2), weight, bias)

    assert torch.autograd.gradcheck(all_three, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(all_three, leaves)


def test_torch_gradient_error_at_an_offset_is_not_above_torchs(torch):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(5)) * 3 + 1000
    dy = torch.randn(4, 300, generator=torch.Generator().manual_seed(6))

    def gradient(function, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x, dy.to(x.dtype))[0]

    exact = gradient(lambda t: torch.nn.functional.layer_norm(t, (300,)), x.double())
    ours = (gradient(lambda t: run(t)[0], x) - exact).abs().max()
    theirs = (gradient(lambda t: torch.nn.functional.layer_norm(t, (300,)), x) - exact).abs().max()
    assert ours <= theirs


# --- JAX: tracing -------------------------------------------------------------------------------


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_jax_jit(jax, assert_close):
    x, weight, bias = (jax.numpy.asarray(v, dtype="float32") for v in (VALUES, WEIGHT, BIAS))
    traced = jax.jit(lambda *leaves: run(leaves[0], (1,), *leaves[1:]))
    exact = [np.asarray(a, dtype=np.float64) for a in (x, weight, bias)]
    want = oracle.layer_norm(exact[0], (1,), *exact[1:], 1e-5)
    for got, expected in zip(traced(x, weight, bias), want, strict=True):
        assert got.dtype == np.float32
        assert_close(np.asarray(got), expected, "float32", COLS)


def test_jax_grad_and_vmap(jax, torch):
    x = jax.numpy.asarray(VALUES, dtype="float32")

    def loss(rows):
        return (run(rows, (1,))[0] ** 3).sum()

    t = torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    (torch.nn.functional.layer_norm(t, (COLS,)) ** 3).sum().backward()
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(np.asarray(gradient(x)), t.grad.numpy(), rtol=1e-4, atol=1e-4)
    by_row = jax.vmap(lambda row: run(row, (0,))[0])(x)
    np.testing.assert_allclose(np.asarray(by_row), np.asarray(run(x)[0]), rtol=1e-5, atol=1e-6)


def test_jax_float64_where_it_is_enabled(jax, assert_close):
    with jax.enable_x64(True):
        x = jax.numpy.asarray(VALUES)
        y, mean, rstd = run(x)
        assert [str(a.dtype) for a in (y, mean, rstd)] == ["float64"] * 3
        assert_close(
            np.asarray(y), oracle.layer_norm(VALUES, (1,), None, None, 1e-5)[0], "float64", COLS
        )
