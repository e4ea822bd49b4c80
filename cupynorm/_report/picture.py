"""One picture of what layer norm does to real data: digits before and after, and their rows."""

from pathlib import Path
from typing import Any

import numpy as np

from cupynorm import plot
from cupynorm._report.selfcheck import EPS, Data
from cupynorm.functional import layer_norm

_SHOWN = 8


def draw(table: Data, path: Path) -> Path:
    """Save the picture of a table with 64 columns as PNG and return the path as absolute.

    Needs matplotlib, whose own ImportError passes through.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = table.x.astype(np.float32)
    m, n = x.shape
    y = layer_norm(x, n, eps=EPS)
    by_std = np.argsort(table.x.std(axis=1), kind="stable")
    picked = by_std[np.linspace(0, m - 1, _SHOWN).astype(int)].tolist()
    figure: Any = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    images, plots, batch = figure.subfigures(3, 1, height_ratios=(1.0, 1.1, 0.8))
    figure.suptitle(
        f"cupynorm.layer_norm on {table.name}, {m} × {n} float32: "
        "every row to mean 0 and variance 1",
        fontsize=14,
    )
    before, after = images.subplots(2, _SHOWN)
    reach = float(np.abs(y).max())
    grey = {"cmap": "gray_r", "vmin": float(x.min()), "vmax": float(x.max())}
    _images(images, before, x[picked], "before", grey)
    _images(images, after, y[picked], "after", {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach})
    plot.distributions(x, n, eps=EPS, rows=picked, ax=plots.subplots(1, 2, sharey=True))
    batch.suptitle(f"all {m} rows before", fontsize=12)
    plot.moments(x, n, ax=batch.subplots(1, 2))
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path


def _images(figure: Any, axes: Any, rows: Any, label: str, look: dict[str, Any]) -> None:
    """Show rows as 8 × 8 images."""
    for ax, image in zip(axes, rows, strict=True):
        shown = ax.imshow(image.reshape(8, -1), **look)
        mean, std = float(image.mean()), float(image.std())
        # + 0.0 turns a rounded -0.0 into 0.0
        ax.set_title(f"mean {round(mean, 2) + 0.0:.2f}\nstd {std:.2f}", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    axes[0].set_ylabel(label, fontsize=12)
    figure.colorbar(shown, ax=list(axes), shrink=0.85, pad=0.01)
