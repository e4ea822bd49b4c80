"""The backward kernels, executed: the plan table, alignments, batches, what is wanted, dtypes."""

import dataclasses
import itertools

import numpy as np
import pytest

from cupynorm._cuda.plan import VEC_BYTES
from cupynorm._cuda.rows import BACKWARD

BWD_TABLE = [row for row in BACKWARD if row.cluster == 1 and row.max_vecs != 2048]
from cupynorm._problem import ITEMSIZE
from tests.conftest import ALL_DTYPES
from tests.gpu_backend import ON_EACH_MACHINE
from tests.gradient_rows import ALL, check, device_for, differentiate, length, pair, run
from tests.row_cases import FAMILIES, affine
from tests.row_kernels import At

pytestmark = ON_EACH_MACHINE


def weight_of(N, dtype="float32"):
    return affine(N, dtype)[0]


# --- every row of the plan table, at its edges --------------------------------------------------


def edges():
    for dtype in ALL_DTYPES:
        for row in BWD_TABLE[:-2]:
            if dtype == "bfloat16" and row.max_vecs not in (32, 128):
                continue  # float16's kernels but for the conversions
            yield pytest.param(dtype, row.max_vecs, id=f"{dtype}-{row.family}-{row.max_vecs}")


@pytest.mark.parametrize(("dtype", "vecs"), list(edges()))
def test_edges_of_the_table(machine, dtype, vecs):
    """The last lengths of a row of the table and the first of the next one.

    An odd pitch brings every row to another alignment, and groups end without a row.
    """
    limit = vecs * VEC_BYTES // ITEMSIZE[dtype]
    for N in (limit - 1, limit, limit + 1)[: 3 if vecs < 512 else 2]:  # longer ones take seconds
        dy, x = pair(19 if vecs <= 64 else 5 if vecs <= 256 else 2, N, dtype)
        at = {"dy_at": At(1, 1 + N % 2), "x_at": At(2, 3 + N % 2), "dx_at": At(0, N % 2)}
        check(differentiate(machine, dy, x, weight_of(N), **at), dy, x, weight_of(N))


@pytest.mark.parametrize(
    ("dtype", "vecs", "shared"),
    [("float16", 2060, 227), ("float32", 4096, 227), ("float64", 1600, 99)],
)
def test_long_rows_in_shared_memory(machine, dtype, vecs, shared):
    """More vectors than leave room for the next row's; float32's is the longest row of K3."""
    N = vecs * VEC_BYTES // ITEMSIZE[dtype] - 1
    (dy, x), weight = pair(2, N, dtype), weight_of(N)
    room = min(shared * 1024, machine.device.shared_bytes)
    device = dataclasses.replace(machine.device, shared_bytes=room, max_cluster=1)
    result = differentiate(machine, dy, x, weight, x_at=At(1, 1), device=device)
    assert (result.plan.family, result.plan.stages[0].constants[2:4]) == ("shared", (0, 0))
    check(result, dy, x, weight)


def test_a_device_with_less_shared_memory_splits_the_row(machine):
    device = dataclasses.replace(machine.device, shared_bytes=64 * 1024, max_cluster=1)
    for N, family in ((6143, "shared"), (6145, "split")):
        (dy, x), weight = pair(2, N), weight_of(N)
        result = differentiate(machine, dy, x, weight, dx_at=At(1, 1), device=device)
        assert result.plan.family == family
        check(result, dy, x, weight)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_length_coarsely(machine, dtype):
    most = 600 * 4 // ITEMSIZE[dtype]
    for N in range(1, most, most // 30):
        (dy, x), weight = pair(5, N, dtype), weight_of(N)
        check(differentiate(machine, dy, x, weight, x_at=At(0, 1)), dy, x, weight)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("N", [1, 3, 33])
def test_short_rows_at_every_pair_of_alignments(machine, dtype, N):
    """Of dy and x; that of dx goes through all of them meanwhile."""
    (dy, x), weight = pair(5, N, dtype), weight_of(N)
    expected = differentiate(machine, dy, x, weight)
    check(expected, dy, x, weight)
    steps = range(16 // ITEMSIZE[dtype])
    for i, j in itertools.product(steps, steps):
        at = {"dy_at": At(i, (i + j) % 3), "x_at": At(j, i % 2), "dx_at": At(i + 3 * j, j % 2)}
        assert differentiate(machine, dy, x, weight, **at).bits() == expected.bits(), (i, j)


# --- the same bits ------------------------------------------------------------------------------

# K3 and K5 take half a second for each case: they share what moves columns with K1 and K2.
SKEWS = [
    *itertools.product(("warp",), ("float16", "float32", "float64"), [None]),
    *itertools.product(("block",), ("float32", "float64"), [None]),
    *itertools.product(("warp", "block"), ("bfloat16",), [(3, 6)]),
    *itertools.product(("block",), ("float16",), [(1, 4, 7, 8)]),
    *itertools.product(("shared", "split"), ("float16", "float64"), [(1,)]),
    *itertools.product(("shared", "split"), ("float32",), [(1, 3)]),
]


@pytest.mark.parametrize(("family", "dtype", "skews"), SKEWS)
def test_bits_do_not_depend_on_alignment(machine, family, dtype, skews):
    """Of all three gradients, of the addresses of dy, x, weight and dx."""
    N = length(family, dtype)
    (dy, x), weight = pair(3, N, dtype), weight_of(N)
    expected = run(machine, family, dy, x, weight)
    check(expected, dy, x, weight)
    for i in skews or range(1, 16 // ITEMSIZE[dtype] + 1):  # the last is a vector's whole length
        at = {"dy_at": At(i, i % 3), "x_at": At(3 * i + 1, (i + 1) % 2), "dx_at": At(2 * i, i % 2)}
        result = run(machine, family, dy, x, weight, weight_offset=i % 2, **at)
        assert result.bits() == expected.bits(), i


BATCHES = [("warp", "float16"), ("block", "float16"), *((f, "float32") for f in FAMILIES)]


@pytest.mark.parametrize(("family", "dtype"), BATCHES)
def test_bits_of_dx_do_not_depend_on_the_batch(machine, family, dtype):
    """Alone, among others, in another order, in outer steps, on a device of any size.

    For long rows without dweight and dbias, whose sums take most of the time.
    """
    N = length(family, dtype)
    (dy, x), weight = pair(6, N, dtype), weight_of(N)
    wanted = ALL if family in ("warp", "block") else (True, False, False)

    def rows_of(dy, x, **options):
        result = run(machine, family, dy, x, weight, wanted=wanted, **options)
        check(result, dy, x, weight)
        return result.row_bits()

    expected = rows_of(dy, x)
    assert rows_of(dy[2:3], x[2:3]) == expected[2:3]
    assert rows_of(dy[::-1].copy(), x[::-1].copy()) == expected[::-1]
    at = {"dy_at": At(0, 3, outer_gap=5), "x_at": At(1), "dx_at": At(2, 1, outer_gap=1)}
    assert rows_of(dy, x, outer=3, **at) == expected
    many = [np.concatenate([a] * 3) for a in (dy, x)]  # blocks of several rows end elsewhere
    for sm_count in (1, 3):
        assert rows_of(*many, sm_count=sm_count) == expected * 3


@pytest.mark.parametrize(("family", "rows"), [("warp", 97), ("block", 23), ("shared", 5)])
def test_seeded_orders_give_the_same_bits(machine, family, rows):
    """Of all three, though whichever thread may run first: no atomics, no race."""
    N = length(family, "float32")
    (dy, x), weight = pair(rows, N), weight_of(N)
    expected = run(machine, family, dy, x, weight, seed=0, sm_count=2).bits()
    for seed in (None, 1, 2):
        assert run(machine, family, dy, x, weight, seed=seed, sm_count=2).bits() == expected


def test_seeded_orders_of_the_split_kernels(machine):
    N = length("split", "float32")
    (dy, x), weight = pair(9, N), weight_of(N)
    expected = run(machine, "split", dy, x, weight, seed=0)
    assert expected.plan.partials > 1
    for seed in (None, 1):
        assert run(machine, "split", dy, x, weight, seed=seed).bits() == expected.bits()


# --- more rows than the device holds at a time --------------------------------------------------


@pytest.mark.parametrize("N", [20, 50, 100, 255])
def test_any_number_of_rows_goes_round_the_groups(machine, N):
    """Groups of 8, 16 and 32 lanes, several rows a block, on one multiprocessor.

    Each number of rows leaves another number of groups without a row in the last round.
    """
    device, weight = device_for(machine, "warp", 1), weight_of(N)
    for rows in (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 129, 200, 401):
        dy, x = pair(rows, N)
        result = differentiate(machine, dy, x, weight, device=device)
        assert result.plan.partials <= 4
        check(result, dy, x, weight)


@pytest.mark.parametrize(
    ("family", "dtype", "rows"),
    [
        ("block", "float16", 47),
        ("block", "float32", 47),
        ("block", "float64", 47),
        ("shared", "float32", 7),
        ("split", "float64", 13),
    ],
)
def test_blocks_go_round_the_rows(machine, family, dtype, rows):
    N = length(family, dtype)
    (dy, x), weight = pair(rows, N, dtype), weight_of(N)
    result = run(machine, family, dy, x, weight, sm_count=1)
    assert result.plan.partials < rows
    check(result, dy, x, weight)


def test_every_partial_is_added_once(machine):
    """Whole numbers, whose sums are exact in float32 and in any order, over many blocks."""
    rows, N = 1100, 33
    rng = np.random.default_rng(1)
    dy = rng.integers(-8, 9, (rows, N)).astype(np.float32)
    x = np.where(np.arange(N) % 2 == np.arange(rows)[:, None] % 2, 1, -1).astype(np.float32)
    x[:, -1] = 0  # so that the mean is 0, and rstd 1 with eps = 1 - var
    eps = 1 - 32 / 33
    for sm_count in (1, 2, 5, 132):
        device = device_for(machine, "warp", sm_count)
        result = differentiate(machine, dy, x, eps=eps, device=device)
        np.testing.assert_array_equal(result.dbias, dy.sum(0))
        np.testing.assert_array_equal(result.dweight, (dy * x).sum(0))
    assert result.plan.partials > 32  # a thread of column_totals adds several


# --- what is wanted -----------------------------------------------------------------------------

WANTED = [
    *(("warp", w) for w in itertools.product((True, False), repeat=3) if any(w) and not all(w)),
    *itertools.product(("block", "shared", "split"), [(True, False, False), (False, True, True)]),
    *itertools.product(("shared",), [(True, False, True)]),
]


@pytest.mark.parametrize(("family", "wanted"), WANTED)
def test_what_is_not_wanted_changes_no_bit_of_the_rest(machine, family, wanted):
    N = length(family, "float32")
    (dy, x), weight = pair(7, N), weight_of(N)
    expected = run(machine, family, dy, x, weight, sm_count=1)
    got = run(machine, family, dy, x, weight, sm_count=1, wanted=wanted)
    assert [a is not None for a in got.arrays] == list(wanted)
    check(got, dy, x, weight)
    same_sums = got.plan.partials == expected.plan.partials  # dx alone takes other blocks
    for mine, theirs, rows in zip(got.bits(), expected.bits(), (True, False, False), strict=True):
        assert mine is None or mine == theirs or not (rows or same_sums)


MIXED = [
    ("warp", "float16", "float64"),
    ("warp", "float16", None),
    ("warp", "bfloat16", "bfloat16"),
    ("warp", "float32", "float16"),
    ("warp", "float64", "bfloat16"),
    ("block", "float16", "float16"),
    ("block", "float32", None),
    ("shared", "float32", "bfloat16"),
    ("split", "float32", None),
]


@pytest.mark.parametrize(("family", "dtype", "weight_dtype"), MIXED)
def test_weight(machine, family, dtype, weight_dtype):
    """Of any dtype, present or not, and at an address where no vector load is allowed."""
    N = length(family, dtype)
    (dy, x), weight = pair(5, N, dtype), weight_of(N, weight_dtype)
    expected = run(machine, family, dy, x, weight)
    totals = weight_dtype or ("float64" if dtype == "float64" else "float32")
    assert [a.dtype.name for a in expected.arrays] == [dtype, totals, totals]
    check(expected, dy, x, weight)
    if weight is not None:
        offset = run(machine, family, dy, x, weight, weight_offset=1)
        assert offset.bits() == expected.bits()


@pytest.mark.parametrize("dtypes", [("float16", "float64"), ("float32", "bfloat16")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_of_dweight_and_dbias(machine, dtype, dtypes):
    """Each has its own, rounded once from the sum of float32, or of float64 for a float64 x."""
    N = length("warp", dtype)
    (dy, x), weight = pair(40, N, dtype), weight_of(N)
    plain = differentiate(machine, dy, x, weight, totals=(dtype, dtype))
    got = differentiate(machine, dy, x, weight, totals=dtypes)
    assert [a.dtype.name for a in got.arrays[1:]] == list(dtypes)
    for mine, sums in zip(got.arrays[1:], plain.arrays[1:], strict=True):
        np.testing.assert_array_equal(mine, sums.astype(mine.dtype))
