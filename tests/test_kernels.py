"""The row kernels, executed: every row of the plan table, alignments, batches, mixed dtypes."""

import dataclasses

import numpy as np
import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.rows import FORWARD

TABLE = [row for row in FORWARD if row.cluster == 1]
from cupynorm._problem import ITEMSIZE
from tests.conftest import ALL_DTYPES
from tests.gpu_backend import ON_EACH_MACHINE
from tests.row_cases import FAMILIES, affine, check, device_for, length, run, values
from tests.row_kernels import At, normalize

pytestmark = ON_EACH_MACHINE


# --- every row of the plan table, at its edges --------------------------------------------------


def edges():
    for dtype in ALL_DTYPES:
        for row in TABLE[:-1]:
            vecs = min(row.max_vecs, 227 * 1024 // VEC_BYTES - 60)  # the last that sm_90 holds
            yield pytest.param(dtype, vecs, id=f"{dtype}-{row.family}-{vecs}")


@pytest.mark.parametrize(("dtype", "vecs"), list(edges()))
def test_edges_of_the_table(machine, dtype, vecs):
    """The last lengths of a row of the table and the first of the next one.

    An odd pitch brings every row to another alignment, and blocks end with rows that do not exist.
    """
    limit = vecs * VEC_BYTES // ITEMSIZE[dtype]
    device = device_for(machine, "shared")
    for N in (limit - 1, limit, limit + 1):
        rows = 37 if vecs <= 64 else 9 if vecs <= 2048 else 2
        x = values(rows, N, dtype)
        weight, bias = affine(N)
        at = {"x_at": At(1, 1 + N % 2), "y_at": At(2, 3 + N % 2)}
        check(normalize(machine, x, weight, bias, device=device, **at), x, weight, bias)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_beyond_shared_memory(machine, dtype):
    N = (machine.device.shared_bytes + VEC_BYTES) // ITEMSIZE[dtype] + 1
    x, (weight, bias) = values(2, N, dtype), affine(N)
    result = normalize(
        machine, x, weight, bias, x_at=At(1, 1), device=device_for(machine, "shared")
    )
    assert result.plan.family == "split"
    check(result, x, weight, bias)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("N", [1, 2, 3, 7, 33])
def test_short_rows_at_every_pair_of_alignments(machine, dtype, N):
    x, (weight, bias) = values(5, N, dtype), affine(N)
    expected = normalize(machine, x, weight, bias)
    check(expected, x, weight, bias)
    steps = range(16 // ITEMSIZE[dtype])
    for i in steps:
        for j in steps:
            at = {"x_at": At(i, (i + j) % 3), "y_at": At(j, i % 2)}
            assert normalize(machine, x, weight, bias, **at).bits() == expected.bits(), (i, j)


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_alignment(machine, family, dtype):
    N = length(family, dtype)
    x, (weight, bias) = values(3, N, dtype), affine(N)
    expected = run(machine, family, x, weight, bias)
    check(expected, x, weight, bias)
    for i in range(16 // ITEMSIZE[dtype] + 1):  # the last is the first vector's whole length
        at = {"x_at": At(i, i % 3), "y_at": At(3 * i + 1, (i + 1) % 2)}
        result = run(machine, family, x, weight, bias, affine_offset=i % 2, **at)
        assert result.bits() == expected.bits(), i


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_batch(machine, family, dtype):
    """Alone, among others, in another order, in outer steps, whatever thread runs first."""
    N = length(family, dtype)
    x, (weight, bias) = values(6, N, dtype), affine(N)
    expected = run(machine, family, x, weight, bias).bits()
    alone = [run(machine, family, row[None], weight, bias).bits()[0] for row in x[:3]]
    assert alone == expected[:3]
    turned = run(machine, family, x[::-1].copy(), weight, bias)
    assert turned.bits() == expected[::-1]
    at = {"x_at": At(0, 3, outer_gap=5), "y_at": At(1, 0, outer_gap=2)}
    assert run(machine, family, x, weight, bias, outer=3, **at).bits() == expected
    many = np.concatenate([x] * 7)  # blocks of several rows end elsewhere
    assert run(machine, family, many, weight, bias).bits() == expected * 7
    for seed in (None, 1, 2):
        assert run(machine, family, x, weight, bias, seed=seed).bits() == expected


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("chunks", [2, 5, 13])
def test_shared_and_split_give_the_same_bits(machine, dtype, chunks):
    """What lets the number of rows choose between K3 and K5."""
    N = (chunks * CHUNK_VECS + 77) * VEC_BYTES // ITEMSIZE[dtype] + 1
    x, (weight, bias) = values(2, N, dtype, offset=1000.0), affine(N)
    shared = run(machine, "shared", x, weight, bias)
    split = run(machine, "split", x, weight, bias, x_at=At(1, 2), y_at=At(1))
    check(shared, x, weight, bias)
    assert shared.bits() == split.bits()


def test_the_number_of_rows_chooses_between_them(machine):
    device = dataclasses.replace(machine.device, sm_count=4, max_cluster=1)
    N = 9 * CHUNK_VECS * 4 + 1
    x, (weight, bias) = values(3, N), affine(N)
    few = normalize(machine, x[:2], weight, bias, device=device)
    more = normalize(machine, x, weight, bias, device=device)
    assert (few.plan.family, more.plan.family) == ("split", "shared")
    assert few.bits() == more.bits()[:2]


# --- weight, bias, statistics, out --------------------------------------------------------------

MIXED = [
    ("float16", "float64", "bfloat16"),
    ("float16", None, "float16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float16", None),
    ("float32", "float16", "float64"),
    ("float32", None, None),
    ("float64", "float64", "float64"),
    ("float64", "bfloat16", "float32"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "weight_dtype", "bias_dtype"), MIXED)
def test_weight_and_bias(machine, family, dtype, weight_dtype, bias_dtype):
    """Of any dtype, present or not, and at addresses where no vector load is allowed."""
    N = length(family, dtype)
    x, (weight, bias) = values(3, N, dtype), affine(N, weight_dtype, bias_dtype)
    expected = run(machine, family, x, weight, bias)
    check(expected, x, weight, bias)
    offset = run(machine, family, x, weight, bias, affine_offset=1)
    assert offset.bits() == expected.bits()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place(machine, family):
    """Also where rows fill their lanes and a skewed one spills into the vector behind."""
    full = {"warp": 64, "block": 512, "shared": 3 * CHUNK_VECS, "split": 3 * CHUNK_VECS}[family]
    for N in (length(family, "float16"), full * 8):
        x, (weight, bias) = values(9, N, "float16"), affine(N)
        expected = run(machine, family, x, weight, bias)
        for at in (At(), At(3, 1)):
            result = run(machine, family, x, weight, bias, in_place=True, x_at=at)
            assert result.bits() == expected.bits()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_statistics(machine, family):
    x = values(3, length(family, "float32"))
    result = run(machine, family, x, *affine(x.shape[1]), stats=False)
    assert result.mean is None
    assert (result.y == run(machine, family, x, *affine(x.shape[1])).y).all()


@pytest.mark.parametrize("eps", [0.0, 1.0, 1e-300, -0.5, -1e9])
def test_eps(machine, eps):
    """Any real number; var + eps below zero gives NaN, as sqrt does."""
    x = values(5, 77)
    result = normalize(machine, x, eps=eps)
    check(result, x, eps=eps)
    assert np.isnan(result.y).all() == (eps == -1e9)
