"""A progress bar where tqdm and a terminal are at hand, lines of text elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["progress", "say"]

Item = TypeVar("Item")
EVERY = 5.0  # seconds between lines where nothing can be overwritten: logs stay readable


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield items, showing which one is at work."""
    bar = _bar(items, label)
    if bar is not None:
        for item in bar:
            bar.set_postfix_str(str(item), refresh=True)
            yield item
        return
    said = -EVERY
    for number, item in enumerate(items, 1):
        if time.monotonic() - said >= EVERY or number == len(items):
            print(f"{label} {number}/{len(items)}: {item}", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield item


def _bar(items: Sequence[Item], label: str) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(items, desc=label, dynamic_ncols=True)


def say(line: str) -> None:
    """Print a line above the bar, if there is one."""
    if "tqdm" in sys.modules and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line)
    else:
        print(line, flush=True)
