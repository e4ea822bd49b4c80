"""A few shapes as SVG. Text takes the page's color, so a drawing reads in light and in dark."""

import html
from collections.abc import Sequence

__all__ = ["Drawing", "tint"]

INK = "#16191d"  # on a tinted box, which is light in both themes


def tint(i: int, n: int) -> str:
    """The i-th of n colors, all light enough for dark text, and far apart for neighbours."""
    return f"hsl({(200 + 320 * i / max(n, 1)) % 360:.0f} 62% {78 if i % 2 else 68}%)"


class Drawing:
    """Shapes on a canvas of a given width; the height follows from what is on it."""

    def __init__(self, width: int, title: str, description: str) -> None:
        self.width, self.height = width, 0.0
        self.title, self.description = title, description
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        *,
        label: str = "",
        size: float = 10,
        dashed: bool = False,
        line: float = 0.8,
    ) -> None:
        """A rectangle, with a label in its middle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        edge = "currentColor" if fill == "none" else INK
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5" '
            f'fill="{fill}" stroke="{edge}" stroke-opacity="0.5" '
            f'stroke-width="{line}"{dash}/>'
        )
        self._grow(y + height)
        if label:
            ink = None if fill == "none" else INK
            self.text(x + width / 2, y + height / 2 + size * 0.36, label, size, "middle", ink=ink)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        anchor: str = "start",
        *,
        bold: bool = False,
        ink: str | None = None,
    ) -> None:
        """A line of text from its baseline's start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight} '
            f'fill="{ink or "currentColor"}">{html.escape(text, quote=False)}</text>'
        )
        self._grow(y + size * 0.3)

    def line(self, points: Sequence[tuple[float, float]], *, arrow: bool = False) -> None:
        """A line through points."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(
            f'<polyline points="{way}" fill="none" stroke="currentColor" stroke-opacity="0.8" '
            f'stroke-width="1.1"{end}/>'
        )
        self._grow(max(y for _, y in points))

    def grid(self, x: float, top: float, bottom: float, *, strong: bool = False) -> None:
        """A vertical line, faint unless it says something."""
        self.parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" '
            f'stroke="currentColor" stroke-opacity="{0.9 if strong else 0.2}"/>'
        )
        self._grow(bottom)

    def arc(self, x0: float, x1: float, y: float, height: float) -> None:
        """An exchange between two places on one line, drawn below it."""
        mid = (x0 + x1) / 2
        self.parts.append(
            f'<path d="M{x0:.1f} {y:.1f} Q{mid:.1f} {y + 2 * height:.1f} {x1:.1f} {y:.1f}" '
            'fill="none" stroke="currentColor" stroke-opacity="0.7" stroke-width="1"/>'
        )
        self._grow(y + height)

    def _grow(self, y: float) -> None:
        self.height = max(self.height, y)

    def svg(self, style: str = "") -> str:
        """The drawing alone."""
        size = f"0 0 {self.width} {self.height + 8:.0f}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" width="{self.width}" '
            f'role="img" font-family="system-ui, sans-serif"{style}>\n'
            f"<title>{html.escape(self.title)}</title>\n"
            f"<desc>{html.escape(self.description)}</desc>\n"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="currentColor"/>'
            "</marker></defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )

    def figure(self) -> str:
        """The drawing with its description under it, for a page of the site."""
        return (
            f'<figure class="drawing">\n<div class="drawing-canvas">\n{self.svg()}</div>\n'
            f"<figcaption>{html.escape(self.description)}</figcaption>\n</figure>\n"
        )
