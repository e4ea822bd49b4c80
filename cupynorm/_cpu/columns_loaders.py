"""Compiled readers of one column: a piece of it, of any dtype, into the dtype of statistics."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, types

from cupynorm._cpu.bits import take
from cupynorm._cpu.kept import sources
from cupynorm._cpu.loops import compiled
from cupynorm._cpu.pointers import at, like

__all__ = ["loader"]

_STORED = {"bool": np.uint8, "float16": np.uint16, "bfloat16": np.uint16}
_ready: dict[tuple[str, str], Any] = {}


def _define_plain(sources: int, stored: Any, computed: Any, is_bool: bool) -> Callable[..., None]:
    size = np.dtype(stored).itemsize

    def load(x, stride, n, out):  # type: ignore[no-untyped-def]
        p, q = at(x, stored), at(out, computed)
        step = stride // (size * (sources != 0))
        if is_bool:
            for i in range(n):
                q[i] = like(q, p[i * step] != 0)
        elif step == 1:
            for i in range(n):
                q[i] = like(q, p[i])
        else:
            for i in range(n):
                q[i] = like(q, p[i * step])

    return load


@compiled()
def _widened(values, step, n, q, room, bfloat16):  # type: ignore[no-untyped-def]
    # The room is an argument because numba frees an array after its last use, pointers or not.
    rows, cols = (1, n) if step == 1 else (n, 1)
    p, _ = take(values, 0, step, rows, cols, room, bfloat16)
    for i in range(n):
        q[i] = like(q, p[i])


def _define_half(sources: int, computed: Any, bfloat16: bool) -> Callable[..., None]:
    def load(x, stride, n, out):  # type: ignore[no-untyped-def]
        room = np.empty(n * (sources != 0), np.float32)
        values, q = carray(at(x, np.uint16), (n,)), at(out, computed)
        # As one row of n, or, where they lie apart, as n rows of one.
        _widened(values, stride // 2, n, q, room, bfloat16)

    return load


def loader(kind: str, computed: str) -> int:
    """Address of the function that reads a piece of a column of a dtype into one of `computed`.

    It is compiled when it is first asked for, and kept on disk if possible.
    """
    key = kind, computed
    if key not in _ready:
        signature = types.void(*[types.int64] * 4)

        def define(sources: int) -> Callable[..., None]:
            to = np.dtype(computed).type
            if kind in ("float16", "bfloat16"):
                return _define_half(sources, to, kind == "bfloat16")
            stored = _STORED.get(kind, np.dtype(kind).type)
            return _define_plain(sources, stored, to, kind == "bool")

        try:
            _ready[key] = cfunc(signature, cache=True, error_model="numpy")(define(sources()))
        except (RuntimeError, OSError):  # no directory to keep compiled code in, or it is full
            _ready[key] = cfunc(signature, error_model="numpy")(define(1))
    return int(_ready[key].address)
