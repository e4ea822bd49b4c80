"""K7, columns of their own on a GPU: values, nulls, layouts, bytes."""

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
KINDS = ("bool", *INTEGERS, "float16", "bfloat16", "float32", "float64")


def column(kind, M, seed):
    rng = np.random.default_rng(seed)
    if kind == "bool":
        return rng.integers(0, 2, M).astype(bool)
    if kind in INTEGERS:
        low = 0 if kind.startswith("u") else -100
        return rng.integers(low, 120, M).astype(kind)
    return (rng.standard_normal(M) * 20 + 5).astype(np_dtype(kind))


def matrix(columns, bitmaps=None):
    """float64 values with NaN for nulls."""
    wide = np.stack([np.asarray(c).astype(np.float64) for c in columns], axis=1)
    for j, bitmap in enumerate(bitmaps or []):
        if bitmap is not None:
            valid = np.unpackbits(bitmap, bitorder="little")[: len(wide)]
            wide[valid == 0, j] = np.nan
    return wide


def expected(wide, weight=None, bias=None, omit=False):
    """Each row by itself, over its valid elements."""
    if not omit:
        return oracle.layer_norm(wide, (1,), weight, bias, 1e-5)[0]
    y = np.full(wide.shape, np.nan)
    for i, row in enumerate(wide):
        valid = ~np.isnan(row)
        if valid.any():
            y[i, valid] = oracle.layer_norm(row[valid], (0,), None, None, 1e-5)[0]
    y = y if weight is None else y * weight.astype(np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def check(got, want, dtype, N):
    bound = oracle.tolerance(dtype, N)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=bound, atol=bound)


def on_device(lib, columns, bitmaps=None):
    bitmaps = bitmaps or [None] * len(columns)
    moved = [lib.from_numpy(c) for c in columns]
    return [c if b is None else (c, lib.from_numpy(b)) for c, b in zip(moved, bitmaps, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_type_of_column(cupy_lib, dtype):
    M = 133
    columns = [column(kind, M, i) for i, kind in enumerate(KINDS)]
    weight, bias = (np.linspace(a, a + 2, len(KINDS)).astype(np.float32) for a in (1, -1))
    affine = [cupy_lib.from_numpy(a) for a in (weight, bias)]
    y = cn.layer_norm_columns(on_device(cupy_lib, columns), *affine, dtype=dtype)
    assert y.flags.c_contiguous
    check(cupy_lib.to_numpy(y), expected(matrix(columns), weight, bias), dtype, len(KINDS))


def test_extreme_integers(cupy_lib):
    """The ends of each type, which a wrong sign or width would move."""
    columns = []
    for kind in INTEGERS:
        limits = np.iinfo(kind)
        columns.append(np.array([limits.min, limits.max, 0, 1], kind))
    y = cn.layer_norm_columns(on_device(cupy_lib, columns), dtype="float64")
    check(cupy_lib.to_numpy(y), expected(matrix(columns)), "float64", len(columns))


@pytest.mark.parametrize("N", [3, 40, 300])
@pytest.mark.parametrize("nulls", ["propagate", "omit"])
def test_nulls(cupy_lib, nulls, N):
    """Bitmaps and NaN alike; more columns than a chunk; rows without a valid element."""
    M = 70
    rng = np.random.default_rng(N)
    columns = [column("float32" if j % 2 else "int16", M, j) for j in range(N)]
    columns[1][4] = np.nan
    bitmaps = [
        rng.integers(0, 256, -(-M // 8)).astype(np.uint8) if j % 3 else None for j in range(N)
    ]
    if nulls == "omit":
        bitmaps = [np.zeros(-(-M // 8), np.uint8) if b is None else b for b in bitmaps]
        for bitmap in bitmaps:
            bitmap[1] = 0  # rows 8 to 15 have nothing
    y = cupy_lib.to_numpy(cn.layer_norm_columns(on_device(cupy_lib, columns, bitmaps), nulls=nulls))
    wide = matrix(columns, bitmaps)
    assert (np.isnan(y) == np.isnan(expected(wide, omit=nulls == "omit"))).all()
    check(y, expected(wide, omit=nulls == "omit"), "float32", N)
    if nulls == "omit":
        assert np.isnan(y[8:16]).all()


def test_strided_columns_and_a_result_of_any_layout(cupy_lib):
    M = 50
    base = column("float32", 3 * M, 0)
    columns = [base[::3], base[M : 2 * M], base[-M:][::-1].copy()]
    device = on_device(cupy_lib, [columns[0].copy(), *columns[1:]])
    wide = on_device(cupy_lib, [base])[0]
    device[0] = wide[::3]
    want = expected(matrix(columns))
    check(cupy_lib.to_numpy(cn.layer_norm_columns(device)), want, "float32", 3)
    import cupy

    out = cupy.empty((M, 3), dtype="float32", order="F")
    assert cn.layer_norm_columns(device, out=out) is out
    check(cupy_lib.to_numpy(out), want, "float32", 3)


def test_half_precision_is_written_two_columns_at_once(cupy_lib):
    import cupy

    M = 90
    for N in (24, 25):
        columns = [column("float32", M, j) for j in range(N)]
        out = cupy.empty((M, 26), dtype="float16")[:, :N]
        cn.layer_norm_columns(on_device(cupy_lib, columns), out=out)
        check(cupy_lib.to_numpy(out), expected(matrix(columns)), "float16", N)
        if cupy_lib.backend is Backend.CUPY_SIMULATED:
            result = cupy.simulator.launches[-1].traffic[out]
            assert result.write_widths == {4: M * (N // 2)} | ({2: M} if N % 2 else {})


def test_a_plan_is_made_once(cupy_lib, monkeypatch):
    from cupynorm._cuda import arrays  # as the library at hand has it

    device = on_device(cupy_lib, [column("float32", 61, j) for j in range(5)])
    first = cn.layer_norm_columns(device)
    monkeypatch.setattr(arrays, "ready_on", None)
    again = cn.layer_norm_columns(device)
    assert (cupy_lib.to_numpy(first) == cupy_lib.to_numpy(again)).all()


def test_no_row_depends_on_another(cupy_lib):
    columns = [column("float32", 300, j) for j in range(20)]
    whole = cupy_lib.to_numpy(cn.layer_norm_columns(on_device(cupy_lib, columns)))
    part = on_device(cupy_lib, [c[100:117].copy() for c in columns])
    assert (cupy_lib.to_numpy(cn.layer_norm_columns(part)) == whole[100:117]).all()


def test_every_byte_is_read_and_written_once(cupy_lib):
    if cupy_lib.backend is not Backend.CUPY_SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    import cupy

    M, N = 512, 24
    kinds = ("float32", "int64", "int8", "float16")
    columns = [column(kinds[j % 4], M, j) for j in range(N)]
    device = on_device(cupy_lib, columns)
    y = cn.layer_norm_columns(device)
    launch = cupy.simulator.launches[-1]
    assert launch.name.startswith("layer_norm_fwd_columns_f32")
    moved = {b.ptr: b for b in launch.traffic.buffers}
    for c in device:
        buffer = moved.pop(c.data.ptr)
        assert (buffer.read_bytes, buffer.written_bytes) == (c.nbytes, 0)
    result = moved.pop(y.data.ptr)
    assert (result.read_bytes, result.written_bytes) == (0, y.nbytes)
    (table,) = moved.values()  # 32 bytes a column, which each block reads
    assert (table.distinct_read_bytes, table.written_bytes) == (32 * N * launch.grid[0], 0)
    assert launch.traffic.shared.max_ways <= 2
