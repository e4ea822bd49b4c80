"""K6's kernel of few columns in registers: values, the tile's bits, bytes and sectors."""

import dataclasses

import numpy as np
import pytest

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.tiles import LANE_THREADS, LANES, lanes_stage
from tests.conftest import ALL_DTYPES
from tests.cuda.rows import affine, problem_of
from tests.cuda.test_tiles import Lie, bits, check, normalize, values
from tests.gpu_backend import ON_EACH_MACHINE, SIMULATED, SM90

pytestmark = ON_EACH_MACHINE

ONE_SM = dataclasses.replace(SM90, sm_count=1)  # two blocks are enough for lanes
MANY_SMS = dataclasses.replace(SM90, sm_count=10_000)  # nothing is: the tile takes it
LAID = {
    "aligned": (Lie("F"), Lie("F")),
    "half of a lane's piece": (Lie("F", gap=2, offset=2), Lie("F")),
    "odd": (Lie("F", gap=3, offset=1), Lie("F")),
    "y odd": (Lie("F"), Lie("F", gap=1, offset=1)),
}


def by_lanes(machine, x, *args, ways="FF", **options):
    result = normalize(machine, x, ways, *args, device=ONE_SM, **options)
    assert result[3].family == "lanes" and not result[3].panel
    return result


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_number_of_columns_has_the_tiles_bits(machine, dtype):
    """Rows past the last block; what stands before and after decides nothing."""
    for N in (1, 2, 7, 8, 13, 33, 64 if dtype == "float32" else 56):
        x, (weight, bias) = values(1, 600, N, dtype), affine(N)
        result = by_lanes(machine, x, weight, bias, seed=N)
        check(result, x, weight, bias)
        tiled = normalize(machine, x, "FF", weight, bias, device=MANY_SMS)
        assert tiled[3].family == "column"
        assert bits(tiled) == bits(result)


@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_address_moves_a_bit(machine, dtype, laid):
    for M in (512, 601):
        x, (weight, bias) = values(2, M, 20, dtype), affine(20)
        expected = bits(normalize(machine, x, "FF", weight, bias, device=MANY_SMS))
        for seed in (0, 1):
            result = by_lanes(machine, x, weight, bias, ways=LAID[laid], seed=seed)
            assert bits(result) == expected


def test_in_place_and_without_weight_or_bias(machine):
    x, (weight, bias) = values(1, 520, 12, "bfloat16"), affine(12, "float64", "float16")
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        expected = bits(normalize(machine, x, "FF", w, b, device=MANY_SMS))
        assert bits(by_lanes(machine, x, w, b, in_place=True)) == expected


def test_nan_stays_in_its_row(machine):
    x = values(1, 600, 16, "float32")
    clean = by_lanes(machine, x)[0]
    x[0, 5, 3], x[0, 541, 15] = np.nan, np.inf
    y = by_lanes(machine, x)[0]
    assert np.isnan(y[0, [5, 541]]).all()
    others = np.delete(np.arange(600), [5, 541])
    assert (y[0, others] == clean[0, others]).all()


# --- counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_warp_access_is_of_256_bytes(machine, dtype):
    """Aligned: read once, written once, in 8-byte pieces of which no sector is left over."""
    if machine is not SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    x, (weight, bias) = values(1, 1024, 24, dtype), affine(24)
    *_, traffic = by_lanes(machine, x, weight, bias)
    assert traffic["x"].read_bytes == traffic["y"].written_bytes == x.nbytes
    assert traffic["x"].read_widths == traffic["y"].write_widths == {8: x.nbytes // 8}
    assert traffic["x"].warp_reads == traffic["y"].warp_writes == x.nbytes // 256
    assert traffic["x"].read_sector_use == traffic["y"].write_sector_use == 1
    assert traffic.shared.warp_reads == traffic.shared.warp_writes == 0


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.66), ("float32", 0.8)])
def test_odd_columns_are_read_side_by_side(machine, dtype, least):
    """A warp's 64 or 128 bytes touch one sector more than they fill; the next ones use the rest."""
    if machine is not SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    x = values(1, 1024, 24, dtype)
    *_, traffic = by_lanes(machine, x, ways=(Lie("F", 3, 1), Lie("F", 3, 1)))
    assert traffic["x"].read_bytes == traffic["y"].written_bytes == x.nbytes
    assert least <= traffic["x"].read_sector_use < 1
    assert least <= traffic["y"].write_sector_use < 1
    assert traffic["x"].merged_read_sector_use >= 0.93
    assert traffic["y"].merged_write_sector_use >= 0.93


# --- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_who_takes_it(machine, dtype):
    """Lanes where x and y lie along the rows, few columns, and blocks enough."""

    def family(N, M=10**6, way="FF", outer=1, device=SM90):
        lies = [(N * M, 1, M) if w == "F" else (N * M, N, 1) for w in way]
        strides = dict(zip("xy", lies, strict=True))
        plan = choose_plan(problem_of({"x": dtype}, (outer, M, N), strides), device)
        assert plan.stages[0].grid[0] * plan.rows_per_block >= outer * M
        return plan.family

    rows = LANE_THREADS * 8 // np.dtype("u2" if dtype == "bfloat16" else dtype).itemsize
    most = 64 if dtype == "float32" else 56
    assert {family(N) for N in range(1, most + 1)} == {"lanes"}
    assert family(most + 1) == family(40, way="FC") == family(40, way="CF") == "column"
    enough = 2 * SM90.sm_count * rows
    assert [family(40, M) for M in (enough, enough - rows)] == ["lanes", "column"]
    assert [family(40, M, outer=10**5) for M in (rows // 2 + 1, rows // 2)] == ["lanes", "column"]


def test_the_table_covers_each_number_once(machine):
    assert [cols for cols, _ in LANES] == list(range(8, 65, 8))
    for N in (1, 8, 9, 64):
        strides = dict.fromkeys("xy", (0, 1, 10**6))
        stage = lanes_stage(problem_of({"x": "float32"}, (1, 10**6, N), strides), SM90)
        assert stage.constants[1] - 8 < N <= stage.constants[1]  # or the kernel reads past N
