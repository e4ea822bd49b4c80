"""What a user of `cn.layer_norm_backward` sees, in every array library."""

import inspect
import itertools
import math

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import np_dtype

RNG = np.random.default_rng(20260105)
X3 = RNG.standard_normal((4, 6, 10)) * 2 + 1
DY3 = RNG.standard_normal((4, 6, 10)) + 0.5
EVERY = (True, True, True)


def stats_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def named_axes(x, normalized_shape, axis):
    """In the caller's order, as NumPy counts them."""
    if axis is not None:
        return tuple(int(a) % x.ndim for a in (axis if isinstance(axis, (tuple, list)) else [axis]))
    length = 1 if normalized_shape is None else np.size(normalized_shape)
    return tuple(range(x.ndim - length, x.ndim))


def backward(dy, x, normalized_shape=None, weight=None, *, axis=None, eps=1e-5, output_mask=None):
    """The gradients with the statistics that the forward returns."""
    _, mean, rstd = cn.layer_norm(
        x, normalized_shape, weight, None, eps, axis=axis, return_stats=True
    )
    return cn.layer_norm_backward(
        dy, x, normalized_shape, mean, rstd, weight, axis=axis, output_mask=output_mask
    )


def check(lib, grads, dy, x, normalized_shape=None, weight=None, *, axis=None, eps=1e-5):
    """Compare with the oracle, which takes ascending axes."""
    named = named_axes(x, normalized_shape, axis)
    turn = tuple(np.argsort(named))
    host = [None if a is None else lib.to_numpy(a) for a in (*grads, dy, x, weight)]
    dx, dweight, dbias, dy, x, weight = host
    got = [dx, *(None if a is None else a.transpose(turn) for a in (dweight, dbias))]
    weight = None if weight is None else weight.transpose(turn)
    oracle.assert_gradients(got, dy, x, tuple(sorted(named)), weight, eps)


def both(lib, dtype="float32"):
    return lib.array(DY3, dtype), lib.array(X3, dtype)


# --- the call -----------------------------------------------------------------------------------


def test_the_call_begins_as_torchs():
    torch = pytest.importorskip("torch")
    ours = inspect.signature(cn.layer_norm_backward).parameters
    schema = str(torch.ops.aten.native_layer_norm_backward.default._schema)
    theirs = ["grad_out", "input", "normalized_shape", "mean", "rstd", "weight"]
    places = [
        schema.index(f" {name}") if i else schema.index(name) for i, name in enumerate(theirs)
    ]
    assert places == sorted(places)
    assert list(ours)[:6] == ["dy", "x", *theirs[2:]]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[6:])


def test_the_result_is_a_named_tuple(lib):
    dy, x = both(lib)
    grads = backward(dy, x, axis=(0, 2), weight=lib.array(np.ones((4, 10))))
    assert isinstance(grads, cn.LayerNormGradients)
    assert grads._fields == ("dx", "dweight", "dbias")
    assert [tuple(a.shape) for a in grads] == [(4, 6, 10), (4, 10), (4, 10)]
    assert all(type(a) is type(x) for a in grads)


@pytest.mark.parametrize("normalized_shape", [None, 10, np.int64(10), [10], (6, 10), (4, 6, 10)])
def test_normalized_shape(lib, normalized_shape):
    dy, x = both(lib)
    shape = X3.shape[-(np.size(normalized_shape) if normalized_shape is not None else 1) :]
    weight = lib.array(RNG.standard_normal(shape))
    grads = backward(dy, x, normalized_shape, weight)
    check(lib, grads, dy, x, normalized_shape, weight)


@pytest.mark.parametrize(
    "axis",
    [0, 1, -1, np.int32(1), [1], (-2, -1), (0, 2), *itertools.permutations(range(3)), (2, -3)],
)
def test_axis_and_the_order_of_weight(lib, axis):
    dy, x = both(lib)
    shape = tuple(X3.shape[a] for a in named_axes(X3, None, axis))
    weight = lib.array(RNG.standard_normal(shape))
    grads = backward(dy, x, axis=axis, weight=weight)
    assert tuple(grads.dweight.shape) == tuple(grads.dbias.shape) == shape
    check(lib, grads, dy, x, axis=axis, weight=weight)
    plain = backward(dy, x, axis=axis, output_mask=EVERY)
    assert tuple(plain.dweight.shape) == shape
    check(lib, plain, dy, x, axis=axis)


def test_one_element_rows(lib):
    """Nothing in y depends on x, whose x_hat is zero."""
    dy, x = lib.array([[2.0], [3.0]]), lib.array([[1.0], [7.0]])
    dx, dweight, dbias = (lib.to_numpy(a).tolist() for a in backward(dy, x, 1, output_mask=EVERY))
    assert (dx, dweight, dbias) == ([[0.0], [0.0]], [0.0], [5.0])


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_dtypes(lib, dtype, weighted):
    """dweight and dbias have weight's dtype; without it that of the statistics."""
    dy, x = both(lib, dtype)
    weight = lib.array(RNG.standard_normal(10), dtype) if weighted else None
    grads = backward(dy, x, 10, weight, output_mask=EVERY)
    totals = dtype if weighted else stats_dtype(dtype)
    assert [lib.dtype(a) for a in grads] == [dtype, totals, totals]
    check(lib, grads, dy, x, 10, weight)


def test_weight_of_another_dtype(lib, dtype):
    dy, x = both(lib, dtype)
    others = ("float32",) if lib.backend.compiles else lib.backend.dtypes
    for other in others:
        weight = lib.array(RNG.standard_normal(10), other)
        grads = backward(dy, x, 10, weight)
        assert [lib.dtype(a) for a in grads] == [dtype, other, other]
        check(lib, grads, dy, x, 10, weight)


# --- what is wanted -----------------------------------------------------------------------------


def test_without_weight_there_is_no_dweight(lib):
    dy, x = both(lib)
    grads = backward(dy, x)
    assert grads.dweight is None
    check(lib, grads, dy, x)


def test_output_mask(lib):
    dy, x = both(lib)
    weight = lib.array(RNG.standard_normal(10))
    masks = list(itertools.product((True, False), repeat=3))
    if lib.backend.compiles:
        masks = [(True, False, False), (False, True, True), (False, False, False)]
    whole = [lib.to_numpy(a) for a in backward(dy, x, 10, weight)]
    for mask in masks:
        for given in (mask, list(mask), tuple(np.bool_(m) for m in mask)):
            grads = backward(dy, x, 10, weight, output_mask=given)
            assert [a is not None for a in grads] == list(mask)
            for got, want in zip(grads, whole, strict=True):
                if got is not None:
                    np.testing.assert_array_equal(lib.to_numpy(got), want)


# --- emptiness, NaN, eps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 4), -1), ((4, 0), -1), ((0,), 0), ((2, 0, 3), 1), ((2, 0, 3), (2, 1)), ((0, 0), (0, 1))],
)
def test_nothing_in_nothing_out(lib, shape, axis):
    """dx as empty as x; the sum over no rows is zero."""
    dy, x = lib.array(np.empty(shape)), lib.array(np.empty(shape))
    named = named_axes(x, None, axis)
    weight = lib.array(np.ones([shape[a] for a in named]))
    for w in (weight, None):
        grads = backward(dy, x, axis=axis, weight=w, output_mask=EVERY)
        assert tuple(grads.dx.shape) == shape
        for total in grads[1:]:
            assert tuple(total.shape) == tuple(weight.shape)
            assert not lib.to_numpy(total).any()
        assert all(type(a) is type(x) for a in grads)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_inf_spoil_their_row_and_column_only(lib, bad, axis):
    """Where they stand in dy: that row of dx, and that element of dweight and dbias."""
    slopes = RNG.standard_normal((7, 7))
    x = lib.array(RNG.standard_normal((7, 7)))

    def gradients():
        return [
            lib.to_numpy(a) for a in backward(lib.array(slopes), x, axis=axis, output_mask=EVERY)
        ]

    clean = gradients()
    slopes[3, 5] = bad
    got = gradients()
    row, column = ((slice(None), 5), 3) if axis == 0 else ((3, slice(None)), 5)
    rest = np.ones((7, 7), bool)
    rest[row] = False
    assert not np.isfinite(got[0][row]).any()
    np.testing.assert_array_equal(got[0][rest], clean[0][rest])
    for total, was in zip(got[1:], clean[1:], strict=True):
        assert not np.isfinite(total[column])
        np.testing.assert_array_equal(np.delete(total, column), np.delete(was, column))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_in_x_leave_other_rows_and_dbias(lib, bad):
    values = RNG.standard_normal((7, 9))
    dy = lib.array(RNG.standard_normal((7, 9)))
    clean = [lib.to_numpy(a) for a in backward(dy, lib.array(values), output_mask=EVERY)]
    values[2, 4] = bad
    dx, dweight, dbias = (
        lib.to_numpy(a) for a in backward(dy, lib.array(values), output_mask=EVERY)
    )
    assert np.isnan(dx[2]).all()
    np.testing.assert_array_equal(np.delete(dx, 2, 0), np.delete(clean[0], 2, 0))
    assert np.isnan(dweight).all()
    np.testing.assert_array_equal(dbias, clean[2])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5, 100])
def test_eps_comes_through_rstd(lib, eps):
    dy, x = both(lib)
    check(lib, backward(dy, x, eps=eps), dy, x, eps=float(eps))


# --- layouts ------------------------------------------------------------------------------------


def laid_out(lib, values, layout):
    """The same values in memory of another order."""
    if layout == "sliced":
        return lib.array(np.repeat(values, 2, axis=2))[:, :, ::2]
    if layout == "turned":
        turned = lib.array(np.ascontiguousarray(values.transpose(1, 2, 0)))
        return turned.permute(2, 0, 1) if hasattr(turned, "permute") else turned.transpose(2, 0, 1)
    return lib.array(np.asarray(values, order=layout))


@pytest.mark.needs("strided")
@pytest.mark.parametrize("axis", [0, 2, (1, 2)])
@pytest.mark.parametrize(("dy_layout", "x_layout"), [
    ("F", "C"), ("C", "F"), ("F", "F"), ("sliced", "turned"), ("turned", "sliced"),
])  # fmt: skip
def test_layouts_of_dy_and_x(lib, dy_layout, x_layout, axis):
    """Whatever they are, the values are the same, and dx is laid out as layer_norm(x) would be."""
    dy, x = laid_out(lib, DY3, dy_layout), laid_out(lib, X3, x_layout)
    weight = lib.array(RNG.standard_normal([X3.shape[a] for a in named_axes(X3, None, axis)]))
    grads = backward(dy, x, axis=axis, weight=weight)
    check(lib, grads, dy, x, axis=axis, weight=weight)
    assert tuple(lib.strides(grads.dx)) == tuple(lib.strides(cn.layer_norm(x, axis=axis)))


@pytest.mark.needs("strided")
def test_broadcast_dy_and_strided_companions(lib):
    """As y.sum() gives it: one number for all; and mean, rstd, weight that are slices."""
    x = lib.array(X3)
    one = lib.array(np.full((1, 1, 1), 0.75))
    dy = one.expand(4, 6, 10) if hasattr(one, "expand") else broadcast(lib, one, (4, 6, 10))
    weight = lib.array(np.repeat(RNG.standard_normal(10), 2))[::2]
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    wide = [lib.array(np.repeat(lib.to_numpy(a), 3, axis=1))[:, ::3] for a in (mean, rstd)]
    grads = cn.layer_norm_backward(dy, x, None, *wide, weight)
    check(lib, grads, lib.array(np.full(X3.shape, 0.75)), x, None, weight)


def broadcast(lib, a, shape):
    if lib.backend.numpy:
        return np.broadcast_to(a, shape)
    import cupy

    return cupy.broadcast_to(a, shape)


def test_inputs_are_left_alone(lib):
    dy, x = both(lib)
    weight = lib.array(RNG.standard_normal(10))
    _, mean, rstd = cn.layer_norm(x, 10, weight, return_stats=True)
    inputs = (dy, x, mean, rstd, weight)
    before = [lib.to_numpy(a).copy() for a in inputs]
    cn.layer_norm_backward(dy, x, 10, mean, rstd, weight)
    for was, now in zip(before, inputs, strict=True):
        np.testing.assert_array_equal(was, lib.to_numpy(now))


# --- NumPy arrays of every kind -----------------------------------------------------------------

KINDS = {
    "big-endian": lambda v: v.astype(v.dtype.newbyteorder(">")),
    "unaligned": lambda v: np.frombuffer(b"\0" + v.tobytes(), v.dtype, offset=1).reshape(v.shape),
    "negative strides": lambda v: np.flip(np.flip(v).copy()),
    "every second column": lambda v: np.repeat(v, 2, axis=-1)[..., ::2],
    "window": lambda v: np.pad(v, 3)[(slice(3, -3),) * v.ndim],
}


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_numpy_arrays_of_every_kind(lib, dtype, kind, axis):
    """Read-only or not, of any alignment and byte order."""
    plain = [RNG.standard_normal((33, 17)).astype(np_dtype(dtype)) for _ in range(2)]
    shape = [plain[0].shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))]
    plain.append(RNG.standard_normal(shape).astype(np_dtype(dtype)))
    dy, x, weight = (KINDS[kind](a) for a in plain)
    for a in (dy, x, weight):
        a.flags.writeable = False
    _, mean, rstd = cn.layer_norm(plain[1], axis=axis, return_stats=True)
    want = cn.layer_norm_backward(*plain[:2], None, mean, rstd, plain[2], axis=axis)
    grads = cn.layer_norm_backward(
        dy, x, None, KINDS[kind](mean), KINDS[kind](rstd), weight, axis=axis
    )
    check(lib, grads, dy, x, axis=axis, weight=weight)
    assert grads.dx.dtype == x.dtype
    assert all(a.flags.writeable for a in grads)
    for got, value in zip(grads, want, strict=True):
        np.testing.assert_array_equal(got, value)


def test_broadcast_x():
    """dx of rows that share memory does not."""
    x = np.broadcast_to(X3[0, 0].astype(np.float32), (5, 10))
    dy = DY3[0, :5].astype(np.float32)
    grads = backward(dy, x)
    oracle.assert_gradients(grads, dy, x, (1,))
    assert all(s for s in grads.dx.strides)


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("shape", [(3001, 129), (3, 200_003)])
def test_numpy_bits_do_not_depend_on_the_number_of_threads(lib, dtype, monkeypatch, shape):
    dy, x = (lib.array(RNG.standard_normal(shape), dtype) for _ in range(2))
    results = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", str(threads))
        results.append([a.tobytes() for a in backward(dy, x, output_mask=EVERY)])
    assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.needs("same_bits")
@pytest.mark.parametrize("n", [1, 7, 64, 250, 1000])
def test_bits_of_a_row_of_dx_are_those_of_the_row_alone(lib, n):
    values, slopes = RNG.standard_normal((40, n)) + 3, RNG.standard_normal((40, n))
    only_dx = (True, False, False)

    def dx(part):
        dy, x = lib.array(slopes[part]), lib.array(values[part])
        return lib.to_numpy(backward(dy, x, output_mask=only_dx).dx)

    whole = dx(slice(None))
    for i in (0, 13, 39):
        np.testing.assert_array_equal(dx(i), whole[i])
    np.testing.assert_array_equal(dx(slice(3, 20)), whole[3:20])


# --- independent of every formula ---------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_central_differences_of_the_forward(lib, axis):
    """The slope of sum(y * dy), in float64, for every element of x, weight and bias."""
    if "float64" not in lib.backend.dtypes:
        pytest.skip("no float64")
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    shape = [x.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))]
    values = [x, rng.standard_normal(shape), rng.standard_normal(shape)]

    def loss(*arrays):
        x, weight, bias = (lib.array(a, "float64") for a in arrays)
        y = cn.layer_norm(x, None, weight, bias, 1e-3, axis=axis)
        return float((lib.to_numpy(y) * dy).sum())

    x, weight = (lib.array(a, "float64") for a in values[:2])
    grads = backward(lib.array(dy, "float64"), x, axis=axis, weight=weight, eps=1e-3)
    h = 1e-5  # the error of a central difference is of order h**2, that of rounding of eps / h
    for which, gradient in enumerate(grads):
        slopes = np.empty(values[which].shape)
        for i in np.ndindex(slopes.shape):
            ends = []
            for step in (h, -h):
                moved = [a.copy() for a in values]
                moved[which][i] += step
                ends.append(loss(*moved))
            slopes[i] = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(lib.to_numpy(gradient), slopes, rtol=1e-7, atol=1e-8)


# --- beside torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_autograd_of_torch_gives_the_same(lib, eps):
    torch = pytest.importorskip("torch")
    weight, bias = RNG.standard_normal((6, 10)), RNG.standard_normal((6, 10))
    leaves = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (X3, weight, bias)]
    y = torch.nn.functional.layer_norm(leaves[0], (6, 10), *leaves[1:], eps)
    want = torch.autograd.grad(y, leaves, torch.tensor(DY3, dtype=torch.float32))
    dy, x = both(lib)
    got = backward(dy, x, (6, 10), lib.array(weight), eps=eps)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(lib.to_numpy(mine), theirs.numpy(), rtol=2e-5, atol=2e-5)


def test_torch_itself_may_differentiate_the_backward():
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a[0, :3], requires_grad=True) for a in (DY3, X3)]
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64, requires_grad=True)

    def gradients(dy, x, weight):
        return tuple(backward(dy, x, 10, weight))

    assert torch.autograd.gradcheck(gradients, (*leaves, weight))


# --- tracing ------------------------------------------------------------------------------------


def test_jax_jit():
    jax = pytest.importorskip("jax")
    dy, x, weight = (
        jax.numpy.asarray(a, dtype="float32") for a in (DY3, X3, RNG.standard_normal((4, 6)))
    )
    _, mean, rstd = cn.layer_norm(x, axis=(0, 1), return_stats=True)

    def call(*arrays):
        return cn.layer_norm_backward(*arrays[:2], None, *arrays[2:], axis=(0, 1))

    got = jax.jit(call)(dy, x, mean, rstd, weight)
    assert isinstance(got, cn.LayerNormGradients)
    want = [np.asarray(a) for a in (dy, x, weight)]
    oracle.assert_gradients([np.asarray(a) for a in got], *want[:2], (0, 1), want[2])


def test_dask_stays_lazy():
    da = pytest.importorskip("dask.array")
    dy, x = (a[0].astype(np.float32) for a in (DY3, X3))
    grads = backward(*(da.from_array(a, chunks=(2, 10)) for a in (dy, x)), output_mask=EVERY)
    assert all(isinstance(a, da.Array) for a in grads)
    oracle.assert_gradients([a.compute() for a in grads], dy, x, (1,))


def test_many_rows_are_summed_without_a_long_chain(lib):
    """30,000 slopes near 1: a chain of float32 would lose some hundred units of the last place."""
    if lib.backend.compiles:
        pytest.skip("tests/test_kernels_bwd.py, with fewer rows")
    rows = 30_000
    dy, x = (lib.array(RNG.standard_normal((rows, 3)) + m) for m in (1, 0))
    _, _, dbias = backward(dy, x)
    exact = lib.to_numpy(dy).astype(np.float64).sum(0)
    assert np.abs(lib.to_numpy(dbias) - exact).max() <= math.log2(rows) * 2.0**-24 * exact.max()
