"""Draws a table: bandwidth against N under the copy roof, and bars against the peers.

python -m bench.plots results.csv --out folder
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["draw", "draw_training", "main", "read"]

# Okabe and Ito's palette, told apart by everybody, then Tol's; the copy is the grey line that
# nothing beats.
COLORS = {
    "cupynorm": "#0072B2",
    "cupynorm.torch": "#000000",
    "torch-eager": "#D55E00",
    "torch-compile": "#009E73",
    "liger": "#CC79A7",
    "quack": "#E69F00",
    "cupy": "#56B4E9",
    "cupy-fuse": "#88CCEE",
    "flash-attn": "#F0E442",
    "apex": "#882255",
    "apex-fast": "#AA4499",
    "transformer-engine": "#332288",
    "cudnn": "#117733",
    "cuml": "#999933",
    "jax": "#DDAA99",
    "copy": "#777777",
}
GROUPS = {"1GB": "1 GB moved", "33MB": "33 MB moved", "few rows": "1 row"}
DTYPES = ("float16", "bfloat16", "float32", "float64")
# What the files of an op's figures begin with, and what it is called.
OPS = {
    "layer_norm_fwd": ("", "forward"),
    "layer_norm_bwd": ("backward-", "backward"),
    "layer_norm_fwd_bwd": ("forward-backward-", "forward and backward"),
}
# Color and line of a training's losses.
NORMS = {
    "torch": (COLORS["torch-eager"], "-"),
    "cupynorm": (COLORS["cupynorm"], "--"),
    "nudged": (COLORS["copy"], ":"),
}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Rows of a table that have a bandwidth."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["op"] in OPS and r["gb_per_s"]]
    if not rows:
        msg = f"{path} has no timed rows to draw"
        raise ValueError(msg)
    return rows


def draw(rows: Rows, folder: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write the figures of each op; their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    figures: dict[str, Callable[[Any, Rows], Any]] = {"bandwidth": bandwidth, "peers": bars}
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for op, (prefix, _) in OPS.items():
            of_op = [r for r in rows if r["op"] == op]
            for name, plot in figures.items() if of_op else ():
                figure = plot(plt, of_op)
                figure.suptitle(title(of_op), fontsize=9)
                for suffix in formats:
                    made.append(folder / f"{prefix}{name}.{suffix}")
                    figure.savefig(made[-1], dpi=130)
                plt.close(figure)
    return made


def title(rows: Rows) -> str:
    """Where the numbers come from."""
    r = rows[0]
    commit = (r["commit"] or f"tree {r['tree']}")[:12]
    where = f"{r['gpu']} · driver {r['driver']} · {commit} · {r['date'][:10]}"
    return f"layer_norm {OPS[r['op']][1]} · {where}"


def series(rows: Rows, peer: str) -> list[tuple[int, float]]:
    """(N, GB/s) of a peer, the best of equals; 'copy' is the fastest copy of each case."""
    best: dict[int, float] = {}
    for r in rows:
        if r["peer"] == peer or (peer == "copy" and r["peer"].startswith("copy")):
            best[int(r["N"])] = max(best.get(int(r["N"]), 0.0), float(r["gb_per_s"]))
    return sorted(best.items())


def tick(N: int) -> str:
    """1024 as 1K, 1048576 as 1M, others in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if size <= N and N % size == 0:
            return f"{N // size}{letter}"
    return str(N)


def _chosen(rows: Rows, group: str, dtype: str) -> Rows:
    few = group == "few rows"
    found = [r for r in rows if r["group"] == group and r["dtype"] == dtype]
    # With one row, weight and bias are as large as x: the panel keeps to the rows without them.
    return [r for r in found if r["rows"] == "1" and not r["weight_dtype"]] if few else found


def bandwidth(plt: Any, rows: Rows) -> Any:
    """A panel per group and dtype, GB/s against N."""
    groups = [g for g in GROUPS if any(_chosen(rows, g, d) for d in DTYPES)]
    dtypes = [d for d in DTYPES if any(_chosen(rows, g, d) for g in groups)]
    figure, axes = plt.subplots(
        max(1, len(groups)),
        max(1, len(dtypes)),
        figsize=(1.2 + 4.0 * max(1, len(dtypes)), 1.0 + 2.7 * max(1, len(groups))),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for i, group in enumerate(groups):
        for j, dtype in enumerate(dtypes):
            _panel(axes[i, j], _chosen(rows, group, dtype))
            axes[i, j].set_title(f"{dtype}, {GROUPS[group]}", fontsize=9)
        axes[i, 0].set_ylabel("GB/s")
        axes[i, 0].set_ylim(bottom=0)  # once the whole row is drawn: it shares the axis
    for ax in axes[-1]:
        ax.set_xlabel("N (columns)")
    lines = [h for ax in axes.flat for h in ax.get_lines() if h.get_label()[0] != "_"]
    handles = {h.get_label(): h for h in lines}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False
    )
    return figure


def _panel(ax: Any, rows: Rows) -> None:
    if not rows:
        ax.set_axis_off()
        return
    for peer, color in COLORS.items():
        points = series(rows, peer)
        if not points:
            continue
        style = {"ls": "--", "lw": 1.2} if peer == "copy" else {"marker": "o", "ms": 3.5, "lw": 1.3}
        front = 3 if peer == "cupynorm" else 2
        even = [p for p in points if p[0] & (p[0] - 1) == 0] or points
        ax.plot(*zip(*even, strict=True), color=color, label=peer, zorder=front, **style)
        odd = [p for p in points if p not in even and peer != "copy"]
        if odd:  # lengths that break vectors: open circles beside the line
            ax.plot(
                *zip(*odd, strict=True), "o", ms=4, mfc="white", mec=color, zorder=front, label="_"
            )
    ax.set_xscale("log", base=2)
    columns = sorted({int(r["N"]) for r in rows})
    powers = [N for N in columns if N & (N - 1) == 0] or columns
    ax.set_xticks(powers[:: -(-len(powers) // 8)])
    ax.set_xticklabels([tick(int(N)) for N in ax.get_xticks()])
    ax.minorticks_off()
    ax.grid(axis="y", alpha=0.3)


def bars(plt: Any, rows: Rows) -> Any:
    """A panel per dtype: each peer's share of the copy's bandwidth, by N, at 1 GB moved."""
    group = next(g for g in (*GROUPS, rows[0]["group"]) if any(r["group"] == g for r in rows))
    big, size = [r for r in rows if r["group"] == group], GROUPS.get(group, group)
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in big)]
    figure, axes = plt.subplots(
        len(dtypes), 1, figsize=(11, 1.0 + 2.6 * len(dtypes)), squeeze=False, layout="constrained"
    )
    for ax, dtype in zip(axes[:, 0], dtypes, strict=True):
        _bars_panel(ax, [r for r in big if r["dtype"] == dtype])
        ax.set_title(f"{dtype}, {size}: share of the copy's bandwidth", fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7, frameon=False)
    return figure


def _bars_panel(ax: Any, rows: Rows) -> None:
    columns = sorted({int(r["N"]) for r in rows})
    peers = [p for p in COLORS if p != "copy" and series(rows, p)]
    roof = dict(series(rows, "copy"))
    width = 0.8 / max(1, len(peers))
    for k, peer in enumerate(peers):
        points = [(columns.index(N), gb / roof[N]) for N, gb in series(rows, peer) if N in roof]
        at = [i + (k - (len(peers) - 1) / 2) * width for i, _ in points]
        ax.bar(at, [share for _, share in points], width, color=COLORS[peer], label=peer)
    ax.axhline(1.0, color=COLORS["copy"], ls="--", lw=1.2)
    ax.set_xticks(range(len(columns)), [tick(N) for N in columns])
    ax.set_ylim(0, 1.1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.grid(axis="y", alpha=0.3)


def draw_training(
    table: Path, folder: Path, formats: tuple[str, ...] = ("png", "svg")
) -> list[Path]:
    """A column per mode: the losses, and below how far they are from torch's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    figure, axes = plt.subplots(
        2, len(modes), figsize=(1.0 + 4.0 * len(modes), 5.5), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for (top, bottom), mode in zip(axes.T, modes, strict=True):
        of_mode = [r for r in rows if r["mode"] == mode]
        steps = [int(r["step"]) for r in of_mode]
        losses = {m: [float(r[f"loss_{m}"]) for r in of_mode] for m in NORMS}
        for name, values in losses.items():
            style = {"color": NORMS[name][0], "ls": NORMS[name][1], "label": name}
            top.plot(steps, values, **style)
            if name != "torch":
                apart = [abs(a - b) for a, b in zip(values, losses["torch"], strict=True)]
                bottom.plot(steps, apart, **style)
        top.set_title(f"{mode}: loss", fontsize=9)
        bottom.set_title("distance from torch's", fontsize=9)
        bottom.set_yscale("symlog", linthresh=1e-7)
        bottom.set_xlabel("step")
    axes[0, 0].legend(frameon=False)
    r = rows[0]
    figure.suptitle(f"GPT on {r['gpu'] or 'the CPU'} · torch {r['torch']} · {r['commit'][:12]}")
    made = [folder / f"training.{suffix}" for suffix in formats]
    for path in made:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return made


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description="Draw a table.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder; the table's own if not given")
    given = parser.parse_args(argv)
    folder = given.out or given.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    training = given.csv.name.startswith("training")
    for path in draw_training(given.csv, folder) if training else draw(read(given.csv), folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
