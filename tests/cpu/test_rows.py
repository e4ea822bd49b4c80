"""NumPy arrays forward and backward: compiled and in plain blocks, every width, layout, value."""

import ctypes
import itertools
import mmap
import sys
import types
import warnings

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from cupynorm import _calls, _ops
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks
from cupynorm._cpu import engine as _engine
from cupynorm._layout import problem_of
from cupynorm._rules import stats_dtype
from tests import directions, oracle
from tests.conftest import ALL_DTYPES
from tests.cpu import door
from tests.cpu.layouts import LAYOUTS, guarded, same_bits, values

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", BF16, "float32", "float64"]
EACH = pytest.mark.parametrize("direction", ["forward", "backward"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(direction, dy, x, axes=(1,), weight=None, bias=None, eps=1e-5, *, y=None, stats=None):
    """(y, mean, rstd), or (dx, dweight, dbias)."""
    if direction == "forward":
        return door.forward(x, axes, weight, bias, eps, out=y)
    mean, rstd = stats or door.forward(x, axes, eps=eps)[1:]
    return door.backward(dy, x, axes, mean, rstd, weight)


def check(direction, found, dy, x, axes=(1,), weight=None, bias=None, eps=1e-5, slack=1.0):
    """Compare with the oracle; a mean may cancel terms of any size."""
    if direction == "backward":
        oracle.assert_gradients(found, dy, x, axes, weight, eps)
        return
    want = oracle.layer_norm(x, axes, weight, bias, eps)
    N = x.size // found[1].size
    bound = slack * oracle.tolerance(x.dtype.newbyteorder("="), N)
    np.testing.assert_allclose(found[0].astype(np.float64), want[0], rtol=bound, atol=bound)
    stats = slack * oracle.tolerance("float64" if x.dtype.char == "d" else "float32", N)
    size = np.max(np.abs(x.astype(np.float64)))
    np.testing.assert_allclose(found[1], want[1], rtol=stats, atol=stats * size)
    np.testing.assert_allclose(found[2], want[2], rtol=stats)


def pair(shape, dtype, seed=0, **x):
    """dy and x."""
    return values(shape, dtype, seed + 1), values(shape, dtype, seed, **x)


# --- every branch -------------------------------------------------------------------------------

# By N: below one vector, its edges, several vectors with a rest, pieces of 1024, the edges of
# numba's chunks and of NumPy's, the widths from which numba takes rows one by one.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 768, 1000, 1024, 1025, 1040, 4095,
          4096, 4097, 8192, 8193, 9000, 32768, 32769, 36865, 262144, 262145]  # fmt: skip
MOST = {"forward": [600000], "backward": []}


@EACH
@each_dtype
def test_every_width(engine, direction, dtype):
    """With weight and bias of any dtype in turn; nothing is written beside y."""
    mixed = itertools.cycle(itertools.product(DTYPES, repeat=2))
    for N, (of_weight, of_bias) in zip([*WIDTHS, *MOST[direction]], mixed, strict=False):
        dy, x = pair((5 if N < 10000 else 1 + (N < 100_000), N), dtype, seed=N, offset=0.5)
        affine = values((N,), of_weight, seed=1), values((N,), of_bias, seed=2)
        y, unharmed = guarded(x.shape, x.dtype)
        found = run(direction, dy, x, (1,), *affine, y=y)
        unharmed()
        # One or two values: y hangs on their difference, which float32 sums round like any other.
        check(direction, found, dy, x, (1,), *affine, slack=4)


@EACH
@each_dtype
def test_every_number_of_rows(engine, direction, dtype):
    """One, a tile and what is left of one, blocks and what is left of one."""
    for M in (1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 255, 257, 1025, 9000):
        dy, x = pair((M, 19), dtype, seed=M)
        check(direction, run(direction, dy, x), dy, x, slack=2)


# --- layouts ------------------------------------------------------------------------------------


@EACH
@each_dtype
def test_broadcast_inputs(engine, direction, dtype):
    row, one = values((50,), dtype), np.ones((), dtype)
    for shape, axes in [((40, 50), (1,)), ((40, 50), (0,)), ((2, 3, 50), (0, 2))]:
        dy, x = pair(shape, dtype, seed=3)
        spread = [(dy, np.broadcast_to(row, shape))]
        if direction == "backward":
            spread += [(np.broadcast_to(a, shape), x) for a in (row, one)]
        for given in spread:
            found = run(direction, *given, axes)
            check(direction, found, *given, axes)
            assert all(found[0].strides) and found[0].flags.writeable  # rows of its own


@each_dtype
@pytest.mark.parametrize("layout", ["C", "F", "reversed", "stepped", "unaligned", "big-endian"])
def test_in_place_and_into_what_lies_otherwise(engine, dtype, layout):
    for shape, axes in [((40, 77), (1,)), ((40, 77), (0,)), ((3, 9001), (1,)), ((3, 9001), (0,))]:
        x = LAYOUTS[layout](values(shape, dtype))
        bias = values(tuple(shape[a] for a in axes), dtype)
        want = door.forward(x.copy(), axes, bias, bias)[0]
        target = np.full((shape[0], 2 * shape[1]), 7, x.dtype)
        door.forward(x, axes, bias, bias, out=target[:, ::-2])
        assert same_bits(target[:, ::-2], want) and np.all(target[:, ::2] == 7)
        y, _, _ = door.forward(x, axes, bias, bias, out=x)
        assert y is x
        assert same_bits(y, want)
        x = LAYOUTS[layout](values(shape, dtype))
        door.forward(x, axes, bias, bias, out=x[...])  # the same memory in another object
        assert same_bits(x, want)


# Shorter than a side of a square, past it, one strip and several, one chunk and several.
SHAPES = ((3, 2), (33, 7), (70, 64), (530, 130), (40, 1030), (37, 4097), (2, 9001))


@pytest.fixture
def no_copies(monkeypatch):
    """Refuse the ways that gather rows into copies."""
    pytest.importorskip("numba")

    def refuse(*arguments):
        raise AssertionError("gathered")

    monkeypatch.setattr(_cpu, "_copied", refuse)
    monkeypatch.setattr(blocks, "forward", refuse)


def laid(x):
    """Copies of a matrix x in other layouts."""
    M, N = x.shape
    apart, wide = np.zeros((2 * M, 3 * N + 1), x.dtype), np.zeros((N, M + 5), x.dtype)
    apart[::2, 1::3], wide[:, 3:-2] = x, x.T
    backwards = np.asfortranarray(x[::-1, ::-1])[::-1, ::-1]
    return np.asfortranarray(x), apart[::2, 1::3], wide[:, 3:-2].T, backwards


@EACH
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_strides_are_walked_and_move_no_bit(no_copies, direction, dtype):
    """Of the gradients' sums neither: whole strips are brought together."""
    for shape in SHAPES:
        dy, x = pair(shape, dtype)
        weight = np.linspace(0.5, 2, shape[1], dtype=np.float32)
        want = cn.layer_norm(x, shape[1], weight, weight, return_stats=True)
        if direction == "forward":
            calls = [(a, order) for a in laid(x) for order in "KC"]
            for a, order in [*calls, (x, "F")]:
                how = {"order": order, "return_stats": True}
                got = cn.layer_norm(a, shape[1], weight, weight, **how)
                assert all(map(same_bits, got, want)), (shape, a.strides, order)
                assert got.y.flags.f_contiguous or order != "F"
            out = np.zeros_like(x, order="F")
            assert same_bits(cn.layer_norm(x, shape[1], weight, weight, out=out), want.y)
            continue
        stats = want[1:]
        want = cn.layer_norm_backward(dy, x, shape[1], *stats, weight)
        oracle.assert_gradients(want, dy, x, (1,), weight)
        pairs = [*zip(laid(dy), laid(x), strict=True), (laid(dy)[0], x), (dy, laid(x)[0])]
        for given in pairs:
            got = cn.layer_norm_backward(*given, shape[1], *stats, weight)
            assert all(map(same_bits, got, want)), shape


@EACH
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 20, 5, 7), 1), ((4, 6, 9), 0), ((5, 3, 4, 6), (1, 2)), ((9, 4, 5), 1), ((5, 1, 7), 1)],
)
def test_axes_in_the_middle(no_copies, direction, shape, axis):
    """Channels first; of a Fortran-ordered x the first batch axis has the neighbours."""
    host = types.SimpleNamespace(to_numpy=lambda a: a)
    weight = values([shape[a] for a in np.atleast_1d(axis)], "float32", 2)
    for order in "CF" if len(shape) == 3 else "C":
        dy, x = (np.asarray(a, order=order) for a in pair(shape, "float32"))
        found = directions.run(direction, dy, x, weight, axis=axis)
        directions.check(host, found, dy, x, weight, axis=axis)
    same_row = np.broadcast_to(values((1, 40), "float32"), (90, 40))
    assert same_bits(cn.layer_norm(same_row, order="F"), cn.layer_norm(same_row.copy()))


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
@EACH
def test_nothing_is_read_beyond_the_arrays(engine, direction):
    """The vector at the end of a row reads only what belongs to it."""
    for dtype, N in itertools.product(DTYPES, (1, 7, 17, 31, 4100, 33001)):
        dy, x = pair((5, N), dtype)
        weight = values((N,), "float64" if dtype == "float64" else "float32")
        given = [before_a_guard(a) for a in (dy, x, *door.forward(x, (1,))[1:], weight)]
        found = run(direction, *given[:2], (1,), given[4], stats=given[2:4])
        check(direction, found, dy, x, (1,), weight, slack=4)


@each_dtype
def test_a_backward_by_address_has_the_bits_of_arrays(dtype):
    """As tensors take it: dx may be dy, and nothing is written beside. Forward: frozen.json."""
    widths = [1, 3, 15, 16, 17, 64, 100, 768, 4096, 4097, 9000]
    for N, order in [*itertools.product(widths, "CF"), (33000, "C")]:
        dy, x = pair((9, N), dtype, N)
        *stats, weight = *door.forward(x, (1,))[1:], values((N,), stats_dtype(x.dtype.name), 1)
        want = door.backward(dy, x, (1,), *stats, weight)
        for mask in itertools.product((True, False), repeat=3):
            how = None, (1,), mask
            facts = _calls._check_backward(_ops.LAYER_NORM, (dy, x, *stats, weight), how).facts
            dx, unharmed = guarded(x.shape, x.dtype, order)
            if mask[0]:
                dx[...] = dy
                steps = tuple(s // x.itemsize for s in dx.strides)
                facts.strides["dx"] = facts.strides["dy"] = steps
            sums = [guarded((N,), stats[0].dtype) for _ in range(2)]
            given = [a if wanted else None for (a, _), wanted in zip(sums, mask[1:], strict=True)]
            arrays = (dx, x, *stats, weight, dx) if mask[0] else (dy, x, *stats, weight, None)
            _engine.differentiator(problem_of(facts))(*map(_cpu._address, (*arrays, *given)))
            for check in (unharmed, *(check for _, check in sums)):
                check()
            for got, exact, wanted in zip((dx, *given), want, mask, strict=True):
                assert not wanted or same_bits(got, exact), (N, order, mask)


# --- values -------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_offsets_and_scales(engine, direction, dtype):
    cases = [(1e3, 1), (1e6, 1), (-1e6, 0.5), (0, 1e-20), (0, 1e-3), (0, 1e6), (0, 1e18),
             (1e18, 1e15)]  # fmt: skip
    every = (1e-5, 0.0, 1.0, 1e6) if direction == "forward" else (1e-5, 1.0)
    for N, (offset, scale), eps in itertools.product((30, 1000, 40000), cases, every):
        if N == 40000 and eps != 1e-5:
            continue  # it stands outside of the sums
        dy, x = pair((3, N), dtype, offset=offset, scale=scale)
        weight = values((N,), dtype, seed=2) if direction == "backward" else None
        # The mean of N sums of size `offset` is good to an ulp of s + m', y to far better.
        found = run(direction, dy, x, (1,), weight, eps=eps)
        check(direction, found, dy, x, (1,), weight, eps=eps, slack=4)
    for factor in (1e-30, 1e18, 1e30) if direction == "backward" else ():
        dy, x = pair((5, 300), dtype)
        dy = (dy * factor).astype(dtype)
        check(direction, run(direction, dy, x), dy, x)


def test_values_whose_squares_or_sums_leave_float32(engine):
    """Where float32 sums overflow or vanish, the row is taken again in float64."""
    for N in (30, 1000, 20000):
        for scale in (1e19, 1e30, 3e36, 1e-25, 1e-30):
            x = values((5, N), "float32", scale=scale)
            want = oracle.layer_norm(x, (1,), None, None, 0.0)[0]
            y = door.forward(x, (1,), eps=0.0)[0]
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        y, mean, _ = door.forward(np.full((3, N), 3e38, np.float32), (1,))
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
            a = x.astype(dtype)
            check("forward", door.forward(a, (1,)), None, a)


def test_float16_near_its_maximum(engine):
    for N in (64, 5000):
        x = values((4, N), "float64", offset=6e4, scale=2e3).clip(-65504, 65504).astype("float16")
        check("forward", door.forward(x, (1,)), None, x)
        weight = np.full(N, 65504, np.float16)
        y = door.forward(x, (1,), weight)[0]
        with np.errstate(over="ignore"):
            want = oracle.layer_norm(x, (1,), weight, None, 1e-5)[0].astype(np.float16)
        np.testing.assert_array_equal(np.isinf(y), np.isinf(want))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_that_go_past_the_caches(dtype, monkeypatch):
    """The same bits, and nothing beside y, wherever its rows begin and end; dense, or in place."""
    pitch = 8
    for N in (256, 257, 271, 1000, 4096, 4103, 9000, 270_000):
        M = _engine.ALONE // N + 1
        x, w = values((M, N), dtype, seed=N), values((N,), dtype, seed=1)
        monkeypatch.setattr(_engine, "_PAST", 1 << 60)
        want = door.forward(x, (1,), w, w)
        monkeypatch.setattr(_engine, "_PAST", 0)
        room = np.full(M * (N + pitch) + 64, 7, dtype)
        for first in (0, 1, 15):
            table = room[first:][: M * (N + pitch)].reshape(M, N + pitch)
            found = door.forward(x, (1,), w, w, out=table[:, :N])
            assert all(map(same_bits, found, want)), (N, first)
            table[:, :N] = 7
            assert (room == 7).all(), (N, first)
            dense = room[first:][: M * N].reshape(M, N)
            dense[:] = x
            assert same_bits(door.forward(dense, (1,), w, w, out=dense)[0], want[0])
            dense[:] = 7
            assert same_bits(door.forward(x, (1,), w, w, out=dense)[0], want[0])
            dense[:] = 7
            assert (room == 7).all(), (N, first)
        turned = door.forward(np.asfortranarray(x), (1,), w, w, out=np.empty_like(x, order="F"))
        assert same_bits(turned[0], want[0])


@each_dtype
def test_constant_rows(engine, dtype):
    """y is 0; x_hat too, and a constant dy gives no dx at all, though rstd is 316."""
    for N, value in itertools.product((1, 5, 64, 1000, 5000, 40000), (0.0, 1.0, 0.1, -12345.678)):
        x = np.full((3, N), value, dtype)
        y, *stats = door.forward(x, (1,))
        assert np.all(y == 0), (N, value)
        if dtype != "float32":
            continue
        dy = np.full((3, N), 1.1, np.float32)
        dx, dweight, dbias = run("backward", dy, x, stats=stats)
        assert np.all(dweight == 0), (N, value)
        assert np.abs(dx).max() <= 316.3 * 4 * 2.0**-23
        np.testing.assert_allclose(dbias, 3.3, rtol=1e-6)
        assert N > 1 or np.all(dx == 0)


@EACH
@each_dtype
def test_nan_and_inf_spoil_their_row_and_column_alone(engine, direction, dtype):
    """In x, and for the gradients in dy, whose sums see one column."""
    for N in (5, 64, 100, 5000, 33000):
        bad = {1: (0, np.nan), 4: (N - 1, np.inf), 6: (N // 2, -np.inf)}
        rows = [r for r in range(8) if r not in bad]
        cols = [c for c in range(N) if c not in (0, N - 1, N // 2)]
        dy, x = pair((8, N), dtype)
        stats = door.forward(x, (1,))[1:]
        good, *sums = run(direction, dy, x, stats=stats)
        spoilt = (x if direction == "forward" else dy).copy()
        for row, (col, value) in bad.items():
            spoilt[row, col] = value
        for a in (spoilt, np.asfortranarray(spoilt)):
            given = (dy, a) if direction == "forward" else (a, x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found, *totals = run(direction, *given, stats=stats)
            assert same_bits(found[rows], good[rows])
            lost = np.isnan if direction == "forward" else lambda a: ~np.isfinite(a)
            assert lost(found[[*bad]].astype(np.float32)).all()
            for total, was in zip(totals, sums, strict=True) if direction == "backward" else ():
                np.testing.assert_allclose(total[cols], was[cols], rtol=1e-5, atol=1e-5)
                assert not np.isfinite(total[[0, N - 1, N // 2]]).any()
        if direction == "backward":
            x[2, 0] = np.nan  # the row has no mean: its x_hat is NaN in every column
            dx, dweight, dbias = run(direction, dy, x)
            assert np.isnan(dx[2].astype(np.float32)).all() and np.isnan(dweight).all()
            rest = [0, 1, 3, 4, 5, 6, 7]
            assert same_bits(dx[rest], good[rest]) and same_bits(dbias, sums[1])


@EACH
@each_dtype
def test_a_rows_bits_are_the_same_in_every_batch(engine, direction, dtype, monkeypatch):
    """Alone, among others, at any alignment, on any number of threads, in pieces or whole."""
    sizes = [5, 64, 100, 1000, 9000, 33000, 300000, *([1100000] if direction == "forward" else [])]
    for N in sizes:
        M = max(2, 1100000 // N) if direction == "forward" else 7 if N < 1e5 else 2
        dy, x = pair((M, N), dtype, seed=N, offset=3.0)
        weight = values((N,), "float32")
        results = []
        several = direction == "forward" and engine == "numba"  # blocks take one
        for threads in ("1", "2", "5") if several else ("2",):
            monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
            results.append(run(direction, dy, x, (1,), weight, weight))
        for other in results[1:]:
            assert all(map(same_bits, other, results[0])), N
        whole = results[0][0]
        for row, shift in itertools.product((0, M // 2, M - 1), (0, 1, 3)):
            memory = np.empty((2, N + 8), dtype)[:, shift : shift + N]
            memory[:] = dy[row], x[row]
            alone = run(direction, *memory, (0,), weight, weight)[0]
            assert same_bits(alone, whole[row]), (N, row)
        assert same_bits(run(direction, dy[1:], x[1:], (1,), weight, weight)[0], whole[1:])


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_sixteen_bit_rounding_in_the_loops(engine, dtype):
    """x = (-1, 1) gives x_hat = (-1, 1) exactly with eps 0: y is bias + weight, rounded once."""
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    for target in (every, np.nextafter(every, np.float32(9e9)), every[:-1] / 2 + every[1:] / 2):
        N = 2 * target.size
        x, bias = np.resize(np.array([-1.0, 1.0], dtype), N), np.repeat(target, 2)
        y = door.forward(x, (0,), np.zeros(N, np.float32), bias, 0.0)[0]
        with np.errstate(over="ignore"):
            want = bias.astype(dtype)
        np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))


def test_no_warning_from_any_thread(engine, monkeypatch):
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in [(4000, 300), (2, 1100000)]:
            inf = np.full(shape, np.inf, np.float32)
            assert np.isnan(run("backward", inf, inf)[0]).all()
            huge = np.full(shape, 3e38, np.float32)
            weight = huge[0].astype(np.float64) * 1e250
            door.forward(huge, (1,), weight)
            stats = door.forward(huge, (1,), eps=0.0)[1:]
            door.backward(huge, huge, (1,), *stats, weight)
            door.backward(huge, huge, (1,), *stats, np.full(shape[1], 6e4, np.float16))
