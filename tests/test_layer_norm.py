"""What a user of `layer_norm` and of `layer_norm_backward` sees, in every array library."""

import inspect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype, why_not
from tests.cpu.layouts import LAYOUTS
from tests.directions import axes_of, backward, check, each_direction, laid_out, run, stats_dtype

RNG = np.random.default_rng(20260102)
X3 = RNG.standard_normal((4, 6, 10)) * 2 + 1
DY3 = RNG.standard_normal((4, 6, 10)) + 0.5


@pytest.mark.parametrize("backend", Backend, ids=lambda b: b.value)
def test_backend_is_here(backend):
    if reason := why_not(backend):
        pytest.skip(reason)


def test_signatures_begin_as_torchs():
    torch = pytest.importorskip("torch")
    ours = inspect.signature(cn.layer_norm).parameters
    theirs = inspect.signature(torch.nn.functional.layer_norm).parameters
    assert list(ours)[1:5] == list(theirs)[1:5]
    assert ours["eps"].default == theirs["eps"].default
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[5:])
    ours = inspect.signature(cn.layer_norm_backward).parameters
    schema = torch.ops.aten.native_layer_norm_backward.default._schema
    names = [a.name for a in schema.arguments]
    wanted = ["grad_out", "input", "normalized_shape", "mean", "rstd", "weight"]
    assert [n for n in names if n in wanted] == wanted
    assert list(ours)[:6] == ["dy", "x", *wanted[2:]]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[6:])


SHAPES = [None, 10, np.int64(10), (10,), [10], (6, 10), [6, 10], (4, 6, 10)]
AXES = [0, 1, 2, -1, -2, -3, np.int32(1), (0,), [1], (-2, -1), (0, 2), (2, 0), (-1, 1), (2, -3),
        *itertools.permutations(range(3))]  # fmt: skip
HOWS = [{"normalized_shape": s} for s in SHAPES] + [{"axis": a} for a in AXES]


@each_direction
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_normalized_shape_and_axis(lib, direction, how):
    """Weight, bias and their gradients follow the order in which axes are named."""
    if lib.backend is Backend.JAX and not any(how is some for some in HOWS[::6]):
        pytest.skip("each is compiled anew; axes are resolved alike for all libraries")
    dy, x = lib.array(DY3), lib.array(X3)
    shape = tuple(X3.shape[a] for a in axes_of(3, **how))
    weight, bias = lib.array(RNG.standard_normal(shape)), lib.array(RNG.standard_normal(shape))
    for affine in ((weight, bias), (None, None))[: 1 if lib.backend.compiles else 2]:
        found = run(direction, dy, x, *affine, **how)
        check(lib, found, dy, x, *affine, **how)
        if direction.endswith("backward"):
            assert {tuple(total.shape) for total in found[1:]} == {shape}


@each_direction
@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias"])
def test_dtype_and_affine(lib, dtype, direction, affine):
    """dweight and dbias have weight's dtype; without it that of the statistics."""
    if lib.backend.compiles and (affine in ("weight", "bias") or dtype in ("float16", "float64")):
        pytest.skip("each dtype through the front door in test_calls, each kernel in tests/cuda")
    dy, x = lib.array(DY3, dtype), lib.array(X3, dtype)
    weight = lib.array(RNG.standard_normal(10), dtype) if "weight" in affine else None
    bias = lib.array(RNG.standard_normal(10), dtype) if "bias" in affine else None
    found = run(direction, dy, x, weight, bias, normalized_shape=10)
    backward = direction.endswith("backward")
    sums = dtype if backward and weight is not None else stats_dtype(dtype)
    assert [lib.dtype(a) for a in found] == [dtype, *[sums] * (len(found) - 1)]
    assert all(type(a) is type(x) for a in found)
    check(lib, found, dy, x, weight, bias)


@each_direction
@pytest.mark.parametrize(
    "eps", [0.0, 0, 1, 100, 1e-300, 1e-12, 0.5, 1e30, np.float32(1e-3), Fraction(1, 8)]
)
def test_eps(lib, direction, eps):
    dy, x = lib.array(DY3), lib.array(X3)
    check(lib, run(direction, dy, x, eps=eps), dy, x, eps=eps)


def test_eps_where_the_variance_is_zero_or_less_is_ieee(lib):
    def of(eps, *rows):
        y, _, rstd = cn.layer_norm(lib.array(rows), eps=eps, return_stats=True)
        return lib.to_numpy(y), lib.to_numpy(rstd)

    y, rstd = of(0.0, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert np.isnan(y[0]).all() and np.isposinf(rstd[0]).all()
    assert np.isfinite(y[1]).all()
    y, rstd = of(-1.0, [1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert np.isnan(y[0]).all() and np.isnan(rstd[0]).all()
    want = np.array([-10, 0, 10.0]) / math.sqrt(200 / 3 - 1)
    np.testing.assert_allclose(y[1], want, rtol=1e-6)


@each_direction
def test_the_result_is_a_named_tuple(lib, direction):
    dy, x, weight = lib.array(DY3), lib.array(X3), lib.array(np.ones((4, 10)))
    found = run(direction, dy, x, weight, axis=(0, 2))
    if direction.endswith("forward"):
        fields, small = ("y", "mean", "rstd"), (1, 6, 1)
        norm = cn.rms_norm if "rms" in direction else cn.layer_norm
        y = norm(x, weight=weight, axis=(0, 2), eps=1e-5)  # statistics change no bit of it
        np.testing.assert_array_equal(lib.to_numpy(found.y), lib.to_numpy(y))
    else:
        fields, small = ("dx", "dweight", "dbias"), (4, 10)
    if "rms" in direction:
        assert found._fields == tuple(f for f in fields if f not in ("mean", "dbias"))
    else:
        assert isinstance(found, (cn.LayerNormResult, cn.LayerNormGradients))
        assert found._fields == fields
    assert [tuple(a.shape) for a in found] == [(4, 6, 10), *[small] * (len(found) - 1)]


@pytest.mark.needs("strided")
@pytest.mark.parametrize("layout", ["C", "F", "sliced", "turned"])
@pytest.mark.parametrize("order", ["K", "C", "F"])
def test_order_sets_the_layout_of_y(lib, layout, order):
    x = laid_out(lib, X3, layout)
    y = cn.layer_norm(x, 10, order=order)
    want = oracle.layer_norm(lib.to_numpy(x), (2,), None, None, 1e-5)[0]
    oracle.assert_close(lib.to_numpy(y), want, 10)
    kept = {"C": (60, 10, 1), "F": (1, 4, 24), "sliced": (60, 10, 1), "turned": (1, 40, 4)}[layout]
    assert tuple(lib.strides(y)) == {"K": kept, "C": (60, 10, 1), "F": (1, 4, 24)}[order]


@pytest.mark.needs("strided")
@pytest.mark.parametrize("axis", [0, 2, (1, 2)])
@pytest.mark.parametrize(("dy_layout", "x_layout"), [
    ("F", "C"), ("C", "F"), ("F", "F"), ("sliced", "turned"), ("turned", "sliced"),
])  # fmt: skip
def test_layouts_of_dy_and_x(lib, dy_layout, x_layout, axis):
    """Whatever they are, the values are the same, and dx is laid out as layer_norm(x) would be."""
    dy, x = laid_out(lib, DY3, dy_layout), laid_out(lib, X3, x_layout)
    weight = lib.array(RNG.standard_normal([X3.shape[a] for a in axes_of(3, axis=axis)]))
    grads = backward(dy, x, axis=axis, weight=weight)
    check(lib, grads, dy, x, weight, axis=axis)
    assert tuple(lib.strides(grads.dx)) == tuple(lib.strides(cn.layer_norm(x, axis=axis)))


def test_numpy_out_beside_x_in_its_memory():
    """Interleaved with x; in place through another view in cpu/test_rows."""
    board = np.zeros((4, 20), np.float32)
    x, out = board[:, ::2], board[:, 1::2]
    x[...] = X3[0, :4]
    want = oracle.layer_norm(x, (1,), None, None, 1e-5)[0]
    cn.layer_norm(x, out=out)
    np.testing.assert_array_equal(x, X3[0, :4].astype(np.float32))
    oracle.assert_close(out, want, 10)


NOTHING = [((0, 4), -1), ((4, 0), -1), ((0,), 0), ((2, 0, 3), 1)]
NOTHING += [((2, 0, 3), (2, 1)), ((0, 0), (0, 1))]


@each_direction
@pytest.mark.parametrize(("shape", "axis"), NOTHING)
def test_nothing_in_nothing_out(lib, direction, shape, axis):
    """Statistics of nothing are NaN; the sum over no rows is zero."""
    length = [shape[a] for a in axes_of(len(shape), axis=axis)]
    x = lib.array(np.empty(shape))
    for weight in (lib.array(np.ones(length)), None):
        first, *others = run(direction, x, x, weight, axis=axis)
        assert tuple(first.shape) == shape and all(type(a) is type(x) for a in (first, *others))
        for a in map(lib.to_numpy, others):
            small = [1 if k in axes_of(x.ndim, axis=axis) else n for k, n in enumerate(shape)]
            back = direction.endswith("backward")
            assert list(a.shape) == (length if back else small)
            assert not a.any() if back else np.isnan(a).all()
    if lib.backend.writable:
        assert cn.layer_norm(x, axis=axis, out=x) is x


@each_direction
@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 250, 1000, 1025, 4097, 40_001])
def test_rows_of_every_length_have_their_bits_wherever_they_stand(lib, direction, n):
    """Alone, and in memory of any layout; a GPU's kernel for strided columns has its own order."""
    if lib.backend.compiles and n not in (7, 250):
        pytest.skip("more of them in cuda/test_rows")
    if lib.backend is Backend.JAX and n not in (1, 9, 1025):
        pytest.skip("each is compiled anew, from the same sums")
    hosts = RNG.standard_normal((2, 12, n))
    hosts[1] += 3

    def of(*given, **named):
        return lib.to_numpy(run(direction, *given, **named)[0])

    given = [lib.array(a) for a in hosts]
    check(lib, run(direction, *given), *given)
    if not lib.backend.same_bits:
        return
    want = of(*given)
    for part in (0, 5, 11, slice(3, 9)):
        np.testing.assert_array_equal(of(*(lib.array(a[part]) for a in hosts)), want[part])
    padded, twice = (
        [lib.array(f(a)) for a in hosts]
        for f in (lambda a: np.pad(a, ((0, 0), (2, 3))), lambda a: np.repeat(a, 2, axis=1))
    )
    turned = [lib.array(np.ascontiguousarray(a.T)) for a in hosts]
    found = [of(*(a[:, 2:-3] for a in padded))] if lib.backend.strided else []
    if not lib.backend.tile_for_columns:
        found.append(of(*turned, axis=0).T)
        if lib.backend.strided:
            found += [of(*(a.T for a in turned)), of(*(a[:, ::2] for a in twice))]
    for a in found:
        np.testing.assert_array_equal(a, want)


@pytest.mark.needs("unstrided")
@pytest.mark.parametrize("n", [3, 768, 20_000])
def test_constant_rows_and_squares_that_have_no_room(lib, n):
    """By the array API; compiled loops in cpu/test_rows."""
    for value in (1e-20, 1.0, 3e8 + 32, 1e18, 3e38):
        y, mean, _ = cn.layer_norm(lib.array(np.full((2, n), value)), return_stats=True)
        assert not lib.to_numpy(y).any()
        np.testing.assert_array_equal(lib.to_numpy(mean), np.float32(value))
    spike, wave = np.zeros(n), 1e19 * (-1.0) ** np.arange(n)
    spike[1] = 5e18 * n**0.5  # the variance is 2.5e37, the square of this n times as large
    for x in (lib.array([spike, -spike]), lib.array([wave, -wave])):
        found = cn.layer_norm(x, return_stats=True)[::2]
        wanted = oracle.layer_norm(lib.to_numpy(x), (1,), None, None, 1e-5)[::2]
        for a, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(lib.to_numpy(a), want, rtol=1e-5)


def test_torch_itself_may_differentiate_the_backward():
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a[0, :3], requires_grad=True) for a in (DY3, X3)]
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64, requires_grad=True)

    def gradients(dy, x, weight):
        return tuple(backward(dy, x, 10, weight))

    assert torch.autograd.gradcheck(gradients, (*leaves, weight))


# Shapes, and the axes to normalize: of strips, of several strides, of rows in chunks.
SPREAD = [((33, 17), a) for a in (0, 1, (0, 1))] + [((2, 9000), 1), ((4, 6, 40), (2, 1))]
SPREAD += [((3, 5, 4, 18), a) for a in (1, (0, 2), (1, 3), (0, 1, 2))]


@pytest.mark.needs("numpy")
@each_direction
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_arrays_of_every_kind(lib, dtype, direction, layout):
    """The bits of plain arrays, whatever the memory; results are plain, and can be written.

    But for sums over rows, which may be added in another order.
    """
    norm, gradients = cn.layer_norm, cn.layer_norm_backward
    if "rms" in direction:
        norm, gradients = cn.rms_norm, cn.rms_norm_backward
    lay, forward = LAYOUTS[layout], direction.endswith("forward")
    for shape, axis in SPREAD:
        lengths = [shape[a] for a in axes_of(len(shape), axis=axis)]
        plain = [RNG.standard_normal(s).astype(np_dtype(dtype)) for s in (shape, shape, lengths)]
        plain += norm(plain[1], axis=axis, eps=1e-5, return_stats=True)[1:]

        def results(dy, x, weight, *stats, axis=axis):
            if forward:
                return norm(x, weight=weight, axis=axis, eps=1e-5, return_stats=True)
            return gradients(dy, x, None, *stats, weight, axis=axis)

        want, made = results(*plain), [lay(a) for a in plain]
        found = results(*made)
        assert found[0].dtype == made[1].dtype
        assert all(type(a) is np.ndarray and a.flags.writeable for a in found)
        exact = len(want) if forward else 1
        for got, value in zip(found[:exact], want, strict=forward):
            np.testing.assert_array_equal(got, value, str((shape, axis)))
        if layout == "C" or not all(map(np.array_equal, found, want)):
            check(lib, found, *plain[:3], axis=axis)
        for pair in () if forward else ((made[0], plain[1]), (plain[0], made[1])):
            dx = results(*pair, *plain[2:])[0]
            np.testing.assert_array_equal(dx, want[0], str((shape, axis)))
