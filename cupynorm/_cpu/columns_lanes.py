"""What loops over columns need of LLVM: calls by address, and writes past the caches."""

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

__all__ = ["call", "fence", "stream"]


@intrinsic
def call(typingctx, function, x, stride, n, out):  # type: ignore[no-untyped-def]
    """Call the loader at an address."""
    word = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [word] * 4).as_pointer()

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def stream(typingctx, p, i, v):  # type: ignore[no-untyped-def]
    """Write the vector v to p[i] and after, aligned to its 64 bytes, past the caches."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        here = builder.bitcast(builder.gep(args[0], [args[1]]), v.vector.as_pointer())
        written = builder.store(args[2], here, align=64)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(p, types.intp, v), codegen


@intrinsic
def fence(typingctx):  # type: ignore[no-untyped-def]
    """Let all that was written, past the caches too, be seen before what comes after."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
