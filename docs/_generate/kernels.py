"""The pictures of the kernels, drawn from the plans that the library would launch."""

from collections.abc import Callable

from cupynorm._explain import _FAMILIES
from cupynorm._plan import CHUNK_VECS, TABLE, Device, Plan, choose_plan
from cupynorm._plan_column import (
    ColumnPlan,
    ColumnProblem,
    ColumnsProblem,
    choose_plan_column,
    choose_plan_columns,
)
from cupynorm._problem import Problem
from docs._generate.lanes import columns_per_vec, holder, tile_holder
from docs._generate.svg import Drawing, tint

__all__ = ["DEVICE", "column_plan", "columns_plan", "pictures", "row_plan"]

DEVICE = Device(90, 132, 227 * 1024)
WIDTH = 860


def row_plan(rows: int, N: int, dtype: str) -> Plan:
    """What a row-major x of this shape takes."""
    strides = (rows * N, N, 1)
    problem = Problem("layer_norm_fwd", dtype, None, None, 1, rows, N, strides, strides, False)
    return choose_plan(problem, DEVICE)


def column_plan(rows: int, N: int, dtype: str) -> ColumnPlan:
    """What a column-major x takes whose y is to be row-major."""
    far, near = (rows * N, 1, rows), (rows * N, N, 1)
    problem = ColumnProblem(dtype, None, None, 1, rows, N, far, near, (rows, 1))
    return choose_plan_column(problem, DEVICE)


def columns_plan(rows: int, N: int) -> ColumnPlan:
    """What float32 columns of their own take."""
    return choose_plan_columns(
        ColumnsProblem("float32", None, None, rows, N, (N, 1), False), DEVICE
    )


def pictures() -> dict[str, str]:
    """File name to contents."""
    drawn: dict[str, Callable[[], Drawing]] = {
        "k1.svg": _warp,
        "k2.svg": _block,
        "k3.svg": _shared,
        "k5.svg": _split,
        "k6.svg": _column,
        "k7.svg": _columns,
    }
    files = {name: draw().figure() for name, draw in drawn.items()}
    files["families.md"] = _families()
    files["cluster.md"] = ""
    files["layouts.md"] = f"```{{raw}} html\n{layouts().figure()}```\n"
    return files


def _families() -> str:
    """The plan's table, as far as it concerns a reader."""
    lines = ["| family | row of x | threads per row |", "|---|---|---|"]
    for family in dict.fromkeys(row.family for row in TABLE):
        rows = [row for row in TABLE if row.family == family]
        limit = rows[-1].max_vecs * 16
        to = f"up to {limit // 1024} KiB" if limit < 2**30 else "any length"
        threads = ", ".join(str(t) for t in sorted({row.threads_per_row for row in rows}))
        lines.append(f"| {_FAMILIES[family]} | {to} | {threads} |")
    lines.append("| K6 column: x or y has neighbouring rows next to each other | any length | 1 to 8 |")
    lines.append("| K7 columns: a list of columns with addresses of their own | any length | 1 to 8 |")
    return "\n".join(lines) + "\n"


def _warp() -> Drawing:
    plan = row_plan(4096, 50, "float32")
    threads, lanes, _, rows = plan.stages[0].constants
    per_vec, groups = columns_per_vec(plan), threads // lanes
    vecs, in_warp = -(-50 // per_vec), 32 // lanes
    d = Drawing(
        WIDTH,
        "K1: one warp",
        f"K1, rows of 50 float32: one warp of {plan.stages[0].name}. Each lane takes one vector of "
        f"16 bytes ({per_vec} columns) of {rows} rows; a color is a lane. Arcs are shuffles.",
    )
    mine = [t * groups + g for t in range(rows) for g in range(in_warp)]
    cell, left = 22.0, 70.0
    d.text(0, 14, "memory", bold=True)
    for i, row in enumerate(mine):
        y = 24 + 24 * i
        d.text(left - 8, y + 14, f"row {row}", 11, "end")
        for v in range(vecs):
            lane = holder(plan, row, v * per_vec).thread % 32
            d.box(left + v * cell * 1.9, y, cell * 1.9, 18, tint(lane, 32), label=_columns_of(v, per_vec, 50))
    top = 24 + 24 * len(mine) + 22
    d.text(0, top, "registers of one warp", bold=True)
    step = (WIDTH - left) / 32
    for lane in range(32):
        x = left + lane * step
        d.text(x + step / 2, top + 16, str(lane), 9, "middle")
        for turn in range(rows):
            row = turn * groups + lane // lanes
            held = [v for v in range(vecs) if holder(plan, row, v * per_vec).thread == lane]
            d.box(x + 1, top + 22 + 20 * turn, step - 2, 17, tint(lane, 32) if held else "none")
    for turn in range(rows):
        d.text(left - 8, top + 34 + 20 * turn, f"turn {turn}", 11, "end")
    top += 22 + 20 * rows + 6
    _shuffles(d, left, step, top, lanes)
    return d


def _columns_of(vec: int, per_vec: int, N: int) -> str:
    return f"{vec * per_vec}–{min(N, (vec + 1) * per_vec) - 1}"


def _shuffles(d: Drawing, left: float, step: float, top: float, lanes: int) -> None:
    """The steps of warp_sum: in each, every lane adds what the partner has."""
    distance = lanes // 2
    while distance:
        d.text(left - 8, top + 10, f"lane ^ {distance}", 11, "end")
        for lane in range(32):
            if lane & distance == 0:
                x0 = left + (lane + 0.5) * step
                d.arc(x0, x0 + distance * step, top, 4 + 0.9 * distance)
        top += 14 + 0.9 * distance
        distance //= 2
    d.text(left, top + 14, "every lane of a row holds the same sum: no barrier, no shared memory", 12)


def _block() -> Drawing:
    N = 5000
    plan = row_plan(4096, N, "float16")
    threads, per_row, vecs = plan.stages[0].constants
    per_vec, warps = columns_per_vec(plan), per_row // 32
    d = Drawing(
        WIDTH,
        "K2: one row in a block",
        f"K2, rows of {N} float16: one row in the {per_row} threads of {plan.stages[0].name}. Each "
        f"warp owns {32 * vecs * per_vec} neighbouring columns, each lane {vecs} vectors of "
        f"{per_vec}; a color is a warp.",
    )
    d.text(0, 14, "memory: one row", bold=True)
    total = -(-N // per_vec)
    scale = WIDTH / total
    edges: dict[int, list[int]] = {}
    for v in range(total):
        edges.setdefault(holder(plan, 0, v * per_vec).thread // 32, []).append(v)
    for warp, held in edges.items():
        x, end = held[0] * scale, (held[-1] + 1) * scale
        label = f"warp {warp}: columns {held[0] * per_vec}–{min(N, (held[-1] + 1) * per_vec) - 1}"
        d.box(x, 22, end - x, 24, tint(2 * warp, 2 * warps), label=label, size=11)
    d.text(0, 74, "registers", bold=True)
    width = WIDTH / warps
    for warp, held in edges.items():
        for k in range(vecs):
            for lane in range(32):
                there = any(
                    (h := holder(plan, 0, v * per_vec)).slot == k and h.thread == warp * 32 + lane
                    for v in (held[0] + k * 32 + lane,)
                    if v <= held[-1]
                )
                size = (width - 16) / 32
                fill = tint(2 * warp, 2 * warps) if there else "none"
                d.box(warp * width + 8 + lane * size, 82 + 12 * k, size, 10, fill, line=0.4)
        d.text(warp * width + width / 2, 82 + 12 * vecs + 14, "32 lanes, five shuffles", 11, "middle")
    top = 82 + 12 * vecs + 24
    _exchange(d, top, width, warps)
    return d


def _exchange(d: Drawing, top: float, width: float, warps: int) -> None:
    """Lane 0 of each warp writes; all wait; all add in the order of the warps."""
    slot, left = 70.0, (WIDTH - 70.0 * warps) / 2
    for warp in range(warps):
        x = warp * width + width / 2
        d.line([(x, top), (x, top + 12), (left + slot * (warp + 0.5), top + 32)], arrow=True)
        d.box(left + slot * warp, top + 34, slot, 22, tint(2 * warp, 2 * warps), label=f"sum {warp}")
    d.text(left - 10, top + 49, "shared memory", 12, "end", bold=True)
    d.text(left + slot * warps + 10, top + 49, "one barrier", 12)
    d.text(WIDTH / 2, top + 76, "every thread adds sum 0, sum 1, … in this order", 12, "middle")


def _shared() -> Drawing:
    N = 50_000
    plan = row_plan(4096, N, "float16")
    (threads,) = plan.stages[0].constants
    per_vec, groups = columns_per_vec(plan), threads // 256
    chunks = -(-N // (CHUNK_VECS * per_vec))
    d = Drawing(
        WIDTH,
        "K3: one row in shared memory",
        f"K3, rows of {N} float16: one row in {plan.stages[0].name}, {threads} threads, "
        f"{plan.stages[0].shared_bytes / 1024:.0f} KiB of shared memory. A chunk is 16 KiB; a color "
        "is the group of 256 threads that holds it.",
    )
    d.text(0, 14, "memory: one row", bold=True)
    _chunks(d, plan, N, chunks, 22, lambda c: holder(plan, 0, c * CHUNK_VECS * per_vec).thread // 256, "chunk")
    d.text(0, 74, "shared memory: the row, in the order of its columns", bold=True)
    _chunks(d, plan, N, chunks, 82, lambda c: holder(plan, 0, c * CHUNK_VECS * per_vec).thread // 256, "")
    d.text(0, 134, "and of each chunk, 8 warps' sums, deviations, squares", bold=True)
    scale = WIDTH / chunks
    for c in range(chunks):
        group = holder(plan, 0, c * CHUNK_VECS * per_vec).thread // 256
        for i in range(8):
            d.box(c * scale + 6 + i * (scale - 12) / 8, 142, (scale - 12) / 8, 16, tint(3 * group, 3 * groups + 1), line=0.5)
        d.line([(c * scale + scale / 2, 160), (c * scale + scale / 2, 172), (WIDTH / 2, 196)])
    d.text(WIDTH / 2 + 14, 194, f"after a barrier: {chunks} lanes of every warp take a chunk each,", 12)
    d.text(WIDTH / 2 + 14, 210, "and merge (count, mean, squares) by shuffles", 12)
    d.text(0, 210, "then each thread normalizes what it staged itself", 12)
    return d


def _chunks(d: Drawing, plan: Plan, N: int, chunks: int, y: float, owner: Callable[[int], int], label: str) -> None:
    groups = plan.stages[0].block[0] // 256
    cols = CHUNK_VECS * columns_per_vec(plan)
    for c in range(chunks):
        width = WIDTH * min(cols, N - c * cols) / (chunks * cols)
        text = f"{label} {c}" if label else f"group {owner(c)}"
        d.box(c * WIDTH / chunks, y, width, 24, tint(3 * owner(c), 3 * groups + 1), label=text, size=11)


def _split() -> Drawing:
    N = 200_000
    plan = row_plan(2, N, "float32")
    per_vec = columns_per_vec(plan)
    cols = CHUNK_VECS * plan.chunks_per_section * per_vec
    stats, normalize = plan.stages
    d = Drawing(
        WIDTH,
        "K5: rows split over blocks",
        f"K5, 2 rows of {N} float32: {stats.grid[0]} blocks of {stats.name}, {plan.sections} sections "
        f"of {cols} columns for each row, then {normalize.grid[0]} blocks that normalize, "
        f"{plan.parts} for each row, from the last to the first.",
    )
    scale = WIDTH / plan.sections
    d.text(0, 14, f"first kernel: {plan.sections} blocks to a row", bold=True)
    for row in range(2):
        y = 24 + 30 * row
        for s in range(plan.sections):
            block = holder(plan, row, s * cols).block
            width = scale * min(cols, N - s * cols) / cols
            label = f"{block}" if scale > 14 else ""
            d.box(s * scale, y, width, 22, tint(s, plan.sections), label=label, size=8)
    d.text(0, 104, "workspace: (mean, its rest, squares) of each section", bold=True)
    for s in range(plan.sections):
        d.box(s * scale, 112, scale, 14, tint(s, plan.sections), line=0.5)
        d.line([(s * scale + scale / 2, 126), (s * scale + scale / 2, 134), (WIDTH / 2, 152)])
    d.text(WIDTH / 2 + 12, 152, "every block merges them all, in one tree", 12)
    d.text(0, 184, "second kernel: blocks go backwards, so that L2 still holds what they read", bold=True)
    parts, width = plan.parts, WIDTH / plan.parts
    for p in range(parts):
        block = normalize.grid[0] - 1 - (parts + p)
        label = f"{block}" if width > 14 else ""
        d.box(p * width, 192, width, 22, tint(p, parts), label=label, size=8)
    d.line([(WIDTH, 224), (0, 224)], arrow=True)
    return d


def _column() -> Drawing:
    M, N = 10_000, 12
    plan = column_plan(M, N, "float32")
    return _tile(
        plan,
        N,
        f"K6, a column-major matrix of {N} float32 columns: one block of {plan.stages[0].name} "
        f"takes {plan.rows_per_block} rows. A color is a warp: along the rows when it loads, along "
        "the columns when it stores.",
        [f"column {n}" for n in range(N)],
    )


def _columns() -> Drawing:
    kinds = ["float32", "int8", "bool", "float64", "int32 + bits", "float16"] * 2
    plan = columns_plan(10_000, len(kinds))
    return _tile(
        plan,
        len(kinds),
        f"K7, a table of {len(kinds)} columns with addresses, types and validity bits of their own: "
        f"one block of {plan.stages[0].name} takes {plan.rows_per_block} rows, and converts each "
        "value on its way in. A color is a warp.",
        kinds,
    )


def _tile(plan: ColumnPlan, N: int, text: str, names: list[str]) -> Drawing:
    """From columns in memory to a tile in shared memory to rows in memory."""
    rows = plan.rows_per_block
    d = Drawing(WIDTH, text.partition(",")[0] + ": one tile", text)
    warps = plan.stages[0].block[0] // 32
    d.text(0, 14, "memory: columns", bold=True)
    d.text(330, 14, f"shared memory: {rows} × {N}, odd pitch", bold=True)
    d.text(640, 14, "memory: rows", bold=True)
    for n in range(N):
        y = 26 + 19 * n
        d.text(0, y + 12, names[n], 10)
        marks = [r for r in range(rows) if r == 0 or _warp_of(plan, r, n) != _warp_of(plan, r - 1, n)]
        for r, end in zip(marks, [*marks[1:], rows], strict=True):
            warp = _warp_of(plan, r, n)
            width = 200 * (end - r) / rows
            d.box(78 + 200 * r / rows, y, width, 16, tint(warp, warps), label=f"{warp}" if width > 12 else "", size=8)
            d.box(330 + 220 * r / rows + n * 0.8, y, 220 * (end - r) / rows, 16, tint(warp, warps), line=0.4)
    d.line([(284, 26 + 9.5 * N), (322, 26 + 9.5 * N)], arrow=True)
    d.line([(568, 26 + 9.5 * N), (632, 26 + 9.5 * N)], arrow=True)
    height = 19 * N - 3
    shown = 14
    for r in range(shown):
        y = 26 + r * height / shown
        d.box(640, y, 200, height / shown - 2, tint(r % warps, warps), label=f"row {r}", size=8)
    top = 26 + 19 * N + 16
    d.text(78, top, "lanes along the rows: whole segments", 11)
    d.text(330, top, f"{plan.threads_per_row} thread(s) add up a row", 11)
    d.text(640, top, "lanes along the columns", 11)
    return d


def _warp_of(plan: ColumnPlan, row: int, col: int) -> int:
    return tile_holder(plan, row, col).thread // 32


def layouts() -> Drawing:
    """What goes in, in which layouts, and that one pass makes one result of it."""
    d = Drawing(
        WIDTH,
        "Layouts",
        "Whatever the layout, x is read once and y is written once: no transpose, no copy, no "
        "conversion before it. One color is one row, which gets mean 0 and variance 1.",
    )
    names = ["row-major", "column-major", "channels first", "columns of a table"]
    for i, name in enumerate(names):
        x0 = 10 + 165 * i
        d.text(x0 + 62, 16, name, 12, "middle", bold=True)
        for r in range(4):
            for c in range(6):
                color = tint(2 * r, 9)
                if i == 0:
                    d.box(x0 + 20 * c, 28 + 24 * r, 20, 18, color)
                elif i == 1:
                    d.box(x0 + 22 * c, 28 + 23 * r, 16, 23, color)
                elif i == 2:
                    d.box(x0 + 4 + 9 * c + 20 * r, 28 + 8 * c, 20, 46, color)
                else:
                    d.box(x0 + 22 * c, 28 + 5 * (c * 5 % 4) + 20 * r, 12 + 3 * (c % 3), 20, color)
        d.line([(x0 + 62, 132), (x0 + 62, 146), (400, 162)], arrow=False)
    d.line([(400, 162), (400, 176)], arrow=True)
    d.box(290, 178, 220, 26, label="one pass: cn.layer_norm(x)", size=13)
    d.line([(400, 204), (400, 218)], arrow=True)
    for r in range(4):
        for c in range(6):
            d.box(340 + 20 * c, 222 + 22 * r, 20, 18, tint(2 * r, 9))
    d.text(474, 250, "the layout of x, or row-major,", 12)
    d.text(474, 268, "ready for DLPack and torch", 12)
    return d
