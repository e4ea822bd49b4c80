"""The one memo: settled calls, by what the arguments look like that they were settled for."""

from collections.abc import Callable
from typing import Any

_MOST = 4096  # calls kept: shapes may be as many as the batches of a program

settled: dict[Any, Callable[..., Any]] = {}


def keep(key: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a call; a full memo is cleared."""
    if len(settled) >= _MOST:
        settled.clear()
    settled[key] = call
    return call
