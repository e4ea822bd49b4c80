"""The row kernels, executed: every row of the plan tables, alignments, batches, dtypes."""

import dataclasses
import itertools

import numpy as np
import pytest

from cupynorm._cuda.plan import STAGE_BULK, STAGE_REGISTERS, VEC_BYTES
from cupynorm._cuda.rows import REGISTERS
from cupynorm._rules import ITEMSIZE
from tests.conftest import ALL_DTYPES
from tests.cuda.rows import (
    DX_ALONE,
    EACH,
    FAMILIES,
    SHAPED,
    WHOLE,
    At,
    case,
    check,
    cols,
    device_for,
    edges,
    length,
    run,
    spread,
)
from tests.gpu_backend import ON_EACH_MACHINE

pytestmark = ON_EACH_MACHINE
FLOATS = ("float16", "float32", "float64")


def laid(direction, *places):
    return dict(zip(SHAPED[direction], places, strict=False))


# --- every row of the plan tables, at its edges ---------------------------------------------------

# Rows up to so many vectors, so that groups and blocks end with rows that do not exist.
EDGE_ROWS = {"forward": ((64, 37), (2048, 9)), "backward": ((64, 19), (256, 5))}


@pytest.mark.parametrize(("direction", "dtype", "vecs"), list(edges()))
def test_edges_of_the_table(machine, direction, dtype, vecs):
    """The last lengths of a row of the table and the first of the next one.

    An odd pitch brings every row to another alignment.
    """
    limit = vecs * VEC_BYTES // ITEMSIZE[dtype]
    device = device_for(machine, "shared", direction)
    for N in (limit - 1, limit, limit + 1):
        rows = next((n for most, n in EDGE_ROWS[direction] if vecs <= most), 2)
        data = case(direction, rows, N, dtype)
        at = laid(direction, At(1, 1 + N % 2), At(2, 3 + N % 2), At(0, N % 2))
        check(run(machine, data, device=device, at=at), data)


@pytest.mark.parametrize(
    ("dtype", "vecs", "shared"), [("float32", 4096, 227), ("float64", 1600, 99)]
)
def test_long_rows_in_shared_memory(machine, dtype, vecs, shared):
    """More vectors than leave room for the next row's; float32's is the longest row of K3."""
    data = case("backward", 2, vecs * VEC_BYTES // ITEMSIZE[dtype] - 1, dtype)
    room = min(shared * 1024, machine.device.shared_bytes)
    device = dataclasses.replace(machine.device, shared_bytes=room, max_cluster=1)
    result = run(machine, data, at={"x": At(1, 1)}, device=device)
    assert (result.plan.family, result.plan.stages[0].constants[3:5]) == ("shared", (0, 0))
    check(result, data)


SHORT = [
    *itertools.product(("forward",), ALL_DTYPES, (1, 2, 3, 7, 33)),
    *itertools.product(("backward",), FLOATS, (1, 3, 33)),
]


@pytest.mark.parametrize(("direction", "dtype", "N"), SHORT)
def test_short_rows_at_every_pair_of_alignments(machine, direction, dtype, N):
    """Of x and y, or of dy and x; that of dx goes through all of them meanwhile.

    Every pair with N of 7; with others each of the two at every one.
    """
    data = case(direction, 5, N, dtype)
    expected = run(machine, data)
    check(expected, data)
    steps = range(16 // ITEMSIZE[dtype])
    for i, j in itertools.product(steps, steps):
        if N != 7 and i and j != (3 * i + 1) % len(steps):
            continue
        at = laid(direction, At(i, (i + j) % 3), At(j, i % 2), At(i + 3 * j, j % 2))
        assert run(machine, data, at=at).bits() == expected.bits(), (i, j)


# --- the same bits ------------------------------------------------------------------------------

# None: each alignment. K3 and K5 backward take half a second a case: they share what moves columns
# with K1 and K2.
SKEWS = [
    *itertools.product(("forward",), FAMILIES, ALL_DTYPES, [None]),
    *itertools.product(("forward", "backward"), ("cluster",), ("float16", "float32"), [None]),
    *itertools.product(("backward",), ("warp",), FLOATS, [None]),
    *itertools.product(("backward",), ("block",), ("float32", "float64"), [None]),
    *itertools.product(("backward",), REGISTERS, ("bfloat16",), [(3, 6)]),
    *itertools.product(("backward",), ("block",), ("float16",), [(1, 4, 7, 8)]),
    *itertools.product(("backward",), ("shared", "split"), ("float16", "float64"), [(1,)]),
    *itertools.product(("backward",), ("shared", "split"), ("float32",), [(1, 3)]),
]


@pytest.mark.parametrize(("direction", "family", "dtype", "skews"), SKEWS)
def test_bits_do_not_depend_on_alignment(machine, direction, family, dtype, skews):
    """Of all results; and of a cluster each byte is read once and written once."""
    cluster = family == "cluster"
    data = case(direction, 2 if cluster else 3, length(family, dtype, direction), dtype)
    expected = run(machine, data, family)
    check(expected, data)
    if cluster and direction == "forward":
        assert run(machine, data, "shared").bits() == expected.bits()
    for i in skews or range(16 // ITEMSIZE[dtype] + 1):  # the last is a vector's whole length
        at = spread(data, i)
        result = run(machine, data, family, affine_offset=i % 2, at=at)
        assert result.bits() == expected.bits(), i
        for traffic in result.traffic if cluster else ():
            *read, written = (traffic[name] for name in data.shaped)
            assert {b.read_bytes for b in read} == {written.written_bytes} == {data.x.nbytes}
            assert {b.written_bytes for b in read} == {written.read_bytes} == {0}


@pytest.mark.parametrize(("direction", "family", "dtype"), WHOLE)
def test_rows_of_whole_vectors_have_two_kernels(machine, direction, family, dtype):
    """One for addresses that are multiples of 16, and one for any; the bits are the same.

    The first would be caught at any other address.
    """
    data = case(direction, 2, length(family, dtype, direction) + 1, dtype)
    expected = run(machine, data, family)
    assert all(s.aligned for s in expected.plan.stages if s.aligned is not None)
    check(expected, data)
    for at, offset in (({}, 1), *(({name: At(1)}, 0) for name in data.shaped)):
        assert run(machine, data, family, affine_offset=offset, at=at).bits() == expected.bits()
    padded = {data.shaped[0]: At(0, 1)}  # a pitch that is no multiple: the plan has one kernel
    result = run(machine, data, family, at=padded)
    assert not any(s.aligned for s in result.plan.stages)
    assert result.bits() == expected.bits()


BATCHES = [
    *itertools.product(("forward",), FAMILIES, ("float16", "float32")),
    ("forward", "cluster", "float16"),
    *itertools.product(("backward",), REGISTERS, ("float16",)),
    *itertools.product(("backward",), (*FAMILIES, "cluster"), ("float32",)),
]


@pytest.mark.parametrize(("direction", "family", "dtype"), BATCHES)
def test_bits_of_a_row_do_not_depend_on_the_batch(machine, direction, family, dtype):
    """Alone, among others, in another order, in outer steps, whatever thread runs first.

    Of a backward on a device of any size, too.
    """
    data = case(direction, 6, length(family, dtype, direction), dtype)

    def rows_of(data, **options):
        result = run(machine, data, family, **options)
        check(result, data)
        return result.rows()

    expected = rows_of(data)
    for i in (0, 1, 2) if direction == "forward" else (2,):
        assert rows_of(data.rows([i])) == expected[i : i + 1]
    assert rows_of(data.rows(slice(None, None, -1))) == expected[::-1]
    places = At(0, 3, outer_gap=5), At(1, 0, outer_gap=2), At(2, 1, outer_gap=1)
    assert rows_of(data, outer=3, at=laid(direction, *places)) == expected
    if direction == "backward":
        for sm_count in (1, 3):  # blocks of several rows end elsewhere
            assert rows_of(data.many(3), sm_count=sm_count) == expected * 3
    elif family != "cluster":
        assert rows_of(data.many(7)) == expected * 7
    for seed in (None, 1, 2) if direction == "forward" or family == "cluster" else ():
        assert rows_of(data, seed=seed) == expected


SEEDED = [
    ("warp", "float32", 97, 2, (None, 1, 2)),
    ("block", "float32", 47, 1, (None, 1, 2)),
    ("block", "float16", 47, 1, (1,)),
    ("block", "float64", 47, 1, (1,)),
    ("shared", "float32", 7, 2, (None, 1, 2)),
    ("split", "float64", 13, 2, (1,)),
    ("split", "float32", 9, None, (None, 1)),
    ("cluster", "float64", 13, 7, (None, 1)),  # three clusters
]


@pytest.mark.parametrize(("family", "dtype", "rows", "sm_count", "seeds"), SEEDED)
def test_seeded_orders_give_the_same_bits(machine, family, dtype, rows, sm_count, seeds):
    """Of all three gradients, though whichever thread may run first: no atomics, no race.

    More rows than a device of so many multiprocessors holds at a time.
    """
    data = case("backward", rows, length(family, dtype, "backward"), dtype)
    expected = run(machine, data, family, sm_count=sm_count)
    check(expected, data)
    if family == "cluster":
        assert (expected.plan.partials, expected.plan.stages[0].grid) == (3, (6, 1, 1))
    assert expected.plan.partials > 1
    assert sm_count is None or expected.plan.partials < rows
    for seed in seeds:
        result = run(machine, data, family, sm_count=sm_count, seed=seed)
        assert result.bits() == expected.bits()


# --- clusters ------------------------------------------------------------------------------------

# Chunks and vectors of a row, KiB of shared memory, results; what the plan's constants begin with.
# Of K4 the first length of each row of the table, the longest that sm_90 holds, and such devices as
# sm_120, where the same row has wider clusters and K3 none of a 16-bit type. dweight and dbias take
# column_totals seconds for many columns: they are wanted where there are few.
ALL, BUT_DWEIGHT = (True, True, True), (True, False, True)
LONG = [
    ("forward", "shared", "float64", 2, 77, 227, ALL, (1, 512)),
    ("forward", "shared", "float32", 5, 77, 227, ALL, (1, 512)),
    ("forward", "shared", "bfloat16", 13, 77, 227, ALL, (1, 768)),
    ("forward", "cluster", "float64", 2, 1, 227, ALL, (2, 256)),
    ("forward", "cluster", "float32", 8, 1, 227, ALL, (4, 256)),
    ("forward", "cluster", "bfloat16", 8, 9, 227, ALL, (8, 256)),
    ("forward", "cluster", "float64", 32, 1, 227, ALL, (8, 512)),
    ("forward", "cluster", "float16", 112, 0, 227, ALL, (8, 512)),
    ("forward", "cluster", "float32", 5, 100, 99, ALL, (4, 256)),
    ("backward", "cluster", "float64", 2, 1, 227, ALL, (2, 512, 4, STAGE_BULK)),
    ("backward", "cluster", "float16", 2, 1, 227, DX_ALONE, (2, 512, 4, STAGE_BULK)),
    ("backward", "cluster", "float16", 4, 1, 227, DX_ALONE, (4, 512, 4, STAGE_BULK)),
    ("backward", "cluster", "float32", 8, 1, 227, DX_ALONE, (8, 512, 4, STAGE_BULK)),
    ("backward", "cluster", "bfloat16", 16, 1, 227, DX_ALONE, (8, 768, 4, STAGE_REGISTERS)),
    ("backward", "cluster", "float64", 24, 1, 227, BUT_DWEIGHT, (8, 256, 16, STAGE_REGISTERS)),
    ("backward", "cluster", "float16", 1, 600, 99, ALL, (2, 256, 4, STAGE_BULK)),
]


@pytest.mark.parametrize(
    ("direction", "family", "dtype", "chunks", "more", "shared", "wanted", "constants"), LONG
)
def test_long_rows_have_the_bits_of_split(
    machine, direction, family, dtype, chunks, more, shared, wanted, constants
):
    """What lets the number of rows choose between K5 and the others, and a device how wide."""
    if machine.device.shared_bytes < 227 * 1024:  # such as sm_120's
        pytest.skip("these rows of the table are for devices with 227 KiB of shared memory")
    rows = (2 if chunks < 9 else 1) if direction == "forward" else (3 if chunks < 16 else 2)
    offset = 1000.0 if direction == "forward" else 5.0
    data = case(direction, rows, cols(chunks, dtype, more), dtype, offset=offset)
    device = device_for(machine, family, direction, 1)
    device = dataclasses.replace(device, shared_bytes=shared * 1024)
    places = laid(direction, At(1, 2), At(3, 1), At(3, 1))
    result = run(machine, data, device=device, at=places, wanted=wanted)
    assert result.plan.family == family
    assert result.plan.stages[0].constants[: len(constants)] == constants
    check(result, data)
    split = run(machine, data, "split")
    assert result.rows() == split.rows()


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_block_may_have_a_few_elements(machine, offset):
    """Fewer than a granule, which the row shares with its neighbours on both sides; or no chunk."""
    small = dataclasses.replace(device_for(machine, "cluster"), shared_bytes=64 * 1024)
    for dtype in ("float16", "float32"):
        data = case("forward", 2, cols(5, dtype) + 2, dtype, None, None)
        result = run(machine, data, device=small, at={"x": At(offset, 1)})
        assert result.plan.stages[0].cluster == 8  # of which two have no chunk, and one an element
        assert result.bits() == run(machine, data, "split").bits()


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_block_may_have_a_few_elements_backward(machine, offset):
    """As in the forward: four blocks for two chunks and two elements, row after row."""
    device = device_for(machine, "cluster", "backward", 1)
    device = dataclasses.replace(device, shared_bytes=99 * 1024)
    data = case("backward", 6, cols(2, "float16") + 3, "float16", None)
    result = run(machine, data, device=device, at=laid("backward", *[At(offset, 1)] * 3))
    assert result.plan.stages[0].constants[:4] == (4, 256, 4, STAGE_BULK)
    check(result, data)
    assert result.rows() == run(machine, data, "split", wanted=DX_ALONE).rows()


# --- weight, bias, statistics, out ----------------------------------------------------------------

MIXED = [
    ("float16", "float64", "bfloat16"),
    ("float16", None, "float16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float16", None),
    ("float32", "float16", "float64"),
    ("float32", "float32", None),
    ("float64", "float64", "float64"),
    ("float64", "bfloat16", "float32"),
]
AFFINE = [  # none, and some of the mixtures, with each family
    *(("forward", family, "float32", None, None) for family in FAMILIES),
    *(("forward", family, *m) for i, family in enumerate(FAMILIES) for m in MIXED[i::4]),
    ("backward", "warp", "float16", "float64", None),
    ("backward", "warp", "float32", "float16", None),
    ("backward", "shared", "float32", "bfloat16", None),
    ("backward", "split", "float32", None, None),
    ("backward", "cluster", "float64", "bfloat16", None),
]


@pytest.mark.parametrize(("direction", "family", "dtype", "weight", "bias"), AFFINE)
def test_weight_and_bias(machine, direction, family, dtype, weight, bias):
    """Of any dtype, present or not, and at addresses where no vector load is allowed."""
    N = length(family, dtype, direction)
    data = case(direction, 2 if family == "cluster" else 3, N, dtype, weight, bias)
    expected = run(machine, data, family)
    check(expected, data)
    if direction == "backward":
        totals = weight or ("float64" if dtype == "float64" else "float32")
        assert [a.dtype.name for a in expected.arrays] == [dtype, totals, totals]
    if weight or bias:
        assert run(machine, data, family, affine_offset=1).bits() == expected.bits()


FULL = {"warp": 64, "block": 320, "shared": 3072, "split": 3072, "cluster": 4096}


@pytest.mark.parametrize("family", FULL)
def test_in_place(machine, family):
    """Also where rows, or blocks of a cluster, end full and a skewed one spills behind."""
    for N in (length(family, "float16"), FULL[family] * 8 - (family == "cluster")):
        data = case("forward", 3 if family == "cluster" else 9, N, "float16")
        expected = run(machine, data, family)
        for at in (At(), At(3, 1)):
            result = run(machine, data, family, in_place=True, at={"x": at})
            assert result.bits() == expected.bits()


@EACH
@pytest.mark.parametrize("eps", [0.0, 1.0, 1e-300, -0.5, -1e9])
def test_eps(machine, direction, eps):
    """Any real number; var + eps below zero gives NaN, as sqrt does.

    It reaches the backward's kernels through rstd alone.
    """
    data = case(direction, 5, 77)
    result = run(machine, data, eps=eps)
    check(result, data, eps=eps)
    assert np.isnan(result.arrays[0]).all() == (eps == -1e9)


# --- more rows than the device holds at a time ----------------------------------------------------


@pytest.mark.parametrize("N", [20, 50, 100, 255])
def test_any_number_of_rows_goes_round_the_groups(machine, N):
    """Groups of 8, 16 and 32 lanes, several rows a block, on one multiprocessor.

    Each number of rows leaves another number of groups without a row in the last round.
    """
    for rows in (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 129, 200, 401):
        data = case("backward", rows, N)
        result = run(machine, data, "warp", sm_count=1)
        assert result.plan.partials <= 4
        check(result, data)


def test_every_partial_is_added_once(machine):
    """Whole numbers, whose sums are exact in float32 and in any order, over many blocks."""
    rows, N = 1100, 33
    rng = np.random.default_rng(1)
    dy = rng.integers(-8, 9, (rows, N)).astype(np.float32)
    x = np.where(np.arange(N) % 2 == np.arange(rows)[:, None] % 2, 1, -1).astype(np.float32)
    x[:, -1] = 0  # so that the mean is 0, and rstd 1 with eps = 1 - var
    data = dataclasses.replace(case("backward", rows, N), x=x, dy=dy, weight=None)
    for sm_count in (1, 2, 5, 132):
        result = run(machine, data, "warp", eps=1 - 32 / 33, sm_count=sm_count)
        np.testing.assert_array_equal(result.arrays[2], dy.sum(0))
        np.testing.assert_array_equal(result.arrays[1], (dy * x).sum(0))
    assert result.plan.partials > 32  # a thread of column_totals adds several


# --- what is wanted -------------------------------------------------------------------------------

WANTED = [
    *(("warp", w) for w in itertools.product((True, False), repeat=3) if any(w) and not all(w)),
    *itertools.product(("block", "shared", "split"), [DX_ALONE, (False, True, True)]),
    ("shared", (True, False, True)),
    *itertools.product(("cluster",), [(True, False, True), (False, True, False)]),
]


@pytest.mark.parametrize(("family", "wanted"), WANTED)
def test_what_is_not_wanted_changes_no_bit_of_the_rest(machine, family, wanted):
    dtype = {"block": "float16", "cluster": "float64"}.get(family, "float32")
    data = case("backward", 7, length(family, dtype, "backward"), dtype)
    expected = run(machine, data, family, sm_count=1)
    got = run(machine, data, family, sm_count=1, wanted=wanted)
    assert [a is not None for a in got.arrays] == list(wanted)
    check(got, data)
    same_sums = got.plan.partials == expected.plan.partials  # dx alone takes other blocks
    for mine, theirs, rows in zip(got.bits(), expected.bits(), DX_ALONE, strict=True):
        assert mine is None or mine == theirs or not (rows or same_sums)
