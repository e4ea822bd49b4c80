"""Arrays of any shape and any strides, drawn, against the oracle."""

import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupynorm as cn
from tests import oracle
from tests.directions import backward, check, stats_dtype


@st.composite
def calls(draw, dtypes=("float16", "float32", "float64"), max_side=9):
    """A NumPy array with drawn shape and strides, and axes in drawn order."""
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(0 if ndim > 1 else 1, max_side)) for _ in range(ndim))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in shape]
    turned = draw(st.permutations(range(ndim)))
    whole = [max(shape[axis] * abs(steps[axis]), 1) for axis in turned]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale, offset = draw(st.sampled_from([1.0, 1e-3, 30.0])), draw(st.sampled_from([0.0, 2.0]))
    base = (rng.standard_normal(whole) * scale + offset).astype(draw(st.sampled_from(dtypes)))
    x = base.transpose(np.argsort(turned))[tuple(slice(None, None, step) for step in steps)]
    x = x[tuple(slice(0, n) for n in shape)]
    axes = draw(st.permutations(range(ndim)))[: draw(st.integers(1, ndim))]
    axes = tuple(a - ndim if draw(st.booleans()) else a for a in axes)
    length = [x.shape[a] for a in axes]
    affine = [
        rng.standard_normal(length).astype(draw(st.sampled_from(dtypes)))
        if draw(st.booleans())
        else None
        for _ in range(2)
    ]
    eps, order = draw(st.sampled_from([1e-5, 1e-12, 0.1])), draw(st.sampled_from("KCF"))
    dy = np.empty_like(x, order=draw(st.sampled_from("KCF")))
    dy[...] = rng.standard_normal(shape)
    return types.SimpleNamespace(x=x, dy=dy, axis=axes, affine=affine, eps=eps, order=order)


def agree_with_the_oracle(lib, call):
    """A drawn call; error is measured against the largest term of a row. The result."""
    x, *affine = (a if a is None else lib.from_numpy(a) for a in (call.x, *call.affine))
    about = {"axis": call.axis, "order": call.order, "return_stats": True}
    result = cn.layer_norm(x, None, *affine, call.eps, **about)
    if not call.x.size:
        assert tuple(result.y.shape) == call.x.shape
        return result
    named = tuple(a % call.x.ndim for a in call.axis)
    weight, bias = (None if a is None else a.transpose(np.argsort(named)) for a in call.affine)
    n = math.prod(call.x.shape[a] for a in named)
    want = oracle.layer_norm(call.x, tuple(sorted(named)), weight, bias, call.eps)
    sums = stats_dtype(str(call.x.dtype))
    for got, value, kind in zip(result, want, (call.x.dtype, sums, sums), strict=True):
        host, bound = lib.to_numpy(got), oracle.tolerance(kind, n)
        assert host.dtype == kind
        atol = bound * max(1, np.abs(value).max())
        np.testing.assert_allclose(host.astype(np.float64), value, rtol=bound, atol=atol)
    return result


@pytest.mark.needs("numpy")
@given(call=calls())
@settings(max_examples=150)
def test_any_numpy_call_agrees_with_the_oracle(lib, call):
    before = call.x.copy()
    result = agree_with_the_oracle(lib, call)
    np.testing.assert_array_equal(call.x, before)
    assert result.y.strides == np.empty_like(call.x, order=call.order).strides
    inplace = before.copy(order="K")
    cn.layer_norm(inplace, None, *call.affine, call.eps, axis=call.axis, out=inplace)
    np.testing.assert_array_equal(inplace, result.y)
    if call.x.size:
        about = {"weight": call.affine[0], "axis": call.axis, "eps": call.eps}
        check(lib, backward(call.dy, call.x, **about), call.dy, call.x, **about)


@pytest.mark.needs("not_numpy", "same_bits")  # JAX would compile each shape
@given(data=st.data())
@settings(max_examples=15)
def test_any_call_agrees_with_the_oracle(lib, data):
    some = [d for d in lib.backend.dtypes if d != "bfloat16"]
    narrow = {"dtypes": ["float32"], "max_side": 5} if lib.backend.compiles else {"dtypes": some}
    call = data.draw(calls(**narrow))
    # Of positive strides, as torch wants them; and of the order that every library knows.
    call.x, call.order = call.x.copy(), "K"
    call.affine = [a if a is None else a.copy() for a in call.affine]
    agree_with_the_oracle(lib, call)
