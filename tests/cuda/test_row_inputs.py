"""The row kernels on inputs that break careless ones: offsets, scales, constants, NaN, huge."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from cupynorm._cuda import rows as _rows
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, totals_stages
from tests import oracle
from tests.conftest import np_dtype
from tests.cuda.rows import (
    DX_ALONE,
    EACH,
    FAMILIES,
    At,
    Rows,
    add_partials,
    case,
    check,
    device_for,
    execute,
    far_rows,
    length,
    problem_of,
    run,
    statistics,
    vector_at,
)
from tests.gpu_backend import ON_EACH_MACHINE

pytestmark = ON_EACH_MACHINE
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def plain(rows, N, dtype="float32", **x):
    """A forward whose weight is 1 and whose bias is 0."""
    ones, zeros = np.ones(N, np.float32), np.zeros(N, np.float32)
    return dataclasses.replace(case("forward", rows, N, dtype, **x), weight=ones, bias=zeros)


# --- hard inputs --------------------------------------------------------------------------------


# A row for each: offset, scale, the most that y may be off, in float32 epsilons of its largest.
HARD = [
    *((offset, 1, 4) for offset in (1e2, 1e4, 1e6, -1e6)),
    *((0, scale, 6) for scale in (1, 1e-20, 1e-3, 1e6, 1e18, 1, 1)),
]


@EACH
@EACH_FAMILY
def test_offsets_scales_and_outliers(machine, direction, family):
    """At 1e6 float32's mean is off by 0.03, which the kernels must repair.

    Two rows hold a value whose square is beyond float32; their variance is not.
    """
    N = length(family, "float32", direction)
    make = plain if direction == "forward" else functools.partial(case, direction)
    data = make(len(HARD), N, scale=1.0, offset=0.0)
    offset, scale, most = np.float32(HARD).T
    data.x[...] = data.x * scale[:, None] + offset[:, None]
    data.x[-2, 0], data.x[-1, -1] = 1e20, -1e20
    result = run(machine, data, family)
    assert all(np.isfinite(a).all() for a in result.arrays)
    if direction == "backward":
        check(result, data)
        return
    y = oracle.layer_norm(data.x, (1,), None, None, 1e-5)[0]
    worst = np.abs(result.arrays[0].astype(np.float64) - y).max(1) / np.abs(y).max(1)
    assert (worst < most * 2.0**-23).all()


# Rows whose variance is beyond the range of the statistics, or flushes to zero: offset and scale.
BEYOND = {
    "bfloat16": ((0, 1e30), (2e38, 1e37), (0, 1e-30), (1e-20, 1e-20)),
    "float32": ((0, 1e30), (1e30, 1e25), (3e38, 1e36), (0, 1e-17), (1e-25, 1e-30), (0, 1e-30)),
    "float64": ((0, 1e200), (1e300, 1e290), (1.5e308, 1e306), (0, 1e-180), (0, 1e-300)),
}


@pytest.mark.parametrize("dtype", BEYOND)
@pytest.mark.parametrize("family", [*FAMILIES, "cluster"])
def test_rows_beyond_the_range_of_their_squares(machine, family, dtype):
    """A row is looked at again, scaled; the others keep their bits. Both ends, with eps 0."""
    N = length(family, dtype)
    plainest = plain(len(BEYOND[dtype]) + 1, N, dtype, scale=1.0, offset=0.0)
    usual = run(machine, plainest.rows([-1]), family, eps=0.0)
    offset, scale = np.array([*BEYOND[dtype], (0, 1)]).T[:, :, None]
    x = (plainest.x.astype(np.float64).clip(-3, 3) * scale + offset).astype(plainest.x.dtype)
    x[-1] = plainest.x[-1]
    result = run(machine, dataclasses.replace(plainest, x=x), family, eps=0.0)
    assert result.rows()[-1] == usual.rows()[0]
    y, mean, _ = oracle.layer_norm(x, (1,), None, None, 0.0)
    worst = np.abs(result.arrays[0].astype(np.float64) - y).max(1) / np.abs(y).max(1)
    assert (worst <= 2 * oracle.tolerance(dtype, N)).all(), worst
    assert (
        np.abs(result.arrays[1] - mean[:, 0]) <= 1e-6 * np.abs(x.astype(np.float64)).max(1)
    ).all()


CONSTANT = [
    *itertools.product(("forward",), FAMILIES, ("float16", "float32")),
    *itertools.product(("backward",), FAMILIES, ("float32",)),
]


@pytest.mark.parametrize(("direction", "family", "dtype"), CONSTANT)
def test_constant_rows(machine, direction, family, dtype):
    """Variance 0 exactly: y is the bias, and no rounding of the mean shows through rstd.

    x_hat is zero, so dweight is, and dx is dy less its mean, times eps**-1/2.
    """
    N = length(family, dtype, direction)
    constants = np.array([0.0, 0.1, -3e4, 65504.0]).astype(np_dtype(dtype))
    x = np.repeat(constants[:, None], N, axis=1)
    data = dataclasses.replace(case(direction, 4, N, dtype), x=x, weight=np.ones(N, np.float32))
    result = run(machine, data, family)
    check(result, data)
    if direction == "backward":
        assert (result.arrays[1] == 0).all()
        return
    y, mean, rstd = result.arrays
    np.testing.assert_array_equal(mean, constants.astype(np.float32))
    np.testing.assert_allclose(rstd, 1e-5**-0.5, rtol=1e-6)
    want = np.broadcast_to(data.bias.astype(x.dtype), x.shape).astype(np.float64)
    np.testing.assert_allclose(y.astype(np.float64), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("direction", "family", "second"),
    [*(("forward", f, 65472.0) for f in FAMILIES), ("backward", "warp", 6e4)],
)
def test_float16_near_its_maximum(machine, direction, family, second):
    N = length(family, "float16", direction)
    data = case(direction, 3, N, "float16")
    high = np.random.default_rng(N).random((3, N)) < 0.5
    data.x[...] = np.where(high, 65504.0, [[-65504.0], [second], [0.0]])
    check(run(machine, data, family), data)


def test_scales_of_dy(machine):
    """The gradient is linear in dy: its size changes no relative error."""
    for scale in (1e-6, 1e15):
        data = case("backward", 40, length("warp", "float32"))
        data.dy[...] *= np.float32(scale)
        check(run(machine, data, "warp"), data)


# --- NaN and infinity -----------------------------------------------------------------------------

SPOILERS = [
    *(("forward", f, "x", s) for f in (*FAMILIES, "cluster") for s in (np.nan, np.inf, -np.inf)),
    *(("backward", "warp", "x", s) for s in (np.nan, np.inf)),
    *(("backward", f, "x", s) for f, s in zip(FAMILIES[1:], (np.inf, np.nan, np.nan), strict=True)),
    *(("backward", "warp", "dy", s) for s in (np.nan, -np.inf)),
    *(
        ("backward", f, "dy", s)
        for f, s in zip(FAMILIES[1:], (np.nan, -np.inf, np.nan), strict=True)
    ),
]


@pytest.mark.parametrize(("direction", "family", "name", "spoiler"), SPOILERS)
def test_nan_and_inf_spoil_no_other_row(machine, direction, family, name, spoiler):
    """Of x also x_hat, so that dweight is lost, and dbias is not; of dy their column of both."""
    rows = 3 if family == "cluster" else 9
    data = case(direction, rows, length(family, "float32", direction))
    options = {"sm_count": 1} if direction == "backward" else {}
    clean = run(machine, data, family, **options)
    spoilt = {(1, -1): spoiler} if rows == 3 else {(4, 1): spoiler}
    if name == "x" and rows == 9:
        spoilt[7, 0] = spoiler
    for place, value in spoilt.items():
        getattr(data, name)[place] = value
    result = run(machine, data, family, **options)
    lost = sorted({row for row, _ in spoilt})
    assert not np.isfinite(result.arrays[0][lost]).any()
    others = [i for i in range(rows) if i not in lost]
    assert [result.rows()[i] for i in others] == [clean.rows()[i] for i in others]
    if direction == "forward":
        assert np.isnan(result.arrays[0][lost]).all() and np.isnan(result.arrays[2][lost]).all()
    elif name == "x":
        assert np.isnan(result.arrays[0][lost]).all() and np.isnan(result.arrays[1]).all()
        assert result.bits()[2] == clean.bits()[2]
    else:
        for mine, was in zip(result.arrays[1:], clean.arrays[1:], strict=True):
            assert not np.isfinite(mine[1])
            np.testing.assert_array_equal(np.delete(mine, 1), np.delete(was, 1))


# --- huge ---------------------------------------------------------------------------------------


# Chunks, and MAX_SECTIONS where it is not the one of rows of more than 512 chunks. Where there are
# more sections than threads or lanes that merge them, these take several before the tree.
SECTIONS = [
    *(("forward", chunks, 4) for chunks in (4, 5, 9, 11)),
    *(("backward", chunks, 2) for chunks in (3, 5)),
    *(("forward", 301, None), ("backward", 34, None)),
]


@pytest.mark.parametrize(("direction", "chunks", "limit"), SECTIONS)
def test_sections(machine, monkeypatch, direction, chunks, limit):
    """Of several chunks each, or many of one."""
    if limit:
        monkeypatch.setattr(_rows, "MAX_SECTIONS", limit)
    N = (chunks * CHUNK_VECS - 1) * VEC_BYTES // 4 + 1
    data = case(direction, 2 if limit or direction == "backward" else 1, N, offset=1e5, scale=1.0)
    at = dict.fromkeys(data.shaped[:-1], At(1)) | {data.shaped[-1]: At(3, 2)}
    options = {"wanted": DX_ALONE} if direction == "backward" else {}
    result = run(machine, data, "split", at=at, **options)
    assert result.plan.chunks_per_section == (-(-chunks // limit) if limit else 1)
    assert limit or result.plan.sections == chunks
    check(result, data)


FAR = [
    *(("forward", family, outer) for family in (*FAMILIES, "cluster") for outer in (1, 2)),
    *(("backward", family, 1) for family in ("warp", "block", "shared", "cluster")),
    ("backward", "warp", 2),
    ("backward", "split", 2),
]


@pytest.mark.parametrize(("direction", "family", "outer"), FAR)
def test_rows_more_than_2_to_31_elements_apart(machine, direction, family, outer):
    """Offsets of rows are 64-bit: two rows of each array, with a hole of addresses between.

    (A row of more than 2**31 columns would need its memory; K5's column offsets are 64-bit too.)
    """
    N, size = length(family, "float16", direction), 2
    data = case(direction, 2, N, "float16")
    options = {"wanted": DX_ALONE} if data.backward else {}
    expected = run(machine, data, family, **options).arrays[0]
    far = {name: far_rows(machine, name, N * size) for name in data.shaped}
    strides = {}
    for name, (first, second) in far.items():
        step = (second.ptr - first.ptr) // size
        assert abs(step) > 2**31
        strides[name] = (step, 0) if outer == 2 else (0, step)
    for name, given in (("x", data.x), ("dy", data.dy)):
        for memory, row in zip(far.get(name, ()), () if given is None else given, strict=True):
            machine.put(memory, row)
    small = {"weight": data.weight, "bias": data.bias}
    if data.backward:
        small |= dict(zip(("mean", "rstd"), statistics(data.x), strict=True))
    held = {name: vector_at(machine, name, a, 0) for name, a in small.items() if a is not None}
    dtypes = {"x": "float16", "weight": "float32", "bias": data.bias is not None and "float32"}
    problem = problem_of(dtypes, (outer, 2 // outer, N), strides, data.backward)
    pointers = {name: pieces[0].ptr for name, pieces in far.items()}
    pointers |= {name: rows.ptr for name, rows in held.items()}
    memories = [m for pieces in far.values() for m in pieces]
    memories += [rows.memory for rows in held.values()]
    plan, _ = execute(machine, problem, device_for(machine, family, direction), pointers, memories)
    assert plan.family == family
    got = [machine.get(memory).view(np.float16) for memory in far[data.shaped[-1]]]
    np.testing.assert_array_equal(got, expected)


# --- the sums of the partials -------------------------------------------------------------------


def totals_of(machine, partials, dtypes, N):
    """column_totals over partials of shape (which, count, pitch), as a plan would launch it."""
    kind = partials.dtype.name
    named = {"x": kind, "dweight": dtypes[0], "dbias": dtypes[1]}
    (stage,) = totals_stages(problem_of(named, (1, 1, N), {"x": (N, N)}, backward=True))
    assert sum(d is not None for d in dtypes) == len(partials)
    found = []
    for on_host in (False, True):
        held = {"workspace": vector_at(machine, "workspace", partials.ravel(), 0)}
        for name, dtype in zip(("dweight", "dbias"), dtypes, strict=True):
            held[name] = dtype and Rows(machine, name, np_dtype(dtype), (1, 1, N))
        at = [a.ptr if a else 0 for a in held.values()]
        args, memories = (
            (at[0], *partials.shape[1:], N, *at[1:]),
            [a.memory for a in held.values() if a],
        )
        if on_host:  # as the simulator saves time elsewhere: the same to the bit
            add_partials(machine, {m.ptr: m for m in memories}, stage, *args)
        else:
            machine.run(stage, args, memories, 1)
        found.append([held[n].get()[0] if held[n] else None for n in ("dweight", "dbias")])
    mine, host = ([None if a is None else a.tobytes() for a in some] for some in found)
    assert mine == host
    return found[0]


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 65, 528])
def test_totals_of_any_number_of_partials(machine, count):
    """Padded columns are not read, and the order of the sum is not one long chain."""
    rng = np.random.default_rng(count)
    N, pitch = 37, 40
    partials = rng.standard_normal((2, count, pitch)).astype(np.float32)
    partials[0] += 1
    partials[:, :, N:] = np.nan
    got = totals_of(machine, partials, ("float32", "float32"), N)
    exact = partials[:, :, :N].astype(np.float64)
    want = exact.sum(1)
    scale = np.sqrt((exact**2).sum(1)) + np.abs(want)
    bound = 2.0**-23 * np.abs(want) + oracle.gradient_tolerance("float32", count) * scale
    assert (np.abs(np.stack(got) - want) <= bound / 2).all()


@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype, dtype) for dtype in ("float32", "float64")),
        *(("float16", "bfloat16"), ("bfloat16", None), (None, "float16")),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_totals_are_rounded_once(machine, kind, dtypes):
    """From sums that are exact: whole numbers, of which most lie between two results."""
    count, N = 5, 33
    wanted = [d for d in dtypes if d]
    rng = np.random.default_rng(3)
    partials = rng.integers(-9000, 9000, (len(wanted), count, 36)).astype(kind)
    sums = iter(partials.sum(1)[:, :N])
    for total, dtype in zip(totals_of(machine, partials, dtypes, N), dtypes, strict=True):
        if dtype is not None:
            np.testing.assert_array_equal(total, next(sums).astype(np_dtype(dtype)))
