"""Compiled loops over rows at raw addresses: an integer costs a call a quarter of an array."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from cupynorm import _cpu_numba
from cupynorm._cpu_lanes import claim
from cupynorm._cpu_loops import CHUNK, GROUP, compiled
from cupynorm._cpu_rows import long_rows, short_rows

__all__ = ["rows_fwd"]

# What the memory of x holds and what loops compute in; the 16-bit kinds share their code.
_TYPES = {
    "float16": (np.uint16, np.float32),
    "bfloat16": (np.uint16, np.float32),
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
}
_I, _F = types.int64, types.float64
_ready: dict[Any, Callable[..., None]] = {}


@intrinsic
def _at(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """Take an integer for the address of elements of dtype."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(address, dtype), codegen


@compiled()
def _seen(address, size, dtype):  # type: ignore[no-untyped-def]
    """View the elements at an address as a row, or an empty one where the address is 0."""
    return carray(_at(address, dtype), (size if address else 0,))


def _rows_fwd(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    """Define the forward for one pair of types; ``sources`` as in ``_cpu_numba``."""

    @jit
    def rows(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16, counter, count):  # type: ignore[no-untyped-def]
        # As _cpu_numba's entry does: with a count, this thread does the blocks that it claims.
        x_row, y_row = _seen(x, M * N, stored), _seen(y, M * N, stored)
        w_row, b_row = _seen(w, N, computed), _seen(b, N, computed)
        means, rstds = _seen(mean, M, computed), _seen(rstd, M, computed)
        tickets = _seen(counter, 1, np.int64)
        half = bfloat16 != 0
        group = max(1, min(M, GROUP // N))
        scratch = np.empty(min(CHUNK, group * N) * (sources != 0), np.float32)
        stats = np.empty((3, group))
        parts = np.empty(((N + CHUNK - 1) // CHUNK, 3))
        block, blocks = 0, 1
        if count > 0:
            block, blocks = claim(tickets), count
        while block < blocks:
            lo, hi = M * block // blocks, M * (block + 1) // blocks
            if N <= CHUNK:
                short_rows(
                    x_row,
                    N,
                    y_row,
                    N,
                    lo,
                    hi,
                    N,
                    w_row,
                    b_row,
                    eps,
                    low,
                    high,
                    means,
                    rstds,
                    half,
                    scratch,
                    stats,
                )
            else:
                long_rows(
                    x_row,
                    N,
                    y_row,
                    N,
                    lo,
                    hi,
                    N,
                    w_row,
                    b_row,
                    eps,
                    low,
                    high,
                    means,
                    rstds,
                    half,
                    scratch,
                    parts,
                )
            block = claim(tickets) if count > 0 else 1

    return rows  # type: ignore[no-any-return]


_FWD = types.void(_I, _I, _I, _I, _I, _I, _F, _F, _F, _I, _I, _I, _I, _I)


def _built(define: Callable[..., Callable[..., None]], signature: Any, kind: str) -> Any:
    """Compile for a kind, or load what an earlier process kept."""
    stored, computed = _TYPES[kind]
    key = define, stored
    if key not in _ready:
        try:
            jit = compiled(signature_or_function=signature, cache=True)
            _ready[key] = define(_cpu_numba._sources(), jit, stored, computed)
        except (RuntimeError, OSError):  # no directory to keep compiled code in, or it is full
            jit = compiled(signature_or_function=signature)
            _ready[key] = define(1, jit, stored, computed)
    return _ready[key]


def rows_fwd(kind: str) -> Callable[..., None]:
    """Forward over contiguous rows, all arguments numbers; its first call per kind compiles.

    ``rows(x, y, M, N, w, b, eps, low, high, mean, rstd, bfloat16, counter, count)``: addresses
    of what is absent are 0; ``count`` 0 does all rows, else those blocks of ``count`` that the
    calls with one ``counter`` claim among them.
    """
    return _built(_rows_fwd, _FWD, kind)  # type: ignore[no-any-return]
