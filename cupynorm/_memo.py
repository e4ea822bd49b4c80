"""The one memo: settled calls, by what the arguments look like that they were settled for."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_MOST = 4096  # calls kept: shapes may be as many as the batches of a program

Settled = dict[Any, Callable[..., Any]]

_everywhere: Settled = {}
kept: ContextVar[Settled] = ContextVar("cupynorm_settled", default=_everywhere)
settled = kept.get  # the calls kept, in this context


def keep(key: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a call; a full memo is cleared."""
    calls = settled()
    if len(calls) >= _MOST:
        calls.clear()
    calls[key] = call
    return call
