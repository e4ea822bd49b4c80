"""One picture of what layer norm does to real data: digits before and after, and their rows."""

from pathlib import Path
from typing import Any

import numpy as np

from cupynorm._selfcheck import EPS, Data
from cupynorm.functional import layer_norm

__all__ = ["draw"]

_SHOWN = 8
_BEFORE, _AFTER = "#b3541e", "#1f6f8b"


def draw(table: Data, path: Path) -> Path:
    """Save the picture of a table with 64 columns as PNG and return the path as absolute.

    Needs matplotlib, whose own ImportError passes through.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = table.x.astype(np.float32)
    y = layer_norm(x, x.shape[1], eps=EPS)
    figure: Any = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    images, plots = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
    m, n = x.shape
    figure.suptitle(
        f"cupynorm.layer_norm on {table.name}, {m} × {n} float32: "
        "every row to mean 0 and variance 1",
        fontsize=14,
    )
    _images(images, x, y)
    _histograms(plots, x, y)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path


def _images(figure: Any, x: Any, y: Any) -> None:
    """Show some rows as 8 × 8 images: before in grey, after with 0 in white."""
    picked = _spread(x)
    axes = figure.subplots(2, _SHOWN)
    reach = float(np.abs(y[picked]).max())
    looks: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("before", x, {"cmap": "gray_r", "vmin": float(x.min()), "vmax": float(x.max())}),
        ("after", y, {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}),
    )
    for row, (label, values, look) in zip(axes, looks, strict=True):
        for ax, i in zip(row, picked, strict=True):
            shown = ax.imshow(values[i].reshape(8, -1), **look)
            mean, std = float(values[i].mean()), float(values[i].std())
            # + 0.0 turns a rounded -0.0 into 0.0
            ax.set_title(f"mean {round(mean, 2) + 0.0:.2f}\nstd {std:.2f}", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(label, fontsize=12)
        figure.colorbar(shown, ax=list(row), shrink=0.85, pad=0.01)


def _spread(x: Any) -> Any:
    """Rows from the faintest to the strongest, evenly spread in their standard deviation."""
    by_std = np.argsort(x.std(axis=1), kind="stable")
    return by_std[np.linspace(0, len(by_std) - 1, _SHOWN).astype(int)]


def _histograms(figure: Any, x: Any, y: Any) -> None:
    """Means and variances of the rows, and all values, before and after."""
    quantities = (
        ("mean of a row", x.mean(axis=1), y.mean(axis=1), "rows"),
        ("variance of a row", x.var(axis=1), y.var(axis=1), "rows"),
        ("value", x.ravel(), y.ravel(), "elements"),
    )
    axes = figure.subplots(2, len(quantities))
    for column, (name, before, after, counted) in zip(axes.T, quantities, strict=True):
        looks = ((before, "before", _BEFORE), (after, "after", _AFTER))
        for ax, (values, label, color) in zip(column, looks, strict=True):
            low, high = float(values.min()), float(values.max())
            if high - low < 0.02:  # after the norm all rows agree: show it on a readable scale
                low, high = round((low + high) / 2, 1) - 0.5, round((low + high) / 2, 1) + 0.5
            ax.hist(values, bins=41, range=(low, high), color=color)
            ax.set_title(f"{name}, {label}: {_spread_text(values)}", fontsize=10)
            ax.set_ylabel(counted)
            ax.spines[["top", "right"]].set_visible(False)


def _spread_text(values: Any) -> str:
    """Smallest to largest, or a center and its reach where they agree in the digits shown."""
    low, high = float(values.min()), float(values.max())
    center, reach = (low + high) / 2, (high - low) / 2
    if reach < 1e-3:
        return f"{round(center, 3) + 0.0:.3g} ± {reach:.0e}"
    return f"{low:.3g} to {high:.3g}"
