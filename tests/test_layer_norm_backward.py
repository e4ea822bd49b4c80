"""What is special to `layer_norm_backward`: masks, layouts of dy, and proofs by other means."""

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.directions import EVERY, axes_of, backward, check, laid_out

RNG = np.random.default_rng(20260105)
X3 = RNG.standard_normal((4, 6, 10)) * 2 + 1
DY3 = RNG.standard_normal((4, 6, 10)) + 0.5


# --- what is wanted -----------------------------------------------------------------------------


# --- NaN, Inf -----------------------------------------------------------------------------------


# --- layouts ------------------------------------------------------------------------------------


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


@pytest.mark.needs("strided")
def test_broadcast_dy_and_strided_companions(lib):
    """As y.sum() gives it: one number for all; and mean, rstd, weight that are slices."""
    x, dy = lib.array(X3), lib.array(np.full((1, 1, 1), 0.75))
    if lib.backend.numpy:
        dy = np.broadcast_to(dy, X3.shape)
    elif hasattr(dy, "expand"):
        dy = dy.expand(*X3.shape)
    else:
        import cupy

        dy = cupy.broadcast_to(dy, X3.shape)
    weight = lib.array(np.repeat(RNG.standard_normal(10), 2))[::2]
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    wide = [lib.array(np.repeat(lib.to_numpy(a), 3, axis=1))[:, ::3] for a in (mean, rstd)]
    grads = cn.layer_norm_backward(dy, x, None, *wide, weight)
    check(lib, grads, lib.array(np.full(X3.shape, 0.75)), x, weight)


# --- independent of every formula ---------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_central_differences_of_the_forward(lib, axis):
    """The slope of sum(y * dy), in float64, for every element of x, weight and bias."""
    if "float64" not in lib.backend.dtypes:
        pytest.skip("no float64")
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    shape = [x.shape[a] for a in axes_of(3, axis=axis)]
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


def test_torch_itself_may_differentiate_the_backward():
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a[0, :3], requires_grad=True) for a in (DY3, X3)]
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64, requires_grad=True)

    def gradients(dy, x, weight):
        return tuple(backward(dy, x, 10, weight))

    assert torch.autograd.gradcheck(gradients, (*leaves, weight))


def test_dask_stays_lazy():
    da = pytest.importorskip("dask.array")
    dy, x = (a[0].astype(np.float32) for a in (DY3, X3))
    grads = backward(*(da.from_array(a, chunks=(2, 10)) for a in (dy, x)), output_mask=EVERY)
    assert all(isinstance(a, da.Array) for a in grads)
    oracle.assert_gradients([a.compute() for a in grads], dy, x, (1,))
