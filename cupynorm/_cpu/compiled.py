"""Compiles the loops once: kept on disk, and compiled again when a file of theirs changes."""

import functools
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Flags, compile_extra
from numba.core.registry import cpu_target
from numba.extending import lower_builtin, type_callable

# Compiled functions by what defines them and for which dtype; loaded code, no call's settings.
_ready: dict[tuple[Any, ...], Any] = {}


class _Piece(JITCodeLibrary):  # type: ignore[misc]
    """Code of an inner function, which is optimized and made for the machine in a job alone.

    numba would do both with every function and all that it calls: three times the work for a job.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


def inner(function: Callable[..., Any], forceinline: bool = False) -> Any:
    """Compile for use inside other loops. Without fastmath: no sum is reordered, no fma fused.

    `forceinline`: where a call, which LLVM leaves of a long function, passes vectors by memory.
    """
    if function.__closure__:
        # Code of one name and one number, which counts what a process has compiled before, is
        # taken for the same where two kept files are loaded: each closure has a name of its own.
        cells = [cell.cell_contents for cell in function.__closure__]
        told = repr([getattr(value, "__qualname__", value) for value in cells])
        function.__qualname__ += f"_{zlib.crc32(told.encode()):08x}"
    flags = Flags()
    flags.error_model, flags.nrt, flags.forceinline = "numpy", True, forceinline
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True

    @functools.cache
    def compiled(*kinds: Any) -> Any:
        piece = _Piece(cpu_target.target_context.codegen(), function.__qualname__)
        contexts = cpu_target.typing_context, cpu_target.target_context
        return compile_extra(*contexts, function, kinds, None, flags, {}, piece)

    @type_callable(function)
    def type_inner(context):  # type: ignore[no-untyped-def]
        return functools.wraps(function)(lambda *kinds: compiled(*kinds).signature)

    @lower_builtin(function, types.VarArg(types.Any))
    def lower(context, builder, signature, args):  # type: ignore[no-untyped-def]
        made = compiled(*signature.args)
        context.add_linking_libs([made.library])
        return context.call_internal(builder, made.fndesc, signature, args)

    return function


@functools.cache
def checksum() -> int:
    """Checksum of the files that compiled functions are made of: those that import this one.

    Each job closes over it, because numba's cache looks at the time stamp of one file alone, and
    at the values of such variables: a change of the files below must not go unseen.
    """
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    name = b"from cupynorm._cpu.compiled import"
    return zlib.crc32(b"".join(text for text in texts if name in text)) | 1


def job(define: Callable[..., Any]) -> Callable[..., Any]:
    """Make what Python calls: for a dtype compiled, or loaded, when it is first asked for.

    ``define(checksum, kind, *more)`` gives a function of integers, or its signature and itself.
    Where numba finds no folder to keep code in, or a full one, it is compiled all the same.
    """

    @functools.wraps(define)
    def ready(*which: Any) -> Any:
        found = _ready.get((define, *which))
        if found is None:
            try:
                found = _compile(define, which, checksum(), True)
            except (RuntimeError, OSError):
                found = _compile(define, which, 1, False)
            _ready[define, *which] = found
        return found

    return ready


def _compile(define: Callable[..., Any], which: Any, number: int, keep: bool) -> Any:
    made = define(number, *which)
    signature, function = made if isinstance(made, tuple) else (None, made)
    # A file of the cache for each: numba's index of a file is read, changed and written without a
    # lock, and two processes could give one dtype the code of another.
    function.__qualname__ = "_".join(map(str, (define.__name__, *which)))
    signature = signature or types.void(*[types.int64] * function.__code__.co_argcount)
    made = numba.njit(signature, nogil=True, error_model="numpy", cache=keep)
    try:
        found = made(function).overloads
    except (EOFError, pickle.UnpicklingError):  # a kept file is cut off: it is made again
        FunctionCache(function).flush()
        found = made(function).overloads
    # The entry of the one signature: what chooses among several costs 0.2 us a call.
    return next(iter(found.values())).entry_point
