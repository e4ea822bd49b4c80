"""The backward kernels on inputs that break careless ones, and the sums of their partials."""

import numpy as np
import pytest

from cupynorm._cuda import plan_bwd as _plan_bwd
from cupynorm._cuda.plan import CHUNK_VECS
from cupynorm._cuda.launch import choose_plan as choose_plan_bwd
from cupynorm._problem import GradientProblem
from tests import oracle
from tests.conftest import np_dtype
from tests.gpu_backend import ON_EACH_MACHINE
from tests.gradient_rows import (
    check,
    device_for,
    differentiate,
    length,
    pair,
    run,
    run_plan,
    statistics,
)
from tests.row_cases import FAMILIES, affine, far_rows
from tests.row_kernels import At, vector_at

pytestmark = ON_EACH_MACHINE


# --- hard inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_scales_and_outliers(machine, family):
    """A row for each. At 1e6 float32's mean is off by 0.03, which the kernels must repair."""
    N = length(family, "float32")
    (dy, x), (weight, _) = pair(9, N, scale=1.0, offset=0.0), affine(N)
    x += np.array([[0], [1e2], [1e4], [1e6], [-1e6], [0], [0], [0], [0]], np.float32)
    x *= np.array([[1], [1], [1], [1], [1], [1e-3], [1e6], [1e18], [1]], np.float32)
    x[8, 0] = 1e20  # whose square is beyond float32
    result = run(machine, family, dy, x, weight)
    check(result, dy, x, weight)
    assert np.isfinite(result.dx).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_past_N_stay_out_of_the_sums(machine, family):
    """Registers past the last column hold zeros, and (0 - mean) * rstd is not zero."""
    widest = length(family, "float32")
    for N in (widest, widest - 102):
        dy, x = pair(2, N, scale=1.0, offset=1000.0)
        check(run(machine, family, dy, x, *affine(N)[:1]), dy, x, *affine(N)[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_constant_rows(machine, family):
    """x_hat is exactly zero, so dweight is, and dx is dy less its mean, times eps**-1/2."""
    N = length(family, "float32")
    dy, _ = pair(3, N)
    x = np.repeat(np.float32([[0.0], [0.1], [-3e4]]), N, axis=1)
    result = run(machine, family, dy, x, np.ones(N, np.float32))
    assert (result.dweight == 0).all()
    check(result, dy, x)


def test_float16_near_its_maximum(machine):
    N = length("warp", "float16")
    dy, _ = pair(3, N, "float16")
    x = np.where(np.random.default_rng(N).random((3, N)) < 0.5, 65504.0, [[-65504.0], [6e4], [0.0]])
    x = x.astype(np.float16)
    check(run(machine, "warp", dy, x, affine(N)[0]), dy, x, affine(N)[0])


@pytest.mark.parametrize("scale", [1e-6, 1e15])
def test_scales_of_dy(machine, scale):
    """The gradient is linear in dy: its size changes no relative error."""
    N = length("warp", "float32")
    dy, x = pair(40, N)
    dy *= np.float32(scale)
    check(run(machine, "warp", dy, x, affine(N)[0]), dy, x, affine(N)[0])


@pytest.mark.parametrize("eps", [0.0, 1.0, 1e-300, -0.5, -1e9])
def test_eps(machine, eps):
    """It reaches the kernels through rstd alone, NaN where var + eps is below zero."""
    dy, x = pair(5, 77)
    result = differentiate(machine, dy, x, affine(77)[0], eps=eps)
    check(result, dy, x, affine(77)[0], eps=eps)
    assert np.isnan(result.dx).all() == (eps == -1e9)


@pytest.mark.parametrize(
    ("family", "spoiler"),
    [("warp", np.nan), ("warp", np.inf), ("block", np.inf), ("shared", np.nan), ("split", np.nan)],
)
def test_nan_and_inf_of_x_spoil_their_row_only(machine, family, spoiler):
    """Of dx; their x_hat is NaN, so dweight is lost, and dbias does not see x."""
    N = length(family, "float32")
    (dy, x), (weight, _) = pair(9, N), affine(N)
    clean = run(machine, family, dy, x, weight, sm_count=1)
    x[4, -1] = spoiler
    result = run(machine, family, dy, x, weight, sm_count=1)
    assert np.isnan(result.dx[4]).all()
    assert np.isnan(result.dweight).all()
    others = [i for i in range(9) if i != 4]
    assert [result.row_bits()[i] for i in others] == [clean.row_bits()[i] for i in others]
    assert result.bits()[2] == clean.bits()[2]


@pytest.mark.parametrize(
    ("family", "spoiler"),
    [
        ("warp", np.nan),
        ("warp", -np.inf),
        ("block", np.nan),
        ("shared", -np.inf),
        ("split", np.nan),
    ],
)
def test_nan_and_inf_of_dy_spoil_their_row_and_column_only(machine, family, spoiler):
    N = length(family, "float32")
    (dy, x), (weight, _) = pair(9, N), affine(N)
    clean = run(machine, family, dy, x, weight, sm_count=1)
    dy[4, 1] = spoiler
    result = run(machine, family, dy, x, weight, sm_count=1)
    assert not np.isfinite(result.dx[4]).any()
    others = [i for i in range(9) if i != 4]
    assert [result.row_bits()[i] for i in others] == [clean.row_bits()[i] for i in others]
    for mine, was in zip(result.arrays[1:], clean.arrays[1:], strict=True):
        assert not np.isfinite(mine[1])
        np.testing.assert_array_equal(np.delete(mine, 1), np.delete(was, 1))


# --- huge ---------------------------------------------------------------------------------------


def test_more_sections_than_the_lanes_that_merge_them(machine):
    """A lane of the second kernel then adds several sections before the tree."""
    N = 33 * CHUNK_VECS * 4 + 5
    dy, x = pair(2, N, scale=1.0, offset=100.0)
    only_dx = {"wanted": (True, False, False)}  # dweight's sums would take most of the time
    result = run(machine, "split", dy, x, affine(N)[0], x_at=At(1), **only_dx)
    assert result.plan.sections == 34
    check(result, dy, x, affine(N)[0])


def test_sections_of_several_chunks(machine, monkeypatch):
    """What a row of more than 512 chunks takes, with a limit of 2 instead."""
    monkeypatch.setattr(_plan_bwd, "MAX_SECTIONS", 2)
    monkeypatch.setattr("tests.gradient_rows.choose_plan_bwd", choose_plan_bwd.__wrapped__)
    for chunks in (3, 5):
        N = (chunks * CHUNK_VECS - 1) * 4 + 1
        dy, x = pair(2, N, scale=1.0, offset=1e5)
        only_dx = {"wanted": (True, False, False)}
        result = run(machine, "split", dy, x, affine(N)[0], dx_at=At(3, 2), **only_dx)
        assert result.plan.chunks_per_section == -(-chunks // 2)
        check(result, dy, x, affine(N)[0])


FAR = [("warp", 1), ("warp", 2), ("block", 1), ("shared", 1), ("cluster", 1), ("split", 2)]


@pytest.mark.parametrize(("family", "outer"), FAR)
def test_rows_more_than_2_to_31_elements_apart(machine, family, outer):
    """Offsets of rows are 64-bit: two rows of dy, x and dx, with a hole of addresses between."""
    N, size = length(family, "float16"), 2
    (dy, x), (weight, _) = pair(2, N, "float16"), affine(N)
    only_dx = (True, False, False)
    expected = run(machine, family, dy, x, weight, wanted=only_dx)
    far = {name: far_rows(machine, name, N * size) for name in ("dy", "x", "dx")}
    strides = {}
    for name, (first, second) in far.items():
        step = (second.ptr - first.ptr) // size
        assert abs(step) > 2**31
        strides[name] = (step, 0, 1) if outer == 2 else (0, step, 1)
    for name, rows in (("dy", dy), ("x", x)):
        for memory, row in zip(far[name], rows, strict=True):
            machine.put(memory, row)
    mean, rstd = (vector_at(machine, "stats", a, 0) for a in statistics(x))
    w = vector_at(machine, "weight", weight, 0)
    problem = GradientProblem(
        "float16", "float32", None, None, True, outer, 2 // outer, N, *strides.values()
    )
    plan = choose_plan_bwd(problem, device_for(machine, family))
    first = {name: memories[0].ptr for name, memories in far.items()}
    pointers = [first["dy"], first["x"], mean.ptr, rstd.ptr, w.ptr, first["dx"], 0, 0]
    memories = [m for pieces in far.values() for m in pieces]
    run_plan(machine, plan, problem, pointers, [*memories, mean.memory, rstd.memory, w.memory])
    got = [machine.get(memory).view(np.float16) for memory in far["dx"]]
    np.testing.assert_array_equal(got, expected.dx)


# --- the sums of the partials -------------------------------------------------------------------


def totals_of(machine, partials, dtypes, N):
    """column_totals over partials of shape (which, count, pitch), as a plan would launch it."""
    kind = partials.dtype.name
    wanted = [d is not None for d in dtypes]
    strides = ((0, N, 1),) * 3
    problem = GradientProblem(kind, None, *dtypes, False, 1, 1, N, *strides)
    stage = choose_plan_bwd(problem, machine.device).stages[-1]
    assert stage.kernel == "column_totals"
    _, count, pitch = partials.shape
    workspace = vector_at(machine, "workspace", partials.ravel(), 0)
    targets = [
        vector_at(machine, "total", np.zeros(N, np_dtype(d)), 0) if d else None for d in dtypes
    ]
    memories = [workspace.memory]
    for target in targets:
        if target is not None:
            target.memory.writable = True
            memories.append(target.memory)
    pointers = [0 if t is None else t.ptr for t in targets]
    machine.run(stage, (workspace.ptr, count, pitch, N, *pointers), memories, 1)
    assert sum(wanted) == len(partials)
    return [None if t is None else t.get()[0] for t in targets]


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
    "dtypes", [("float16", "bfloat16"), ("bfloat16", None), (None, "float16"), ("float64", None)]
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
