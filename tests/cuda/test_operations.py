"""Operations other than layer norm through every kernel family, of CuPy arrays."""

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import np_dtype
from tests.cuda.rows import length
from tests.cuda.test_arrays import FORWARD, LENGTHS, numbers

ADDS = {True: (cn.add_layer_norm, cn.layer_norm), False: (cn.add_rms_norm, cn.rms_norm)}
SUMS = [  # each family; a warp's rows of float32 in whole vectors
    *(("warp", True, "float32"), ("block", False, "float32"), ("split", True, "float32")),
    *(("shared", True, "bfloat16"), ("cluster", False, "float32"), ("warp", False, "bfloat16")),
]
# Each family with one value of a flag, and the next one with the other.
IN_TURN = [(family, i % 2 == 0) for i, family in enumerate(FORWARD)]


def near(found, expected, dtype, N):
    bound = oracle.tolerance(np_dtype(dtype), N)
    np.testing.assert_allclose(
        found.get().astype(np.float64), expected, rtol=bound, atol=bound * np.abs(expected).max()
    )


@pytest.mark.parametrize(("family", "unit"), IN_TURN)
def test_rms_norm(cp, family, unit):
    """y and rstd; at any address it is another kernel with the same bits."""
    N, dtype = LENGTHS["forward"][family]
    N += -N % 4 * unit  # whole vectors, or not
    x, w = numbers(3, N), numbers(N)
    X, W = cp.asarray(x), cp.asarray(w)
    how = {"eps": 1e-3, "zero_centered_weight": unit, "return_stats": True}
    y, rstd = cn.rms_norm(X, weight=W, **how)
    expected, _, of_rows = oracle.layer_norm(x, (1,), w.astype(float) + unit, None, 1e-3, False)
    near(y, expected, dtype, N)
    near(rstd, of_rows, "float32", N)
    shifted = cp.empty(3 * N + 1, dtype="float32")[1:].reshape(3, N)
    shifted[...] = X
    assert cn.rms_norm(shifted, weight=W, **how)[0].get().tobytes() == y.get().tobytes()


@pytest.mark.parametrize(("family", "unit"), [(f, not flag) for f, flag in IN_TURN])
def test_rms_norm_backward(cp, family, unit):
    """dx with and without what flows into the sum from elsewhere, and dweight."""
    N, dtype = LENGTHS["backward"][family]
    dy, x, dsum, w = (numbers(*s, dtype=dtype) for s in ((3, N), (3, N), (3, N), (N,)))
    DY, X, DSUM, W = map(cp.asarray, (dy, x, dsum, w))
    how = {"zero_centered_weight": unit}
    rstd = cp.asarray(oracle.layer_norm(x, (1,), None, None, 1e-5, False)[2].astype(dtype))
    dx, dweight = cn.rms_norm_backward(DY, X, None, rstd, W, **how)
    factor = w.astype(float) + unit
    exact = oracle.layer_norm_backward(dy, x, (1,), factor, 1e-5, center=False)
    scales = oracle.gradient_scales(dy, x, (1,), factor, 1e-5, center=False)
    bound = oracle.gradient_tolerance(dtype, N)
    for found, want, scale in zip((dx, dweight), exact, scales, strict=False):
        assert (np.abs(found.get() - want) <= 4 * bound * scale).all()
    more, again = cn.rms_norm_backward(DY, X, None, rstd, W, dsum=DSUM, **how)
    assert again.get().tobytes() == dweight.get().tobytes()
    assert (np.abs(more.get() - exact[0] - dsum) <= 4 * bound * (scales[0] + np.abs(dsum))).all()


@pytest.mark.parametrize(("family", "center", "dtype"), SUMS)
def test_a_sum_has_the_bits_of_two_calls(cp, family, center, dtype):
    """The sum is written once, also over the residual and at any address; y over x."""
    fused, alone = ADDS[center]
    N = length(family, dtype) if family != "split" else LENGTHS["forward"]["split"][0]
    N += (family, dtype) == ("warp", "float32")
    x, r = (numbers(3, N).astype(np_dtype(dtype)) for _ in range(2))
    total = (x.astype(np.float32) + r.astype(np.float32)).astype(x.dtype)
    X, R, W = cp.asarray(x), cp.asarray(r), cp.asarray(numbers(N))
    how = {"weight": W, "eps": 1e-5} | ({"bias": W} if center else {})
    expected = alone(cp.asarray(total), **how).get().tobytes()
    y, s = fused(X, R, **how)
    assert not hasattr(cp, "simulator") or f"_{family}_" in cp.simulator.launches[-1].name
    assert (s.get().tobytes(), y.get().tobytes()) == (total.tobytes(), expected)
    y, s, *stats = fused(X, R, **how, out=X, sum_out=R, return_stats=True)
    assert y is X and s is R and len(stats) == 1 + center
    assert (R.get().tobytes(), X.get().tobytes()) == (total.tobytes(), expected)


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_a_sum_over_any_axes_and_in_float32(cp, axis):
    """Where columns are strided through copies; a wider residual takes a copy of x and of y."""
    x, r = numbers(4, 6, 10).astype(np.float16), numbers(4, 6, 10)
    for residual in (r.astype(np.float16), r):
        y, s = cn.add_rms_norm(cp.asarray(x), cp.asarray(residual), axis=axis, eps=1e-5)
        total = (x.astype(np.float32) + residual.astype(np.float32)).astype(residual.dtype)
        assert (y.dtype, s.get().tobytes()) == (x.dtype, total.tobytes())
        axes = axis if isinstance(axis, tuple) else (axis,)
        near(y, oracle.layer_norm(total, axes, None, None, 1e-5, False)[0], "float16", 24)
