"""Every link of the built site: those within it must lead somewhere, the others are listed.

python -m docs._generate.links build/docs
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken", "main"]


class _Page(HTMLParser):
    """What a page points to, and the places in it that can be pointed at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value is None:
                continue
            if key in ("id", "name"):
                self.anchors.add(value)
            elif key in ("href", "src") and tag != "base":
                self.targets.append(value)


def broken(site: Path) -> tuple[list[str], list[str]]:
    """Give the links that lead nowhere, as 'page -> target', and all external addresses."""
    site = site.resolve()
    # _static holds templates of the theme, which are no pages.
    found = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts)
    pages = {path: _Page(path) for path in found}
    faults, outside = [], set()
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                outside.add(target)
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = there in pages and unquote(parts.fragment) not in pages[there].anchors
            if not there.exists() or known:
                faults.append(f"{path.relative_to(site)} -> {target}")
    return faults, sorted(outside)


def main(folder: str) -> int:
    """Print what is broken and write external-links.txt; 1 if anything is."""
    site = Path(folder)
    faults, outside = broken(site)
    (site / "external-links.txt").write_text("\n".join(outside) + "\n", encoding="utf-8")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(faults)} broken links; {len(outside)} to other sites, in external-links.txt")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
