"""K4 forward, executed: every row of its table, the bits of K3 and K5, what it moves."""

import dataclasses

import numpy as np
import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._problem import ITEMSIZE
from tests.gpu_backend import ON_EACH_MACHINE
from tests.row_cases import affine, check, device_for, length, need_the_memory_of_sm_90, run, values
from tests.row_kernels import At, normalize

pytestmark = ON_EACH_MACHINE


def cols(chunks, dtype, more=0):
    """Columns of so many chunks and `more` vectors, but one."""
    return (chunks * CHUNK_VECS + more) * VEC_BYTES // ITEMSIZE[dtype] - 1


# The first row of each row of the table, and the longest that sm_90 holds.
TABLE = [
    ("float16", 2, 1, 2, 256),
    ("float64", 2, 1, 2, 256),
    ("float32", 8, 1, 4, 256),
    ("bfloat16", 8, 9, 8, 256),
    ("float64", 32, 1, 8, 768),
    ("float16", 112, 0, 8, 768),
]


@pytest.mark.parametrize(("dtype", "chunks", "more", "cluster", "threads"), TABLE)
def test_every_row_of_the_table_has_the_bits_of_split(
    machine, dtype, chunks, more, cluster, threads
):
    need_the_memory_of_sm_90(machine)
    N = cols(chunks, dtype, more)
    x, (weight, bias) = values(2 if chunks < 9 else 1, N, dtype, offset=1000.0), affine(N)
    result = run(machine, "cluster", x, weight, bias, x_at=At(1, 2), y_at=At(3, 1))
    assert result.plan.stages[0].constants == (cluster, threads)
    check(result, x, weight, bias)
    split = run(machine, "split", x, weight, bias)
    assert result.bits() == split.bits()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_device_short_of_shared_memory_has_wider_clusters(machine, dtype):
    """As sm_120: the same row, other blocks, the same bits."""
    need_the_memory_of_sm_90(machine)
    N = cols(5, dtype, 100)
    x = values(2, N, dtype)
    device = device_for(machine, "cluster")
    small = dataclasses.replace(device, shared_bytes=99 * 1024)
    wide = normalize(machine, x, device=small)
    assert wide.plan.stages[0].cluster > normalize(machine, x, device=device).plan.stages[0].cluster
    check(wide, x)
    assert wide.bits() == run(machine, "shared", x).bits() == run(machine, "cluster", x).bits()


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_block_may_have_a_few_elements(machine, offset):
    """Fewer than a granule, which the row shares with its neighbours on both sides; or no chunk."""
    small = dataclasses.replace(device_for(machine, "cluster"), shared_bytes=64 * 1024)
    for dtype in ("float16", "float32"):
        x = values(2, cols(5, dtype) + 2, dtype)
        result = normalize(machine, x, device=small, x_at=At(offset, 1))
        assert result.plan.stages[0].cluster == 8  # of which two have no chunk, and one an element
        assert result.bits() == run(machine, "split", x).bits()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_alignment(machine, dtype):
    """Of x and y: the bits stay, each byte of x is read once and each of y written once."""
    N = length("cluster", dtype)
    x, (weight, bias) = values(2, N, dtype), affine(N)
    expected = run(machine, "shared", x, weight, bias)
    for i in range(16 // ITEMSIZE[dtype]):
        at = {"x_at": At(i, i % 3), "y_at": At(3 * i + 1, (i + 1) % 2)}
        result = run(machine, "cluster", x, weight, bias, affine_offset=i % 2, **at)
        assert result.bits() == expected.bits(), i
        for traffic in result.traffic:
            assert traffic["x"].read_bytes == traffic["y"].written_bytes == x.nbytes
            assert traffic["y"].read_bytes == traffic["x"].written_bytes == 0


def test_bits_do_not_depend_on_the_batch(machine):
    N = length("cluster", "float16")
    x, (weight, bias) = values(4, N, "float16"), affine(N)
    expected = run(machine, "cluster", x, weight, bias).bits()
    assert run(machine, "cluster", x[1:2], weight, bias).bits() == expected[1:2]
    assert run(machine, "cluster", x[::-1].copy(), weight, bias).bits() == expected[::-1]
    at = {"x_at": At(0, 3, outer_gap=5), "y_at": At(1, 0, outer_gap=2)}
    assert run(machine, "cluster", x, weight, bias, outer=2, **at).bits() == expected
    for seed in (None, 1, 2):
        assert run(machine, "cluster", x, weight, bias, seed=seed).bits() == expected


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "bias_dtype"),
    [("float16", "float64", "bfloat16"), ("float32", None, None), ("float64", "float64", None)],
)
def test_weight_bias_and_statistics(machine, dtype, weight_dtype, bias_dtype):
    N = length("cluster", dtype)
    x, (weight, bias) = values(2, N, dtype), affine(N, weight_dtype, bias_dtype)
    result = run(machine, "cluster", x, weight, bias, affine_offset=1)
    check(result, x, weight, bias)
    without = run(machine, "cluster", x, weight, bias, stats=False)
    assert without.mean is None
    assert without.y.tobytes() == result.y.tobytes()


@pytest.mark.parametrize("more", [300, 0])
def test_in_place(machine, more):
    """Also where blocks end full, and a skewed one spills into the vector of the next."""
    N = cols(4 if more == 0 else 2, "float16", more)
    x, (weight, bias) = values(3, N, "float16"), affine(N)
    expected = run(machine, "cluster", x, weight, bias)
    for at in (At(), At(3, 1)):
        result = run(machine, "cluster", x, weight, bias, in_place=True, x_at=at)
        assert result.bits() == expected.bits()


def test_nan_and_infinity_spoil_their_row_alone(machine):
    N = length("cluster", "float16")
    x, (weight, bias) = values(3, N, "float16"), affine(N)
    expected = run(machine, "cluster", x, weight, bias)
    for bad, col in ((np.nan, N - 1), (np.inf, 0)):
        spoiled = x.copy()
        spoiled[1, col] = bad
        result = run(machine, "cluster", spoiled, weight, bias)
        assert np.isnan(result.y[1]).all()
        assert [result.bits()[i] for i in (0, 2)] == [expected.bits()[i] for i in (0, 2)]


def test_what_it_moves(machine):
    """Whole sectors, no bank conflicts; between blocks three numbers a chunk and nothing else."""
    if machine.name != "simulated":
        pytest.skip("a GPU counts nothing")
    for dtype, chunks, cluster in (("float16", 5, 4), ("float64", 4, 2)):
        N = cols(chunks, dtype) + 1
        result = run(machine, "cluster", values(2, N, dtype), *affine(N))
        (traffic,) = result.traffic
        assert traffic["x"].read_sector_use == traffic["y"].write_sector_use == 1.0
        assert set(traffic["y"].write_widths) == {VEC_BYTES}
        assert set(traffic["x"].read_widths) == {32}  # copied in bulk, counted under the widest
        assert traffic.shared.max_ways <= 1
        assert not [s for s in traffic.sites() if s.wavefronts > s.minimal_wavefronts]
        number = 8 if dtype == "float64" else 4
        sent = 2 * chunks * 3 * number * (cluster - 1)
        assert traffic.shared.remote_written_bytes == sent
        assert traffic.shared.remote_read_bytes == 0
