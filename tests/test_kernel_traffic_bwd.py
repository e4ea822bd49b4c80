"""What the backward kernels move: bytes at the floor, whole sectors, no bank conflicts."""

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._cuda.launch import choose_plan as choose_plan_bwd
from cupynorm._problem import ITEMSIZE, stats_dtype
from tests.gpu_backend import SIMULATED
from tests.gradient_rows import device_for, differentiate, length, pair, run
from tests.report import put_table
from tests.row_cases import FAMILIES, affine
from tests.row_kernels import At

ROWS = {"warp": 150, "block": 11, "shared": 3, "split": 5}  # more than one multiprocessor holds


def weight_of(N):
    return affine(N)[0]


def has(traffic, name):
    return any(buffer.name == name for buffer in traffic.buffers)


def total(result, name, attribute):
    """Of one buffer, over all launches."""
    return sum(getattr(t[name], attribute) for t in result.traffic if has(t, name))


def moved(result):
    """Bytes that all launches together read of dy and x, and wrote of dx."""
    pairs = (("dy", "read_bytes"), ("x", "read_bytes"), ("dx", "written_bytes"))
    return tuple(total(result, name, attribute) for name, attribute in pairs)


def use(result, merged=False):
    """Share of the touched sectors' bytes that was asked for, the least of dy's, x's and dx's."""
    prefix = "merged_" if merged else ""
    shares = [getattr(t[name], f"{prefix}read_sector_use") for t in result.traffic[:-1]
              for name in ("dy", "x")]  # fmt: skip
    return min(*shares, getattr(result.traffic[-2]["dx"], f"{prefix}write_sector_use"))


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [At(), At(1, 2)], ids=["dense", "skewed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_at_the_floor(family, dtype, at):
    """dy and x once, dx once, whatever the alignment; K5 reads dy and x a second time."""
    N, rows = length(family, dtype), ROWS[family] if dtype == "float32" else 3
    (dy, x), weight = pair(rows, N, dtype), weight_of(N)
    result = run(SIMULATED, family, dy, x, weight, dy_at=at, x_at=at, dx_at=at, sm_count=1)
    reads = 2 if family == "split" else 1
    assert moved(result) == (reads * x.nbytes, reads * x.nbytes, x.nbytes)
    assert result.plan.passes == 2 * reads + 1
    for name, attribute in (("dx", "read_bytes"), ("dy", "written_bytes"), ("x", "written_bytes")):
        assert total(result, name, attribute) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_weight(family):
    """mean and rstd once for every warp that holds a piece of the row, weight mostly from L1.

    K3 copies its next row, whose mean and rstd one thread brings.
    """
    N, rows = length(family, "float32"), ROWS[family]
    (dy, x), weight = pair(rows, N), weight_of(N)
    result = run(SIMULATED, family, dy, x, weight, sm_count=1)
    plan = result.plan
    pieces, blocks = 1, plan.partials
    if family == "split":  # a section's block; then a run's, which goes through the rows
        pieces = plan.sections + plan.stages[2].grid[0] // plan.partials
        blocks += rows
    for name in ("mean", "rstd"):
        assert total(result, name, "distinct_read_bytes") == 4 * rows * pieces
        warps = 1 if family == "shared" else plan.threads_per_row // 32
        assert total(result, name, "warp_reads") == rows * pieces * warps
        assert total(result, name, "written_bytes") == 0
    assert total(result, "weight", "distinct_read_bytes") == blocks * weight.nbytes
    # For the row's sums and again for dx; groups without a row read it too.
    rounds = -(-rows // plan.rows_per_block) * plan.rows_per_block
    assert total(result, "weight", "read_bytes") == 2 * rounds * weight.nbytes


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
    N, rows = length(family, "float32"), ROWS[family]
    (dy, x), weight = pair(rows, N), weight_of(N)
    result = run(SIMULATED, family, dy, x, weight, sm_count=1, wanted=wanted)
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
    N = length("warp", "float32")
    (dy, x), weight = pair(40, N), weight_of(N)
    (only,) = run(SIMULATED, "warp", dy, x, weight, wanted=(True, False, False)).traffic
    assert only["workspace"].written_bytes == 0
    sums, _ = run(SIMULATED, "warp", dy, x, weight, wanted=(False, True, True)).traffic
    assert not has(sums, "dx")
    assert (sums["x"].read_bytes, sums["dy"].read_bytes) == (x.nbytes, x.nbytes)


def test_the_split_kernels_own_sums():
    """Three numbers for each section, and for each row; read once, and once by each run."""
    N = length("split", "float32")
    dy, x = pair(5, N)
    result = run(SIMULATED, "split", dy, x, wanted=(True, False, False), sm_count=1)
    plan, (sums, merge, apply) = result.plan, result.traffic
    sections, gradients = 12 * 5 * plan.sections, 12 * 5
    assert plan.workspace_bytes == sections + gradients
    assert (sums["workspace"].read_bytes, sums["workspace"].written_bytes) == (0, sections)
    assert merge["workspace"].read_bytes == sections
    assert merge["workspace"].written_bytes == gradients
    runs = plan.stages[2].grid[0] // plan.partials
    assert apply["workspace"].distinct_read_bytes == runs * gradients


def share(dtype, N, rows):
    """Bytes that partials move twice, over the bytes of dy, x and dx, on sm_90."""
    kind = stats_dtype(dtype)
    problem = GradientProblem(
        dtype, dtype, dtype, dtype, True, 1, rows, N, *((rows * N, N, 1) for _ in range(3))
    )
    plan = choose_plan_bwd(problem, SIMULATED.device)
    partials = 2 * plan.partials * plan.pitch * ITEMSIZE[kind]
    return 2 * partials / (3 * rows * N * ITEMSIZE[dtype]), plan.family


def test_partials_are_a_small_part_of_what_moves(request):
    """Up to two thirds where rows are few, and next to nothing where they are many.

    (Few rows that leave partials of megabytes leave them in L2.)
    """
    rows_tried = (1, 64, 512, 4096, 32_768, 200_000)
    lines = [f"{'dtype':8} {'N':>6} {'family':>7} " + " ".join(f"{r:>9}" for r in rows_tried)]
    for dtype in ("float16", "float32", "float64"):
        for N in (64, 768, 4096, 8192, 65_536):
            shares = [share(dtype, N, rows)[0] for rows in rows_tried]
            family = share(dtype, N, 1)[1]
            lines.append(f"{dtype:8} {N:6} {family:>7} " + " ".join(f"{s:9.4f}" for s in shares))
            # 8 bytes a column written and read, for at least 4 rows of 12 (float16: 6) each.
            assert max(shares[1:]) <= (0.7 if dtype == "float16" else 0.34)
            assert shares[-2] <= 0.1
            assert shares[-1] <= 0.02
    put_table(request.config, "Backward: partials written and read over dy, x and dx", lines)


# --- sectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_aligned_rows_use_whole_sectors(dtype):
    """Rows of whole sectors: every byte of every touched sector is asked for, 16 at a time.

    Of the partials too, but for float16, whose lanes store 32 bytes each in two instructions:
    L2 sees both halves of such a sector.
    """
    partials = "merged_write_sector_use" if dtype == "float16" else "write_sector_use"
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    for vecs in (2, 8, 10, 16, 32, 48, 64, 128, 300):
        N = vecs * per_vec
        (dy, x), weight = pair(19 if vecs <= 64 else 3, N, dtype), weight_of(N)
        result = differentiate(SIMULATED, dy, x, weight)
        assert use(result) == 1.0, N
        main = result.traffic[0]
        widths = {*main["x"].read_widths, *main["dy"].read_widths, *main["dx"].write_widths}
        assert widths == {VEC_BYTES}
        assert getattr(main["workspace"], partials) == 1.0
    for family in ("shared", "split"):
        N = (CHUNK_VECS + 64) * per_vec
        result = run(SIMULATED, family, *pair(2, N, dtype), weight_of(N))
        assert use(result) == 1.0
        assert getattr(result.traffic[-2]["workspace"], partials) == 1.0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_odd_rows_use_most_of_their_sectors(dtype, request):
    """Rows of odd lengths, whose alignments cycle.

    `warp` counts the sectors of each warp's instruction, `merged` those of a block, which must
    reach 0.98. A warp holds 1 KiB of a row, half of the forward's: the pieces at its ends weigh
    more, and from 768 bytes on it must reach 0.85.
    """
    lines = []
    for N in (65, 101, 255, 385, 511, 769, 1025, 2049, 3001, length("shared", dtype)):
        vecs = N * ITEMSIZE[dtype] / VEC_BYTES
        (dy, x), weight = pair(37 if vecs <= 64 else 8, N, dtype), weight_of(N)
        family = "split" if length("shared", dtype) == N else None
        device = device_for(SIMULATED, family)
        result = differentiate(SIMULATED, dy, x, weight, device=device)
        lines.append((N, result.plan.family, use(result), use(result, merged=True)))
    title = f"Backward, odd rows of {dtype}: share of the touched 32-byte sectors that is used"
    table = [f"{'N':>6} {'bytes':>7} {'family':>7}   warp  merged"]
    for N, family, warp, merged in lines:
        size = N * ITEMSIZE[dtype]
        table.append(f"{N:6} {size:7} {family:>7} {warp:6.3f} {merged:6.3f}")
    put_table(request.config, title, table)
    for N, _, warp, merged in lines:
        assert merged >= 0.98, N
        assert warp >= (0.85 if N * ITEMSIZE[dtype] >= 768 else 0.5), N


# --- shared memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bank_conflicts(family, dtype):
    """The warps' turns in K1, exchanges, K3's sums, and the turned tile of column_totals."""
    lengths = [length(family, dtype)]
    if family == "warp":  # groups of 8 and 16 lanes too
        lengths += [7 * VEC_BYTES // ITEMSIZE[dtype], 15 * VEC_BYTES // ITEMSIZE[dtype]]
    for N in lengths:
        result = run(SIMULATED, family, *pair(3, N, dtype), weight_of(N), x_at=At(1, 1))
        for traffic in result.traffic:
            waste = [s for s in traffic.sites() if s.wavefronts > s.minimal_wavefronts]
            assert not waste
            assert traffic.shared.max_ways <= 1
        assert result.traffic[-1].shared.warp_reads > 0
        assert result.traffic[0].shared.warp_reads > 0
