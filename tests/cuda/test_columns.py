"""K7, columns of their own on a GPU: values, nulls, layouts, bytes."""

import numpy as np
import pytest

import cupynorm as cn
from tests import test_columns as on_cpu
from tests.conftest import Backend
from tests.test_columns import DTYPES, INTEGERS, column, table


def on_device(lib, columns, bitmaps=None):
    bitmaps = bitmaps or [None] * len(columns)
    moved = [lib.from_numpy(c) for c in columns]
    return [c if b is None else (c, lib.from_numpy(b)) for c, b in zip(moved, bitmaps, strict=True)]


def check(lib, y, columns, **how):
    on_cpu.check(lib.to_numpy(y), columns, **how)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_type_of_column(cupy_lib, dtype):
    rng, N = np.random.default_rng(1), len(DTYPES)
    columns = table(rng, DTYPES, 133)
    weight, bias = (np.linspace(a, a + 2, N).astype(np.float32) for a in (1, -1))
    affine = [cupy_lib.from_numpy(a) for a in (weight, bias)]
    y = cn.layer_norm_columns(on_device(cupy_lib, columns), *affine, dtype=dtype)
    assert y.flags.c_contiguous
    check(cupy_lib, y, columns, weight=weight, bias=bias)


def test_extreme_integers(cupy_lib):
    """The ends of each type, which a wrong sign or width would move."""
    columns = []
    for kind in INTEGERS:
        limits = np.iinfo(kind)
        columns.append(np.array([limits.min, limits.max, 0, 1], kind))
    y = cn.layer_norm_columns(on_device(cupy_lib, columns), dtype="float64")
    check(cupy_lib, y, columns)


@pytest.mark.parametrize("N", [3, 40, 300])
@pytest.mark.parametrize("nulls", ["propagate", "omit"])
def test_nulls(cupy_lib, nulls, N):
    """Bitmaps and NaN alike; more columns than a chunk; rows without a valid element."""
    M, rng = 70, np.random.default_rng(N)
    columns = [column(rng, "float32" if j % 2 else "int16", M) for j in range(N)]
    columns[1][4] = np.nan
    bitmaps = [
        rng.integers(0, 256, -(-M // 8)).astype(np.uint8) if j % 3 else None for j in range(N)
    ]
    if nulls == "omit":
        bitmaps = [np.zeros(-(-M // 8), np.uint8) if b is None else b for b in bitmaps]
        for bitmap in bitmaps:
            bitmap[1] = 0  # rows 8 to 15 have nothing
    every = np.full(-(-M // 8), 255, np.uint8)
    known = (every if b is None else b for b in bitmaps)
    valid = [np.unpackbits(b, bitorder="little")[:M].astype(bool) for b in known]
    given, how = on_device(cupy_lib, columns, bitmaps), {"omit": nulls == "omit", "valid": valid}
    y = cn.layer_norm_columns(given, nulls=nulls)
    check(cupy_lib, y, columns, **how)  # NaN for NaN
    scaled = cn.rms_norm_columns(given, eps=1e-5, nulls=nulls)
    check(cupy_lib, scaled, columns, center=False, **how)
    assert nulls != "omit" or np.isnan(cupy_lib.to_numpy(y)[8:16]).all()


def test_strided_columns_and_a_result_of_any_layout(cupy_lib):
    import cupy

    M = 50
    base = column(np.random.default_rng(0), "float32", 3 * M)
    columns = [base[::3], base[M : 2 * M], base[-M:][::-1].copy()]
    device = [cupy_lib.from_numpy(base)[::3], *on_device(cupy_lib, columns[1:])]
    check(cupy_lib, cn.layer_norm_columns(device), columns)
    out = cupy.empty((M, 3), dtype="float32", order="F")
    assert cn.layer_norm_columns(device, out=out) is out
    check(cupy_lib, out, columns)


def test_half_precision_is_written_two_columns_at_once(cupy_lib):
    import cupy

    M = 90
    for N in (24, 25):
        columns = table(np.random.default_rng(N), ["float32"] * N, M)
        out = cupy.empty((M, 26), dtype="float16")[:, :N]
        cn.layer_norm_columns(on_device(cupy_lib, columns), out=out)
        check(cupy_lib, out, columns)
        if cupy_lib.backend is Backend.CUPY_SIMULATED:
            result = cupy.simulator.launches[-1].traffic[out]
            assert result.write_widths == {4: M * (N // 2)} | ({2: M} if N % 2 else {})


def test_a_plan_is_made_once(cupy_lib, monkeypatch):
    from cupynorm._cuda import arrays  # as the library at hand has it

    device = on_device(cupy_lib, table(np.random.default_rng(0), ["float32"] * 5, 61))
    first = cn.layer_norm_columns(device)
    monkeypatch.setattr(arrays, "ready_on", None)
    again = cn.layer_norm_columns(device)
    assert (cupy_lib.to_numpy(first) == cupy_lib.to_numpy(again)).all()


def test_no_row_depends_on_another(cupy_lib):
    columns = table(np.random.default_rng(0), ["float32"] * 20, 300)
    whole = cupy_lib.to_numpy(cn.layer_norm_columns(on_device(cupy_lib, columns)))
    part = on_device(cupy_lib, [c[100:117].copy() for c in columns])
    assert (cupy_lib.to_numpy(cn.layer_norm_columns(part)) == whole[100:117]).all()


def test_every_byte_is_read_and_written_once(cupy_lib):
    if cupy_lib.backend is not Backend.CUPY_SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    import cupy

    M, N = 512, 24
    columns = table(np.random.default_rng(0), ["float32", "int64", "int8", "float16"] * (N // 4), M)
    device = on_device(cupy_lib, columns)
    y = cn.layer_norm_columns(device, dtype="float32")
    launch = cupy.simulator.launches[-1]
    assert launch.name.startswith("layer_norm_fwd_columns_f32")
    moved = {b.ptr: b for b in launch.traffic.buffers}
    for c in device:
        buffer = moved.pop(c.data.ptr)
        assert (buffer.read_bytes, buffer.written_bytes) == (c.nbytes, 0)
    result = moved.pop(y.data.ptr)
    assert (result.read_bytes, result.written_bytes) == (0, y.nbytes)
    (described,) = moved.values()  # 32 bytes a column, which each block reads
    assert (described.distinct_read_bytes, described.written_bytes) == (32 * N * launch.grid[0], 0)
    assert launch.traffic.shared.max_ways <= 2
