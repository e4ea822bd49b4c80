"""The NumPy path forward: with numba's loops and in plain blocks, every layout and value."""

import itertools
import warnings

import ml_dtypes
import numpy as np
import pytest

from tests import oracle
from tests.cpu import door
from tests.cpu.layouts import LAYOUTS, guarded, same_bits, values

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", BF16, "float32", "float64"]


def normalize(x, axes, weight=None, bias=None, eps=1e-5, y=None):
    """y, mean, rstd of the path itself."""
    return door.forward(x, axes, weight, bias, eps, out=y)


def assert_exact(result, x, axes, weight, bias, eps, slack=1.0):
    want = oracle.layer_norm(x, axes, weight, bias, eps)
    N = x.size // result[1].size
    bound = slack * oracle.tolerance(x.dtype.newbyteorder("="), N)
    np.testing.assert_allclose(result[0].astype(np.float64), want[0], rtol=bound, atol=bound)
    stats = slack * oracle.tolerance("float64" if x.dtype.char == "d" else "float32", N)
    size = np.max(np.abs(x.astype(np.float64)))
    np.testing.assert_allclose(result[1], want[1], rtol=stats, atol=stats * size)
    np.testing.assert_allclose(result[2], want[2], rtol=stats)


# Every branch by N: below one vector, its edges, several vectors with a rest, the edge of numba's
# chunk and of NumPy's, rows of several chunks.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 768, 1000, 1025, 4095, 4096, 4097]
WIDTHS += [9000, 262144, 262145, 600000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(engine, dtype):
    for N in WIDTHS:
        x = values((3, N), dtype, seed=N, offset=0.5)
        weight, bias = values((N,), dtype, seed=1), values((N,), dtype, seed=2)
        y, unharmed = guarded(x.shape, x.dtype)
        result = normalize(x, (1,), weight, bias, y=y)
        unharmed()
        # One or two values: y hangs on their difference, which float32 sums round like any other.
        assert_exact(result, x, (1,), weight, bias, 1e-5, slack=4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_bits_of_the_contiguous_array(engine, dtype, layout):
    """Rows are found where they are, and neither address nor stride reaches their bits."""
    if layout == "big-endian" and dtype is BF16:
        pytest.skip("ml_dtypes has no big-endian bfloat16")
    for shape in [(70, 33), (4, 6, 40), (3, 5, 4, 18), (2, 9000)]:
        x = values(shape, dtype)
        all_axes = range(len(shape))
        subsets = [c for k in (1, 2) for c in itertools.combinations(all_axes, k)]
        for axes in [*subsets, tuple(all_axes)]:
            N_shape = tuple(shape[a] for a in axes)
            weight, bias = values(N_shape, "float32", seed=1), values(N_shape, dtype, seed=2)
            plain = normalize(x, axes, weight, bias)
            assert_exact(plain, x, axes, weight, bias, 1e-5, slack=2)
            other = normalize(LAYOUTS[layout](x), axes, weight, bias)
            for a, b in zip(other, plain, strict=True):
                assert same_bits(a, b), (shape, axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_input_and_scattered_output(engine, dtype):
    row = values((50,), dtype)
    x = np.broadcast_to(row, (40, 50))
    target = np.full((40, 100), 7, dtype)
    result = normalize(x, (1,), y=target[:, ::-2])
    assert_exact(result, x, (1,), None, None, 1e-5)
    assert np.all(target[:, ::2] == 7)
    result = normalize(x, (0,), y=np.empty_like(target)[:, :50])
    np.testing.assert_allclose(result[0].astype(np.float64), 0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["C", "F", "reversed", "stepped", "unaligned", "big-endian"])
def test_in_place_gives_the_same_bits(engine, dtype, layout):
    for shape, axes in [((40, 77), (1,)), ((40, 77), (0,)), ((3, 9001), (1,)), ((3, 9001), (0,))]:
        x = LAYOUTS[layout](values(shape, dtype))
        bias = values(tuple(shape[a] for a in axes), dtype)
        want = normalize(x.copy(), axes, bias, bias)[0]
        y, _, _ = normalize(x, axes, bias, bias, y=x)
        assert y is x
        assert same_bits(y, want)
        x = LAYOUTS[layout](values(shape, dtype))
        normalize(x, axes, bias, bias, y=x[...])  # the same memory in another object
        assert same_bits(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_bias_of_any_dtype_and_layout(engine, dtype):
    x = values((9, 200), dtype)
    for w_dtype, b_dtype in itertools.product([None, *DTYPES], repeat=2):
        weight = None if w_dtype is None else values((200,), w_dtype, seed=3)[::-1]
        bias = None if b_dtype is None else np.repeat(values((200,), b_dtype, seed=4), 2)[::2]
        assert_exact(normalize(x, (1,), weight, bias), x, (1,), weight, bias, 1e-5, slack=2)
    weight = values((200,), ">f4")
    assert_exact(normalize(x, (1,), weight), x, (1,), weight, None, 1e-5, slack=2)
    huge = np.full(200, 1e300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalize(x, (1,), huge)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_offsets_and_scales(engine, dtype):
    for N, (offset, scale), eps in itertools.product(
        (30, 1000, 20000),
        [(1e3, 1), (1e6, 1), (-1e6, 0.5), (0, 1e-20), (0, 1e-3), (0, 1e6), (0, 1e18), (1e18, 1e15)],
        (1e-5, 0.0, 1.0, 1e6),
    ):
        x = values((4, N), dtype, offset=offset, scale=scale)
        # The mean of N sums of size `offset` is good to an ulp of s + m', y to far better.
        assert_exact(normalize(x, (1,), eps=eps), x, (1,), None, None, eps, slack=4)


def test_values_whose_squares_or_sums_leave_float32(engine):
    """Where float32 sums overflow or vanish, the row is taken again in float64."""
    for N in (30, 1000, 20000):
        for scale in (1e19, 1e30, 3e36, 1e-25, 1e-30):
            x = values((5, N), "float32", scale=scale)
            y, _, _ = normalize(x, (1,), eps=0.0)
            want = oracle.layer_norm(x, (1,), None, None, 0.0)[0]
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        x = np.full((3, N), 3e38, np.float32)
        y, mean, _ = normalize(x, (1,))
        assert np.all(y == 0)
        assert np.all(mean == np.float32(3e38))


def test_a_row_whose_beginning_is_far_from_its_mean(engine):
    """Its first values, near which deviations are taken, may tell nothing of the rest."""
    for N in (300, 1000, 4096, 20000):
        ramp = np.linspace(0, 1000, N)
        step = np.where(np.arange(N) < 256, -1000.0, 1000.0)
        outlier = values(N, "float64")
        outlier[3] = 1e6
        spread = values(N, "float64")
        late = np.where(np.arange(N) < 256, 0.0, spread)
        x = np.stack([ramp, ramp[::-1], step, step + spread, outlier, late, late + 1e4])
        for dtype in ("float32", "float64"):
            assert_exact(normalize(x.astype(dtype), (1,)), x.astype(dtype), (1,), None, None, 1e-5)


def test_float16_near_its_maximum(engine):
    for N in (64, 5000):
        x = values((4, N), "float64", offset=6e4, scale=2e3).clip(-65504, 65504).astype("float16")
        assert_exact(normalize(x, (1,)), x, (1,), None, None, 1e-5)
        weight = np.full(N, 65504, np.float16)
        y = normalize(x, (1,), weight)[0]
        with np.errstate(over="ignore"):
            want = oracle.layer_norm(x, (1,), weight, None, 1e-5)[0].astype(np.float16)
        np.testing.assert_array_equal(np.isinf(y), np.isinf(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_are_zero(engine, dtype):
    for N, value in itertools.product((1, 5, 64, 1000, 5000, 20000), (0.0, 1.0, 0.1, -12345.0)):
        y = normalize(np.full((3, N), value, dtype), (1,))[0]
        assert np.all(y == 0), (N, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_spoil_their_row_alone(engine, dtype):
    for N in (5, 64, 100, 5000, 20000):
        x = values((8, N), dtype)
        good = normalize(x, (1,))[0]
        for row, (col, value) in {1: (0, np.nan), 4: (N - 1, np.inf), 6: (N // 2, -np.inf)}.items():
            x[row, col] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = normalize(x, (1,))[0]
            transposed = normalize(np.asfortranarray(x), (1,))[0]
        clean = [0, 2, 3, 5, 7]
        assert same_bits(y[clean], good[clean])
        assert np.isnan(y[[1, 4, 6]].astype(np.float32)).all()
        assert same_bits(transposed[clean], good[clean])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_are_the_same_in_every_batch(engine, dtype, monkeypatch):
    """Alone, among others, at any alignment, on any number of threads, in pieces or whole."""
    for N in (5, 64, 100, 1000, 5000, 300000, 1100000):
        M = max(2, 1100000 // N)
        x = values((M, N), dtype, seed=N, offset=3.0)
        weight = values((N,), "float32")
        results = []
        for threads in ("1", "2", "5"):
            monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
            results.append(normalize(x, (1,), weight, weight))
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True)), N
        y = results[0][0]
        for row in (0, M // 2, M - 1):
            for shift in (0, 1, 3):
                memory = np.empty(N + 8, dtype)[shift : shift + N]
                memory[:] = x[row]
                assert same_bits(normalize(memory, (0,), weight, weight)[0], y[row]), (N, row)
        assert same_bits(normalize(x[1:], (1,), weight, weight)[0], y[1:])


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_sixteen_bit_rounding_in_the_loops(engine, dtype):
    """x = (-1, 1) gives x_hat = (-1, 1) exactly with eps 0: y is bias + weight, rounded once."""
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    for target in (every, np.nextafter(every, np.float32(9e9)), every[:-1] / 2 + every[1:] / 2):
        half = np.array([-1.0, 1.0], dtype)
        N = 2 * target.size
        x = np.resize(half, N)
        bias = np.repeat(target, 2)
        y = normalize(x, (0,), np.zeros(N, np.float32), bias, eps=0.0)[0]
        with np.errstate(over="ignore"):
            want = bias.astype(dtype)
        np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))
