"""The page of error messages: each sentence, its cause and its way out, by what it is about."""

import re
from collections.abc import Iterable

from docs._generate.sentences import Sentence, sentences

__all__ = ["TOPICS", "page"]

# Rooms whose sentences belong together; one that is not named here stands under the last.
TOPICS = {
    "Shapes, axes, dtypes, eps, gradients": ("_rules",),
    "Arrays, devices, libraries": ("_calls", "_libraries", "_reference"),
    "Layers and pictures": ("modules", "plot"),
    "Columns and tables": ("frames",),
    "torch": ("_torch",),
    "scikit-learn": ("sklearn",),
    "Dask": ("dask",),
    "Launches, settings, names": (),
}


def page() -> str:
    """Give the page's body in Markdown."""
    rest = list(TOPICS)[-1]
    topic_of = {room: topic for topic, rooms in TOPICS.items() for room in rooms}
    text = []
    for topic in TOPICS:
        mine = [s for s in sentences() if topic_of.get(s.module.partition(".")[0], rest) == topic]
        text.append(f"## {topic}\n\n" + "\n".join(_entries(mine)))
    return "\n\n".join(text) + "\n"


def _entries(found: Iterable[Sentence]) -> list[str]:
    return [_entry(sentence) for sentence in found]


def _entry(sentence: Sentence) -> str:
    fault, way_out = sentence.parts
    where = f"`{sentence.module}.{sentence.function}`"
    when = f"`` {sentence.when} `` in {where}" if sentence.when else f"in {where}"
    title = f"{sentence.error}: {_words(fault.rstrip(' ;.:'))}"
    return (
        f":::{{admonition}} {title}\n:class: error-entry\n\n"
        f"**Way out:** {_words(way_out)}\n\n"
        f"**Raised when:** {when}\n:::\n"
    )


def _words(text: str) -> str:
    """A sentence as Markdown: what is filled in, in italics; the rest as it is."""
    pieces = re.split(r"(‹[^›]*›)", text)
    return "".join(
        f"*‹{_plain(p[1:-1])}›*" if p.startswith("‹") else _plain(p) for p in pieces if p
    )


def _plain(text: str) -> str:
    return re.sub(r"([\\*_`\[\]<>{}|#$])", r"\\\1", text)
