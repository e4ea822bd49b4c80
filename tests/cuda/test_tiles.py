"""K6, the kernels of strided columns, forward and backward: values, bits, bytes and banks."""

import dataclasses
import itertools

import numpy as np
import pytest

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device
from cupynorm._cuda.tiles import TILE_CHUNK, bytes_beyond_floor
from tests.conftest import ALL_DTYPES
from tests.cuda.rows import DX_ALONE, EACH, SHAPED, At, case, check, problem_of, run
from tests.gpu_backend import ON_EACH_MACHINE, SIMULATED, SM90

LONG = 2 * 256 + 9  # columns: three chunks, the last in part
LONGER = 3 * 256
WAYS = ("FF", "FC", "CF")  # how x and y, or x and dy, lie: F has neighbouring rows side by side
FLOATS = ("float16", "float32", "float64")
SMALL = Device(compute_capability=75, sm_count=4, shared_bytes=64 * 1024)
ONE_SM = dataclasses.replace(SM90, sm_count=1)  # two blocks are enough for lanes
MANY_SMS = dataclasses.replace(SM90, sm_count=10_000)  # nothing is: the tile takes it
PANELS = Device(compute_capability=75, sm_count=1, shared_bytes=64 * 1024)


def laid(direction, ways, gap=0, offset=0):
    """Places of arrays of x's shape, x first; dx lies as x does."""
    x, other = (At(offset, gap, way=way) for way in ways)
    return {"x": x, "y": other} if direction == "forward" else {"x": x, "dy": other, "dx": x}


def tiled(machine, data, ways="FF", gap=0, offset=0, **options):
    """A run whose arrays lie so; on a device of many blocks no lanes are taken."""
    options.setdefault("device", SM90 if data.backward else MANY_SMS)
    at = laid(data.direction, ways, gap, offset)
    result = run(machine, data, at=at, **options)
    assert result.plan.family in ("column", "lanes")
    return result


def main(result):
    """What the first launch moved; nothing is counted on a GPU."""
    return result.traffic[0]


# --- values and bits ------------------------------------------------------------------------------

SHAPES = {  # outer, M, N: rows past the tile's edge, few columns and many, several batches
    "forward": ((1, 2, 2), (1, 70, 3), (3, 77, 8), (2, 33, 13), (1, 130, 40), (1, 65, 300)),
    "backward": ((1, 70, 2), (1, 70, 8), (2, 100, 13), (1, 65, 40), (1, 130, 300)),
}


@ON_EACH_MACHINE
@EACH
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_shapes(machine, direction, dtype, way):
    """A third of the shapes for each type and way: every two of the three meet."""
    first = ALL_DTYPES.index(dtype) + WAYS.index(way)
    for outer, M, N in SHAPES[direction][first % 3 :: 3]:
        data = case(direction, outer * M, N, dtype)
        check(tiled(machine, data, way, gap=N == 2, outer=outer), data)


@ON_EACH_MACHINE
@pytest.mark.parametrize(("dtype", "way"), [*zip(FLOATS, ("FC", "FF", "CF"), strict=True)])
def test_no_plan_moves_a_bit(machine, dtype, way):
    """Tiles of other widths, one panel or several, odd addresses and pitches, thread orders."""
    data = case("forward", 140, LONG, dtype)
    seen, expected = set(), None
    for shared, sm_count in ((227, 1), (227, 132), (99, 1), (64, 1)):
        device = dataclasses.replace(SM90, shared_bytes=shared * 1024, sm_count=sm_count)
        odd = {"gap": 3, "offset": 1} if shared != 99 else {}
        result = tiled(machine, data, way, device=device, seed=shared, **odd)
        expected = expected or result.bits()
        assert result.bits() == expected
        seen.add((result.plan.panels, result.plan.rows_per_block))
    check(result, data)
    panels, rows = ({held[i] for held in seen} for i in (0, 1))
    assert min(panels) < max(panels)
    assert len(rows) > (dtype != "float64")


@ON_EACH_MACHINE
@EACH
def test_bits_of_a_row_are_its_own(machine, direction):
    """Whichever batch it stands in, and whichever way it is read and written."""
    data = case(direction, 200, 50)
    whole = tiled(machine, data, "FC")
    check(whole, data)
    for way in WAYS:
        assert tiled(machine, data.rows(slice(57, 80)), way).rows() == whole.rows()[57:80]


@ON_EACH_MACHINE
@EACH
def test_large_offset_and_nan(machine, direction):
    data = case(direction, 70, 40, scale=0.1, offset=1e6)
    clean = tiled(machine, data)
    check(clean, data)
    data.x[11, 3], data.x[41, 39] = np.nan, np.inf
    spoilt = tiled(machine, data)
    assert np.isnan(spoilt.arrays[0][[11, 41]]).all()
    others = [i for i in range(70) if i not in (11, 41)]
    assert [spoilt.rows()[i] for i in others] == [clean.rows()[i] for i in others]


@ON_EACH_MACHINE
@pytest.mark.parametrize("way", ["FC", "CF"])
def test_two_columns_at_once(machine, way):
    """16-bit rows that begin on four bytes; the last column of an odd number goes alone."""
    for N in (13, 40, 301):
        data = case("forward", 154, N, "bfloat16")
        expected = tiled(machine, data, outer=2)
        x, y = (At(2, N % 2 if w == "C" else 1, way=w) for w in way)
        result = run(machine, data, at={"x": x, "y": y}, outer=2, device=MANY_SMS)
        assert result.bits() == expected.bits()
        if machine is SIMULATED:
            moved = main(result)
            widths = moved["y"].write_widths if way == "FC" else moved["x"].read_widths
            assert widths == {4: 2 * 77 * (N // 2)} | ({2: 2 * 77} if N % 2 else {})


ALONE = dataclasses.replace(SMALL, sm_count=1)
AFFINE = [
    ("float16", 100, 40, ALONE, "float64", None),
    ("float16", 100, LONG, ALONE, None, "float16"),  # in two sweeps: the second reads again
    ("bfloat16", 520, 12, ONE_SM, None, None),  # by lanes
]


@ON_EACH_MACHINE
@pytest.mark.parametrize(("dtype", "rows", "N", "device", "weight", "bias"), AFFINE)
def test_weight_and_bias_and_in_place(machine, dtype, rows, N, device, weight, bias):
    data = case("forward", rows, N, dtype, weight, bias)
    expected = tiled(machine, data)
    check(expected, data)
    result = tiled(machine, data, device=device, in_place=True)
    assert result.bits() == expected.bits()
    assert (result.plan.family == "lanes") == (device is ONE_SM)


# --- backward: what is wanted, and more columns than two tiles hold -------------------------------


@ON_EACH_MACHINE
@pytest.mark.parametrize("wanted", [DX_ALONE, (False, True, True), (True, True, False)])
def test_what_is_wanted(machine, wanted):
    data = case("backward", 90, 20, "float16")
    whole, some = (tiled(machine, data, wanted=w) for w in ((True,) * 3, wanted))
    check(some, data)
    for want, part, all_of_it in zip(wanted, some.bits(), whole.bits(), strict=True):
        assert part == (all_of_it if want else None)


@pytest.mark.parametrize(
    ("dtype", "way", "wanted"),
    [
        ("float32", "CF", (True, True, True)),
        ("bfloat16", "FC", (True, True, True)),
        ("float64", "FF", (True, True, True)),
        *(("float16", "FC", w) for w in (DX_ALONE, (False, True, True))),
    ],
)
def test_panels(dtype, way, wanted):
    """Whole panels and a last one in part, several tiles a block; they move no bit of dx."""
    data = case("backward", 150, 283, dtype)
    result = tiled(SIMULATED, data, way, device=PANELS, wanted=wanted)
    assert result.plan.panels > 1
    assert result.plan.stages[0].grid[0] <= 2  # so one has two tiles, but for 16-bit ones
    check(result, data)
    assert main(result).shared.max_ways <= 2
    if dtype == "float32" and wanted[0]:
        whole = tiled(SIMULATED, data, way)
        assert whole.plan.panels == 1
        assert result.rows() == whole.rows()


def test_panels_read_twice_but_for_the_last():
    """Counted; and what `explain` says of it, partial sums included."""
    rows, N = 256, 300
    data = case("backward", rows, N, weight=None)
    result = tiled(SIMULATED, data, device=PANELS, wanted=(True, False, True))
    plan, (moved,), (totals,) = result.plan, result.traffic, result.totals
    last = N - N // plan.panel * plan.panel
    tiles, blocks = rows // plan.rows_per_block, plan.stages[0].grid[0]
    assert 0 < last < plan.panel < N and blocks < tiles
    read = sum(b.read_bytes for b in moved.buffers)
    written = sum(b.written_bytes for b in moved.buffers)
    nbytes, statistics, partial = data.x.nbytes, 2 * 4 * rows, 4 * N
    again = 2 * 4 * rows * (N - last)
    assert read == 2 * nbytes + again + statistics + (tiles - blocks) * partial
    assert written == nbytes + tiles * partial
    summed = sum(b.read_bytes for b in totals.buffers)
    strides = dict.fromkeys(SHAPED["backward"], (0, 1, rows))
    dtypes = {"x": "float32", "dbias": "float32"}
    problem = problem_of(dtypes, (1, rows, N), strides, backward=True)
    assert read + written + summed == 3 * nbytes + statistics + bytes_beyond_floor(problem, plan)


# --- counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_sectors_and_banks(dtype, way):
    """Up to one tile every byte is read and written once, and no bank meets more than two lanes."""
    for N in (8, 16, 64, 200):
        data = case("forward", 512, N, dtype)
        result = tiled(SIMULATED, data, way)
        moved, nbytes = main(result), data.x.nbytes
        assert result.plan.panels == 1
        assert moved["x"].read_bytes == moved["y"].written_bytes == nbytes
        assert moved["x"].written_bytes == moved["y"].read_bytes == 0
        assert moved["x"].merged_read_sector_use == moved["y"].merged_write_sector_use == 1
        # Rows of 400 bytes begin in the middle of a sector, which the next access fills.
        least = 0.78 if N * data.x.itemsize == 400 and "C" in way else 1
        assert min(moved["x"].read_sector_use, moved["y"].write_sector_use) >= least
        if way == "FC":
            assert set(moved["y"].write_widths) == {max(4, data.x.itemsize)}
        assert moved.shared.max_ways <= 2


@pytest.mark.parametrize(
    ("dtype", "way", "N"),
    [*zip(("float16", "float32") * 3, (*WAYS, *WAYS), (8, 8, 40, 40, 300, 300), strict=False)],
)
def test_three_passes_and_banks(dtype, way, N):
    rows = 128
    data = case("backward", rows, N, dtype)
    result = tiled(SIMULATED, data, way)
    moved = main(result)
    read = sum(b.read_bytes for b in moved.buffers) - moved["weight"].read_bytes
    assert read == 2 * data.x.nbytes + 2 * 4 * rows
    written = sum(b.written_bytes for b in moved.buffers)
    assert written == data.x.nbytes + 2 * 4 * N * result.plan.partials
    assert moved.shared.max_ways <= 2


@pytest.mark.parametrize(
    ("dtype", "N", "least", "merged"),
    [
        ("float16", 70, 0.66, 0.89),
        ("float32", 70, 0.8, 0.89),
        ("float64", 70, 0.9, 0.89),
        ("float16", 24, 0.66, 0.93),
        ("float32", 24, 0.8, 0.93),
    ],
)
def test_sector_use_at_odd_pitches(dtype, N, least, merged):
    """Columns that begin anywhere: a warp's 128 bytes touch 5 sectors where they fill 4.

    Of a 16-bit type 64 bytes touch 3, where they fill 2. A tile's accesses together leave only the
    two ends of each segment: 9 sectors for 256 bytes. Few columns are read by lanes.
    """
    data = case("forward", 1024, N, dtype)
    result = tiled(SIMULATED, data, gap=3, offset=1, device=ONE_SM if N == 24 else MANY_SMS)
    moved = main(result)
    assert result.plan.family == ("lanes" if N == 24 else "column")
    assert moved["x"].read_bytes == moved["y"].written_bytes == data.x.nbytes
    assert least <= moved["x"].read_sector_use < 1
    assert least <= moved["y"].write_sector_use < 1
    assert moved["x"].merged_read_sector_use >= merged
    assert moved["y"].merged_write_sector_use >= merged


def test_two_sweeps_read_all_but_the_last_panel_again():
    data = case("forward", 64, LONGER)
    result = tiled(SIMULATED, data, device=SMALL)
    assert result.plan.panels == 3
    assert main(result)["x"].read_bytes * 3 == data.x.nbytes * 5
    assert main(result)["y"].written_bytes == data.x.nbytes


# --- few columns in registers ---------------------------------------------------------------------


# Up to the most that lanes hold, of 16-bit types together.
COLUMNS = {"float16": (1, 13), "bfloat16": (7, 56), "float32": (8, 33, 64), "float64": (1, 56)}


def by_lanes(machine, data, **options):
    result = tiled(machine, data, device=ONE_SM, **options)
    assert result.plan.family == "lanes" and not result.plan.panel
    return result


@ON_EACH_MACHINE
@pytest.mark.parametrize(("dtype", "columns"), COLUMNS.items())
def test_every_number_of_columns_has_the_tiles_bits(machine, dtype, columns):
    """Rows past the last block; what stands before and after decides nothing."""
    for N in columns:
        data = case("forward", 600, N, dtype)
        result = by_lanes(machine, data, seed=N)
        check(result, data)
        if N > 1:
            assert tiled(machine, data).bits() == result.bits()


@ON_EACH_MACHINE
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_address_moves_a_bit(machine, dtype):
    """Aligned, at half of a lane's piece, odd; y alone."""
    here, half, odd = At(way="F"), At(2, 2, way="F"), At(1, 3, way="F")
    for M, seed in ((512, 0), (601, 1)):
        data = case("forward", 2 * M, 20, dtype)
        expected = tiled(machine, data, outer=2).bits()
        for x, y in ((here, here), (half, here), (odd, here), (here, odd)):
            result = run(machine, data, at={"x": x, "y": y}, outer=2, device=ONE_SM, seed=seed)
            assert result.plan.family == "lanes"
            assert result.bits() == expected


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_warp_access_is_of_256_bytes(dtype):
    """Aligned: read once, written once, in 8-byte pieces of which no sector is left over."""
    data = case("forward", 1024, 24, dtype)
    moved, nbytes = main(by_lanes(SIMULATED, data)), data.x.nbytes
    assert moved["x"].read_bytes == moved["y"].written_bytes == nbytes
    assert moved["x"].read_widths == moved["y"].write_widths == {8: nbytes // 8}
    assert moved["x"].warp_reads == moved["y"].warp_writes == nbytes // 256
    assert moved["x"].read_sector_use == moved["y"].write_sector_use == 1
    assert moved.shared.warp_reads == moved.shared.warp_writes == 0


# --- the plan -------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_plan_stays_within_the_device(direction, dtype):
    backward = direction == "backward"
    dtypes = dict.fromkeys(("x", "weight", *(("dweight", "dbias") if backward else ())), dtype)
    sizes = (1, 9, 64, 255, 700, 1801, 5000, 30_000), (2, 100, 10**6), (64, 99, 163, 227)
    for N, M, shared in itertools.product(*sizes):
        device = dataclasses.replace(SM90, shared_bytes=shared * 1024)
        strides = dict.fromkeys(SHAPED[direction], (0, 1, M))
        plan = choose_plan(problem_of(dtypes, (1, M, N), strides, backward), device)
        assert plan.stages[0].shared_bytes <= device.shared_bytes
        assert backward or plan.stages[0].grid[0] * plan.rows_per_block >= M
        if plan.family == "column" and backward:
            assert plan.workspace_bytes >= 2 * plan.partials * N * 4
            assert plan.panels == 1 or (N > 64 and plan.panel % 8 == 0 and plan.panel >= 32)
            assert plan.slots >= (N if plan.panels == 1 else plan.panel)
        elif plan.family == "column":
            assert plan.panels == 1 or plan.panel % TILE_CHUNK[dtype] == 0
            assert (plan.panels - 1) * plan.panel < N <= plan.panels * plan.panel
