"""Draws a table of bench.cpu: time over torch's by shape, bandwidth against N, time against bytes.

python -m bench.plots_cpu cpu.csv --out folder
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plots import COLORS, tick

__all__ = ["draw", "main", "read"]

# A page shows a figure at some 700 pixels: 7 inches, in which 9 points stay legible.
WIDTH, DPI = 7.0, 200
PEER_COLORS = {
    "cupynorm": COLORS["cupynorm"],
    "cupynorm out=": "#000000",
    "cupynorm C": "#56B4E9",
    "cupynorm.torch": "#882255",
    "torch": COLORS["torch-eager"],
    "onnxruntime": "#E69F00",
    "onnxruntime out=": "#999933",
    "jax": "#009E73",
    "scikit-learn": "#CC79A7",
    "cupynorm numpy": "#88CCEE",
    "numpy formula": "#BBBBBB",
}
COPIES = {"copyto": ("--", "copy, kept result"), "copyto fresh": (":", "copy, fresh result")}
OPS = {
    "layer_norm_fwd": ("forward", "forward"),
    "layer_norm_bwd": ("backward", "backward"),
    "layer_norm_fwd_bwd": ("both", "forward and backward"),
}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Rows that have a time."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["op"] in OPS and r["median_us"]]
    if not rows:
        msg = f"{path} has no timed rows to draw"
        raise ValueError(msg)
    return rows


def draw(rows: Rows, folder: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write the figures that the rows allow; their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, plot, chosen in _figures(rows):
            figure = plot(plt, chosen)
            figure.suptitle(_title(chosen), fontsize=8, color="#555555")
            for suffix in formats:
                made.append(folder / f"{name}.{suffix}")
                figure.savefig(made[-1], dpi=DPI)
            plt.close(figure)
    return made


def _figures(rows: Rows) -> list[tuple[str, Callable[[Any, Rows], Any], Rows]]:
    found: list[tuple[str, Callable[[Any, Rows], Any], Rows]] = []
    for op, (name, _) in OPS.items():
        of_op = [r for r in rows if r["op"] == op and r["dtype"] == "float32"]
        found += [
            (f"cpu-{group}-{name}", over_torch, [r for r in of_op if r["group"] == group])
            for group in ("shapes", "layouts")
        ]
        if op == "layer_norm_fwd":
            found.append(
                ("cpu-bandwidth", bandwidth, [r for r in of_op if r["group"] == "columns"])
            )
            found.append(("cpu-bytes", time_of_bytes, [r for r in of_op if r["group"] == "rows"]))
    return [figure for figure in found if figure[2]]


def _title(rows: Rows) -> str:
    r = rows[0]
    versions = " · ".join(f"{n} {r[n]}" for n in ("torch", "onnxruntime", "jax") if r.get(n))
    where = f"{r['cpu']}, {r['threads']} threads · {r['commit'][:12]} · {r['date']}"
    return f"layer_norm {OPS[r['op']][1]}, float32 · {where}\n{versions}"


def _legend(figure: Any, columns: int = 4) -> None:
    lines = [
        pair for ax in figure.axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)
    ]
    handles = {label: handle for handle, label in lines}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def _where(row: dict[str, str]) -> str:
    """Shape, and what is unusual about the layout."""
    major = " column-major" if row["layout"] == "F" else ""
    axis = f" axis={row['axis']}" if row["axis"] != "-1" else ""
    return row["shape"] + major + axis


def over_torch(plt: Any, rows: Rows) -> Any:
    """Bars: time over that of the fastest of torch's ways, on a log scale, four shapes a panel."""
    shapes = list(dict.fromkeys(_where(r) for r in rows if r["over_torch"]))
    panels = [shapes[k : k + 4] for k in range(0, len(shapes), 4)]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 1.2 + 2.4 * len(panels)), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    peers = [p for p in PEER_COLORS if p != "torch" and any(r["peer"] == p for r in rows)]
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        _bars(ax, rows, panel, peers)
    _legend(figure)
    return figure


def _bars(ax: Any, rows: Rows, panel: list[str], peers: list[str]) -> None:
    width = 0.86 / max(1, len(peers))
    for k, peer in enumerate(peers):
        ratios = {
            _where(r): float(r["over_torch"]) for r in rows if r["peer"] == peer and r["over_torch"]
        }
        points = [(i, ratios[name]) for i, name in enumerate(panel) if name in ratios]
        at = [i + (k - (len(peers) - 1) / 2) * width for i, _ in points]
        heights = [ratio for _, ratio in points]
        # From 1 up or down: a bar above the line is slower than torch, one below is faster.
        bars = ax.bar(at, [h - 1 for h in heights], width * 0.92, bottom=1, color=PEER_COLORS[peer],
                      label=peer)  # fmt: skip
        for bar, ratio in zip(bars, heights, strict=True):
            ax.annotate(
                f"{ratio:.2g}", (bar.get_x() + bar.get_width() / 2, ratio), ha="center",
                va="bottom" if ratio > 1 else "top", xytext=(0, 2 if ratio > 1 else -2),
                textcoords="offset points", fontsize=7, rotation=90,
            )  # fmt: skip
    ax.axhline(1.0, color=PEER_COLORS["torch"], lw=1.2)
    ax.set_yscale("log")
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "torch", "2", "5", "10"])
    ax.minorticks_off()
    ax.set_xticks(range(len(panel)), panel)
    ax.margins(y=0.2)
    ax.set_ylabel("time over torch's")
    ax.grid(axis="y", alpha=0.3)


def _points(rows: Rows, peer: str, x: str, y: str) -> list[tuple[float, float]]:
    return sorted((float(r[x]), float(r[y])) for r in rows if r["peer"] == peer and r[y])


def _lines(ax: Any, rows: Rows, x: str, y: str) -> None:
    for peer, color in PEER_COLORS.items():
        if points := _points(rows, peer, x, y):
            front = 3 if peer.startswith("cupynorm") else 2
            ax.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.4, color=color, label=peer,
                    zorder=front)  # fmt: skip
    for peer, (style, label) in COPIES.items():
        if points := _points(rows, peer, x, y):
            ax.plot(*zip(*points, strict=True), style, lw=1.4, color=COLORS["copy"], label=label)


def bandwidth(plt: Any, rows: Rows) -> Any:
    """GB/s against N at a constant number of bytes, with what a copy reaches."""
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    _lines(ax, rows, "N", "gb_per_s")
    ax.set_xscale("log", base=2)
    columns = sorted({int(r["N"]) for r in rows})
    ax.set_xticks(columns, [tick(N) for N in columns])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("N (columns)")
    ax.set_ylabel("GB/s of the bytes that must move")
    ax.grid(axis="y", alpha=0.3)
    _legend(figure)
    return figure


def time_of_bytes(plt: Any, rows: Rows) -> Any:
    """Time against the bytes that must move, both on log scales."""
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    _lines(ax, rows, "bytes", "median_us")
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = {10**k: label for k, label in ((4, "10 KB"), (5, "100 KB"), (6, "1 MB"),
                                           (7, "10 MB"), (8, "100 MB"))}  # fmt: skip
    ax.set_xticks(list(sizes), list(sizes.values()))
    times = {1: "1 µs", 10: "10 µs", 100: "100 µs", 1e3: "1 ms", 1e4: "10 ms", 1e5: "100 ms"}
    ax.set_yticks(list(times), list(times.values()))
    ax.minorticks_off()
    ax.set_xlabel("bytes that must move (N = 1024)")
    ax.set_ylabel("time of a call")
    ax.grid(alpha=0.3)
    _legend(figure)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    about = "Draw a table of bench.cpu."
    parser = argparse.ArgumentParser(prog="python -m bench.plots_cpu", description=about)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder; the table's own if not given")
    given = parser.parse_args(argv)
    folder = given.out or given.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(read(given.csv), folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
