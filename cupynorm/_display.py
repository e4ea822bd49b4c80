"""Facts in rows: aligned text for a terminal, a table for a notebook."""

import html
from abc import abstractmethod

Sections = list[tuple[str, list[tuple[str, str]]]]

# Notebooks align cells to the right. No colors: text and lines take the theme's, light or dark.
_LEFT = "style='text-align:left;vertical-align:top'"
_KEY = "style='text-align:left;vertical-align:top;white-space:nowrap'"
_TITLE = "style='text-align:left;border-bottom:1px solid'"  # in the color of text


class Table:
    """Base of what prints as aligned text and shows as a table in a notebook."""

    __slots__ = ()

    @abstractmethod
    def _sections(self) -> Sections:
        """Title and rows (key, value) of each part; '' for no title, or a row that goes on."""

    def __str__(self) -> str:
        sections = self._sections()
        width = max(len(key) for _, rows in sections for key, _ in rows)
        lines = []
        for title, rows in sections:
            indent = "  " if title else ""
            lines += [title] if title else []
            lines += [f"{indent}{key:{width}}  {value}" for key, value in rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        body = ""
        for title, rows in self._sections():
            head = f"<tr><th colspan='2' {_TITLE}>{html.escape(title)}</th></tr>" if title else ""
            body += f"<tbody>{head}{''.join(map(_row, rows))}</tbody>"
        return f"<table>{body}</table>"


def _row(row: tuple[str, str]) -> str:
    key, value = map(html.escape, row)
    return f"<tr><th scope='row' {_KEY}>{key}</th><td {_LEFT}>{value}</td></tr>"
