"""Words of memory by which threads speak in compiled code: atomics, Linux' futex, CPUs."""

import platform
import sys
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

__all__ = [
    "FUTEX",
    "GET_CPUS",
    "PROCESS",
    "SET_CPUS",
    "SLEEP",
    "THREAD",
    "WAKE",
    "add_to",
    "and_with",
    "cpu",
    "invoke",
    "pause",
    "read",
    "swap",
    "system",
]

# Numbers of the system calls futex, sched_getaffinity, sched_setaffinity, getpid and gettid; LLVM's
# name and argument for the instruction by which a loop says that it only waits.
_MACHINES = {
    "x86_64": (202, 204, 203, 39, 186, "llvm.x86.sse2.pause", ()),
    "aarch64": (98, 123, 122, 172, 178, "llvm.aarch64.hint", (1,)),
}
_HERE = platform.machine() if sys.platform == "linux" and sys.maxsize > 1 << 32 else ""
_NUMBERS = _MACHINES.get(_HERE, (0, 0, 0, 0, 0, "", ()))
FUTEX = _NUMBERS[0]  # 0 where there is none
GET_CPUS = _NUMBERS[1]
SET_CPUS = _NUMBERS[2]
PROCESS = _NUMBERS[3]
THREAD = _NUMBERS[4]
SLEEP = 128  # FUTEX_WAIT within one process
WAKE = 129  # FUTEX_WAKE within one process


def _atomic(operation: str) -> Any:
    @intrinsic
    def update(typingctx, address, value):  # type: ignore[no-untyped-def]
        """Change the int32 at an address at once, whoever else does so now; give what it was."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            word = ir.IntType(32)
            here = builder.inttoptr(args[0], word.as_pointer())
            old = builder.atomic_rmw(operation, here, builder.trunc(args[1], word), "seq_cst")
            return builder.sext(old, ir.IntType(64))

        return types.int64(types.int64, types.int64), codegen

    return update


add_to = _atomic("add")
and_with = _atomic("and")


@intrinsic
def read(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        here = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load_atomic(here, "seq_cst", 4), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def swap(typingctx, address, old, new):  # type: ignore[no-untyped-def]
    """Put new where old is; tell whether it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = ir.IntType(32)
        here = builder.inttoptr(args[0], word.as_pointer())
        old, new = (builder.trunc(a, word) for a in args[1:])
        done = builder.cmpxchg(here, old, new, "seq_cst", "seq_cst")
        return builder.extract_value(done, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call a function of the C library, which the process has loaded; -1 where none is needed."""
    if not FUTEX:  # another system, whose library may have no such function: nothing would link
        return ir.Constant(result, -1)
    kind = ir.FunctionType(result, [a.type for a in args[:1]], var_arg=len(args) > 1)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args)


@intrinsic
def system(typingctx, number, a, b, c):  # type: ignore[no-untyped-def]
    """Make a system call."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        none = ir.Constant(ir.IntType(64), 0)
        return _call(builder, "syscall", ir.IntType(64), [*args, none, none, none])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def cpu(typingctx):  # type: ignore[no-untyped-def]
    """Tell on which CPU this thread runs."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.sext(_call(builder, "sched_getcpu", ir.IntType(32), []), ir.IntType(64))

    return types.int64(), codegen


@intrinsic
def pause(typingctx):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name, hint = _NUMBERS[5:]
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [word] * len(hint))
        if name:
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [ir.Constant(word, n) for n in hint])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def invoke(typingctx, function, record, who):  # type: ignore[no-untyped-def]
    """Call a C function of two int64 by its address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 2)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
