"""Benchmarks, each a program: bench/README.md. Here is what their command lines share."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path


def command_line(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Parser of `python -m bench.name`, whose help is the docstring of the file."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def saved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")


def some_of(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Type of an option: names of these, separated by commas."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(filter(None, text.split(",")))
        if unknown := set(found) - set(allowed):
            msg = f"{', '.join(sorted(unknown))} is not one of {', '.join(allowed)}"
            raise argparse.ArgumentTypeError(msg)
        return found

    return names
