"""Layer norm over separate columns of NumPy arrays; any table with nulls is drawn in strategies."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from cupynorm.frames.columns import as_matrix, gather, layer_norm_columns
from tests import oracle
from tests.conftest import Exporter, np_dtype

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = ("bool", *INTEGERS, "float16", "bfloat16", "float32", "float64")


def bitmap(valid, offset=0):
    """Arrow's bitmap of a bool array, after `offset` bits of which nobody may read any."""
    return np.packbits(np.r_[np.arange(offset) % 2 == 0, valid], bitorder="little")


def column(rng, dtype, M):
    values = rng.standard_normal(M) * 20
    if dtype == "bool":
        return values > 0
    return (np.abs(values) if dtype[0] == "u" else values).astype(np_dtype(dtype))


def table(rng, dtypes, M):
    return [column(rng, dtype, M) for dtype in dtypes]


def expected(columns, weight=None, bias=None, *, dtype="float32", omit=False, valid=None, **how):
    """The definition, row by row, of columns rounded to the dtype of the statistics."""
    compute, how = "float64" if dtype == "float64" else "float32", {"eps": 1e-5, **how}
    with np.errstate(over="ignore"):
        x = np.stack([np.asarray(c).astype(compute) for c in columns], axis=1)
    if valid is not None:
        x[~np.stack(valid, axis=1)] = np.nan
    if not omit:
        return oracle.layer_norm(x, (1,), weight, bias, **how)[0]
    y = np.full(x.shape, np.nan)
    for i, row in enumerate(x):
        known = ~np.isnan(row)
        if known.any():
            w, b = (None if a is None else np.asarray(a)[known] for a in (weight, bias))
            y[i, known] = oracle.layer_norm(row[known], (0,), w, b, **how)[0]
    return y


def check(y, columns, **kwargs):
    oracle.assert_close(y, expected(columns, dtype=y.dtype.name, **kwargs), len(columns))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_into_every_result(engine, dtype):
    rng = np.random.default_rng(1)
    columns = table(rng, [dtype, "float32", dtype, "int8", dtype], 83)
    for result in ("float16", "bfloat16", "float32", "float64"):
        y = layer_norm_columns(columns, dtype=result)
        assert y.dtype == np_dtype(result)
        assert y.flags.c_contiguous
        check(y, columns)


@pytest.mark.parametrize(
    ("M", "N"), [(1, 1), (1, 7), (5, 1), (16, 2), (17, 40), (1000, 3), (2100, 16), (40, 3000)]
)
def test_sizes(engine, M, N):
    rng = np.random.default_rng(M + N)
    columns = table(rng, [DTYPES[j % len(DTYPES)] for j in range(N)], M)
    before = [c.copy() for c in columns]
    w, b = rng.standard_normal((2, N)).astype(np.float32)
    check(layer_norm_columns(columns, w, b, 1e-3), columns, weight=w, bias=b, eps=1e-3)
    check(layer_norm_columns(columns, dtype="float32"), columns)
    assert all(map(np.array_equal, columns, before))


def test_dtype_of_the_result():
    wide = ("i4", "f4"), ("i8", "f4"), ("u4", "f4"), ("u8", "f4"), ("f4", "f8", "i8")
    narrow = ("f4", "i2", "f2"), ("?", "u2", "i1")
    for kinds in (*wide, *narrow):
        columns = [np.ones(2, kind) for kind in kinds]
        assert layer_norm_columns(columns).dtype == ("float64" if kinds in wide else "float32")
        for dtype in (np.float32, ">f4", "bfloat16"):
            y = layer_norm_columns(columns, dtype=dtype)
            assert y.dtype == np_dtype("bfloat16" if dtype == "bfloat16" else "float32")


def exactly(rows, eps=1e-5):
    """The definition in fractions, which hold every integer."""
    y = []
    for row in rows:
        x = [Fraction(value) for value in row]
        mean = sum(x) / len(x)
        var = float(sum((value - mean) ** 2 for value in x) / len(x))
        y.append([float(value - mean) / math.sqrt(var + eps) for value in x])
    return np.array(y)


FAR = {
    "int64": [[2**53 + 1, 2**53 + 3, 2**53 + 5], [-(2**63), 2**63 - 1, 0], [2**62, 2**62 + 1, 7]],
    "uint64": [[2**64 - 1, 2**64 - 2, 2**64 - 9], [2**63 + 1, 2**63 + 3, 2**53]],
    "int32": [[2**31 - 1, 2**31 - 2, 2**31 - 5], [-(2**31), 2**31 - 1, 3]],
}


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
@pytest.mark.parametrize("kind", FAR)
def test_integers_keep_their_differences(engine, kind, dtype):
    columns = list(np.array(FAR[kind], kind).T)
    oracle.assert_close(layer_norm_columns(columns, dtype=dtype), exactly(FAR[kind]), 3)


def test_integers_beside_floats_and_nulls():
    at = 2**53
    columns = [np.array([at + 1, 5]), np.array([at + 2.0, 7.0]), np.array([True, False])]
    columns.append(np.array([2**63 + 1, 2**63 + 3], np.uint64))
    want = exactly([[at + 1, at + 2, 1, 2**63 + 1], [5, 7, 0, 2**63 + 3]])
    oracle.assert_close(layer_norm_columns(columns), want, 4)
    nulls = [(np.array([0]), bitmap([False])), *(np.array([at + k]) for k in (1, 3, 5))]
    y = layer_norm_columns(nulls, nulls="omit")
    oracle.assert_close(y[:, 1:], exactly([[1, 3, 5]]), 3)


def test_large_offsets_cost_no_digits(engine):
    rng = np.random.default_rng(3)
    columns = [(1e6 + rng.standard_normal(300)).astype(np.float32) for _ in range(200)]
    for eps in (0.0, -0.5):
        check(layer_norm_columns(columns, eps=eps), columns, eps=eps)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30, 3e37])
def test_squares_that_their_dtype_cannot_hold(engine, scale):
    rng = np.random.default_rng(4)
    columns = [np.float32(scale) * rng.uniform(-3, 3, 40).astype(np.float32) for _ in range(9)]
    valid = [np.ones(40, bool) for _ in columns]
    valid[3][5:20] = False
    pairs = [(c, bitmap(v)) for c, v in zip(columns, valid, strict=True)]
    for eps in (0.0, 1e-5):
        check(layer_norm_columns(columns, eps=eps), columns, eps=eps)
        y = layer_norm_columns(pairs, eps=eps, nulls="omit")
        check(y, columns, eps=eps, omit=True, valid=valid)
    columns = [np.array([1e153, 1.0]), np.array([1.5e153, 2.0]), np.array([-1e153, 4.0])]
    small = expected([c * [1e-100, 1] for c in columns], eps=0.0, dtype="float64")
    np.testing.assert_allclose(layer_norm_columns(columns, eps=0.0), small, rtol=1e-14)


def test_inf_and_nan_spoil_their_row_only(engine):
    rng = np.random.default_rng(5)
    columns = table(rng, ["float32"] * 20, 60)
    clean = layer_norm_columns(columns)
    columns[3] = columns[3].copy()
    columns[3][[7, 20]] = np.inf, np.nan
    y = layer_norm_columns(columns)
    assert np.isnan(y[[7, 20]]).all()
    others = np.delete(np.arange(60), [7, 20])
    np.testing.assert_array_equal(y[others], clean[others])
    omitted = layer_norm_columns(columns, nulls="omit")
    assert np.isnan(omitted[7]).all()  # Inf is a value, not a missing one
    assert np.isnan(omitted[20]).sum() == 1


def test_strided_swapped_and_unaligned_columns(engine):
    rng = np.random.default_rng(6)
    packed = np.zeros(90, np.dtype([("a", "i1"), ("b", "f8"), ("c", "<f2")]))
    packed["a"], packed["b"] = rng.integers(-9, 9, 90), rng.standard_normal(90)
    packed["c"] = rng.standard_normal(90)
    wide = rng.standard_normal((180, 3)).astype(np.float32)
    columns = [packed["a"], packed["b"], packed["c"], wide[::2, 1], wide[::-2, 2]]
    columns += [np.arange(90).astype(">i4"), np.arange(90).astype(">f2")]
    columns += [wide[:90, 0].astype(ml_dtypes.bfloat16)[::-1], np.broadcast_to(np.int16(4), 90)]
    columns[0].flags.writeable = False
    check(layer_norm_columns(columns), columns)
    check(layer_norm_columns(columns, dtype="float16"), columns)


def test_out_of_any_layout(engine):
    rng = np.random.default_rng(7)
    columns = table(rng, ["float32", "int32", "bool", "float16"], 70)
    for dtype in ("float16", "float32", "float64", ">f4"):
        want = layer_norm_columns(columns, dtype=dtype)
        room = np.zeros((140, 8), dtype)
        outs = [
            np.empty((70, 4), dtype),
            np.empty((70, 4), dtype, order="F"),
            room[:70, :4],
            room[::2, ::2],
            room[::-2, 3::-1],
            np.zeros((4, 100), dtype)[:, 5:75].T,
            np.zeros((71, 4), f"V1,{np.dtype(dtype).str}")["f1"][1:],
        ]
        for out in outs:
            assert layer_norm_columns(columns, out=out) is out
            np.testing.assert_array_equal(out, want)
    assert not room[:70, 4:][1::2].any()


def test_columns_of_one_matrix_have_the_bits_of_layer_norm(engine):
    whole = np.random.default_rng(8).standard_normal((300, 50), np.float32)
    for x in (whole, np.asfortranarray(whole), whole[::2, 1::3], whole[::-1, ::-1], whole[:, :1]):
        assert as_matrix(gather(list(x.T))).tobytes() == x.tobytes()
        for order in "CF":
            out = np.empty(x.shape, x.dtype, order)
            assert layer_norm_columns(list(x.T), out=out) is out
            np.testing.assert_array_equal(out, cn.layer_norm(x, order=order))
    for columns in ([whole[:, 0], whole[:, 1].copy()], [whole[:, 0], whole[:, 1].astype("f8")]):
        assert as_matrix(gather(columns)) is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_its_bits_wherever_it_stands(engine, dtype, monkeypatch):
    rng = np.random.default_rng(9)
    columns = table(rng, ["float32", "int64", "bool", "float16", "int8"] * 8, 30_000)
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
    y = layer_norm_columns(columns, dtype=dtype)
    for threads in ("2", "3", "7"):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
        np.testing.assert_array_equal(layer_norm_columns(columns, dtype=dtype), y)
    out = np.empty(y.shape, dtype, order="F")
    np.testing.assert_array_equal(layer_norm_columns(columns, out=out), y)
    part = layer_norm_columns([c[1234:1299] for c in columns], dtype=dtype)
    np.testing.assert_array_equal(part, y[1234:1299])
    check(y, columns)


def test_a_result_larger_than_caches_has_the_bits_of_its_parts():
    rng = np.random.default_rng(10)
    M = (1 << 26) // (17 * 4) + 7  # columns begin at any alignment
    columns = table(rng, ["float32", "int16", "bool"] * 5 + ["int8"] * 2, M)
    w, b = rng.standard_normal((2, 17))
    for affine in ((None, None), (w, b), (w, None), (None, b)):
        y = np.empty((M, 17), "f4", order="F")
        layer_norm_columns(columns, *affine, out=y)
        for lo, hi in ((0, 999), (M // 2, M // 2 + 777), (M - 1234, M)):
            part = layer_norm_columns([c[lo:hi] for c in columns], *affine)
            np.testing.assert_array_equal(y[lo:hi], part)


def test_exporters_are_columns():
    columns = [np.arange(4.0), np.ones(4), np.arange(4, dtype=np.int8)]
    for lent in ({0}, {1}, {0, 1, 2}):
        given = [Exporter(c) if j in lent else c for j, c in enumerate(columns)]
        check(layer_norm_columns(given), columns)


def test_a_result_that_cannot_be_written_is_refused():
    """The other sentences: test_advice.py, and frozen.py, to the letter."""
    ones, room, frozen = np.ones(4), np.ones((4, 2)), np.ones((4, 2))
    frozen.flags.writeable = False
    apart = np.lib.stride_tricks.as_strided(np.ones(9), (4, 2), (8, 8))
    for columns, out, words in (
        ([ones, ones], frozen, "read-only"),
        ([ones, ones], apart, "at one address"),
        ([ones, room[:, 0]], room, r"out shares memory with columns\[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            layer_norm_columns(columns, out=out)
    with pytest.raises(TypeError, match=r"dtype bool.*packbits"):
        layer_norm_columns([(ones, ones > 0)])
