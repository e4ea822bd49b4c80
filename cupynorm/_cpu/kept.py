"""Compiled functions that Python calls: compiled once, kept on disk, again when changed."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import carray, from_dtype, types

from cupynorm._cpu.loops import compiled
from cupynorm._cpu.pointers import at

__all__ = ["INNER", "built", "seen", "shared", "sources"]

# What the memory of x holds and what loops compute in; the 16-bit kinds share their code.
_TYPES = {
    "float16": (np.uint16, np.float32),
    "bfloat16": (np.uint16, np.float32),
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
}
# The files whose functions others are compiled from.
INNER = (
    "bits",
    "bwd_loops",
    "bwd_rows",
    "columns_lanes",
    "columns_write",
    "crew",
    "entries",
    "kept",
    "lanes",
    "loops",
    "narrow",
    "pointers",
    "rows",
    "shared",
    "signals",
    "squares",
    "strided_loops",
)
_ready: dict[Any, Any] = {}


def sources() -> int:
    """Checksum of INNER.

    The functions that are called from Python close over it, because numba's cache looks at the time
    stamp of their own file alone, and at the values of such variables: an edit or upgrade of the
    files below must not go unseen.
    """
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in INNER)
    return zlib.crc32(text) | 1


@compiled()
def seen(address, size, dtype):  # type: ignore[no-untyped-def]
    """View the elements at an address as a row, or an empty one where the address is 0."""
    return carray(at(address, dtype), (size if address else 0,))


def _once(define: Callable[..., Any], kind: Any, compiler: Callable[[bool], Any]) -> Any:
    pair = stored, computed = _TYPES.get(kind, kind)
    if (define, pair) not in _ready:
        try:
            made = define(sources(), compiler(True), stored, computed)
        except (RuntimeError, OSError):  # no directory to keep compiled code in, or it is full
            made = define(1, compiler(False), stored, computed)
        _ready[define, pair] = made
    _ready[define, kind] = _ready[define, pair]
    return _ready[define, kind]


def built(define: Callable[..., Any], letters: str, kind: str = "float32") -> Any:
    """Compile for a kind what ``define(sources, jit, stored, computed)`` gives, or load it.

    Letters of its result and arguments: v nothing, i an int64, f a float64, m rows of x's memory, r
    a row for sums, both as numba's C-contiguous arrays.
    """
    found = _ready.get((define, kind))
    if found is not None:
        return found
    stored, computed = _TYPES[kind]
    letter = {"v": types.void, "i": types.int64, "f": types.float64}
    letter["m"] = types.Array(from_dtype(np.dtype(stored)), 2, "C")
    letter["r"] = types.Array(from_dtype(np.dtype(computed)), 1, "C")
    result, *arguments = (letter[c] for c in letters)
    signature = result(*arguments)
    return _once(define, kind, lambda keep: compiled(signature_or_function=signature, cache=keep))


def shared(define: Callable[..., Any], kind: Any = "float32") -> Any:
    """Compile, or load, a C function (job, who), for threads to call at one time.

    A kind may be the pair of what the memory of x holds and what loops compute in. The function has
    ``address``, and ``ctypes`` to call it from Python without the interpreter's lock.
    """
    found = _ready.get((define, kind))
    if found is not None:
        return found
    signature = types.void(types.int64, types.int64)

    def compiler(keep: bool) -> Any:
        return numba.cfunc(signature, cache=keep, error_model="numpy")

    return _once(define, kind, compiler)
