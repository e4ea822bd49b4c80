"""K4 backward, executed: every row of its table, the dx of K5, what it moves."""

import dataclasses

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._problem import ITEMSIZE
from tests.gpu_backend import ON_EACH_MACHINE
from tests.gradient_rows import ALL, check, device_for, differentiate, length, pair, run
from tests.row_cases import affine, need_the_memory_of_sm_90
from tests.row_kernels import At

pytestmark = ON_EACH_MACHINE

DX_ALONE = (True, False, False)


def weight_of(N, dtype="float32"):
    return affine(N, dtype)[0]


def cols(chunks, dtype, more=0):
    """Columns of so many chunks and `more` vectors, but one."""
    return (chunks * CHUNK_VECS + more) * VEC_BYTES // ITEMSIZE[dtype] - 1


# The first length of each row of the table on sm_90. dweight and dbias take column_totals seconds
# for many columns: they are wanted where there are few.
TABLE = [
    ("float64", 2, 1, ALL, (2, 512, 1, 0)),
    ("float16", 2, 1, DX_ALONE, (2, 512, 1, 1)),
    ("float16", 4, 1, DX_ALONE, (4, 512, 1, 1)),
    ("float32", 8, 1, DX_ALONE, (8, 512, 1, 1)),
    ("bfloat16", 16, 1, DX_ALONE, (8, 768, 1, 0)),
    ("float64", 24, 1, (True, False, True), (8, 512, 2, 0)),
]


@pytest.mark.parametrize(("dtype", "chunks", "more", "wanted", "constants"), TABLE)
def test_every_row_of_the_table_has_the_dx_of_split(
    machine, dtype, chunks, more, wanted, constants
):
    need_the_memory_of_sm_90(machine)
    N = cols(chunks, dtype, more)
    (dy, x), weight = pair(3 if chunks < 16 else 2, N, dtype), weight_of(N)
    at = {"dy_at": At(1, 2), "x_at": At(2, 1), "dx_at": At(3, 1)}
    result = run(machine, "cluster", dy, x, weight, wanted=wanted, sm_count=1, **at)
    assert result.plan.stages[0].constants[:4] == constants
    check(result, dy, x, weight)
    split = run(machine, "split", dy, x, weight, wanted=DX_ALONE)
    assert result.row_bits() == split.row_bits()


def test_a_device_short_of_shared_memory(machine):
    """As sm_120, where a block holds the sums of one chunk of a 16-bit type, and K3 no such row."""
    device = device_for(machine, "cluster", 1)
    device = dataclasses.replace(device, shared_bytes=99 * 1024)
    N = cols(1, "float16", 600)
    (dy, x), weight = pair(2, N, "float16"), weight_of(N)
    result = differentiate(machine, dy, x, weight, device=device)
    assert result.plan.stages[0].constants[:4] == (2, 256, 1, 1)
    check(result, dy, x, weight)
    split = run(machine, "split", dy, x, weight, wanted=DX_ALONE)
    assert result.row_bits() == split.row_bits()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_alignment(machine, dtype):
    """Of dy, x and dx: the bits stay, each byte of dy and x is read once, of dx written once."""
    N = length("cluster", dtype)
    (dy, x), weight = pair(2, N, dtype), weight_of(N)
    expected = run(machine, "cluster", dy, x, weight, wanted=DX_ALONE)
    for i in range(1, 16 // ITEMSIZE[dtype]):
        at = {"dy_at": At(i, i % 3), "x_at": At(3 * i + 1, (i + 1) % 2), "dx_at": At(2 * i, i % 2)}
        result = run(machine, "cluster", dy, x, weight, weight_offset=i % 2, wanted=DX_ALONE, **at)
        assert result.bits() == expected.bits(), i
        for traffic in result.traffic:
            assert traffic["x"].read_bytes == traffic["dy"].read_bytes == x.nbytes
            assert traffic["dx"].written_bytes == x.nbytes
            assert traffic["dx"].read_bytes == traffic["x"].written_bytes == 0


def test_bits_of_dx_do_not_depend_on_the_batch(machine):
    """Alone, in another order, in outer steps, on any device, whatever the threads' order."""
    N = length("cluster", "float32")
    (dy, x), weight = pair(5, N), weight_of(N)

    def rows_of(dy, x, sm_count=1, **options):
        options = {"wanted": DX_ALONE, "sm_count": sm_count, **options}
        return run(machine, "cluster", dy, x, weight, **options).row_bits()

    expected = rows_of(dy, x)
    assert rows_of(dy[2:3], x[2:3]) == expected[2:3]
    assert rows_of(dy[::-1].copy(), x[::-1].copy()) == expected[::-1]
    assert rows_of(dy, x, sm_count=7) == expected
    at = {"dy_at": At(0, 3, outer_gap=5), "x_at": At(1), "dx_at": At(2, 1, outer_gap=1)}
    assert rows_of(dy[:4], x[:4], outer=2, **at) == expected[:4]
    for seed in (None, 1, 2):
        assert rows_of(dy, x, seed=seed) == expected


def test_clusters_go_round_the_rows(machine):
    """Three clusters; any order of the threads gives the same bits of all three gradients."""
    N = length("cluster", "float64")
    (dy, x), weight = pair(13, N, "float64"), weight_of(N)
    expected = run(machine, "cluster", dy, x, weight, sm_count=7)
    assert (expected.plan.partials, expected.plan.stages[0].grid) == (3, (6, 1, 1))
    check(expected, dy, x, weight)
    for seed in (None, 1):
        result = run(machine, "cluster", dy, x, weight, sm_count=7, seed=seed)
        assert result.bits() == expected.bits()


@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, False)])
def test_what_is_not_wanted_changes_no_bit_of_the_rest(machine, wanted):
    N = length("cluster", "float64")
    (dy, x), weight = pair(5, N, "float64"), weight_of(N)
    expected = run(machine, "cluster", dy, x, weight, sm_count=1)
    got = run(machine, "cluster", dy, x, weight, sm_count=1, wanted=wanted)
    assert [a is not None for a in got.arrays] == list(wanted)
    for mine, theirs in zip(got.bits(), expected.bits(), strict=True):
        assert mine is None or mine == theirs


@pytest.mark.parametrize("weight_dtype", [None, "bfloat16"])
def test_weight(machine, weight_dtype):
    N = length("cluster", "float64")
    (dy, x), weight = pair(2, N, "float64"), weight_of(N, weight_dtype)
    check(run(machine, "cluster", dy, x, weight, weight_offset=1), dy, x, weight)


def test_what_it_moves(machine):
    """Whole sectors, no bank conflicts, partials by the cluster, three numbers of each chunk."""
    if machine.name != "simulated":
        pytest.skip("a GPU counts nothing")
    rows, chunks, N = 5, 3, cols(3, "float64") + 1
    result = run(machine, "cluster", *pair(rows, N, "float64"), weight_of(N), sm_count=1)
    main, columns = result.traffic
    for name in ("x", "dy"):
        assert main[name].read_bytes == rows * N * 8
        assert main[name].read_sector_use == 1.0
        assert set(main[name].read_widths) == {VEC_BYTES}
    assert main["dx"].write_sector_use == main["workspace"].write_sector_use == 1.0
    assert result.plan.passes == 3
    kept = 2 * result.plan.partials * N * 8
    assert main["workspace"].written_bytes == columns["workspace"].read_bytes == kept
    assert result.plan.workspace_bytes == kept
    assert main.shared.max_ways <= 1
    assert not [s for s in main.sites() if s.wavefronts > s.minimal_wavefronts]
    assert main.shared.remote_written_bytes == rows * chunks * 3 * 8  # to the one peer
    assert main.shared.remote_read_bytes == 0
