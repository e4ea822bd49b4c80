"""The row kernels on inputs that break careless ones: offsets, scales, constants, NaN, huge."""

import numpy as np
import pytest

from cupynorm._cuda import plan as _plan
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._problem import Problem
from tests import oracle
from tests.conftest import np_dtype
from tests.gpu_backend import ON_EACH_MACHINE
from tests.row_cases import FAMILIES, affine, check, device_for, far_rows, length, run, values
from tests.row_kernels import At, Rows, run_plan

pytestmark = ON_EACH_MACHINE


# --- hard inputs --------------------------------------------------------------------------------


def kernel_error(result, x):
    """Largest error of y over the largest |y| of its row, in float32 epsilons."""
    y = oracle.layer_norm(x, (1,), None, None, 1e-5)[0]
    worst = np.abs(result.y.astype(np.float64) - y).max(1) / np.abs(y).max(1)
    return worst.max() / 2.0**-23


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_past_N_stay_out_of_the_variance(machine, family):
    """Registers past the last column hold zeros, and (0 - mean)^2 is not zero.

    One lane that counts would move a variance of 1 around a mean of 1000 by a thousandth or more.
    """
    widest = length(family, "float32")
    for N in (widest, widest - 1, widest - 2, widest - 100):
        x = values(2, N, scale=1.0, offset=1000.0)
        rstd = oracle.layer_norm(x, (1,), None, None, 1e-5)[2][:, 0]
        np.testing.assert_allclose(run(machine, family, x).rstd, rstd, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offset", [1e2, 1e4, -1e6])
def test_a_common_offset_costs_no_digit(machine, family, offset):
    """The float32 values near 1e6 are coarse, but the kernel normalizes exactly those."""
    x = values(2, length(family, "float32"), scale=1.0, offset=offset)
    assert kernel_error(run(machine, family, x), x) < 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e6, 1e18])
def test_scales(machine, family, scale):
    x = values(2, length(family, "float32"), scale=scale, offset=0.0)
    assert kernel_error(run(machine, family, x), x) < 6


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outlier_whose_square_overflows(machine, family):
    """1e20 squared is beyond float32, the variance of a row that holds one such value is not."""
    x = values(2, length(family, "float32"))
    x[0, 0], x[1, -1] = 1e20, -1e20
    result = run(machine, family, x)
    assert np.isfinite(result.rstd).all()
    assert kernel_error(result, x) < 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_constant_rows(machine, family, dtype):
    """Variance 0 exactly: y is the bias, and no rounding of the mean shows through rstd."""
    N = length(family, dtype)
    constants = np.array([0.0, 0.1, -3e4, 65504.0]).astype(np_dtype(dtype))
    x, (_, bias) = np.repeat(constants[:, None], N, axis=1), affine(N)
    result = run(machine, family, x, np.ones(N, np.float32), bias)
    np.testing.assert_array_equal(result.mean, constants.astype(np.float32))
    np.testing.assert_allclose(result.rstd, 1e-5**-0.5, rtol=1e-6)
    want = np.broadcast_to(bias.astype(x.dtype), x.shape).astype(np.float64)
    np.testing.assert_allclose(result.y.astype(np.float64), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_near_its_maximum(machine, family):
    N = length(family, "float16")
    x = np.where(
        np.random.default_rng(N).random((3, N)) < 0.5, 65504.0, [[-65504.0], [65472.0], [0.0]]
    )
    x = x.astype(np.float16)
    check(run(machine, family, x), x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_spoil_their_row_only(machine, family, spoiler):
    x = values(9, length(family, "float32"))
    clean = run(machine, family, x).bits()
    x[4, -1] = spoiler
    x[7, 0] = spoiler
    result = run(machine, family, x)
    assert np.isnan(result.y[[4, 7]]).all()
    assert np.isnan(result.rstd[[4, 7]]).all()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert [result.bits()[i] for i in others] == [clean[i] for i in others]


# --- huge ---------------------------------------------------------------------------------------


def test_sections_of_several_chunks(machine, monkeypatch):
    """What a row of more than 512 chunks takes, with a limit of 4 instead."""
    monkeypatch.setattr(_plan, "MAX_SECTIONS", 4)
    monkeypatch.setattr("tests.row_kernels.choose_plan", _plan.choose_plan.__wrapped__)
    for chunks in (4, 5, 9, 11):
        N = (chunks * CHUNK_VECS - 1) * VEC_BYTES // 4 + 1
        x, (weight, bias) = values(2, N, offset=1e5, scale=1.0), affine(N)
        result = run(machine, "split", x, weight, bias, x_at=At(1), y_at=At(3, 2))
        assert result.plan.chunks_per_section == -(-chunks // 4)
        check(result, x, weight, bias)


def test_more_sections_than_threads(machine):
    """A thread of the second kernel then merges several sections before the tree."""
    N = 300 * CHUNK_VECS * 4 + 5
    x, (weight, bias) = values(1, N, scale=1.0), affine(N)
    result = run(machine, "split", x, weight, bias)
    assert result.plan.sections == 301
    check(result, x, weight, bias)


@pytest.mark.parametrize("family", [*FAMILIES, "cluster"])
@pytest.mark.parametrize("outer", [1, 2])
def test_rows_more_than_2_to_31_elements_apart(machine, family, outer):
    """Offsets of rows are 64-bit: two rows of x, and of y, with a hole of addresses between.

    (A row of more than 2**31 columns would need its memory; K5's column offsets are 64-bit too.)
    """
    N, size = length(family, "float16"), 2
    x, (weight, bias) = values(2, N, "float16"), affine(N)
    expected = run(machine, family, x, weight, bias)
    far = [far_rows(machine, name, N * size) for name in ("x", "y")]
    strides = []
    for first, second in far:
        step = (second.ptr - first.ptr) // size
        assert abs(step) > 2**31
        strides.append((step, 0, 1) if outer == 2 else (0, step, 1))
    for memory, row in zip(far[0], x, strict=True):
        machine.put(memory, row)
    w, b = (Rows(machine, name, np.float32, (1, 1, N), At()) for name in ("weight", "bias"))
    w.put(weight[None])
    b.put(bias[None])
    problem = Problem(
        "layer_norm_fwd", "float16", "float32", "float32", outer, 2 // outer, N, *strides, False
    )
    plan = _plan.choose_plan(problem, device_for(machine, family))
    pointers = [far[0][0].ptr, far[1][0].ptr, w.ptr, b.ptr, 0, 0]
    memories = [*far[0], *far[1], w.memory, b.memory]
    run_plan(machine, plan, problem, pointers, memories)
    got = [machine.get(memory).view(np.float16) for memory in far[1]]
    np.testing.assert_array_equal(got, expected.y)
