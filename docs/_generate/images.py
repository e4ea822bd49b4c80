"""The picture of the README, which GitHub shows as a file: `python -m docs._generate.images`."""

from pathlib import Path

from docs._generate.tile_pictures import layouts

__all__ = ["images", "main"]

FOLDER = Path(__file__).resolve().parents[1] / "images"
INK = {"light": "#1f2328", "dark": "#e6edf3"}  # GitHub's text on its two backgrounds


def images() -> dict[str, str]:
    """File name to contents, one for each of the reader's themes."""
    return {
        f"layouts-{theme}.svg": layouts().svg(f' style="color:{color}"')
        for theme, color in INK.items()
    }


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in images().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
