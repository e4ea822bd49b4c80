"""Vectors of 64 bytes for numba loops: the order of every sum is written down, not left to LLVM."""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic, models, register_model

from cupynorm._cpu.narrow import Narrow, narrowed, widened

__all__ = [
    "Lanes",
    "add",
    "fma",
    "fold",
    "keep_last",
    "lanes",
    "load",
    "load_first",
    "mul",
    "splat",
    "store",
    "store_first",
    "store_past",
    "sub",
]

# LLVM would vectorize a flagged scalar loop too, but in an order that changes with the CPU and its
# version, with a scalar remainder of up to 63 elements, and in a scalar loop where x and y overlap.
# Sixteen float32 lanes everywhere: one AVX-512 register, two of AVX2, four of SSE or NEON.
_BYTES = 64


class Lanes(types.Type):
    """A vector of 64 bytes of one floating type."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.count = _BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype}x{self.count})")

    @property
    def vector(self) -> ir.VectorType:
        """The LLVM type."""
        lane = ir.FloatType() if self.dtype.bitwidth == 32 else ir.DoubleType()
        return ir.VectorType(lane, self.count)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Lanes) -> None:
        super().__init__(manager, fe_type, fe_type.vector)


def _vector_at(builder: Any, vector: ir.VectorType, p: Any, i: Any) -> Any:
    return builder.bitcast(builder.gep(p, [i]), vector.as_pointer())


def _constant(vector: ir.VectorType, values: Any) -> ir.Constant:
    return ir.Constant(vector, list(values))


def _broadcast(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    first = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), first)


@intrinsic
def lanes(typingctx, p):  # type: ignore[no-untyped-def]
    """Elements of p in one vector."""
    count = Lanes(p.dtype).count

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, count)

    return types.intp(p), codegen


@intrinsic
def load(typingctx, p, i):  # type: ignore[no-untyped-def]
    """Read the vector that begins at p[i], at any alignment."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = signature.return_type.vector
        if isinstance(p, Narrow):
            return widened(builder, p, args[0], args[1], vector.count)
        address = _vector_at(builder, vector, *args)
        return builder.load(address, align=p.dtype.bitwidth // 8, typ=vector)

    return Lanes(p.dtype)(p, types.intp), codegen


@intrinsic
def store(typingctx, p, i, v):  # type: ignore[no-untyped-def]
    """Write the vector v to p[i] and after."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if isinstance(p, Narrow):
            narrowed(builder, p, args[0], args[1], args[2], v.count)
            return context.get_dummy_value()
        address = _vector_at(builder, v.vector, args[0], args[1])
        builder.store(args[2], address, align=p.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(p, types.intp, v), codegen


@intrinsic
def store_past(typingctx, p, i, v):  # type: ignore[no-untyped-def]
    """Write the vector v to p[i], which is on a cache line, past the caches."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if isinstance(p, Narrow):  # whose vectors are half a line
            narrowed(builder, p, args[0], args[1], args[2], v.count)
            return context.get_dummy_value()
        address = _vector_at(builder, v.vector, args[0], args[1])
        written = builder.store(args[2], address, align=_BYTES)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(p, types.intp, v), codegen


def _llvm(builder: Any, name: str, vector: ir.VectorType, result: Any, args: list[Any]) -> Any:
    """Call LLVM's own function of that name for vectors of this type."""
    full = f"llvm.{name}.v{vector.count}f{64 if vector.count == 8 else 32}"
    full += ".p0" if name.startswith("masked") else ""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, args)


def _first(builder: Any, vector: ir.VectorType, count: Any) -> Any:
    index = ir.VectorType(ir.IntType(32), vector.count)
    count = builder.trunc(count, ir.IntType(32))
    return builder.icmp_signed(
        "<", _constant(index, range(vector.count)), _broadcast(builder, count, index)
    )


@intrinsic
def load_first(typingctx, p, i, count, rest):  # type: ignore[no-untyped-def]
    """Read ``count`` lanes from p[i] on and touch no memory after; the others come from rest."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = rest.vector
        address, mask = _vector_at(builder, vector, *args[:2]), _first(builder, vector, args[2])
        align = ir.Constant(ir.IntType(32), p.dtype.bitwidth // 8)
        return _llvm(builder, "masked.load", vector, vector, [address, align, mask, args[3]])

    return rest(p, types.intp, types.intp, rest), codegen


@intrinsic
def store_first(typingctx, p, i, count, v):  # type: ignore[no-untyped-def]
    """Write the first ``count`` lanes of v to p[i] and after, and nothing else."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = v.vector
        address, mask = _vector_at(builder, vector, *args[:2]), _first(builder, vector, args[2])
        align = ir.Constant(ir.IntType(32), p.dtype.bitwidth // 8)
        _llvm(builder, "masked.store", vector, ir.VoidType(), [args[3], address, align, mask])
        return context.get_dummy_value()

    return types.void(p, types.intp, types.intp, v), codegen


@intrinsic
def splat(typingctx, p, value):  # type: ignore[no-untyped-def]
    """Make a vector of p's lanes that all hold the scalar value."""
    result = Lanes(p.dtype)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _broadcast(builder, args[1], result.vector)

    return result(p, p.dtype), codegen


def _binary(operation: str) -> Any:
    @intrinsic
    def lanewise(typingctx, a, b):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return getattr(builder, operation)(*args)

        return a(a, b), codegen

    return lanewise


add = _binary("fadd")
sub = _binary("fsub")
mul = _binary("fmul")


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """Compute a * b + c, rounded once: the same bits on every CPU, as no compiler chooses."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _llvm(builder, "fma", a.vector, a.vector, list(args))

    return a(a, b, c), codegen


@intrinsic
def keep_last(typingctx, v, count):  # type: ignore[no-untyped-def]
    """Keep the last ``count`` lanes of v, with zero in those before."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        index = ir.VectorType(ir.IntType(64), v.count)
        first = builder.sub(ir.Constant(ir.IntType(64), v.count), args[1])
        kept = builder.icmp_signed(
            ">=", _constant(index, range(v.count)), _broadcast(builder, first, index)
        )
        return builder.select(kept, args[0], ir.Constant(v.vector, None))

    return v(v, types.int64), codegen


@intrinsic
def fold(typingctx, v):  # type: ignore[no-untyped-def]
    """Sum the lanes: halves are added until one lane is left."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        part, count = args[0], v.count
        while count > 1:
            count //= 2
            index = ir.VectorType(ir.IntType(32), count)
            low = builder.shuffle_vector(part, part, _constant(index, range(count)))
            high = builder.shuffle_vector(part, part, _constant(index, range(count, 2 * count)))
            part = builder.fadd(low, high)
        return builder.extract_element(part, ir.Constant(ir.IntType(32), 0))

    return v.dtype(v), codegen
