"""What loops over columns need of LLVM: calls by address, and square tiles turned in registers."""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

__all__ = ["address", "call", "fence", "square", "stream", "turn"]

_SQUARE = 32  # bytes of a side of a tile: a register of AVX2


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
def address(typingctx, p):  # type: ignore[no-untyped-def]
    """Tell the integer that a pointer is."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(p), codegen


def _side(p: Any) -> int:
    return _SQUARE * 8 // int(p.dtype.bitwidth)


@intrinsic
def square(typingctx, p):  # type: ignore[no-untyped-def]
    """Elements of p on a side of a tile."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, _side(p))

    return types.intp(p), codegen


def _interleaved(builder: Any, a: Any, b: Any, start: int) -> Any:
    """The elements of a and b in turn, half of them, from ``start`` on."""
    side = a.type.count
    index = [i // 2 + start + side * (i % 2) for i in range(side)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), side), index)
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def turn(typingctx, p, pitch, q, qp):  # type: ignore[no-untyped-def]
    """Write a square tile at p to q, transposed; each has its elements from line to line."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        side, align = _side(p), p.dtype.bitwidth // 8
        lane = ir.FloatType() if align == 4 else ir.DoubleType()
        vector = ir.VectorType(lane, side)

        def at(base: Any, step: Any, line: int) -> Any:
            far = builder.mul(step, ir.Constant(step.type, line))
            return builder.bitcast(builder.gep(base, [far]), vector.as_pointer())

        lines = [
            builder.load(at(args[0], args[1], k), align=align, typ=vector) for k in range(side)
        ]
        half = side // 2
        for _ in range(side.bit_length() - 1):  # log2: each doubles what stands together
            pairs = zip(lines[:half], lines[half:], strict=True)
            lines = [_interleaved(builder, a, b, start) for a, b in pairs for start in (0, half)]
        for k, line in enumerate(lines):
            builder.store(line, at(args[2], args[3], k), align=align)
        return context.get_dummy_value()

    return types.void(p, types.intp, q, types.intp), codegen


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
