"""Compiles the loops once: kept on disk, and compiled again when a file of theirs changes."""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types

# Compiled functions by what defines them and for which dtype; loaded code, no call's settings.
_ready: dict[tuple[Any, str], Any] = {}


def inner(function: Callable[..., Any]) -> Any:
    """Compile for use inside other loops. Without fastmath: no sum is reordered, no fma fused."""
    return numba.njit(nogil=True, error_model="numpy")(function)


@functools.cache
def checksum() -> int:
    """Checksum of the files that compiled functions are made of: those that import this one.

    Each job closes over it, because numba's cache looks at the time stamp of one file alone, and
    at the values of such variables: a change of the files below must not go unseen.
    """
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    name = b"from cupynorm._cpu.compiled import"
    return zlib.crc32(b"".join(text for text in texts if name in text)) | 1


def job(define: Callable[..., Any]) -> Callable[[str], Any]:
    """Make what Python calls: for a dtype compiled, or loaded, when it is first asked for.

    ``define(checksum, kind)`` gives a function of integers, or its signature and the function.
    Where numba finds no folder to keep code in, or a full one, it is compiled all the same.
    """

    @functools.wraps(define)
    def ready(kind: str) -> Any:
        found = _ready.get((define, kind))
        if found is None:
            try:
                found = _compile(define, kind, checksum(), True)
            except (RuntimeError, OSError):
                found = _compile(define, kind, 1, False)
            _ready[define, kind] = found
        return found

    return ready


def _compile(define: Callable[..., Any], kind: str, number: int, keep: bool) -> Any:
    made = define(number, kind)
    signature, function = made if isinstance(made, tuple) else (None, made)
    # A file of the cache for each dtype: numba's index of a file is read, changed and written
    # without a lock, and two processes could give one dtype the code of another.
    function.__qualname__ += f"_{kind}"
    if signature is None:
        signature = types.void(*[types.int64] * function.__code__.co_argcount)
    return numba.njit(signature, nogil=True, error_model="numpy", cache=keep)(function)
