"""All generated pages, and links that lead within the site where the checkout's lead to files."""

import os
import re
from pathlib import Path

from docs._generate import errors, kernels, results

__all__ = ["PAGES", "with_links_of_the_site", "write"]

ROOT = Path(__file__).resolve().parents[2]
# Files of the checkout that are pages of the site, and what such a page is called there.
PAGES = {
    "CHANGELOG.md": "generated/changelog.md",
    "CONTRIBUTING.md": "generated/contributing.md",
    "bench/NOTES.md": "generated/bench-notes.md",
    "bench/README.md": "generated/bench.md",
    "bench/results/PENDING.md": "generated/pending.md",
    "bench/results/accuracy.md": "generated/accuracy.md",
    "bench/results/accuracy-backward.md": "generated/accuracy-backward.md",
    "bench/results/compile-matrix.md": "generated/compile-matrix.md",
}
# Reports that come later are pages, too: reached by links, in no table of contents.
LATER = {
    f"bench/results/{path.name}": f"generated/{path.stem.lower()}.md"
    for path in sorted((ROOT / "bench" / "results").glob("*.md"))
    if f"bench/results/{path.name}" not in PAGES
}
_LINK = re.compile(r"\[([^\]\[]*)\]\((?!https?://|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^ *(?:```|:::).*?^ *(?:```|:::) *$)", re.M | re.S)


def write(to: Path) -> None:
    """Write them all, each only where it changes, so that Sphinx reads again what it must."""
    for name, page in (PAGES | LATER).items():
        text = _relinked((ROOT / name).read_text(encoding="utf-8"), name, page)
        put(ROOT / "docs" / page, f"---\norphan: true\n---\n\n{text}" if name in LATER else text)
    parts = {"errors.md": errors.page(), "notebooks.md": _notebooks()}
    parts |= kernels.pictures() | results.parts()
    for name, text in parts.items():
        put(to / "parts" / name, text)


def _notebooks() -> str:
    """The table of contents of docs/notebooks; nothing before there is one."""
    if not any((ROOT / "docs" / "notebooks").glob("*.*")):
        return ""
    return "```{toctree}\n:caption: Notebooks\n:hidden:\n:glob:\n\nnotebooks/*\n```\n"


def put(path: Path, text: str) -> None:
    """Write a file unless it says that already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def with_links_of_the_site(text: str, docname: str) -> str:
    """Let the links of a page in docs/ lead to the site's pages of the files they name."""
    if docname.startswith(("generated/", "notebooks/")):
        return text
    return _relinked(text, f"docs/{docname}.md", f"{docname}.md")


def _relinked(text: str, source: str, page: str) -> str:
    """Text of the checkout's `source` as the site's `page`; code stays as it is."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        there = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if (ROOT / there).is_dir():
            return label  # a site has no page for a folder
        if there in PAGES | LATER:
            there = (PAGES | LATER)[there]
        elif there.startswith("docs/"):
            there = there.removeprefix("docs/")
        else:
            there = f"../{there}"  # a file to download
        way = os.path.relpath(there, os.path.dirname(page) or ".").replace(os.sep, "/")
        return f"[{label}]({way}{anchor})"

    parts = _FENCE.split(text)
    return "".join(p if i % 2 else _LINK.sub(link, p) for i, p in enumerate(parts))
