"""What the row kernels move: bytes at the floor, whole sectors, no bank conflicts."""

import itertools

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.launch import choose_plan
from cupynorm._problem import ITEMSIZE
from tests.conftest import ALL_DTYPES
from tests.gpu_backend import SIMULATED
from tests.report import put_table
from tests.row_cases import FAMILIES, affine, device_for, length, run, values
from tests.row_kernels import At, normalize

# On sm_90 with few rows: K3 unless it does not fit.
DEVICE = device_for(SIMULATED, "shared")


def moved(result):
    """Bytes that all launches together read of x and wrote of y."""
    return tuple(
        sum(getattr(t[name], attribute) for t in result.traffic if has(t, name))
        for name, attribute in (("x", "read_bytes"), ("y", "written_bytes"))
    )


def has(traffic, name):
    return any(buffer.name == name for buffer in traffic.buffers)


def rows_for(N, dtype):
    """Enough rows that odd ones come at every alignment, and more than a block holds."""
    vecs = N * ITEMSIZE[dtype] / VEC_BYTES
    return 37 if vecs <= 64 else 8


def use(result, merged=False):
    """Share of the touched sectors' bytes that was asked for, the lesser of x's and y's."""
    prefix = "merged_" if merged else ""
    shares = [getattr(t["x"], f"{prefix}read_sector_use") for t in result.traffic]
    return min(*shares, getattr(result.traffic[-1]["y"], f"{prefix}write_sector_use"))


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [At(), At(1, 2)], ids=["dense", "skewed"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_at_the_floor(family, dtype, at):
    """x once and y once, whatever the alignment; K5 reads x a second time, from L2."""
    N = length(family, dtype)
    x, (weight, bias) = values(9, N, dtype), affine(N)
    result = run(SIMULATED, family, x, weight, bias, x_at=at, y_at=at)
    passes = 2 if family == "split" else 1
    assert moved(result) == (passes * x.nbytes, x.nbytes)
    last = result.traffic[-1]
    assert last["y"].read_bytes == last["x"].written_bytes == 0
    for name in ("mean", "rstd"):
        assert last[name].written_bytes == 9 * (8 if dtype == "float64" else 4)
        assert last[name].read_bytes == 0
    for vector in (weight, bias):
        name = "weight" if vector is weight else "bias"
        assert last[name].written_bytes == 0
        assert last[name].read_bytes <= 9 * vector.nbytes
        blocks = -(-9 // result.plan.rows_per_block)  # whose rows share what L1 holds
        assert last[name].distinct_read_bytes == blocks * vector.nbytes


def workspace_share(dtype, chunks, rows):
    """Bytes of the workspace that the normalizing blocks read, over the bytes of x."""
    N = chunks * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]
    strides = (0, N, 1)
    problem = Problem("layer_norm_fwd", dtype, None, None, 1, rows, N, strides, strides, True)
    plan = choose_plan(problem, device_for(SIMULATED, "split"))
    return plan.parts * plan.workspace_bytes / (rows * N * ITEMSIZE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_workspace_reads_are_counted_as_planned(dtype):
    """Every block that normalizes reads the moments of its whole row once."""
    chunks = 15
    x = values(2, chunks * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype], dtype)
    stats, normalizing = (t["workspace"] for t in run(SIMULATED, "split", x).traffic)
    assert stats.distinct_written_bytes == stats.written_bytes == 2 * chunks * 3 * x.itemsize
    assert stats.read_bytes == normalizing.written_bytes == 0
    share = workspace_share(dtype, chunks, 2)
    assert normalizing.distinct_read_bytes == round(share * x.nbytes)


def test_workspace_is_a_few_percent_of_x(request):
    """From 8 rows on, and for one row where it ends K3 and where it is huge.

    One row of some megabytes needs all blocks that the device can hold, each with all moments:
    that is L2's to serve, and bounded here too.
    """
    lengths = (15, 40, 100, 300, 600, 1024, 1025, 4096, 16_384, 65_536)
    lines = [f"{'chunks':>7} " + " ".join(f"{c:>6}" for c in lengths)]
    for dtype, few in (("float32", 0.05), ("float64", 0.1)):
        for rows in (1, 2, 8, 32, 1000):
            shares = [workspace_share(dtype, chunks, rows) for chunks in lengths]
            lines.append(f"{dtype} {rows:>4} rows " + " ".join(f"{s:.3f}" for s in shares))
            assert max(shares) <= (few if rows >= 8 else 5 * few)
            assert max(shares[0], *shares[-2:]) <= few
    put_table(request.config, "K5: workspace read from L2 over the bytes of x", lines)


# --- sectors ------------------------------------------------------------------------------------


def aligned_lengths(dtype):
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    vecs = [2, 8, 10, 16, 32, 48, 64, 128, 256, 512, 1024, 2048, 2050, 7168, 14_000]
    return [v * per_vec for v in vecs]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_aligned_rows_use_whole_sectors(dtype):
    """Rows of whole sectors: every byte of every touched sector is asked for, 16 at a time."""
    for N in aligned_lengths(dtype):
        x = values(rows_for(N, dtype), N, dtype)
        result = normalize(SIMULATED, x, *affine(N), device=DEVICE)
        assert use(result) == 1.0, N
        last = result.traffic[-1]
        assert set(last["y"].write_widths) == {VEC_BYTES}
        copied = result.plan.family == "shared"  # in bulk, counted under the widest
        assert set(last["x"].read_widths) == {32 if copied else VEC_BYTES}
    N = (3 * CHUNK_VECS - 8) * VEC_BYTES // ITEMSIZE[dtype]
    assert use(run(SIMULATED, "split", values(2, N, dtype), *affine(N))) == 1.0


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_odd_rows_use_nine_tenths_of_their_sectors(dtype, request):
    """Rows of odd lengths, whose alignments cycle.

    `warp` counts the sectors of each warp's instruction, `merged` those of a block: what L2 sees
    when L1 joins the two halves of a sector. From 1.5 KiB on a row both must reach 0.9; shorter
    rows end in more pieces than that for a warp.
    """
    lines = []
    for N in (65, 101, 129, 255, 385, 511, 769, 1023, 1025, 1537, 2049, 3001, 5001, 8191, 20_001):
        x = values(rows_for(N, dtype), N, dtype)
        result = normalize(SIMULATED, x, *affine(N), device=DEVICE)
        lines.append((N, result.plan.family, use(result), use(result, merged=True)))
    result = run(SIMULATED, "split", x, *affine(N))
    lines.append((N, "split", use(result), use(result, merged=True)))
    title = f"Odd rows of {dtype}: share of the touched 32-byte sectors that is used"
    table = [f"{'N':>6} {'bytes':>7} {'family':>7}   warp  merged"]
    for N, family, warp, merged in lines:
        size = N * ITEMSIZE[dtype]
        table.append(f"{N:6} {size:7} {family:>7} {warp:6.3f} {merged:6.3f}")
        assert merged >= 0.98, N
        assert warp >= (0.9 if size >= 1536 else 0.5), N
    put_table(request.config, title, table)


# --- shared memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("family", ["block", "shared", "split"])
def test_no_bank_conflicts(family, dtype):
    """Staging, exchanges, and the merge of up to 14 chunks."""
    lengths = [length(family, dtype)]
    if family == "shared":
        lengths += [(c * CHUNK_VECS + 5) * VEC_BYTES // ITEMSIZE[dtype] for c in (4, 8, 13)]
    for N, at in itertools.product(lengths, (At(), At(1, 1))):
        result = run(SIMULATED, family, values(2, N, dtype), *affine(N), x_at=at)
        for traffic in result.traffic:
            waste = [s for s in traffic.sites() if s.wavefronts > s.minimal_wavefronts]
            assert not waste
            assert traffic.shared.max_ways <= 1


@pytest.mark.parametrize("N", [64, 1000])
def test_the_warp_kernel_needs_no_shared_memory(N):
    result = normalize(SIMULATED, values(5, N), *affine(N))
    assert result.plan.family == "warp"
    assert result.traffic[0].shared.warp_reads == result.traffic[0].shared.warp_writes == 0
