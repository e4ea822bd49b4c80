"""What a user of `cn.layer_norm` sees, in every array library."""

import functools
import inspect
import itertools
import math
import threading
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, why_not

RNG = np.random.default_rng(20260102)
X3 = RNG.standard_normal((4, 6, 10)) * 2 + 1


def stats_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def exact(lib, *arrays):
    """The values that the arrays hold, in float64."""
    return [None if a is None else lib.to_numpy(a).astype(np.float64) for a in arrays]


def expected(lib, x, axes, weight=None, bias=None, eps=1e-5):
    """Oracle for ascending axes."""
    x, weight, bias = exact(lib, x, weight, bias)
    return oracle.layer_norm(x, axes, weight, bias, eps)


@pytest.mark.parametrize("backend", Backend, ids=lambda b: b.value)
def test_backend_is_here(backend):
    if reason := why_not(backend):
        pytest.skip(reason)


# --- normalized_shape and axis ------------------------------------------------------------------


def test_signature_begins_as_torchs():
    torch = pytest.importorskip("torch")
    ours = inspect.signature(cn.layer_norm).parameters
    theirs = inspect.signature(torch.nn.functional.layer_norm).parameters
    assert list(ours)[1:5] == list(theirs)[1:5]
    assert ours["eps"].default == theirs["eps"].default
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[5:])


@pytest.mark.parametrize(
    ("normalized_shape", "axes"),
    [
        (None, (2,)),
        (10, (2,)),
        (np.int64(10), (2,)),
        ((10,), (2,)),
        ([10], (2,)),
        ((6, 10), (1, 2)),
        ([6, 10], (1, 2)),
        ((4, 6, 10), (0, 1, 2)),
    ],
)
def test_normalized_shape(lib, normalized_shape, axes, assert_close):
    x = lib.array(X3)
    shape = tuple(X3.shape[a] for a in axes)
    weight, bias = lib.array(RNG.standard_normal(shape)), lib.array(RNG.standard_normal(shape))
    y = cn.layer_norm(x, normalized_shape, weight, bias)
    want = expected(lib, x, axes, weight, bias)[0]
    assert_close(lib.to_numpy(y), want, "float32", math.prod(shape))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3, np.int32(1), (0,), [1], (-2, -1), (0, 2)])
def test_axis(lib, axis, assert_close):
    x = lib.array(X3)
    axes = tuple(sorted(int(a) % 3 for a in (axis if isinstance(axis, (tuple, list)) else [axis])))
    shape = tuple(X3.shape[a] for a in axes)
    weight = lib.array(RNG.standard_normal(shape))
    y, mean, rstd = cn.layer_norm(x, weight=weight, axis=axis, return_stats=True)
    want = expected(lib, x, axes, weight)
    for got, value in zip((y, mean, rstd), want, strict=True):
        assert_close(lib.to_numpy(got), value, "float32", math.prod(shape))


@pytest.mark.parametrize("axis", [*itertools.permutations(range(3)), (2, 0), (-1, 1), (2, -3)])
def test_weight_follows_the_order_of_axis(lib, axis, assert_close):
    x = lib.array(X3)
    named = tuple(a % 3 for a in axis)
    shape = tuple(X3.shape[a] for a in named)
    weight, bias = lib.array(RNG.standard_normal(shape)), lib.array(RNG.standard_normal(shape))
    y = cn.layer_norm(x, None, weight, bias, axis=axis)
    values, w, b = exact(lib, x, weight, bias)
    ascending = np.argsort(named)
    want = oracle.layer_norm(
        values, tuple(sorted(named)), w.transpose(ascending), b.transpose(ascending), 1e-5
    )[0]
    assert_close(lib.to_numpy(y), want, "float32", math.prod(shape))


def test_one_axis_and_one_element(lib):
    one = lib.array([3.0])
    assert lib.to_numpy(cn.layer_norm(one)).tolist() == [0.0]
    column = lib.array([[1.0], [2.0]])
    y, mean, rstd = cn.layer_norm(column, 1, bias=lib.array([0.5]), return_stats=True)
    assert lib.to_numpy(y).tolist() == [[0.5], [0.5]]
    assert lib.to_numpy(mean).tolist() == [[1.0], [2.0]]
    np.testing.assert_allclose(lib.to_numpy(rstd), 1 / math.sqrt(1e-5), rtol=1e-6)


# --- dtypes, weight, bias -----------------------------------------------------------------------


@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias"])
def test_dtype_and_affine(lib, dtype, affine, assert_close):
    x = lib.array(X3, dtype)
    weight = lib.array(RNG.standard_normal(10), dtype) if "weight" in affine else None
    bias = lib.array(RNG.standard_normal(10), dtype) if "bias" in affine else None
    y, mean, rstd = cn.layer_norm(x, 10, weight, bias, return_stats=True)
    kinds = (dtype, stats_dtype(dtype), stats_dtype(dtype))
    assert tuple(lib.dtype(a) for a in (y, mean, rstd)) == kinds
    assert all(type(a) is type(x) for a in (y, mean, rstd))
    for got, want, kind in zip(
        (y, mean, rstd), expected(lib, x, (2,), weight, bias), kinds, strict=True
    ):
        assert_close(lib.to_numpy(got), want, kind, 10)


def test_weight_and_bias_of_other_dtypes(lib, dtype, assert_close):
    x = lib.array(X3, dtype)
    pairs = itertools.product(lib.backend.dtypes, repeat=2)
    if lib.backend.compiles:
        pairs = [("float32", "float32"), ("float64", "float16")]
    for weight_dtype, bias_dtype in pairs:
        weight = lib.array(RNG.standard_normal(10), weight_dtype)
        bias = lib.array(RNG.standard_normal(10), bias_dtype)
        y = cn.layer_norm(x, 10, weight, bias)
        assert lib.dtype(y) == dtype
        assert_close(lib.to_numpy(y), expected(lib, x, (2,), weight, bias)[0], dtype, 10)


@pytest.mark.needs("has_float16")
def test_float16_near_its_maximum(lib, assert_close):
    x = lib.array(65504 * (1 - RNG.random((3, 50)) * [[0.0], [1e-2], [2.0]]), "float16")
    y, mean, _ = cn.layer_norm(x, return_stats=True)
    want = expected(lib, x, (1,))
    assert_close(lib.to_numpy(y), want[0], "float16", 50)
    # float32 sums of numbers near 65504, whose mean may be far smaller
    np.testing.assert_allclose(lib.to_numpy(mean), want[1], rtol=1e-6, atol=65504 * 2.0**-23)


def test_one_square_beyond_float32_does_not_overflow(lib):
    values = np.zeros((1, 4096))
    values[0, 7] = 1e20  # its square is 1e40, the variance 2.4e36
    x = lib.array(values)
    y, _, rstd = cn.layer_norm(x, return_stats=True)
    want_y, _, want_rstd = expected(lib, x, (1,))
    np.testing.assert_allclose(lib.to_numpy(y), want_y, rtol=1e-5)
    np.testing.assert_allclose(lib.to_numpy(rstd), want_rstd, rtol=1e-5)


@pytest.mark.parametrize("value", [1e-20, 1.0, 3e8 + 32, 1e18])
@pytest.mark.parametrize("n", [3, 768, 5000])
def test_constant_rows_are_zero(lib, value, n):
    y, mean, _ = cn.layer_norm(lib.array(np.full((2, n), value)), return_stats=True)
    assert not lib.to_numpy(y).any()
    np.testing.assert_array_equal(lib.to_numpy(mean), np.float32(value))


def test_inputs_are_left_alone(lib):
    x, weight, bias = lib.array(X3), lib.array(np.ones(10)), lib.array(np.ones(10))
    before = [a.copy() for a in exact(lib, x, weight, bias)]
    cn.layer_norm(x, 10, weight, bias)
    for was, now in zip(before, exact(lib, x, weight, bias), strict=True):
        np.testing.assert_array_equal(was, now)


# --- eps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eps", [0.0, 0, 1, 1e-300, 1e-12, 0.5, 1e30, np.float32(1e-3), Fraction(1, 8)]
)
def test_eps(lib, eps, assert_close):
    x = lib.array(X3)
    want = expected(lib, x, (2,), eps=float(eps))
    for got, value in zip(cn.layer_norm(x, eps=eps, return_stats=True), want, strict=True):
        assert_close(lib.to_numpy(got), value, "float32", 10)


def test_eps_zero_on_a_constant_row_is_ieee(lib):
    x = lib.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    y, _, rstd = cn.layer_norm(x, eps=0.0, return_stats=True)
    assert np.isnan(lib.to_numpy(y)[0]).all()
    assert np.isposinf(lib.to_numpy(rstd)[0]).all()
    assert np.isfinite(lib.to_numpy(y)[1]).all()


def test_negative_eps_beyond_the_variance_gives_nan(lib):
    x = lib.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    y, _, rstd = cn.layer_norm(x, eps=-1.0, return_stats=True)
    assert np.isnan(lib.to_numpy(y)[0]).all()
    assert np.isnan(lib.to_numpy(rstd)[0]).all()
    np.testing.assert_allclose(
        lib.to_numpy(y)[1], (np.array([-10, 0, 10.0]) / math.sqrt(200 / 3 - 1)), rtol=1e-6
    )


# --- return_stats -------------------------------------------------------------------------------


def test_return_stats_is_a_named_tuple(lib):
    result = cn.layer_norm(lib.array(X3), axis=(0, 2), return_stats=True)
    assert isinstance(result, cn.LayerNormResult)
    assert result._fields == ("y", "mean", "rstd")
    assert [tuple(a.shape) for a in result] == [(4, 6, 10), (1, 6, 1), (1, 6, 1)]


def test_return_stats_changes_no_bit_of_y(lib):
    x = lib.array(X3)
    plain, with_stats = cn.layer_norm(x), cn.layer_norm(x, return_stats=True).y
    np.testing.assert_array_equal(lib.to_numpy(plain), lib.to_numpy(with_stats))


# --- order --------------------------------------------------------------------------------------


def c_strides(shape):
    return tuple(math.prod(shape[a + 1 :]) for a in range(len(shape)))


def f_strides(shape):
    return tuple(math.prod(shape[:a]) for a in range(len(shape)))


@pytest.mark.needs("strided")
@pytest.mark.parametrize("layout", ["C", "F", "sliced", "turned"])
@pytest.mark.parametrize("order", ["K", "C", "F"])
def test_order_sets_the_layout_of_y(lib, layout, order, assert_close):
    source = {
        "C": X3,
        "F": np.asfortranarray(X3),
        "sliced": np.repeat(X3, 2, axis=2),
        "turned": np.ascontiguousarray(X3.transpose(1, 2, 0)),
    }[layout]
    x = lib.array(source)
    if layout == "sliced":
        x = x[:, :, ::2]
    if layout == "turned":
        x = x.transpose(2, 0, 1) if lib.backend is not Backend.TORCH else x.permute(2, 0, 1)
    y = cn.layer_norm(x, 10, order=order)
    assert_close(lib.to_numpy(y), expected(lib, x, (2,))[0], "float32", 10)
    kept = {"C": (60, 10, 1), "F": (1, 4, 24), "sliced": (60, 10, 1), "turned": (1, 40, 4)}[layout]
    want = {"K": kept, "C": c_strides(X3.shape), "F": f_strides(X3.shape)}[order]
    assert tuple(lib.strides(y)) == want


# --- out ----------------------------------------------------------------------------------------


@pytest.mark.needs("writable")
def test_out_is_filled_and_returned(lib, dtype):
    x, out = lib.array(X3, dtype), lib.array(np.full(X3.shape, 7.0), dtype)
    want = lib.to_numpy(cn.layer_norm(x, 10)).copy()
    assert cn.layer_norm(x, 10, out=out) is out
    np.testing.assert_array_equal(lib.to_numpy(out), want)
    result = cn.layer_norm(x, 10, out=x, return_stats=True)
    assert result.y is x
    np.testing.assert_array_equal(lib.to_numpy(x), want)


@pytest.mark.needs("writable")
@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), (0, 1, 2)])
def test_out_may_be_x_whatever_the_axes(lib, axis):
    x = lib.array(X3.copy())
    want = lib.to_numpy(cn.layer_norm(x, axis=axis)).copy()
    cn.layer_norm(x, axis=axis, out=x)
    np.testing.assert_array_equal(lib.to_numpy(x), want)


def assert_same_row(lib, got, want, strided):
    """The same bits; but a GPU's kernel for strided columns adds them up in an order of its own."""
    if strided and lib.backend.tile_for_columns:
        bound = oracle.tolerance("float32", want.shape[-1])
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.needs("strided")
def test_out_of_any_layout(lib):
    x = lib.array(X3)
    want = lib.to_numpy(cn.layer_norm(x, 10))
    board = lib.array(np.full((4, 6, 20), 7.0))
    for out in (board[:, :, ::2], lib.array(np.asfortranarray(np.zeros(X3.shape)))):
        assert cn.layer_norm(x, 10, out=out) is out
        assert_same_row(lib, lib.to_numpy(out), want, strided=True)
    np.testing.assert_array_equal(lib.to_numpy(board)[:, :, 1::2], 7.0)


def test_out_may_interleave_with_x():
    board = np.zeros((4, 20), np.float32)
    x, out = board[:, ::2], board[:, 1::2]
    x[...] = X3[0, :4]
    cn.layer_norm(x, out=out)
    np.testing.assert_array_equal(x, X3[0, :4].astype(np.float32))
    np.testing.assert_array_equal(out, cn.layer_norm(x.copy()))


def test_out_may_be_x_through_another_view():
    x = X3.astype(np.float32)
    want = cn.layer_norm(x)
    cn.layer_norm(x, out=x[...])
    np.testing.assert_array_equal(x, want)


def test_jax_out_is_refused():
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.asarray(X3, dtype="float32")
    with pytest.raises(TypeError, match=r"out= .*JAX arrays cannot be written to.*returned array"):
        cn.layer_norm(x, out=x)


# --- emptiness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "stats"),
    [
        ((0, 4), -1, (0, 1)),
        ((4, 0), -1, (4, 1)),
        ((0,), 0, (1,)),
        ((2, 0, 3), 1, (2, 1, 3)),
        ((2, 0, 3), (1, 2), (2, 1, 1)),
        ((0, 0), (0, 1), (1, 1)),
    ],
)
def test_nothing_in_nothing_out(lib, shape, axis, stats):
    x = lib.array(np.empty(shape))
    axes = axis if isinstance(axis, tuple) else (axis,)
    weight = lib.array(np.ones([shape[a] for a in axes]))
    y, mean, rstd = cn.layer_norm(x, weight=weight, axis=axis, return_stats=True)
    assert [tuple(a.shape) for a in (y, mean, rstd)] == [shape, stats, stats]
    assert type(y) is type(x)
    assert np.isnan(lib.to_numpy(mean)).all()  # vacuous where there are no rows
    if lib.backend.writable:
        assert cn.layer_norm(x, weight=weight, axis=axis, out=x) is x


# --- NaN, Inf -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_inf_spoil_their_row_only(lib, dtype, bad, axis):
    clean = RNG.standard_normal((7, 7))
    spoilt = clean.copy()
    spoilt[3, 3] = bad
    y, mean, rstd = (
        lib.to_numpy(a).astype(np.float64)
        for a in cn.layer_norm(lib.array(spoilt, dtype), axis=axis, return_stats=True)
    )
    want = lib.to_numpy(cn.layer_norm(lib.array(clean, dtype), axis=axis)).astype(np.float64)
    row = (slice(None), 3) if axis == 0 else (3, slice(None))
    rest = np.ones((7, 7), bool)
    rest[row] = False
    assert np.isnan(y[row]).all()
    assert np.isnan(rstd[row]).all()
    assert not np.isfinite(mean[row]).any()
    np.testing.assert_array_equal(y[rest], want[rest])


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.needs("same_bits")
@pytest.mark.parametrize("n", [1, 7, 64, 250, 1000])
def test_bits_of_a_row_are_those_of_the_row_alone(lib, n):
    values = RNG.standard_normal((40, n)) + 3
    y = lib.to_numpy(cn.layer_norm(lib.array(values)))
    for i in (0, 13, 39):
        alone = lib.to_numpy(cn.layer_norm(lib.array(values[i])))
        np.testing.assert_array_equal(alone, y[i])
    np.testing.assert_array_equal(lib.to_numpy(cn.layer_norm(lib.array(values[3:20]))), y[3:20])


@pytest.mark.needs("strided")
@pytest.mark.parametrize("n", [7, 250, 1000])
def test_bits_of_a_row_do_not_depend_on_its_layout(lib, n):
    values = RNG.standard_normal((40, n)) + 3
    y = lib.to_numpy(cn.layer_norm(lib.array(values)))
    padded = np.zeros((40, n + 5))
    padded[:, 2:-3] = values
    for x, strided in (
        (lib.array(np.asfortranarray(values)), True),
        (lib.array(padded)[:, 2:-3], False),
        (lib.array(np.repeat(values, 2, axis=1))[:, ::2], True),
    ):
        assert_same_row(lib, lib.to_numpy(cn.layer_norm(x)), y, strided)
    turned = cn.layer_norm(lib.array(np.ascontiguousarray(values.T)), axis=0)
    assert_same_row(lib, lib.to_numpy(turned).T, y, strided=True)


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("shape", [(3000, 129), (3, 200_003)])
def test_numpy_bits_do_not_depend_on_the_number_of_threads(lib, dtype, monkeypatch, shape):
    x = lib.array(RNG.standard_normal(shape) + 3, dtype)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", str(threads))
        results.append([a.tobytes() for a in cn.layer_norm(x, return_stats=True)])
    assert results[0] == results[1] == results[2]


def test_calls_from_many_threads_at_once():
    arrays = [RNG.standard_normal((50 + i, 96)).astype(np.float32) for i in range(8)]
    want = [cn.layer_norm(x) for x in arrays]
    got = [[] for _ in arrays]

    def work(i):
        got[i].extend(cn.layer_norm(arrays[i]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, y in zip(got, want, strict=True):
        assert len(results) == 20
        assert all(np.array_equal(result, y) for result in results)


# --- NumPy arrays of every kind -----------------------------------------------------------------


def _big_endian(values, _):
    return values.astype(values.dtype.newbyteorder(">"))


def _read_only(values, _):
    values.flags.writeable = False
    return values


def _memmapped(values, path):
    file = path / f"{len(list(path.iterdir()))}.bin"
    values.tofile(file)
    return np.memmap(file, dtype=values.dtype, mode="r", shape=values.shape)


def _unaligned(values, _):
    buffer = bytearray(values.nbytes + 1)
    view = np.frombuffer(buffer, dtype=values.dtype, offset=1).reshape(values.shape)
    view[...] = values
    return view


def _field_of_records(values, _):
    records = np.zeros(values.shape, dtype=[("flag", "u1"), ("value", values.dtype)])
    records["value"] = values
    return records["value"]  # strides that are no multiple of the item size


KINDS = {
    "big-endian": _big_endian,
    "read-only": _read_only,
    "memmapped": _memmapped,
    "unaligned": _unaligned,
    "field of records": _field_of_records,
    "negative strides": lambda v, _: np.flip(np.flip(v).copy()),
    "every second column": lambda v, _: np.repeat(v, 2, axis=1)[:, ::2],
    "column-major": lambda v, _: np.asfortranarray(v),
    "window": lambda v, _: np.pad(v, 3)[3:-3, 3:-3],
}


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_numpy_arrays_of_every_kind(lib, dtype, tmp_path, kind, axis):
    plain = (RNG.standard_normal((33, 17)) * 2 + 1).astype(dtype)
    x = KINDS[kind](plain.copy(), tmp_path)
    np.testing.assert_array_equal(x, plain)
    shape = [x.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))]
    weight = KINDS[kind](np.atleast_2d(RNG.standard_normal(shape)).astype(dtype), tmp_path)
    weight = weight.reshape(shape)
    want = cn.layer_norm(plain, weight=weight.astype(dtype), axis=axis, return_stats=True)
    y, mean, rstd = cn.layer_norm(x, weight=weight, axis=axis, return_stats=True)
    assert type(y) is np.ndarray
    assert y.dtype == x.dtype
    assert y.flags.writeable
    assert mean.dtype == rstd.dtype == np.dtype(stats_dtype(dtype))
    for got, value in zip((y, mean, rstd), want, strict=True):
        np.testing.assert_array_equal(got, value)
    bound = oracle.tolerance(dtype, math.prod(shape))
    axes = axis if isinstance(axis, tuple) else (axis,)
    np.testing.assert_allclose(
        y, oracle.layer_norm(plain, axes, weight, None, 1e-5)[0], rtol=bound, atol=bound
    )


def test_broadcast_numpy_input(assert_close):
    row = X3[0, 0].astype(np.float32)
    want = oracle.layer_norm(row, (0,), None, None, 1e-5)[0]
    rows = np.broadcast_to(row, (5, 10))
    y = cn.layer_norm(rows, weight=np.broadcast_to(np.float32(2), (10,)))
    assert_close(y, np.broadcast_to(2 * want, (5, 10)), "float32", 10)
    assert y.flags.writeable
    y[0] = 0  # must not move the other rows
    assert y[1].any()
    same = cn.layer_norm(np.broadcast_to(np.float32(3), (2, 9)))
    np.testing.assert_array_equal(same, 0)


def test_big_endian_out():
    x = X3.astype(np.float32)
    out = np.zeros(x.shape, ">f4")
    swapped = x.astype(">f4")
    cn.layer_norm(swapped, out=out)
    np.testing.assert_array_equal(out, cn.layer_norm(x))
    cn.layer_norm(swapped, out=swapped)
    np.testing.assert_array_equal(swapped, out)


def test_ndarray_subclass_without_meaning_of_its_own_is_taken():
    class Tagged(np.ndarray):
        pass

    x = X3.astype(np.float32).view(Tagged)
    np.testing.assert_array_equal(np.asarray(cn.layer_norm(x)), cn.layer_norm(np.asarray(x)))


# --- the semantics of torch ---------------------------------------------------------------------

# Shapes of torch's own OpInfo for layer_norm and native_layer_norm.
OPINFO = [((1, 2, 3), (1, 2, 3)), ((2, 2, 3), (2, 3)), ((1,), (1,)), ((1, 2), (2,)), ((0, 1), (1,))]


@pytest.mark.parametrize(("shape", "normalized_shape"), OPINFO)
def test_torch_semantics(lib, shape, normalized_shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    x, weight, bias = (rng.uniform(-3, 3, s) for s in (shape, normalized_shape, normalized_shape))
    ours = [lib.array(a) for a in (x, weight, bias)]
    theirs = [torch.tensor(a, dtype=torch.float32) for a in (x, weight, bias)]
    for eps in (1e-5, 0.5, -0.5):
        for with_weight, with_bias in itertools.product((True, False), repeat=2):
            result, want = (
                call(
                    arrays[0],
                    normalized_shape,
                    arrays[1] if with_weight else None,
                    arrays[2] if with_bias else None,
                    eps,
                )
                for call, arrays in (
                    (functools.partial(cn.layer_norm, return_stats=True), ours),
                    (torch.native_layer_norm, theirs),
                )
            )
            for got, value in zip(result, want, strict=True):
                assert tuple(got.shape) == tuple(value.shape)
                np.testing.assert_allclose(lib.to_numpy(got), value.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [5, 64, 1000])
def test_torch_dtype_rules(dtype, n):
    torch = pytest.importorskip("torch")
    x = (torch.randn(6, n, generator=torch.Generator().manual_seed(n)) * 2 + 1).to(
        getattr(torch, dtype)
    )
    want = torch.nn.functional.layer_norm(x, (n,))
    got = cn.layer_norm(x, (n,))
    assert got.dtype == want.dtype
    bound = 2 * torch.finfo(x.dtype).eps if dtype != "float32" else 1e-5
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


# --- any shape, any strides ---------------------------------------------------------------------


@st.composite
def calls(draw, dtypes=("float16", "float32", "float64"), max_side=9):
    """A NumPy array with drawn shape and strides, and axes in drawn order."""
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(0 if ndim > 1 else 1, max_side)) for _ in range(ndim))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    turned = draw(st.permutations(range(ndim)))
    whole = [0] * ndim
    for place, axis in enumerate(turned):
        whole[place] = max(shape[axis] * abs(steps[axis]), 1)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scale, offset = draw(st.sampled_from([1.0, 1e-3, 30.0])), draw(st.sampled_from([0.0, 2.0]))
    dtype = draw(st.sampled_from(dtypes))
    base = (rng.standard_normal(whole) * scale + offset).astype(dtype)
    x = base.transpose(np.argsort(turned))
    x = x[tuple(slice(None, None, step) for step in steps)]
    x = x[tuple(slice(0, n) for n in shape)]
    axes = draw(st.permutations(range(ndim)))[: draw(st.integers(1, ndim))]
    axes = tuple(a - ndim if draw(st.booleans()) else a for a in axes)
    return types.SimpleNamespace(
        x=x,
        axis=axes,
        affine=[
            rng.standard_normal([x.shape[a] for a in axes]).astype(draw(st.sampled_from(dtypes)))
            if draw(st.booleans())
            else None
            for _ in range(2)
        ],
        eps=draw(st.sampled_from([1e-5, 1e-12, 0.1])),
        order=draw(st.sampled_from("KCF")),
    )


def check_against_oracle(call, y, mean, rstd):
    """Compare a drawn call with the oracle; error is measured against the largest term of a row."""
    named = tuple(a % call.x.ndim for a in call.axis)
    turn = np.argsort(named)
    weight, bias = (None if a is None else a.transpose(turn) for a in call.affine)
    n = math.prod(call.x.shape[a] for a in named)
    if not call.x.size:
        assert y.shape == call.x.shape
        return
    want = oracle.layer_norm(call.x, tuple(sorted(named)), weight, bias, call.eps)
    dtype = str(call.x.dtype)
    for got, value, kind in zip(
        (y, mean, rstd), want, (dtype, stats_dtype(dtype), stats_dtype(dtype)), strict=True
    ):
        assert got.dtype == kind
        bound = oracle.tolerance(kind, n)
        np.testing.assert_allclose(
            got.astype(np.float64), value, rtol=bound, atol=bound * max(1, np.abs(value).max())
        )


@pytest.mark.needs("numpy")
@given(call=calls())
@settings(max_examples=150)
def test_any_numpy_call_agrees_with_the_oracle(lib, call):
    before = call.x.copy()
    result = cn.layer_norm(
        call.x, None, *call.affine, call.eps, axis=call.axis, order=call.order, return_stats=True
    )
    check_against_oracle(call, *result)
    np.testing.assert_array_equal(call.x, before)
    want = {
        "K": np.empty_like(call.x).strides,
        "C": np.empty(call.x.shape, call.x.dtype).strides,
        "F": np.empty(call.x.shape, call.x.dtype, order="F").strides,
    }[call.order]
    assert result.y.strides == want
    inplace = before.copy(order="K")
    cn.layer_norm(inplace, None, *call.affine, call.eps, axis=call.axis, out=inplace)
    np.testing.assert_array_equal(inplace, result.y)


@given(data=st.data())
@settings(max_examples=15)
def test_any_call_agrees_with_the_oracle(lib, data):
    dtypes = (
        ["float32"] if lib.backend.compiles else [d for d in lib.backend.dtypes if d != "bfloat16"]
    )
    call = data.draw(calls(dtypes=dtypes, max_side=5 if lib.backend.compiles else 9))
    call.x = call.x.copy()  # of positive strides, as torch wants them
    affine = [None if a is None else lib.from_numpy(a.copy()) for a in call.affine]
    result = cn.layer_norm(
        lib.from_numpy(call.x), None, *affine, call.eps, axis=call.axis, return_stats=True
    )
    check_against_oracle(call, *(lib.to_numpy(a) for a in result))
