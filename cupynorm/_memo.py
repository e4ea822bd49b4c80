"""The one memo: settled calls, by what the arguments look like that they were settled for."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_MOST = 4096  # calls kept: shapes may be as many as the batches of a program

Settled = dict[Any, Callable[..., Any]]

_everywhere: Settled = {}
_kept: ContextVar[Settled] = ContextVar("cupynorm_settled", default=_everywhere)
settled = _kept.get  # the calls kept, in this context


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within this context what is settled is kept apart, and nothing settled before is known."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def keep(key: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a call; a full memo is cleared."""
    calls = settled()
    if len(calls) >= _MOST:
        calls.clear()
    calls[key] = call
    return call
