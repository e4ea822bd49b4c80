"""Pointers in numba's loops: a view of an array would be counted, with atomics, per row."""

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from cupynorm._cpu.narrow import Narrow, narrowed, widened

__all__ = [
    "address",
    "advance",
    "at",
    "claim",
    "item",
    "like",
    "pointer",
    "put",
    "size_of",
]


@intrinsic
def pointer(typingctx, x, i):  # type: ignore[no-untyped-def]
    """Address of x[i], of a contiguous 1-D x. A view would be counted, with atomics, per row."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(x.dtype)(x, types.intp), codegen  # type: ignore[attr-defined]


@intrinsic
def at(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """Take an integer for the address of elements of dtype."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(address, dtype), codegen  # type: ignore[attr-defined]


@intrinsic
def address(typingctx, p):  # type: ignore[no-untyped-def]
    """Tell the integer that a pointer is."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(p), codegen


@intrinsic
def advance(typingctx, p, i):  # type: ignore[no-untyped-def]
    """Move the pointer p by i elements."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), codegen


@intrinsic
def item(typingctx, p, i):  # type: ignore[no-untyped-def]
    """Read p[i]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if isinstance(p, Narrow):
            return widened(builder, p, args[0], args[1], 1)
        return builder.load(builder.gep(args[0], [args[1]]))

    return p.dtype(p, types.intp), codegen


@intrinsic
def put(typingctx, p, i, value):  # type: ignore[no-untyped-def]
    """Write p[i]."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if isinstance(p, Narrow):
            narrowed(builder, p, args[0], args[1], args[2], 1)
        else:
            builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, p.dtype), codegen


@intrinsic
def size_of(typingctx, p):  # type: ignore[no-untyped-def]
    """Bytes from one element of p to the next."""
    size = 2 if isinstance(p, Narrow) else p.dtype.bitwidth // 8

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, size)

    return types.intp(p), codegen


@intrinsic
def like(typingctx, p, value):  # type: ignore[no-untyped-def]
    """Cast a scalar to the type that p points to."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.cast(builder, args[1], value, p.dtype)

    return p.dtype(p, value), codegen


@intrinsic
def claim(typingctx, counter):  # type: ignore[no-untyped-def]
    """Add one to counter[0], whoever else does so now, and give what it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen
