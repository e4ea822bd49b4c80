"""RMS norm and the fused adds: what they have beside layer norm, and how others define them.

Shapes, axes, dtypes, layouts, bits and arguments: the bodies of test_layer_norm and test_errors.
"""

import itertools

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype
from tests.directions import laid_out, stats_dtype

BACKENDS = [b for b in Backend if b is not Backend.CUPY_SIMULATED]  # cuda/test_operations.py
RNG = np.random.default_rng(20261130)
X3, R3, DY3 = RNG.standard_normal((3, 4, 6, 10)) * 2 + 1
WEIGHT, BIAS = RNG.standard_normal((2, 10))
NORMS = {  # the fused call by the one that normalizes, and what both take
    cn.add_layer_norm: (cn.layer_norm, {"weight": WEIGHT, "bias": BIAS}),
    cn.add_rms_norm: (cn.rms_norm, {"weight": WEIGHT, "eps": 1e-5}),
}


def same(lib, got, want):
    for a, b in zip(got, want, strict=True):
        assert lib.dtype(a) == lib.dtype(b)
        np.testing.assert_array_equal(lib.to_numpy(a), lib.to_numpy(b))


def cast(lib, a, dtype):
    return lib.from_numpy(lib.to_numpy(a).astype(np_dtype(dtype)))


def test_a_zero_centered_weight_is_one_plus_it(lib, dtype):
    """The bits of 1 + weight in the dtype of the statistics."""
    x, dy, weight = (lib.array(a, dtype) for a in (X3, DY3, WEIGHT))
    whole = lib.from_numpy(1 + lib.to_numpy(weight).astype(stats_dtype(dtype)))
    got = cn.rms_norm(x, 10, weight, return_stats=True, zero_centered_weight=True)
    same(lib, got, cn.rms_norm(x, 10, whole, return_stats=True))
    grads = cn.rms_norm_backward(dy, x, 10, got.rstd, weight, zero_centered_weight=True)
    want = cn.rms_norm_backward(dy, x, 10, got.rstd, whole)
    same(lib, grads, (want.dx, cast(lib, want.dweight, dtype)))
    fused = cn.add_rms_norm(x, x, 10, weight, zero_centered_weight=True)
    same(lib, fused, cn.add_rms_norm(x, x, 10, whole))


@pytest.mark.parametrize("layout", ["C", "F", "sliced"])
@pytest.mark.parametrize("axis", [2, 1, (0, 2)])
def test_dsum_is_added_before_dx_is_rounded(lib, dtype, axis, layout):
    if layout != "C" and not lib.backend.strided:
        pytest.skip("no layouts")
    x, dy, dsum = (laid_out(lib, a, layout, dtype) for a in (X3, DY3, R3))
    wide = stats_dtype(dtype)
    for norm, backward in (
        (cn.layer_norm, cn.layer_norm_backward),
        (cn.rms_norm, cn.rms_norm_backward),
    ):
        _, *stats = norm(x, axis=axis, eps=1e-5, return_stats=True)
        got = backward(dy, x, None, *stats, axis=axis, dsum=dsum)
        exact = backward(cast(lib, dy, wide), cast(lib, x, wide), None, *stats, axis=axis).dx
        want = lib.to_numpy(exact) + lib.to_numpy(dsum).astype(wide)
        want = want.astype(np_dtype(dtype)).astype(np.float64)
        bound = 0 if lib.backend.numpy else oracle.tolerance(dtype, 60)  # libraries may fuse
        got = lib.to_numpy(got.dx).astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


def test_long_rows_take_dsum():
    """Past the columns that are read twice, and past those that one thread does."""
    for shape in ((3, 40_000), (600, 1_000)):
        dy, x, dsum = RNG.standard_normal((3, *shape)).astype(np.float32)
        _, rstd = cn.rms_norm(x, return_stats=True)
        plain = cn.rms_norm_backward(dy, x, None, rstd)
        got = cn.rms_norm_backward(dy, x, None, rstd, dsum=dsum)
        np.testing.assert_array_equal(got.dx, plain.dx + dsum)
        oracle.assert_gradients((*plain, None), dy, x, (1,), None, 2.0**-23, center=False)


@pytest.mark.parametrize("n", [7, 5000, 70_000])
def test_neither_large_nor_small_squares_are_lost(lib, n):
    """On every path as far as docs/numerics.md says."""
    rows = np.clip(RNG.standard_normal((3, n)), -3, 3)
    sizes = {"float32": (1e-14, 1e18), "float64": (1e-140, 1e150)}
    if lib.backend.numpy:
        sizes = {"float32": (1e-30, 1e-18, 1e25, 1e38), "float64": (1e-300, 1e-200, 1e200, 1e307)}
    for dtype in sizes.keys() & set(lib.backend.dtypes):
        for size in sizes[dtype]:
            x = lib.array(rows * size, dtype)
            zero = lib.array(rows * 0, dtype)
            for center, (y, *_, rstd) in (
                (False, cn.rms_norm(x, eps=0.0, return_stats=True)),
                (False, cn.add_rms_norm(x, zero, eps=0.0, return_stats=True)),
                (True, cn.layer_norm(x, eps=0.0, return_stats=True)),
            ):
                host = lib.to_numpy(x)
                want, _, of = oracle.layer_norm(host, (1,), None, None, 0.0, center=center)
                bound = oracle.tolerance(dtype, n)
                np.testing.assert_allclose(lib.to_numpy(y), want, rtol=bound, atol=bound)
                np.testing.assert_allclose(lib.to_numpy(rstd), of, rtol=bound)


@pytest.mark.parametrize("n", [4, 20_000])
@pytest.mark.parametrize("axis", [0, 1])
def test_beside_an_infinite_element_all_are_zero(lib, axis, n):
    x = np.ones((2, n), np.float32)
    x[1, 2] = np.inf
    x = x if axis else x.T
    y, rstd = cn.rms_norm(lib.array(x), axis=axis, return_stats=True)
    want = oracle.layer_norm(x, (axis,), None, None, 2.0**-23, center=False)
    np.testing.assert_allclose(lib.to_numpy(y), want[0], rtol=1e-6)
    np.testing.assert_allclose(lib.to_numpy(rstd), want[2], rtol=1e-6)


@pytest.mark.parametrize("fused", NORMS)
def test_an_add_has_the_bits_of_the_two_calls(lib, dtype, fused):
    elsewhere = dtype == "float16" or (fused is cn.add_rms_norm and dtype == "float64")
    if lib.backend is Backend.NUMPY and elsewhere:
        pytest.skip("compiled for these in the next tests, and in torch/test_operations.py")
    norm, given = NORMS[fused]
    given = {k: lib.array(v) if k != "eps" else v for k, v in given.items()}
    layouts = ("C", "F", "sliced") if lib.backend.strided else ("C",)
    for of_sum in {dtype, "float32"} if dtype.endswith("16") else {dtype}:
        for first, second in itertools.product(layouts, repeat=2):
            x, residual = laid_out(lib, X3, first, dtype), laid_out(lib, R3, second, of_sum)
            total = cast(lib, x, of_sum) + residual
            y, *stats = norm(total, 10, return_stats=True, **given)
            want = cast(lib, y, dtype), total, *stats
            got = fused(x, residual, 10, return_stats=True, **given)
            assert got._fields == ("y", "sum", *[f for f in ("mean", "rstd") if hasattr(got, f)])
            if lib.backend.same_bits and not lib.name.startswith("torch"):  # which adds by itself
                same(lib, got, want)
            same(lib, fused(x, residual, 10, **given), got[:2])
            if lib.backend.writable:  # each in the place of what it comes from
                again = fused(x, residual, 10, out=x, sum_out=residual, **given)
                assert again.y is x and again.sum is residual
                same(lib, again, got[:2])


@pytest.mark.needs("numpy")
@pytest.mark.parametrize("fused", NORMS)
@pytest.mark.parametrize("shape", [(700, 1000), (3, 9001), (2, 70_000), (70, 33)])
def test_large_adds(lib, fused, shape):
    """Strips over threads, long rows, chunks of rows; of either layout, and bytes swapped."""
    norm, _ = NORMS[fused]
    pairs = ("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")
    if shape == (2, 70_000):  # of functions of its own for each: one operation with each
        pairs = pairs[:1] if fused is cn.add_layer_norm else pairs[1:]
    for dtype, of_sum in pairs:
        x, residual = (a.astype(np_dtype(dtype)) for a in RNG.standard_normal((2, *shape)))
        residual = residual.astype(np_dtype(of_sum))
        total = x.astype(np_dtype(of_sum)) + residual
        y = norm(total).astype(np_dtype(dtype))
        makers = [np.copy, lambda a: a.copy(order="F")]
        makers += [lambda a: a.astype(a.dtype.newbyteorder(">"))] * (dtype != "bfloat16")
        for a, b in itertools.product(makers, repeat=2):
            same(lib, fused(a(x), b(residual)), (y, total))
            given = a(x), b(residual)
            fused(*given, out=given[0], sum_out=given[1])
            same(lib, given, (y, total))


@pytest.mark.needs("numpy")
def test_results_may_not_meet(lib):
    board = np.ones((8, 10), np.float32)
    x, residual, apart = board[:4], board[4:], np.ones((4, 10), np.float32)
    for words, given in (
        ("out shares memory with x in part", {"out": board[1:5]}),
        ("out shares memory with residual in part", {"out": board[3:7], "x": apart}),
        ("sum_out shares memory with x in part", {"sum_out": board[1:5]}),
        ("sum_out shares memory with residual in part", {"sum_out": board[2:6], "x": apart}),
        ("out shares memory with sum_out", {"out": apart, "sum_out": apart}),
        ("out shares memory with sum_out", {"out": residual, "sum_out": residual}),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            cn.add_rms_norm(**{"x": x, "residual": residual} | given)
    half = np.ones((4, 20), np_dtype("bfloat16"))[:, ::2]  # whose strides are those of float32
    wide = half.base.view(np.float32)
    with pytest.raises(ValueError, match=r"^out shares memory with residual"):
        cn.add_rms_norm(np.ones((4, 10), half.dtype), wide, out=half)


def test_explained():
    x = np.ones((64, 768), np.float16)
    of = cn.explain(x, op="add_rms_norm", residual=x.astype(np.float32), return_stats=True)
    assert (of.op, of.bytes_floor) == ("add_rms_norm", 64 * (768 * (2 + 4 + 4 + 2) + 4))
    assert "mean of squares" in str(of)
    back = cn.explain(x, 768, np.ones(768, np.float16), op="rms_norm", backward=True)
    assert back.bytes_floor == 64 * 768 * 2 * 3 + 768 * 2 * 2 + 64 * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torchs_own_cases(dtype):
    """Of its operators' tests: values, and gradients by autograd through our calls."""
    pytest.importorskip("expecttest")  # which torch's tests import
    torch = pytest.importorskip("torch")
    from torch.testing._internal.common_methods_invocations import op_db

    kind = getattr(torch, dtype)
    (found,) = (op for op in op_db if op.name == "nn.functional.rms_norm")
    cases = list(found.sample_inputs("cpu", kind, requires_grad=True))
    assert len(cases) > 5
    for case in cases:
        x, (shape, *weight) = case.input, case.args
        results = []
        for function in (cn.rms_norm, torch.nn.functional.rms_norm):
            y = function(x, shape, *weight, **case.kwargs)
            slope = torch.linspace(-1, 1, y.numel(), dtype=kind).view_as(y)
            leaves = [t for t in (x, *weight) if t is not None]
            results.append((y, *torch.autograd.grad(y, leaves, slope)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_onnxs_node_tests():
    pytest.importorskip("onnx")
    from onnx.backend.test.case import node
    from onnx.backend.test.case.node import rmsnormalization  # noqa: F401  # adds its cases

    cases = [c for c in node._NodeTestCases if c.model.graph.node[0].op_type == "RMSNormalization"]
    assert len(cases) >= 19
    for case in cases:
        how = {a.name: a.f or a.i for a in case.model.graph.node[0].attribute}
        ((x, weight), (y,)) = case.data_sets[0]
        axes = tuple(range(x.ndim))[how.get("axis", -1) :]
        got = cn.rms_norm(x, None, weight, how.get("epsilon", 1e-5), axis=axes)
        np.testing.assert_allclose(got, y, rtol=case.rtol, atol=case.atol)
