"""The summary of a CPU table: ours over each peer, by group; as text and as Markdown."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

__all__ = ["fixed_cost", "geometric_mean", "lines", "markdown", "summary"]

# Ours, against whom; "torch" is the fastest of torch's ways in each case.
PAIRS = (
    ("cupynorm", "torch"),
    ("cupynorm C", "torch"),
    ("cupynorm numpy", "torch"),
    ("cupynorm.torch", "torch"),
    ("cupynorm", "onnxruntime"),
    ("cupynorm out=", "onnxruntime"),
    ("cupynorm out=", "onnxruntime out="),
    ("cupynorm", "jax"),
    ("cupynorm", "scikit-learn"),
    ("cupynorm numpy", "numpy formula"),
    ("cupynorm out=", "copyto"),
    ("cupynorm", "copyto fresh"),
)
HEADS = ("op", "group", "dtype", "time of", "over that of", "cases",
         "geometric mean", "of fastest turns", "worst", "worst case")  # fmt: skip
Rows = list[dict[str, Any]]


def geometric_mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, ratios)))


def summary(rows: Rows) -> list[tuple[str, ...]]:
    """A line for each op, group, dtype and pair of which both were timed; below 1, ours is faster.

    Against a copy it is the time for as many bytes as the copy moved: 1.25 is 80 % of its
    bandwidth.
    """
    cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["median_us"] != "":
            key = tuple(row[k] for k in ("op", "group", "dtype", "shape"))
            cases.setdefault(key, {})[row["peer"]] = row
    made = []
    for op, group, dtype in dict.fromkeys(key[:3] for key in cases):
        mine = {key[3]: peers for key, peers in cases.items() if key[:3] == (op, group, dtype)}
        for ours, theirs in PAIRS:
            found = {s: r for s, peers in mine.items() if (r := _ratios(peers, ours, theirs))}
            if found:
                made.append((op.removeprefix("layer_norm_"), group, dtype, ours, theirs,
                             *_figures(found)))  # fmt: skip
    return made


def _figures(found: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    worst = max(found, key=lambda shape: found[shape][0])
    means = (geometric_mean(r[k] for r in found.values()) for k in (0, 1))
    return str(len(found)), *(f"{m:.2f}" for m in means), f"{found[worst][0]:.2f}", worst


def _ratios(peers: dict[str, Any], ours: str, theirs: str) -> tuple[float, float] | None:
    """Of medians and of fastest turns."""
    if ours not in peers:
        return None
    row = peers[ours]
    if theirs == "torch":
        known = row["over_torch"] != ""
        return (float(row["over_torch"]), float(row["best_over_torch"])) if known else None
    if theirs not in peers:
        return None
    other = peers[theirs]
    part = float(row["bytes"]) / float(other["bytes"])
    median, best = (float(row[k]) / float(other[k]) / part for k in ("median_us", "best_us"))
    return median, best


def fixed_cost(rows: Rows) -> str:
    """What a call costs on eight numbers, by those who were timed on them; part of every time."""
    mine = [r for r in rows if r["group"] == "small" and r["M"] == 1 and r["median_us"] != ""]
    by_op: dict[str, list[str]] = {}
    for r in sorted(mine, key=lambda r: r["median_us"]):
        by_op.setdefault(r["op"].removeprefix("layer_norm_"), []).append(
            f"{r['peer']} {r['median_us']:.3g}"
        )
    parts = (f"{op}: {', '.join(by_op[op])}" for op in by_op)
    return "Fixed cost of a call (1x8), us: " + "; ".join(parts) if by_op else ""


def lines(table: list[tuple[str, ...]]) -> list[str]:
    """Aligned text."""
    widths = [max(map(len, column)) for column in zip(HEADS, *table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADS, *table)
    ]


def markdown(
    table: list[tuple[str, ...]], host: dict[str, str], source: str, fixed: str = ""
) -> str:
    """The same as a page that says where it comes from."""
    said = ", ".join(f"{name} {value}" for name, value in host.items() if value)
    head = [f"# Summary of `{source}`", "", f"{said}.", "",
            "Time over time within the same run: below 1, the first is faster. Against a copy: for"
            " as many bytes, so 1.25 is 80 % of its bandwidth.", ""]  # fmt: skip
    head += [fixed, ""] if fixed else []
    body = [HEADS, ("---",) * len(HEADS), *table]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"
