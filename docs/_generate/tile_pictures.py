"""Pictures of K6 and K7, which turn columns into rows in a tile, and of the layouts."""

from cupynorm._cuda.plan import Plan
from docs._generate.lanes import tile_holder
from docs._generate.row_pictures import WIDTH
from docs._generate.svg import Drawing, tint

__all__ = ["layouts", "tile"]

SHOWN = 14  # rows of y


def tile(plan: Plan, names: list[str], text: str) -> Drawing:
    """From columns in memory to a tile in shared memory to rows in memory."""
    rows, N, warps = plan.rows_per_block, len(names), plan.stages[0].block[0] // 32
    d = Drawing(WIDTH, text.partition(",")[0] + ": one tile", text)
    d.text(0, 14, "memory: columns", bold=True)
    d.text(258, 14, f"shared memory: {rows} × {N}", bold=True)
    d.text(522, 14, "memory: rows", bold=True)
    for n, name in enumerate(names):
        y = 26 + 19 * n
        d.text(0, y + 12, name, 11)
        owners = [tile_holder(plan, r, n).thread // 32 for r in range(rows)]
        starts = [r for r in range(rows) if r == 0 or owners[r] != owners[r - 1]]
        for r, end in zip(starts, [*starts[1:], rows], strict=True):
            color, label = tint(owners[r], warps), str(owners[r])
            d.box(76 + 130 * r / rows, y, 130 * (end - r) / rows, 16, color, label=label, size=9)
            d.box(258 + 180 * r / rows + 2 * n, y, 180 * (end - r) / rows, 16, color, line=0.4)
    middle, height = 26 + 9.5 * N, 19 * N - 3
    d.line([(212, middle), (250, middle)], arrow=True)
    d.line([(470, middle), (512, middle)], arrow=True)
    for r in range(SHOWN):
        y = 26 + r * height / SHOWN
        color = tint(r % warps, warps)
        d.box(522, y, 170, height / SHOWN - 2, color, label=f"row {r}", size=9)
    bottom = 26 + 19 * N + 14
    d.text(0, bottom, "lanes along the rows", 11)
    d.text(258, bottom, f"{plan.threads_per_row} threads add up a row", 11)
    d.text(522, bottom, "lanes along the columns", 11)
    return d


def layouts() -> Drawing:
    """What goes in, in which layouts, and that one pass makes one result of it."""
    d = Drawing(
        660,
        "Layouts",
        "Whatever the layout, x is read once and y is written once: no transpose, no copy, no "
        "conversion before it. One color is one row, which gets mean 0 and variance 1.",
    )
    for i, name in enumerate(("row-major", "column-major", "channels first", "a table's columns")):
        x0 = 10 + 165 * i
        d.text(x0 + 62, 16, name, 13, "middle", bold=True)
        for r in range(4):
            for c in range(6):
                x, y, w, h = (
                    (20 * c, 24 * r, 20, 18),
                    (22 * c, 23 * r, 16, 23),
                    (4 + 9 * c + 20 * r, 8 * c, 20, 46),
                    (22 * c, 5 * (c * 5 % 4) + 20 * r, 12 + 3 * (c % 3), 20),
                )[i]
                d.box(x0 + x, 28 + y, w, h, tint(2 * r, 9))
        d.line([(x0 + 62, 132), (x0 + 62, 146), (330, 164)])
    d.line([(330, 164), (330, 178)], arrow=True)
    d.box(220, 180, 220, 26, label="one pass: cn.layer_norm(x)", size=13)
    d.line([(330, 206), (330, 220)], arrow=True)
    for r in range(4):
        for c in range(6):
            d.box(270 + 20 * c, 224 + 22 * r, 20, 18, tint(2 * r, 9))
    d.text(404, 258, "in the layout of x, or row-major,", 13)
    d.text(404, 276, "ready for DLPack and torch", 13)
    return d
