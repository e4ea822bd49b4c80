"""What the row kernels move: bytes at the floor, whole sectors, no bank conflicts."""

import itertools

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.conftest import ALL_DTYPES
from tests.cuda.rows import (
    DX_ALONE,
    FAMILIES,
    SHAPED,
    WHOLE,
    At,
    case,
    cols,
    device_for,
    edges,
    length,
    run,
)
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
    result = run(SIMULATED, case("backward", rows, N), family, sm_count=1, wanted=wanted)
    plan, totals = result.plan, sum(wanted[1:])
    kept = 4 * totals * plan.partials * plan.pitch
    own = 12 * rows * (plan.sections + 1) if family == "split" else 0
    assert plan.workspace_bytes == kept + own
    assert plan.partials < rows
    last = result.traffic[-1]["workspace"]
    assert last.written_bytes == last.distinct_written_bytes == kept
    assert set(last.write_widths) == {VEC_BYTES}
    assert family == "split" or last.read_bytes == 0
    assert bool(result.totals) == (family == "warp")  # of longer rows not executed
    for columns in result.totals:
        read = columns["workspace"]
        assert read.read_bytes == read.distinct_read_bytes == 4 * totals * plan.partials * N
        assert read.written_bytes == 0
        for name in ("dweight", "dbias")[2 - totals :]:
            assert columns[name].written_bytes == 4 * N


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


@pytest.mark.parametrize("dtype", FLOATS)
def test_partials_are_a_small_part_of_what_moves(dtype):
    """Up to two thirds where rows are few, and next to nothing where they are many, on sm_90.

    (Few rows that leave partials of megabytes leave them in L2.)
    """
    # 8 bytes a column written and read, for at least 4 rows of 12 (float16: 6) each.
    few = 0.7 if dtype == "float16" else 0.34
    limits = {64: few, 512: few, 4096: few, 32_768: 0.1, 200_000: 0.02}
    for (rows, most), N in itertools.product(limits.items(), (64, 768, 4096, 8192, 65_536)):
        plan = plan_of("backward", N, dtype, rows=rows, weight=dtype, totals=(dtype, dtype))
        partials = 2 * plan.partials * plan.pitch * ITEMSIZE[stats_dtype(dtype)]
        assert 2 * partials <= most * 3 * rows * N * ITEMSIZE[dtype]


# --- sectors ------------------------------------------------------------------------------------

# Of whole vectors: what test_rows.py runs, and groups of 8 and of 16 lanes.
ALIGNED = [
    *((*whole, None) for whole in WHOLE),
    *(("forward", "warp", *narrow) for narrow in (("float16", 8), ("float32", 16))),
    *(("backward", "warp", *narrow) for narrow in (("float16", 8), ("float64", 16))),
]


@pytest.mark.parametrize(("direction", "family", "dtype", "vecs"), ALIGNED)
def test_aligned_rows_use_whole_sectors(direction, family, dtype, vecs):
    """Every byte of every touched sector is asked for, 16 at a time; of the partials too.

    But for 16-bit types, whose lanes store 32 bytes each of those in two instructions: L2 sees both
    halves of such a sector. K1 needs no shared memory forward.
    """
    per_vec, backward = VEC_BYTES // ITEMSIZE[dtype], direction == "backward"
    N = vecs * per_vec if vecs else length(family, dtype, direction) + 1
    N -= N % (2 * per_vec)  # whole sectors
    result = run(SIMULATED, case(direction, 37 if vecs else 5, N, dtype), family)
    assert use(result) == 1.0
    last = result.traffic[-1]
    *read, written = SHAPED[direction]
    assert set(last[written].write_widths) == {VEC_BYTES}
    # What is copied in bulk is counted under the widest.
    copied = family in ("shared", "cluster")
    widths = {width for name in read for width in last[name].read_widths}
    assert widths == {32 if copied else VEC_BYTES}
    if backward:
        merged = "merged_" * dtype.endswith("16")
        assert getattr(last["workspace"], f"{merged}write_sector_use") == 1.0
    elif family == "warp":
        assert last.shared.warp_reads == last.shared.warp_writes == 0


# By direction: what a warp must reach, and from how many bytes a row on.
LEAST = {"forward": (0.9, 1536), "backward": (0.85, 768)}


@pytest.mark.parametrize(("direction", "dtype"), [*itertools.product(SHAPED, ALL_DTYPES)])
def test_odd_rows_use_most_of_their_sectors(direction, dtype, request):
    """Rows of odd lengths, whose alignments cycle, at the ends of the tables' rows.

    `warp` counts the sectors of each warp's instruction, `merged` those of a block: what L2 sees
    when L1 joins the two halves of a sector, which must reach 0.98. Shorter rows end in more pieces
    than LEAST for a warp. Backward a warp holds 1 KiB of a row, half of the forward's: the pieces
    at its ends weigh more.
    """
    size = ITEMSIZE[dtype]
    lengths = [
        vecs * VEC_BYTES // size - 1 for d, t, vecs in edges() if (d, t) == (direction, dtype)
    ]
    families = [(N, None) for N in lengths if N * size > 64]
    families.append((length("split", dtype, direction), "split"))
    lines = []
    for N, family in families:
        rows = 37 if N * size <= 1024 else 8
        options = {} if family else {"device": DEVICES[direction]}
        result = run(SIMULATED, case(direction, rows, N, dtype), family, **options)
        lines.append((N, result.plan.family, use(result), use(result, merged=True)))
    prefix = "Odd rows" if direction == "forward" else "Backward, odd rows"
    title = f"{prefix} of {dtype}: share of the touched 32-byte sectors that is used"
    table = [f"{'N':>6} {'bytes':>7} {'family':>7}   warp  merged"]
    for N, family, warp, merged in lines:
        table.append(f"{N:6} {N * size:7} {family:>7} {warp:6.3f} {merged:6.3f}")
    put_table(request.config, title, table)
    share, enough = LEAST[direction]
    for N, _, warp, merged in lines:
        assert merged >= 0.98, N
        assert warp >= (share if N * size >= enough else 0.49), N


# --- shared memory ------------------------------------------------------------------------------


def no_bank_waits(result):
    for traffic in (*result.traffic, *result.totals):
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
    if forward and family == "shared" and dtype in ("bfloat16", "float64"):
        lengths += [cols(c, dtype, 5) for c in (4, 8, 13)]
    if not forward and family == "warp":  # groups of 8 and 16 lanes too
        lengths += [7 * VEC_BYTES // ITEMSIZE[dtype], 15 * VEC_BYTES // ITEMSIZE[dtype]]
    for N, at in itertools.product(lengths, (At(), At(1, 1)) if forward else (At(1, 1),)):
        data = case(direction, 2 if forward else 3, N, dtype)
        result = run(SIMULATED, data, family, at={"x": at})
        no_bank_waits(result)
        assert forward or result.traffic[0].shared.warp_reads > 0


@pytest.mark.parametrize(
    ("direction", "dtype", "chunks", "cluster"),
    [("forward", "float16", 5, 4), ("forward", "float64", 4, 2), ("backward", "float64", 3, 2)],
)
def test_what_a_cluster_moves(direction, dtype, chunks, cluster):
    """No bank conflicts; between blocks three numbers a chunk and nothing else."""
    rows, backward = 3, direction == "backward"
    result = run(
        SIMULATED, case(direction, rows, cols(chunks, dtype), dtype), "cluster", sm_count=1
    )
    (traffic,) = result.traffic
    no_bank_waits(result)
    number = 8 if dtype == "float64" else 4
    sent = rows * chunks * 3 * number * (cluster - 1)
    assert result.plan.stages[0].cluster == cluster
    assert (traffic.shared.remote_written_bytes, traffic.shared.remote_read_bytes) == (sent, 0)
    if backward:
        kept = 2 * result.plan.partials * result.plan.pitch * number
        assert traffic["workspace"].written_bytes == result.plan.workspace_bytes == kept
