"""A bar for what lasts: drawn by tqdm where someone looks on, silent elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["steps"]

T = TypeVar("T")
_MANY = 2  # a single step tells nothing before it is over


def steps(items: Iterable[T], label: str, progress: bool | None) -> Iterator[T]:
    """Pass the items on, and count them behind a bar.

    Parameters
    ----------
    items : iterable
        What is to be done, one by one.
    label : str
        Stands before the bar.
    progress : bool or None
        True draws a bar, False none. None draws one if there is more than one item, tqdm is
        installed, and a terminal or a notebook shows it.

    Raises
    ------
    ImportError
        If `progress` is True and tqdm is not installed.
    """
    todo = list(items)
    if progress or (progress is None and len(todo) >= _MANY and _someone_looks_on()):
        tqdm = _tqdm(needed=bool(progress))
        if tqdm is not None:
            return iter(tqdm(todo, desc=label, leave=False))
    return iter(todo)


def _someone_looks_on() -> bool:
    """Whether standard error is a terminal, or this is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        return True
    return sys.stderr is not None and sys.stderr.isatty()


def _tqdm(needed: bool) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if not needed:
            return None
        msg = (
            f"progress=True draws a bar with tqdm, which cannot be imported ({error}); "
            "pip install 'cupynorm[notebook]', or leave progress out"
        )
        raise ImportError(msg) from error
    return tqdm
