"""Pictures of K3, K4 and K5, whose long rows are taken in chunks of 16 KiB."""

from cupynorm._cuda.plan import CHUNK_VECS, Plan
from docs._generate.lanes import Holder, columns_per_vec, holder
from docs._generate.row_pictures import WIDTH
from docs._generate.svg import Drawing, tint

__all__ = ["cluster", "shared", "split"]


def _owners(plan: Plan, N: int, row: int = 0) -> list[tuple[Holder, float]]:
    """Who reads the first element of each chunk, and how much of a chunk there is."""
    cols = CHUNK_VECS * columns_per_vec(plan)
    return [
        (holder(plan, row, first, N), min(cols, N - first) / cols) for first in range(0, N, cols)
    ]


def _strip(d: Drawing, y: float, shares: list[float], colors: list[str], labels: list[str]) -> None:
    scale = WIDTH / len(shares)
    for c, (share, color, label) in enumerate(zip(shares, colors, labels, strict=True)):
        d.box(
            c * scale,
            y,
            scale * share,
            22,
            color,
            label=label if scale * share > 6 * len(label) else "",
            size=11,
        )


def shared(plan: Plan, N: int) -> Drawing:
    """K3: the row in shared memory, chunk by chunk, and the merge."""
    threads = plan.stages[0].block[0]
    owners = _owners(plan, N)
    groups = [h.thread // 256 for h, _ in owners]
    colors = [tint(2 * g, 2 * (threads // 256) + 1) for g in groups]
    shares = [share for _, share in owners]
    d = Drawing(
        WIDTH,
        "K3: one row in shared memory",
        f"K3, rows of {N} float16 on sm_80: one row in {plan.stages[0].name}, {threads} threads, "
        f"{plan.stages[0].shared_bytes / 1024:.0f} KiB of shared memory. A color is a group of 256 "
        "threads.",
    )
    d.text(0, 14, "memory: one row, in chunks of 16 KiB", bold=True)
    _strip(d, 22, shares, colors, [f"chunk {c}" for c in range(len(owners))])
    d.text(0, 70, "shared memory: the row, in the order of its columns", bold=True)
    _strip(d, 78, shares, colors, [f"group {g}" for g in groups])
    d.text(0, 126, "shared memory: 8 warps' sums for each chunk", bold=True)
    scale = WIDTH / len(owners)
    for c, color in enumerate(colors):
        for w in range(8):
            d.box(c * scale + 6 + w * (scale - 12) / 8, 134, (scale - 12) / 8, 14, color, line=0.5)
        d.line([(c * scale + scale / 2, 150), (c * scale + scale / 2, 160), (WIDTH / 2, 178)])
    text = f"a barrier, then {len(owners)} lanes of every warp merge (count, mean, squares)"
    d.text(WIDTH / 2, 196, text + " by shuffles", 12, "middle")
    d.text(WIDTH / 2, 214, "and each thread normalizes what it summed", 12, "middle")
    return d


def cluster(plan: Plan, N: int) -> Drawing:
    """K4: a row in the shared memory of several blocks, and what they send each other."""
    blocks = plan.stages[0].cluster
    owners = _owners(plan, N)
    ranks = [h.block for h, _ in owners]
    colors = [tint(2 * r, 2 * blocks + 1) for r in ranks]
    d = Drawing(
        WIDTH,
        "K4: one row in a cluster",
        f"K4, rows of {N} float32 on sm_90: one row in a cluster of {blocks} blocks of "
        f"{plan.stages[0].name}. A color is a block.",
    )
    d.text(0, 14, "memory: one row, in chunks of 16 KiB", bold=True)
    _strip(d, 22, [s for _, s in owners], colors, [str(c) for c in range(len(owners))])
    d.text(0, 70, "shared memory of each block", bold=True)
    width, gap = WIDTH / blocks, 8
    for rank in range(blocks):
        x, mine = rank * width, [c for c, r in enumerate(ranks) if r == rank]
        size = (width - 2 * gap) / max(len(mine), 1)
        d.box(x + gap / 2, 78, width - gap, 76, dashed=True)
        d.text(x + width / 2, 92, f"block {rank}", 11, "middle")
        for i, c in enumerate(mine):
            d.box(x + gap + i * size, 98, size, 20, colors[c], label=str(c), size=10)
        size = (width - 2 * gap) / len(owners)
        for c, color in enumerate(colors):
            d.box(x + gap + c * size, 128, size, 18, color, line=0.5)
    for rank in range(blocks):
        for other in range(blocks):
            if other != rank:
                x0, x1 = (rank + 0.5) * width, (other + 0.5) * width
                d.arc(min(x0, x1), max(x0, x1), 154, 8 + 5 * abs(rank - other))
    y = 154 + 8 + 5 * blocks + 14
    d.text(WIDTH / 2, y, "each block sends the moments of its chunks to all:", 12, "middle")
    d.text(WIDTH / 2, y + 17, "a barrier of the cluster, then all merge in one tree", 12, "middle")
    return d


def split(plan: Plan, N: int) -> Drawing:
    """K5: sections, the workspace, and the last kernel's way back."""
    stats, _, normalize = plan.stages
    cols = CHUNK_VECS * plan.chunks_per_section * columns_per_vec(plan)
    d = Drawing(
        WIDTH,
        "K5: rows split over blocks",
        f"K5, 2 rows of {N} float32 on sm_80: {stats.grid[0]} blocks of {stats.name}, "
        f"{plan.sections} sections of {cols} columns for each row, then {normalize.grid[0]} blocks "
        "that normalize, from the last to the first. A color is a block; numbers are its index.",
    )
    scale = WIDTH / plan.sections
    d.text(0, 14, f"first kernel: {plan.sections} blocks to a row", bold=True)
    for row in range(2):
        for s in range(plan.sections):
            index = holder(plan, row, s * cols, N).block
            share = min(cols, N - s * cols) / cols
            color, y = tint(s, plan.sections), 24 + 28 * row
            d.box(s * scale, y, scale * share, 22, color, label=str(index), size=7)
    d.text(0, 102, "workspace: mean and squares of each section of a row", bold=True)
    for s in range(plan.sections):
        x = s * scale + scale / 2
        d.box(s * scale, 110, scale, 14, tint(s, plan.sections), line=0.5)
        d.line([(x, 124), (x, 130), (WIDTH / 2, 150)])
    d.text(WIDTH / 2, 166, "second kernel: a block for each row merges them", 12, "middle")
    d.text(0, 194, "third kernel: backwards, while L2 still holds the end", bold=True)
    parts = plan.parts
    for p in range(parts):
        index = normalize.grid[0] - 1 - (parts + p)  # of row 1
        d.box(p * WIDTH / parts, 202, WIDTH / parts, 22, tint(p, parts), label=str(index), size=7)
    d.line([(WIDTH, 232), (0, 232)], arrow=True)
    return d
