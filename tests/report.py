"""Tables that tests measure, printed after the run; works across pytest-xdist's workers."""

import shutil
from pathlib import Path

import pytest


def _folder(config: pytest.Config) -> Path:
    return Path(config.rootpath) / ".pytest_cache" / "tables"


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not _is_worker(session.config):
        shutil.rmtree(_folder(session.config), ignore_errors=True)


def put_table(config: pytest.Config, title: str, lines: list[str]) -> None:
    """Keep a table until the end of the run; a second one of the same title is appended."""
    folder = _folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in title)
    with (folder / f"{name}.txt").open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(f"{title}\n")
        file.write("\n".join(lines) + "\n")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _is_worker(config) or not _folder(config).is_dir():
        return
    for path in sorted(_folder(config).glob("*.txt")):
        title, *rows = path.read_text(encoding="utf-8").splitlines()
        terminalreporter.section(title)
        for row in rows:
            terminalreporter.write_line(row)
