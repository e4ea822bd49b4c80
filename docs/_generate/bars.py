"""Bars of ratios around 1, on a logarithmic axis."""

import math

from docs._generate.svg import Drawing, tint

__all__ = ["bars"]

WIDTH, LEFT, RIGHT = 700, 200, 685
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


def bars(title: str, text: str, lines: list[tuple[str, str, list[float]]]) -> Drawing:
    """A line for each case and contender: a mark for each run, a bar to the least favorable."""
    values = [1.0, *(v for *_, several in lines for v in several)]
    ticks = [t for t in TICKS if min(values) / 2 <= t <= max(values) * 2]
    low, high = (math.log(f([*ticks, *values])) for f in (min, max))

    def at(value: float) -> float:
        return LEFT + (math.log(value) - low) / (high - low) * (RIGHT - LEFT)

    d = Drawing(WIDTH, title, text)
    d.text(0, 14, title, 13, bold=True)
    bottom = 40 + 20 * len(lines)
    for tick in ticks:
        d.text(at(tick), 32, f"{tick:g}", 11, "middle", bold=tick == 1)
        d.grid(at(tick), 38, bottom, strong=tick == 1)
    labels = list(dict.fromkeys(label for _, label, _ in lines))
    for i, (case, label, several) in enumerate(lines):
        y, end = 42 + 20 * i, at(max(several))
        if i == 0 or lines[i - 1][0] != case:
            d.text(0, y + 11, case, 11)
        d.text(LEFT - 12, y + 11, label, 11, "end")
        color = tint(4 * labels.index(label), 9)
        d.box(min(at(1), end), y, abs(end - at(1)) + 0.5, 14, color)
        for value in several:
            d.grid(at(value), y + 1, y + 13, strong=True)
    d.text(at(1) - 6, bottom + 14, "← faster than torch", 11, "end")
    d.text(at(1) + 6, bottom + 14, "slower →", 11)
    return d
