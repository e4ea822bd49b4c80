"""Draws a table: time over torch's, and bandwidth against N under the copy."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import command_line
from bench.cases import ITEMSIZE, OPS

# A page shows a figure at some 700 pixels: 7 inches, in which 9 points stay legible.
WIDTH, DPI = 7.0, 200
# Okabe and Ito's palette, told apart by everybody, and some of Tol's; copies are grey lines.
COLORS = {
    "cupynorm": "#0072B2", "cupynorm out=": "#56B4E9", "cupynorm.torch": "#000000",
    "torch": "#D55E00", "torch-compile": "#009E73", "onnxruntime": "#E69F00",
    "onnxruntime out=": "#999933", "jax": "#DDAA99", "scikit-learn": "#CC79A7", "liger": "#CC79A7",
    "cupy-fuse": "#88CCEE", "formula": "#BBBBBB",
}  # fmt: skip
GREY = "#777777"
GROUPS = {"columns": "64 MiB moved", "1GB": "1 GB moved", "33MB": "33 MB moved"}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["op"] in OPS and r["gb_per_s"]]
    if not rows:
        msg = f"{path} has no timed rows to draw"
        raise ValueError(msg)
    return rows


def draw(rows: Rows, folder: Path) -> list[Path]:
    kind, made = "gpu" if rows[0].get("gpu") else "cpu", []
    for op, about in OPS.items():
        mine = [r for r in rows if r["op"] == op]
        single = [r for r in mine if r["dtype"] == "float32"]
        figures = {
            "shapes": (over_torch, [r for r in single if r["group"] == "shapes"]),
            "layouts": (over_torch, [r for r in single if r["group"] == "layouts"]),
            "bandwidth": (bandwidth, [r for r in mine if r["group"] in GROUPS]),
        }
        for name, (plot, chosen) in figures.items():
            if chosen:
                stem, title = folder / f"{kind}-{name}-{about.direction}", _title(chosen)
                made += save(lambda plt, p=plot, c=chosen: p(plt, c), stem, title)
    return made


def save(plot: Callable[[Any], Any], stem: Path, title: str) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plot(plt)
        figure.suptitle(title, fontsize=8, color="#555555")
        found = [p for ax in figure.axes for p in zip(*ax.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in found}
        place = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        figure.legend(handles.values(), handles.keys(), **place)
        paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return paths


def _title(rows: Rows) -> str:
    r, op = rows[0], OPS[rows[0]["op"]]
    where = r.get("gpu") or f"{r['cpu']}, {r['threads']} threads"
    versions = " · ".join(f"{n} {r[n]}" for n in ("torch", "onnxruntime", "jax") if r.get(n))
    direction = op.direction.replace("both", "forward and backward")
    return f"{op.norm} {direction} · {where} · {r['commit'][:12]} · {r['date']}\n{versions}"


def _peers(rows: Rows) -> list[str]:
    there = {r["peer"] for r in rows}
    return [p for p in COLORS if p in there]


def over_torch(plt: Any, rows: Rows) -> Any:
    """Bars: time over that of the fastest of torch's ways, on a log scale, four shapes a panel."""
    where = lambda r: r["shape"] + ("" if r["layout"] == "C" else f" {r['layout']}")  # noqa: E731
    rows = [r for r in rows if r["over_torch"]]
    shapes, peers = list(dict.fromkeys(map(where, rows))), [p for p in _peers(rows) if p != "torch"]
    panels = [shapes[k : k + 4] for k in range(0, len(shapes), 4)] or [[]]
    about = {"figsize": (WIDTH, 1.2 + 2.4 * len(panels)), "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(len(panels), 1, layout="constrained", **about)
    width = 0.86 / max(1, len(peers))
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        for r in (r for r in rows if where(r) in panel and r["peer"] in peers):
            ratio, k = float(r["over_torch"]), peers.index(r["peer"])
            at = panel.index(where(r)) + (k - (len(peers) - 1) / 2) * width
            # From 1 up or down: a bar above the line is slower than torch, one below faster.
            ax.bar(at, ratio - 1, width * 0.92, bottom=1, color=COLORS[r["peer"]], label=r["peer"])
            place = ("bottom", 2) if ratio > 1 else ("top", -2)
            about = {"ha": "center", "va": place[0], "fontsize": 7, "rotation": 90}
            offset = {"xytext": (0, place[1]), "textcoords": "offset points"}
            ax.annotate(f"{ratio:.2g}", (at, ratio), **offset, **about)
        ax.axhline(1.0, color=COLORS["torch"], lw=1.2)
        ax.set_yscale("log")
        ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "torch", "2", "5", "10"])
        ax.minorticks_off()
        ax.set_xticks(range(len(panel)), panel)
        ax.margins(y=0.2)
        ax.set_ylabel("time over torch's")
    return figure


def _lines(ax: Any, rows: Rows) -> None:
    """A line per peer, open circles for lengths that break vectors; the fastest copies."""
    for peer in _peers(rows):
        points = sorted((int(r["N"]), float(r["gb_per_s"])) for r in rows if r["peer"] == peer)
        even = [p for p in points if p[0] & (p[0] - 1) == 0] or points
        style = {"color": COLORS[peer], "zorder": 3 if peer.startswith("cupynorm") else 2}
        ax.plot(*zip(*even, strict=True), "o-", ms=3.5, lw=1.3, label=peer, **style)
        if odd := [p for p in points if p not in even]:
            ax.plot(*zip(*odd, strict=True), "o", ms=4, mfc="white", label="_", **style)
    for label, style in (("copy", "--"), ("copy, fresh result", ":")):
        roof: dict[int, float] = {}
        for r in rows:
            if r["peer"].startswith("copy") and ("fresh" in r["peer"]) == ("fresh" in label):
                roof[int(r["N"])] = max(roof.get(int(r["N"]), 0.0), float(r["gb_per_s"]))
        if roof:
            ax.plot(*zip(*sorted(roof.items()), strict=True), style, color=GREY, label=label)


def bandwidth(plt: Any, rows: Rows) -> Any:
    """A panel per group and dtype: GB/s against N, with what a copy reaches."""
    groups = [g for g in GROUPS if any(r["group"] == g for r in rows)]
    dtypes = [d for d in ITEMSIZE if any(r["dtype"] == d for r in rows)]
    size = (max(WIDTH, 1.2 + 4.0 * len(dtypes)), 1.2 + 3.0 * len(groups))
    about = {"figsize": size, "squeeze": False, "sharey": "row", "layout": "constrained"}
    figure, axes = plt.subplots(len(groups), len(dtypes), **about)
    for line, group in zip(axes, groups, strict=True):
        for ax, dtype in zip(line, dtypes, strict=True):
            mine = [r for r in rows if (r["group"], r["dtype"]) == (group, dtype)]
            _lines(ax, mine)
            ax.set_xscale("log", base=2)
            ax.minorticks_off()
            ax.set_title(f"{dtype}, {GROUPS[group]}", fontsize=9)
            ax.set_xlabel("N (columns)")
        line[0].set_ylabel("GB/s of the bytes that must move")
        line[0].set_ylim(bottom=0)  # once the whole row is drawn: it shares the axis
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = command_line("plots", __doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder; the table's own if not given")
    given = parser.parse_args(argv)
    folder = given.out or given.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    print(*draw(read(given.csv), folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
