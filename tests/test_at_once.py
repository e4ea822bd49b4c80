"""Calls that skip the ordinary way: taken where nothing is special, with its bits and refusals."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from cupynorm import functional, gradient
from cupynorm._cpu import arrays as _cpu

KINDS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# One row, few, a row in chunks, rows that threads share, chunks that they share, several axes.
SHAPES = [((1, 7), 1), ((5, 100), 1), ((3, 9000), 1), ((3000, 256), 1), ((2, 300001), 1),
          ((4, 6, 80), 2)]  # fmt: skip


@pytest.fixture(autouse=True)
def _numba():
    pytest.importorskip("numba")


def values(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


@pytest.fixture
def at_once_alone(monkeypatch):
    """The ordinary way is closed; a call that is answered was answered at once."""

    def closed(*_):
        pytest.fail("took the ordinary way")

    def close():
        monkeypatch.setattr(functional, "check_arguments", closed)
        monkeypatch.setattr(gradient, "check_arguments", closed)

    return close


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_forward_has_the_bits_of_the_ordinary_way(kind, shape, axes, at_once_alone):
    x, N = values(shape, KINDS[kind]), shape[-axes:]
    weight, bias = values(N, KINDS[kind], 1), values(N, KINDS[kind], 2)
    affine = list(itertools.product((weight, None), (bias, None)))
    # order="C" goes the ordinary way, and says the same of a row-major x.
    want = [cn.layer_norm(x, N, *wb, 1e-3, order="C", return_stats=True) for wb in affine]
    at_once_alone()
    for wb, (y, mean, rstd) in zip(affine, want, strict=True):
        got = cn.layer_norm(x, N, *wb, 1e-3, return_stats=True)
        assert all(map(same_bits, got, (y, mean, rstd)))
        assert same_bits(cn.layer_norm(x, N, *wb, 1e-3), y)
        out = np.empty_like(x)
        assert cn.layer_norm(x, N, *wb, 1e-3, out=out) is out
        assert same_bits(out, y)
        out[...] = x
        cn.layer_norm(out, N, *wb, 1e-3, out=out)
        assert same_bits(out, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_backward_has_the_bits_of_the_ordinary_way(kind, shape, axes, at_once_alone):
    x, dy, N = values(shape, KINDS[kind]), values(shape, KINDS[kind], 3), shape[-axes:]
    _, mean, rstd = cn.layer_norm(x, N, return_stats=True)
    weight = values(N, mean.dtype, 1)
    masks = list(itertools.product((True, False), repeat=3))
    calls = [(w, m) for w in (weight, None) for m in masks]
    arguments = dy, x, N, mean, rstd
    # A mask that is a list goes the ordinary way.
    want = [cn.layer_norm_backward(*arguments, w, output_mask=list(m)) for w, m in calls]
    if np.prod(N) <= 32768:  # beyond, x and dy are read twice, which no call does at once
        at_once_alone()
    for (w, m), gradients in zip(calls, want, strict=True):
        got = cn.layer_norm_backward(*arguments, w, output_mask=m)
        for a, b, asked in zip(got, gradients, m, strict=True):
            assert (a is None) == (b is None) == (not asked)
            assert a is None or same_bits(a, b)
    whole = cn.layer_norm_backward(*arguments, weight)
    assert all(
        map(same_bits, whole, cn.layer_norm_backward(*arguments, weight, output_mask=(True,) * 3))
    )


def test_a_weight_of_another_dtype_goes_the_ordinary_way_and_is_right():
    x = values((5, 100), np.float32)
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        weight = values(100, dtype, 1)
        want = cn.layer_norm(x, 100) * weight.astype(np.float32)
        np.testing.assert_allclose(cn.layer_norm(x, 100, weight), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [4, 3000])
def test_out_that_overlaps_is_refused(kind, rows):
    """The compiled code, or the look at a copied weight, sees it; nothing is written."""
    N, dtype = 256, KINDS[kind]
    memory = values((rows + 2) * N, dtype)
    before = memory.copy()
    table = memory[: rows * N].reshape(rows, N)
    weight = values(N, dtype, 1)
    with pytest.raises(ValueError, match="shares memory"):
        cn.layer_norm(memory[N : (rows + 1) * N].reshape(rows, N), N, out=table)
    x = values((rows, N), dtype, 2)
    for part in (memory[:N], memory[(rows - 1) * N + 5 : rows * N + 5]):
        with pytest.raises(ValueError, match="shares memory"):
            cn.layer_norm(x, N, part, out=table)
        with pytest.raises(ValueError, match="shares memory"):
            cn.layer_norm(x, N, weight, part, out=table)
    assert same_bits(memory, before)
    beside = memory[rows * N : (rows + 1) * N]  # begins where out ends
    assert same_bits(cn.layer_norm(x, N, beside, out=table), cn.layer_norm(x, N, beside.copy()))


def test_without_numba_nothing_is_at_once():
    x = values((5, 100), np.float32)
    with _cpu.without_numba():
        y, mean, rstd = cn.layer_norm(x, 100, return_stats=True)
        dx = cn.layer_norm_backward(x, x, 100, mean, rstd).dx
    np.testing.assert_allclose(y, cn.layer_norm(x, 100), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        dx, cn.layer_norm_backward(x, x, 100, mean, rstd).dx, rtol=1e-5, atol=1e-5
    )


WRONG = {
    "mean of another shape": {"mean": np.zeros(5, np.float32)},
    "rstd in float64": {"rstd": np.ones((5, 1))},
    "dy of another dtype": {"dy": np.ones((5, 100))},
    "weight of another shape": {"weight": np.ones(99, np.float32)},
    "no mask": {"output_mask": (True, True)},
    "a mask of numbers": {"output_mask": (1, 1, 1)},
}


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_backward_refuses_what_the_ordinary_way_refuses(changed):
    x = values((5, 100), np.float32)
    _, mean, rstd = cn.layer_norm(x, 100, return_stats=True)
    good = {"dy": x, "x": x, "normalized_shape": 100, "mean": mean, "rstd": rstd}
    cn.layer_norm_backward(**good)
    with pytest.raises((TypeError, ValueError)):
        cn.layer_norm_backward(**good | changed)


# --- torch --------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    found = pytest.importorskip("torch")
    cn.layer_norm(found.ones(2, 3))  # from here on the type is known
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_at_once(torch, kind, at_once_alone):
    dtype = getattr(torch, kind)
    x = torch.randn(6, 100, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(2, 100, dtype=torch.float64).to(dtype)
    want = cn.layer_norm(x, 100, weight, bias, order="C")
    bare = cn.layer_norm(x, order="C")
    at_once_alone()
    for shape in (100, (100,)):
        assert torch.equal(cn.layer_norm(x, shape, weight, bias), want)
        out = torch.empty_like(x)
        assert cn.layer_norm(x, shape, weight, bias, out=out) is out
        assert torch.equal(out, want)
    for axis in ({}, {"axis": -1}, {"axis": (-1,)}):
        assert torch.equal(cn.layer_norm(x, **axis), bare)
    assert torch.equal(cn.layer_norm(x, out=x), bare)


def test_tensors_that_the_ordinary_way_takes(torch):
    """Each is right, or is refused as it was."""
    x = torch.randn(6, 100)
    want = cn.layer_norm(x, order="C")
    assert torch.equal(cn.layer_norm(x.T.contiguous().T), want)
    assert torch.equal(cn.layer_norm(x, axis=1), want)
    out = torch.empty(100, 6).T
    assert torch.equal(cn.layer_norm(x, out=out), want)
    assert torch.equal(cn.layer_norm(x, return_stats=True)[0], want)
    leaf = x.clone().requires_grad_()
    cn.layer_norm(leaf).sum().backward()
    assert leaf.grad is not None
    memory = torch.randn(700)
    before = memory.clone()
    with pytest.raises(ValueError, match="shares memory"):
        cn.layer_norm(memory[:600].view(6, 100), out=memory[50:650].view(6, 100))
    with pytest.raises(ValueError, match="shares memory"):
        cn.layer_norm(x, 100, memory[550:650], out=memory[:600].view(6, 100))
    assert torch.equal(memory, before)
    half = memory.to(torch.float16)
    before = half.clone()
    for name in ("weight", "bias"):  # of which the loops have a copy
        with pytest.raises(ValueError, match="shares memory"):
            cn.layer_norm(x.half(), 100, out=half[:600].view(6, 100), **{name: half[550:650]})
    assert torch.equal(half, before)
    cn.layer_norm(x, 100)
    cn.layer_norm(x, 100, eps=1.0)
    bad = [{"axis": True}, {"axis": (-1.0,)}, {"normalized_shape": 100, "axis": 1},
           {"normalized_shape": 99}, {"normalized_shape": (100.0,)},
           {"normalized_shape": 100, "eps": True}]  # fmt: skip
    for arguments in bad:
        with pytest.raises((TypeError, ValueError)):
            cn.layer_norm(x, **arguments)
    with pytest.raises((TypeError, ValueError)):
        cn.layer_norm(x, out=torch.empty(6, 100, dtype=torch.float64))
