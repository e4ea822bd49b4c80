"""What the row kernels move: bytes at the floor, whole sectors, no bank conflicts."""

import itertools

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.conftest import ALL_DTYPES
from tests.cuda.rows import DX_ALONE, FAMILIES, SHAPED, At, case, cols, device_for, length, run
from tests.cuda.test_plan import plan_of
from tests.gpu_backend import SIMULATED
from tests.report import put_table

FLOATS = ("float16", "float32", "float64")
ROWS = {"warp": 150, "block": 11, "shared": 3, "split": 5}  # more than one multiprocessor holds
DEVICES = {  # on sm_90 with few rows: K3 unless it does not fit
    "forward": device_for(SIMULATED, "shared"),
    "backward": device_for(SIMULATED, None),
}


def has(traffic, name):
    return any(buffer.name == name for buffer in traffic.buffers)


def total(result, name, attribute):
    """Of one buffer, over all launches."""
    return sum(getattr(t[name], attribute) for t in result.traffic if has(t, name))


def moved(result):
    """Bytes that all launches together read of x, or of dy and x, and wrote of y or dx."""
    *read, written = SHAPED["backward" if result.backward else "forward"]
    return (
        *(total(result, n, "read_bytes") for n in read),
        total(result, written, "written_bytes"),
    )


def use(result, merged=False):
    """Share of the touched sectors' bytes that was asked for, the least of all arrays."""
    prefix = "merged_" if merged else ""
    *read, written = SHAPED["backward" if result.backward else "forward"]
    launches = [t for t in result.traffic if has(t, "x") and t["x"].read_bytes]
    shares = [getattr(t[name], f"{prefix}read_sector_use") for t in launches for name in read]
    return min(*shares, getattr(launches[-1][written], f"{prefix}write_sector_use"))


# --- bytes --------------------------------------------------------------------------------------


FLOOR = [
    *itertools.product(("forward",), FAMILIES, ALL_DTYPES),
    *itertools.product(("backward",), FAMILIES, FLOATS),
]


@pytest.mark.parametrize("at", [At(), At(1, 2)], ids=["dense", "skewed"])
@pytest.mark.parametrize(("direction", "family", "dtype"), FLOOR)
def test_bytes_are_at_the_floor(direction, family, dtype, at):
    """Each array once, whatever the alignment; K5 reads x (and dy) a second time, from L2."""
    rows = 9 if direction == "forward" else ROWS[family] if dtype == "float32" else 3
    data = case(direction, rows, length(family, dtype, direction), dtype)
    options = {"sm_count": 1} if data.backward else {}
    result = run(SIMULATED, data, family, at=dict.fromkeys(data.shaped, at), **options)
    nbytes, reads = data.x.nbytes, 2 if family == "split" else 1
    *read, written = data.shaped
    assert moved(result) == (*(reads * nbytes for _ in read), nbytes)
    assert total(result, written, "read_bytes") == 0
    assert not any(total(result, name, "written_bytes") for name in read)
    if data.backward:
        assert result.plan.passes == 2 * reads + 1
        return
    last = result.traffic[-1]
    for name in ("mean", "rstd"):
        assert total(result, name, "written_bytes") == 9 * (8 if dtype == "float64" else 4)
        assert total(result, name, "read_bytes") == 0
    for name, vector in (("weight", data.weight), ("bias", data.bias)):
        assert last[name].written_bytes == 0
        assert last[name].read_bytes <= 9 * vector.nbytes
        blocks = -(-9 // result.plan.rows_per_block)  # whose rows share what L1 holds
        assert last[name].distinct_read_bytes == blocks * vector.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_weight_of_the_backward(family):
    """mean and rstd once for every warp that holds a piece of the row, weight mostly from L1.

    K3 copies its next row, whose mean and rstd one thread brings.
    """
    rows = ROWS[family]
    data = case("backward", rows, length(family, "float32", "backward"))
    result = run(SIMULATED, data, family, sm_count=1)
    plan, nbytes = result.plan, data.weight.nbytes
    pieces, blocks = 1, plan.partials
    if family == "split":  # a section's block; then a run's, which goes through the rows
        pieces = plan.sections + plan.stages[2].grid[0] // plan.partials
        blocks += rows
    for name in ("mean", "rstd"):
        assert total(result, name, "distinct_read_bytes") == 4 * rows * pieces
        warps = 1 if family == "shared" else plan.threads_per_row // 32
        assert total(result, name, "warp_reads") == rows * pieces * warps
        assert total(result, name, "written_bytes") == 0
    assert total(result, "weight", "distinct_read_bytes") == blocks * nbytes
    # K1 and K2 keep it from row to row, once for each group of lanes; the others read it for the
    # row's sums and again for dx, K5's last kernel only where an address is odd.
    times = {"warp": blocks * plan.rows_per_block, "block": blocks}.get(family, 2 * rows)
    assert total(result, "weight", "read_bytes") == times * nbytes


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        *((family, (True, True, True)) for family in FAMILIES),
        ("warp", (True, False, True)),
        ("shared", (True, False, True)),
    ],
)
def test_partials_are_written_and_read_once(family, wanted):
    """With the bytes that the plan gives them; the columns past N are not read."""
    N, rows = length(family, "float32", "backward"), ROWS[family]
    result = run(SIMULATED, case("backward", rows, N), family, sm_count=1, wanted=wanted, add=True)
    plan, totals = result.plan, sum(wanted[1:])
    kept = 4 * totals * plan.partials * plan.pitch
    own = 12 * rows * (plan.sections + 1) if family == "split" else 0
    assert plan.workspace_bytes == kept + own
    assert plan.partials < rows
    *_, last, columns = result.traffic
    assert last["workspace"].written_bytes == last["workspace"].distinct_written_bytes == kept
    assert set(last["workspace"].write_widths) == {VEC_BYTES}
    assert columns["workspace"].read_bytes == 4 * totals * plan.partials * N
    assert columns["workspace"].distinct_read_bytes == 4 * totals * plan.partials * N
    assert columns["workspace"].written_bytes == 0
    for name in ("dweight", "dbias")[2 - totals :]:
        assert columns[name].written_bytes == 4 * N
    if family != "split":
        assert last["workspace"].read_bytes == 0


def test_what_is_not_wanted_moves_nothing():
    data = case("backward", 40, length("warp", "float32"))
    (only,) = run(SIMULATED, data, "warp", wanted=DX_ALONE).traffic
    assert only["workspace"].written_bytes == 0
    (sums,) = run(SIMULATED, data, "warp", wanted=(False, True, True)).traffic
    assert not has(sums, "dx")
    assert (sums["x"].read_bytes, sums["dy"].read_bytes) == (data.x.nbytes, data.x.nbytes)


# --- workspace ------------------------------------------------------------------------------------


def test_the_split_kernels_own_sums():
    """Three numbers for each section, and for each row; read once, and once by each run."""
    data = case("backward", 5, length("split", "float32", "backward"), weight=None)
    result = run(SIMULATED, data, "split", wanted=DX_ALONE, sm_count=1)
    plan, (sums, merge, apply) = result.plan, result.traffic
    sections, gradients = 12 * 5 * plan.sections, 12 * 5
    assert plan.workspace_bytes == sections + gradients
    assert (sums["workspace"].read_bytes, sums["workspace"].written_bytes) == (0, sections)
    assert merge["workspace"].read_bytes == sections
    assert merge["workspace"].written_bytes == gradients
    runs = plan.stages[2].grid[0] // plan.partials
    assert apply["workspace"].distinct_read_bytes == runs * gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_workspace_of_the_split_forward(dtype):
    """Three numbers of each section, written and read once; four of a row for each block of it."""
    chunks, rows = 15, 2
    N = chunks * CHUNK_VECS * VEC_BYTES // ITEMSIZE[dtype]
    data, size = case("forward", rows, N, dtype, None, None), ITEMSIZE[dtype]
    result = run(SIMULATED, data, "split")
    stats, merging, normalizing = (t["workspace"] for t in result.traffic)
    sections = rows * chunks * 3 * size
    assert stats.distinct_written_bytes == stats.written_bytes == sections
    assert merging.distinct_read_bytes == sections
    assert merging.written_bytes == rows * 4 * size
    assert normalizing.distinct_read_bytes == rows * result.plan.parts * 4 * size
    assert stats.read_bytes == normalizing.written_bytes == 0


def partials_share(dtype, N, rows):
    """Bytes that partials move twice, over the bytes of dy, x and dx, on sm_90; the family."""
    plan = plan_of("backward", N, dtype, rows=rows, weight=dtype, totals=(dtype, dtype))
    partials = 2 * plan.partials * plan.pitch * ITEMSIZE[stats_dtype(dtype)]
    return 2 * partials / (3 * rows * N * ITEMSIZE[dtype]), plan.family


def test_partials_are_a_small_part_of_what_moves(request):
    """Up to two thirds where rows are few, and next to nothing where they are many.

    (Few rows that leave partials of megabytes leave them in L2.)
    """
    rows_tried = (1, 64, 512, 4096, 32_768, 200_000)
    lines = [f"{'dtype':8} {'N':>6} {'family':>7} " + " ".join(f"{r:>9}" for r in rows_tried)]
    for dtype in FLOATS:
        for N in (64, 768, 4096, 8192, 65_536):
            shares = [partials_share(dtype, N, rows)[0] for rows in rows_tried]
            family = partials_share(dtype, N, 1)[1]
            lines.append(f"{dtype:8} {N:6} {family:>7} " + " ".join(f"{s:9.4f}" for s in shares))
            # 8 bytes a column written and read, for at least 4 rows of 12 (float16: 6) each.
            assert max(shares[1:]) <= (0.7 if dtype == "float16" else 0.34)
            assert shares[-2] <= 0.1
            assert shares[-1] <= 0.02
    put_table(request.config, "Backward: partials written and read over dy, x and dx", lines)


# --- sectors ------------------------------------------------------------------------------------

# Vectors, of each type a third; every other one fills a row of the tables.
ALIGNED = (2, 8, 10, 16, 48, 32, 60, 64, 128, 256, 600, 512, 2048, 1024, 7168, 14_000)


def at_every_alignment(direction, N, dtype):
    """Enough rows that odd ones come at every alignment, and more than a block holds."""
    vecs = N * ITEMSIZE[dtype] / VEC_BYTES
    return case(direction, 37 if vecs <= 64 else 8, N, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_aligned_rows_use_whole_sectors(dtype):
    """Rows of whole sectors: every byte of every touched sector is asked for, 16 at a time."""
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    for N in (v * per_vec for v in ALIGNED[FLOATS.index(dtype) :: 3]):
        result = run(SIMULATED, at_every_alignment("forward", N, dtype), device=DEVICES["forward"])
        assert use(result) == 1.0, N
        last = result.traffic[-1]
        assert set(last["y"].write_widths) == {VEC_BYTES}
        copied = result.plan.family == "shared"  # in bulk, counted under the widest
        assert set(last["x"].read_widths) == {32 if copied else VEC_BYTES}
    N = (3 * CHUNK_VECS - 8) * per_vec
    assert use(run(SIMULATED, case("forward", 2, N, dtype), "split")) == 1.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_aligned_rows_use_whole_sectors_backward(dtype):
    """Of the partials too, but for float16, whose lanes store 32 bytes each in two instructions:
    L2 sees both halves of such a sector.
    """
    partials = "merged_write_sector_use" if dtype == "float16" else "write_sector_use"
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    for vecs in (2, 8, 10, 16, 32, 48, 64, 128, 300)[FLOATS.index(dtype) :: 3]:
        data = case("backward", 19 if vecs <= 64 else 3, vecs * per_vec, dtype)
        result = run(SIMULATED, data)
        assert use(result) == 1.0, vecs
        main = result.traffic[0]
        widths = {*main["x"].read_widths, *main["dy"].read_widths, *main["dx"].write_widths}
        assert widths == {VEC_BYTES}
        assert getattr(main["workspace"], partials) == 1.0
    for family in ("shared", "split"):
        data = case("backward", 2, (CHUNK_VECS + 64) * per_vec, dtype)
        result = run(SIMULATED, data, family)
        assert use(result) == 1.0
        assert getattr(result.traffic[-1]["workspace"], partials) == 1.0


ODD = (65, 101, 129, 255, 385, 511, 769, 1023, 1025, 1537, 2049, 3001, 5001, 8191, 20_001)
ODD_BACKWARD = (65, 101, 255, 385, 511, 769, 1025, 2049, 3001)
# By direction: what a warp must reach, and from how many bytes a row on.
LEAST = {"forward": (0.9, 1536), "backward": (0.85, 768)}


@pytest.mark.parametrize(
    ("direction", "dtype"),
    [*(("forward", d) for d in FLOATS), ("backward", "float16"), ("backward", "float32")],
)
def test_odd_rows_use_most_of_their_sectors(direction, dtype, request):
    """Rows of odd lengths, whose alignments cycle.

    `warp` counts the sectors of each warp's instruction, `merged` those of a block: what L2 sees
    when L1 joins the two halves of a sector, which must reach 0.98. Shorter rows end in more pieces
    than LEAST for a warp. Backward a warp holds 1 KiB of a row, half of the forward's: the pieces
    at its ends weigh more.
    """
    lines = []
    forward, i = direction == "forward", FLOATS.index(dtype)
    for N in ODD[i::3] if forward else ODD_BACKWARD[i::2]:
        result = run(SIMULATED, at_every_alignment(direction, N, dtype), device=DEVICES[direction])
        lines.append((N, result.plan.family, use(result), use(result, merged=True)))
    N = ODD[-1] if forward else length("shared", dtype, direction)
    result = run(SIMULATED, at_every_alignment(direction, N, dtype), "split")
    lines.append((N, "split", use(result), use(result, merged=True)))
    prefix = "Odd rows" if forward else "Backward, odd rows"
    title = f"{prefix} of {dtype}: share of the touched 32-byte sectors that is used"
    table = [f"{'N':>6} {'bytes':>7} {'family':>7}   warp  merged"]
    for N, family, warp, merged in lines:
        size = N * ITEMSIZE[dtype]
        table.append(f"{N:6} {size:7} {family:>7} {warp:6.3f} {merged:6.3f}")
    put_table(request.config, title, table)
    share, enough = LEAST[direction]
    for N, _, warp, merged in lines:
        assert merged >= 0.98, N
        assert warp >= (share if N * ITEMSIZE[dtype] >= enough else 0.49), N


# --- shared memory ------------------------------------------------------------------------------


def no_bank_waits(result):
    for traffic in result.traffic:
        assert traffic.shared.wavefronts == traffic.shared.minimal_wavefronts
        assert traffic.shared.max_ways <= 1


BANKED = [
    *itertools.product(("forward",), ("block", "shared", "split"), ALL_DTYPES),
    *itertools.product(("backward",), FAMILIES, FLOATS),
]


@pytest.mark.parametrize(("direction", "family", "dtype"), BANKED)
def test_no_bank_conflicts(direction, family, dtype):
    """Staging, exchanges, the merge of up to 14 chunks; the warps' turns in K1's backward, K3's
    sums, and the turned tile of column_totals.
    """
    lengths, forward = [length(family, dtype, direction)], direction == "forward"
    if forward and family == "shared":
        lengths += [(c * CHUNK_VECS + 5) * VEC_BYTES // ITEMSIZE[dtype] for c in (4, 8, 13)]
    if not forward and family == "warp":  # groups of 8 and 16 lanes too
        lengths += [7 * VEC_BYTES // ITEMSIZE[dtype], 15 * VEC_BYTES // ITEMSIZE[dtype]]
    for N, at in itertools.product(lengths, (At(), At(1, 1)) if forward else (At(1, 1),)):
        data = case(direction, 2 if forward else 3, N, dtype)
        result = run(SIMULATED, data, family, at={"x": at}, add=dtype != "float16")
        no_bank_waits(result)
        assert forward or result.traffic[0].shared.warp_reads > 0


@pytest.mark.parametrize("N", [64, 1000])
def test_the_warp_kernel_needs_no_shared_memory(N):
    result = run(SIMULATED, case("forward", 5, N), "warp")
    assert result.traffic[0].shared.warp_reads == result.traffic[0].shared.warp_writes == 0


# --- clusters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "chunks", "cluster"), [("float16", 5, 4), ("float64", 4, 2)])
def test_what_a_cluster_moves(dtype, chunks, cluster):
    """Whole sectors, no bank conflicts; between blocks three numbers a chunk and nothing else."""
    result = run(SIMULATED, case("forward", 2, cols(chunks, dtype) + 1, dtype), "cluster")
    (traffic,) = result.traffic
    assert use(result) == 1.0
    assert set(traffic["y"].write_widths) == {VEC_BYTES}
    assert set(traffic["x"].read_widths) == {32}  # copied in bulk, counted under the widest
    no_bank_waits(result)
    number = 8 if dtype == "float64" else 4
    assert traffic.shared.remote_written_bytes == 2 * chunks * 3 * number * (cluster - 1)
    assert traffic.shared.remote_read_bytes == 0


def test_what_a_cluster_moves_backward():
    """Partials by the cluster, three numbers of each chunk."""
    rows, chunks, N = 5, 3, cols(3, "float64") + 1
    result = run(SIMULATED, case("backward", rows, N, "float64"), "cluster", sm_count=1, add=True)
    main, columns = result.traffic
    assert use(result) == main["workspace"].write_sector_use == 1.0
    for name in ("x", "dy"):
        assert main[name].read_bytes == rows * N * 8
        assert set(main[name].read_widths) == {32}  # as in the forward
    assert result.plan.passes == 3
    kept = 2 * result.plan.partials * N * 8
    assert main["workspace"].written_bytes == columns["workspace"].read_bytes == kept
    assert result.plan.workspace_bytes == kept
    no_bank_waits(result)
    assert main.shared.remote_written_bytes == rows * chunks * 3 * 8  # to the one peer
    assert main.shared.remote_read_bytes == 0
