"""What the pictures are drawn with: two axes, colors, histograms, bands and maps."""

from typing import Any

import numpy as np

from cupynorm import _libraries

# Vermilion and blue of Okabe and Ito, which color-blind readers tell apart. Both stand out from
# white and from black by a contrast of 3.8 and more, so they do under any style of matplotlib.
BEFORE = "#d55e00"
AFTER = "#0072b2"
_MAP = "cividis"  # from dark to bright for every kind of sight

_BINS = 40
_HEIGHT = 0.85  # of a row's histogram, where rows are 1 apart
_LOG_FROM = 100.0  # largest over smallest value from which a scale of powers reads better

Array = np.ndarray[Any, np.dtype[np.float64]]


def two_axes(ax: Any, size: tuple[float, float], **shared: bool) -> tuple[Any, Any]:
    """Make a figure with two axes side by side, or check those that the caller has."""
    if ax is None:
        needed = "cupynorm.plot needs matplotlib"
        with _libraries.needing(needed, "pip install 'cupynorm[notebook]'"):
            import matplotlib.pyplot as plt
        _, pair = plt.subplots(1, 2, figsize=size, layout="constrained", **shared)
        return pair[0], pair[1]
    given = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(given) != 2 or not all(hasattr(one, "stairs") for one in given):
        kinds = ", ".join(type(one).__name__ for one in given[:4])
        msg = (
            f"ax holds {len(given)} object(s) ({kinds}) and must be two Axes of matplotlib; pass "
            "e.g. ax=plt.subplots(1, 2)[1], or leave it out for a new figure"
        )
        raise ValueError(msg)
    return given[0], given[1]


def ridges(ax: Any, rows: Array, labels: list[str], color: str) -> None:
    """Histogram of each row over a base line of its own, with its mean and standard deviation.

    Every row has the same bins and is scaled to the same height. NaN and infinity are left out.
    """
    finite = rows[np.isfinite(rows)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if high - low < 1e-6 * max(1.0, abs(high)):  # all the same: a bin of readable width
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    ink = ax.xaxis.label.get_color()  # of the style's text
    for i, values in enumerate(rows):
        base = float(len(rows) - 1 - i)  # the first on top
        values = values[np.isfinite(values)]
        if values.size:
            counts = np.histogram(values, edges)[0]
            heights = base + _HEIGHT * counts / counts.max()
            ax.stairs(heights, edges, baseline=base, fill=True, color=color)
            ax.errorbar(
                values.mean(), base - 0.13, xerr=values.std(),
                color=ink, marker="o", markersize=3.5, linewidth=1.2, capsize=2,
            )  # fmt: skip
    ax.set_yticks(range(len(rows) - 1, -1, -1), labels)
    ax.set_ylim(-0.4, len(rows) - 0.05)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("value (dot and bar: mean ± standard deviation)")
    _open(ax)


def band(ax: Any, center: Array, reach: Array, color: str) -> None:
    """Center of every column as steps, with the reach around it."""
    edges = np.arange(center.size + 1) - 0.5
    ax.stairs(center + reach, edges, baseline=center - reach, fill=True, color=color, alpha=0.4)
    ax.stairs(center, edges, baseline=None, color=color, linewidth=1.8)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("column")
    _open(ax)


def outline(ax: Any, center: Array, reach: Array, label: str) -> None:
    """Edges of such a band as dashed lines in the color of text, with a legend."""
    look = {"color": ax.xaxis.label.get_color(), "linestyle": "--", "linewidth": 1.0}
    edges = np.arange(center.size + 1) - 0.5
    ax.stairs(center + reach, edges, baseline=None, label=label, **look)
    ax.stairs(center - reach, edges, baseline=None, **look)
    ax.legend(frameon=False, loc="best")


def line(ax: Any, values: Array, xlabel: str, color: str) -> None:
    """Draw one number per row."""
    ax.plot(values, ".", color=color, markersize=3 if values.size > 100 else 7)
    ax.set_xlabel(xlabel)
    if _spans(values):
        ax.set_yscale("log")
    _open(ax)


def map_of(ax: Any, values: Array, xlabel: str, ylabel: str, square: bool) -> None:
    """One number per row as a field of colors; NaN stays empty."""
    norm = None
    if _spans(values):
        from matplotlib.colors import LogNorm

        norm = LogNorm()
    look: dict[str, Any] = {"cmap": _MAP, "norm": norm, "interpolation": "nearest"}
    shown = ax.imshow(values, aspect="equal" if square else "auto", **look)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    # Beside a row of images a bar would be as high as the axes, not as the images.
    where = {"location": "bottom", "pad": 0.08} if square else {"shrink": 0.9}
    ax.figure.colorbar(shown, ax=ax, **where)


def _spans(values: Array) -> bool:
    """Whether positive values differ so much that the small ones would all look alike."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > _LOG_FROM * finite.min())


def _open(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
