"""Draws the model's predictions: bandwidth over the copy's against N, by GPU.

python -m bench.model_plots    # writes bench/results/model-forward and model-backward, PNG and SVG
"""

import hashlib
import itertools
import sys
from pathlib import Path
from typing import Any

from bench.gpu_grid import BIG, BWD, FWD, SMALL, case
from bench.model_cases import predicted
from bench.model_checks import RESULTS
from bench.model_gpus import GPUS, Gpu
from bench.plots import tick

__all__ = ["OPS", "draw", "main", "points", "state"]

# Okabe and Ito's palette, as in bench/plots.py.
SHOWN = {
    "A100": "#E69F00", "RTX 4090": "#009E73", "H100": "#0072B2", "H200": "#56B4E9",
    "B200": "#D55E00",
}  # fmt: skip
DTYPES = ("bfloat16", "float32")
SIZES = {BIG: "1 GB moved", SMALL: "33 MB moved"}
OPS = {FWD: "forward", BWD: "backward"}
LEAST, MOST = 6, 20  # powers of two


def points(gpu: Gpu, op: str, dtype: str, group: str) -> list[tuple[int, float, str]]:
    """(N, bandwidth over the copy's, kernel), two lengths to each power of two."""
    found = []
    for i in range(2 * LEAST, 2 * MOST + 1):
        N = int(2 ** (i / 2)) // 64 * 64 or 64
        p = predicted(case(dtype, N, group, op=op), gpu)
        if p:
            found.append((N, p.fraction_of_copy, p.families))
    return found


def state(op: str) -> str:
    """Hash of what a figure shows, which its SVG holds, so that a test sees whether it is old."""
    shown = []
    for gpu in (g for g in GPUS if g.name in SHOWN):
        for dtype, group in itertools.product(DTYPES, SIZES):
            found = points(gpu, op, dtype, group)
            shown.append([gpu.name, dtype, group, *((N, f"{f:.3f}", k) for N, f, k in found)])
    return "points " + hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def draw(op: str, folder: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write the figure of an op; its paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "model", "svg.fonttype": "none"}  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            2, 2, figsize=(10, 6.2), sharex=True, sharey=True, layout="constrained"
        )
        for row, dtype in zip(axes, DTYPES, strict=True):
            for ax, (group, size) in zip(row, SIZES.items(), strict=True):
                _panel(ax, op, dtype, group)
                ax.set_title(f"{dtype}, {size}", fontsize=9)
            row[0].set_ylabel("bandwidth over the copy's")
        for ax in axes[-1]:
            ax.set_xlabel("N (columns)")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
        figure.suptitle(f"layer_norm {OPS[op]} · predicted by the cost model, not measured")
        made = [folder / f"model-{OPS[op]}.{suffix}" for suffix in formats]
        for path in made:
            said = {"Date": None, "Description": state(op)}
            about = said if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=90, metadata=about)
        plt.close(figure)
    return made


def _panel(ax: Any, op: str, dtype: str, group: str) -> None:
    """A line per GPU, a ring where another kernel takes over, its name where the first one does."""
    ax.axhline(1.0, color="#777777", ls="--", lw=1.2, label="copy")
    firsts: dict[str, int] = {}
    for gpu in (g for g in GPUS if g.name in SHOWN):
        found, color = points(gpu, op, dtype, group), SHOWN[gpu.name]
        ax.plot([N for N, *_ in found], [f for _, f, _ in found], color=color, label=gpu.name)
        for (_, _, before), (N, fraction, kernel) in itertools.pairwise(found):
            if kernel != before:
                ax.plot(N, fraction, "o", ms=4, mfc="white", mec=color, zorder=3)
        for N, _, kernel in found:
            firsts[kernel] = min(N, firsts.get(kernel, N))
    for kernel, N in firsts.items():
        ax.annotate(kernel, (N, 0.03), ha="center", fontsize=8, color="#444444")
        ax.axvline(N, ymin=0.07, ymax=0.11, color="#444444", lw=0.8)
    ax.set_xscale("log", base=2)
    ticks = [2**i for i in range(LEAST, MOST + 1, 2)]
    ax.set_xticks(ticks, [tick(N) for N in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 1.1)
    ax.grid(axis="y", alpha=0.3)


def main() -> int:
    """Write the figures anew."""
    for op in OPS:
        for path in draw(op, RESULTS):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
