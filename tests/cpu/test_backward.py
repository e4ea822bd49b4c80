"""The NumPy path's backward: both engines, every layout, sums over many rows, threads."""

import contextlib
import ctypes
import itertools
import mmap
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupynorm._cpu import arrays as _cpu
from tests import oracle
from tests.cpu import door
from tests.cpu.layouts import LAYOUTS, WRITABLE, same_bits, values

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", BF16, "float32", "float64"]


def stats_of(x, axes, eps=1e-5):
    """Mean and rstd as the forward gives them."""
    return door.forward(x, axes, eps=eps)[1:]


def backward(dy, x, axes, weight=None, eps=1e-5, *, dtype=None, stats=None):
    """dx, dweight, dbias of the path itself; dweight and dbias in the statistics' dtype."""
    mean, rstd = stats_of(x, axes, eps) if stats is None else stats
    dtype = dtype or mean.dtype.newbyteorder("=")
    return door.backward(dy, x, axes, mean, rstd, weight, dtype=dtype)


# By N: below one vector, its edges, pieces of 1024, the widths from which numba takes rows one by
# one and in chunks, the edge of NumPy's chunk.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 768, 1024, 1025, 1040, 4097]
WIDTHS += [8192, 8193, 32768, 32769, 36865, 262144, 262145]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(engine, dtype):
    for N in WIDTHS:
        M = 5 if N < 10000 else 2
        x, dy = values((M, N), dtype, seed=N, offset=0.5), values((M, N), dtype, seed=N + 1)
        weight = values((N,), dtype, seed=1)
        oracle.assert_gradients(backward(dy, x, (1,), weight), dy, x, (1,), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(engine, dtype):
    """One, a tile and what is left of one, blocks and what is left of one."""
    for M in (1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 255, 257, 1025, 9000):
        x, dy = values((M, 19), dtype, seed=M), values((M, 19), dtype, seed=M + 1, offset=0.3)
        oracle.assert_gradients(backward(dy, x, (1,)), dy, x, (1,))


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(engine, dtype, layout):
    """dx has the bits of the contiguous array's, in whichever array the odd layout is."""
    if layout == "big-endian" and dtype is BF16:
        pytest.skip("ml_dtypes has no big-endian bfloat16")
    lay = LAYOUTS[layout]
    for shape in [(70, 33), (4, 6, 40), (2, 9000)]:
        x, dy = values(shape, dtype, offset=2.0), values(shape, dtype, seed=1)
        dims = range(len(shape))
        for axes in [c for k in (1, 2) for c in itertools.combinations(dims, k)]:
            weight = values(tuple(shape[a] for a in axes), dtype, seed=2)
            plain = backward(dy, x, axes, weight)
            oracle.assert_gradients(plain, dy, x, axes, weight)
            for args in ((lay(dy), x), (dy, lay(x)), (lay(dy), lay(x))):
                other = backward(*args, axes, weight, stats=stats_of(x, axes))
                assert same_bits(other[0], plain[0]), (shape, axes)
                oracle.assert_gradients((None, *other[1:]), dy, x, axes, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_inputs(engine, dtype):
    row, one = values((50,), dtype), np.ones((), dtype)
    for shape, axes in [((40, 50), (1,)), ((40, 50), (0,)), ((2, 3, 50), (0, 2))]:
        x = values(shape, dtype, seed=3)
        for dy in (np.broadcast_to(row, shape), np.broadcast_to(one, shape)):
            oracle.assert_gradients(backward(dy, x, axes), dy, x, axes)
        x, dy = np.broadcast_to(row, shape), values(shape, dtype, seed=4)
        oracle.assert_gradients(backward(dy, x, axes), dy, x, axes)


@given(st.data())
@settings(max_examples=40)
def test_any_problem(data):
    """Shapes, axes, dtypes and layouts of each array drawn at will, on either engine."""
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3)))
    dims = range(len(shape))
    axes = tuple(sorted(data.draw(st.sets(st.sampled_from(dims), min_size=1))))
    dtype = data.draw(st.sampled_from(DTYPES))
    lays = data.draw(st.tuples(*[st.sampled_from(WRITABLE)] * 2))
    x, dy = values(shape, dtype, offset=1.0), values(shape, dtype, seed=1)
    weight = None
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(DTYPES))
        weight = values(tuple(shape[a] for a in axes), kind, seed=2)
    with _cpu.without_numba() if data.draw(st.booleans()) else contextlib.nullcontext():
        got = backward(LAYOUTS[lays[0]](dy), LAYOUTS[lays[1]](x), axes, weight)
    oracle.assert_gradients(got, dy, x, axes, weight)


def before_a_guard(a):
    """Copy an array to where the page after its last byte cannot be read."""
    size = mmap.PAGESIZE * -(-a.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    view = np.frombuffer(memory, np.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert mprotect(view.ctypes.data + size, mmap.PAGESIZE, 0) == 0
    copy = view[size - a.nbytes : size].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_beyond_the_arrays(engine):
    """The vector at the end of a row reads only what belongs to it."""
    for dtype, N in itertools.product(DTYPES, (1, 7, 17, 31, 4100, 33001)):
        x, dy = values((5, N), dtype), values((5, N), dtype, seed=1)
        weight = values((N,), "float64" if dtype == "float64" else "float32")
        args = [before_a_guard(a) for a in (dy, x, *stats_of(x, (1,)), weight)]
        got = door.backward(*args[:2], (1,), *args[2:])
        oracle.assert_gradients(got, dy, x, (1,), weight)


def of_torch(dy, x, stats, weight):
    """dx, dweight and dbias as torch computes them."""
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(a) for a in (dy, x, *stats, weight)]
    given = *tensors[:2], weight.shape, *tensors[2:], torch.zeros(weight.shape), [True] * 3
    return [a.numpy() for a in torch.ops.aten.native_layer_norm_backward(*given)]


@pytest.mark.parametrize("M, N", [(200000, 8), (2000, 64), (512, 768), (40, 4096)])
def test_gradients_are_not_worse_than_torchs(engine, M, N):
    """One float32 sum of 200000 terms would lose hundreds of units in the last place."""
    for offset, slope in ((3.0, 0.0), (1000.0, 1.0)):
        x, dy = values((M, N), "float32", 0, offset), values((M, N), "float32", 1, slope)
        weight = values((N,), "float32", seed=2, offset=1.0)
        stats = stats_of(x, (1,))
        got = backward(dy, x, (1,), weight, stats=stats)
        want = oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5)
        theirs = of_torch(dy, x, stats, weight)
        for ours, other, exact in zip(got, theirs, want, strict=True):
            error, limit = (np.abs(a - exact) for a in (ours, other))
            assert np.sqrt((error**2).mean()) <= np.sqrt((limit**2).mean())
            # The largest of 10^5 roundings is luck; that of a long sum is not.
            assert M < 1000 or ours.ndim == 2 or error.max() <= limit.max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_offsets_and_scales(engine, dtype):
    cases = [(1e3, 1), (1e6, 1), (-1e6, 0.5), (0, 1e-20), (0, 1e-3), (0, 1e18), (1e18, 1e15)]
    for N, (offset, scale), eps in itertools.product((30, 1000, 40000), cases, (1e-5, 1.0)):
        x, dy = values((3, N), dtype, offset=offset, scale=scale), values((3, N), dtype, seed=1)
        weight = values((N,), dtype, seed=2)
        oracle.assert_gradients(backward(dy, x, (1,), weight, eps), dy, x, (1,), weight, eps)
    for factor in (1e-30, 1e18, 1e30):
        x, dy = values((5, 300), dtype), values((5, 300), dtype, seed=1, scale=factor)
        oracle.assert_gradients(backward(dy, x, (1,)), dy, x, (1,))


def test_constant_rows(engine):
    """x_hat is 0 there, and a constant dy gives no dx at all, though rstd is 316."""
    for N, value in itertools.product((1, 5, 64, 1000, 40000), (0.0, 0.1, -12345.678)):
        x = np.full((3, N), value, np.float32)
        dx, dweight, dbias = backward(np.full((3, N), 1.1, np.float32), x, (1,))
        assert np.all(dweight == 0), (N, value)
        assert np.abs(dx).max() <= 316.3 * 4 * 2.0**-23
        np.testing.assert_allclose(dbias, 3.3, rtol=1e-6)
        assert N > 1 or np.all(dx == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_spoil_their_row_and_column_alone(engine, dtype):
    for N in (5, 64, 100, 33000):
        x, dy = values((8, N), dtype), values((8, N), dtype, seed=1)
        stats = stats_of(x, (1,))
        good = backward(dy, x, (1,), stats=stats)
        bad = {1: (0, np.nan), 4: (N - 1, np.inf), 6: (N // 2, -np.inf)}
        for row, (col, value) in bad.items():
            dy[row, col] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = backward(dy, x, (1,), stats=stats)
            scattered = backward(np.asfortranarray(dy), x, (1,), stats=stats)
        rows = [r for r in range(8) if r not in bad]
        cols = [c for c in range(N) if c not in {col for col, _ in bad.values()}]
        for dx, dweight, dbias in (got, scattered):
            assert same_bits(dx[rows], good[0][rows])
            assert not np.isfinite(dx[list(bad)].astype(np.float32)).any()
            for sums, clean in ((dweight, good[1]), (dbias, good[2])):
                np.testing.assert_allclose(sums[cols], clean[cols], rtol=1e-5, atol=1e-5)
                assert not np.isfinite(sums[[0, N - 1, N // 2]]).any()
        x[2, 0] = np.nan  # the row has no mean: its x_hat is NaN in every column
        dx, dweight, dbias = backward(values((8, N), dtype, seed=1), x, (1,))
        assert np.isnan(dx[2].astype(np.float32)).all() and np.isnan(dweight).all()
        rest = [0, 1, 3, 4, 5, 6, 7]
        assert same_bits(dx[rest], good[0][rest]) and same_bits(dbias, good[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_dx_is_the_same_in_every_batch(engine, dtype):
    """Alone, in a tile or in what is left of one, at any alignment."""
    for N in (5, 64, 100, 1000, 9000, 33000, 300000):
        M = 7 if N < 1e5 else 2
        x, dy = values((M, N), dtype, seed=N, offset=3.0), values((M, N), dtype, seed=N + 1)
        weight = values((N,), "float32")
        dx = backward(dy, x, (1,), weight)[0]
        for row, shift in itertools.product((0, M // 2, M - 1), (0, 1, 3)):
            memory = np.empty((2, N + 8), dtype)[:, shift : shift + N]
            memory[:] = dy[row], x[row]
            alone = backward(memory[0], memory[1], (0,), weight)[0]
            assert same_bits(alone, dx[row]), (N, row)
        assert same_bits(backward(dy[1:], x[1:], (1,), weight)[0], dx[1:])


def test_no_warning_from_any_thread(engine, monkeypatch):
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in [(4000, 300), (2, 1100000)]:
            inf = np.full(shape, np.inf, np.float32)
            assert np.isnan(backward(inf, inf, (1,))[0]).all()
            huge = np.full(shape, 3e38, np.float32)
            backward(huge, huge, (1,), huge[0].astype(np.float64) * 1e10, eps=0.0, dtype="float16")
