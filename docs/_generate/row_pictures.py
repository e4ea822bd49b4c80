"""Pictures of K1 and K2, whose rows are in registers."""

from cupynorm._cuda.plan import Plan
from docs._generate.lanes import columns_per_vec, holder
from docs._generate.svg import Drawing, tint

__all__ = ["WIDTH", "block", "warp"]

WIDTH = 700
LEFT = 62.0  # what is written beside a strip


def warp(plan: Plan, N: int) -> Drawing:
    """K1: memory and registers of one warp, and its shuffles."""
    threads, lanes = plan.stages[0].constants[:2]
    rows = plan.rows_per_block * lanes // threads  # of a group of lanes
    per_vec, groups = columns_per_vec(plan), threads // lanes
    d = Drawing(
        WIDTH,
        "K1: one warp",
        f"K1, rows of {N} float32: one warp of {plan.stages[0].name}. Each lane takes 16 bytes "
        f"({per_vec} columns) of {rows} rows. A color is a lane, an arc a shuffle.",
    )
    mine = [t * groups + g for t in range(rows) for g in range(32 // lanes)]
    vecs = -(-N // per_vec)
    cell = (WIDTH - LEFT) / vecs
    d.text(0, 14, "memory: columns of some rows", bold=True)
    for i, row in enumerate(mine):
        y = 24 + 22 * i
        d.text(LEFT - 8, y + 13, f"row {row}", 11, "end")
        for v in range(vecs):
            lane = holder(plan, row, v * per_vec, N).thread % 32
            last = min(N, (v + 1) * per_vec) - 1
            label = f"{v * per_vec}–{last}"
            d.box(LEFT + v * cell, y, cell, 18, tint(lane, 32), label=label, size=10)
    top = 24 + 22 * len(mine) + 22
    d.text(0, top, "registers of one warp", bold=True)
    step = (WIDTH - LEFT) / 32
    for lane in range(32):
        d.text(LEFT + (lane + 0.5) * step, top + 16, str(lane), 10, "middle")
    for turn in range(rows):
        y = top + 22 + 20 * turn
        d.text(LEFT - 8, y + 12, f"turn {turn}", 11, "end")
        for lane in range(32):
            row = turn * groups + lane // lanes
            held = any(holder(plan, row, v * per_vec, N).thread == lane for v in range(vecs))
            d.box(LEFT + lane * step + 1, y, step - 2, 16, tint(lane, 32) if held else "none")
    _shuffles(d, step, top + 22 + 20 * rows + 6, lanes)
    return d


def _shuffles(d: Drawing, step: float, top: float, lanes: int) -> None:
    """The steps of warp_sum: in each, every lane adds what its partner has."""
    distance = lanes // 2
    while distance:
        height = 6 + 2.6 * distance
        d.text(LEFT - 8, top + 12, f"lane ^ {distance}", 11, "end")
        for lane in range(32):
            if lane & distance == 0:
                x = LEFT + (lane + 0.5) * step
                d.arc(x, x + distance * step, top, height)
        top += height + 7
        distance //= 2
    d.text(LEFT, top + 12, "Now every lane of a row has the same sum: no barrier.", 12)


def block(plan: Plan, N: int) -> Drawing:
    """K2: the warps' runs of columns, their registers, and the exchange."""
    per_row, vecs = plan.threads_per_row, plan.vecs_per_thread
    per_vec, warps = columns_per_vec(plan), plan.threads_per_row // 32
    d = Drawing(
        WIDTH,
        "K2: one row in a block",
        f"K2, rows of {N} float16: one row in {per_row} threads of {plan.stages[0].name}. Each "
        f"warp owns {32 * vecs * per_vec} neighbouring columns, each lane {vecs} vectors of "
        f"{per_vec}. A color is a warp.",
    )
    held: dict[int, dict[int, tuple[int, int]]] = {}  # warp -> vector -> its lane and place
    for v in range(-(-N // per_vec)):
        h = holder(plan, 0, v * per_vec, N)
        held.setdefault(h.thread // 32, {})[v] = (h.thread % 32, h.slot)
    width = WIDTH / warps
    d.text(0, 14, "memory: one row", bold=True)
    d.text(0, 72, "registers", bold=True)
    scale = WIDTH * per_vec / N
    for w, mine in held.items():
        first, last = min(mine), max(mine)
        label = f"columns {first * per_vec}–{min(N, (last + 1) * per_vec) - 1}"
        color = tint(2 * w, 2 * warps)
        d.box(first * scale, 22, (last + 1 - first) * scale, 24, color, label=label, size=11)
        size = (width - 12) / 32
        places = set(mine.values())
        for k in range(vecs):
            for lane in range(32):
                fill = color if (lane, k) in places else "none"
                d.box(w * width + 6 + lane * size, 80 + 11 * k, size, 9, fill, line=0.4)
        middle = w * width + width / 2
        d.text(middle, 80 + 11 * vecs + 14, f"warp {w}: five shuffles", 11, "middle")
    _exchange(d, 80 + 11 * vecs + 22, width, warps)
    return d


def _exchange(d: Drawing, top: float, width: float, warps: int) -> None:
    """Lane 0 of each warp writes; all wait; all add in the order of the warps."""
    slot = 62.0
    left = (WIDTH - slot * warps) / 2
    for w in range(warps):
        x = w * width + width / 2
        d.line([(x, top), (x, top + 10), (left + slot * (w + 0.5), top + 32)], arrow=True)
        color = tint(2 * w, 2 * warps)
        d.box(left + slot * w, top + 34, slot, 22, color, label=f"sum {w}", size=11)
    d.text(left - 10, top + 49, "shared memory", 12, "end", bold=True)
    d.text(left + slot * warps + 10, top + 49, "one barrier", 12)
    d.text(WIDTH / 2, top + 76, "every thread adds sum 0, sum 1, … in this order", 12, "middle")
