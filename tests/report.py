"""Tables that tests measure, printed after the run; works across pytest-xdist's workers."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_VARIABLE = "CUPYNORM_TEST_TABLES"


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):  # whose workers, started later, inherit the environment
        os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="cupynorm-tables-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _is_worker(config):
        shutil.rmtree(os.environ.pop(_VARIABLE, ""), ignore_errors=True)


def put_table(config: pytest.Config, title: str, lines: list[str]) -> None:
    """Keep a table until the end of the run; a second one of the same title is appended."""
    folder = Path(os.environ[_VARIABLE])
    name = "".join(c if c.isalnum() else "-" for c in title)
    with (folder / f"{name}.txt").open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(f"{title}\n")
        file.write("\n".join(lines) + "\n")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _is_worker(config):
        return
    for path in sorted(Path(os.environ[_VARIABLE]).glob("*.txt")):
        title, *rows = path.read_text(encoding="utf-8").splitlines()
        terminalreporter.section(title)
        for row in rows:
            terminalreporter.write_line(row)
