"""Copies tables from one layout to another: squares of elements are turned in registers."""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from cupynorm._cpu.loops import compiled
from cupynorm._cpu.pointers import advance

__all__ = ["move", "square", "turn"]

_SIDE = 32  # bytes of a side of a square: a register of AVX2


def _side(p: Any) -> int:
    return _SIDE * 8 // int(p.dtype.bitwidth)


@intrinsic
def square(typingctx, p):  # type: ignore[no-untyped-def]
    """Elements of p on a side of a square."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.get_constant(types.intp, _side(p))

    return types.intp(p), codegen


def _interleaved(builder: Any, a: Any, b: Any, start: int) -> Any:
    """The elements of a and b in turn, half of them, from ``start`` on."""
    side = a.type.count
    index = [i // 2 + start + side * (i % 2) for i in range(side)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), side), index)
    return builder.shuffle_vector(a, b, mask)


_LANES = {16: ir.IntType(16), 32: ir.FloatType(), 64: ir.DoubleType()}


@intrinsic
def turn(typingctx, p, pitch, q, qp):  # type: ignore[no-untyped-def]
    """Write a square at p to q, transposed; each has its elements from line to line."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        side, align = _side(p), p.dtype.bitwidth // 8
        vector = ir.VectorType(_LANES[p.dtype.bitwidth], side)

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


@compiled()
def _turned(p, pitch, q, qp, rows, cols):  # type: ignore[no-untyped-def]
    """Copy columns at p, ``pitch`` apart, to rows at q, ``qp`` apart."""
    side = square(p)
    tall, wide = rows // side * side, cols // side * side
    for j in range(0, wide, side):
        for i in range(0, tall, side):
            turn(advance(p, j * pitch + i), pitch, advance(q, i * qp + j), qp)
    for j in range(cols):
        for i in range(tall if j < wide else 0, rows):
            q[i * qp + j] = p[j * pitch + i]


@compiled()
def move(p, p_row, p_col, q, q_row, q_col, rows, cols):  # type: ignore[no-untyped-def]
    """Copy a table from p to q, which do not overlap; strides in elements."""
    if p_row == 1 and q_col == 1:
        _turned(p, p_col, q, q_row, rows, cols)
    elif p_col == 1 and q_row == 1:
        _turned(p, p_row, q, q_col, cols, rows)
    elif p_col == 1 and q_col == 1:
        for i in range(rows):
            for j in range(cols):
                q[i * q_row + j] = p[i * p_row + j]
    elif abs(p_row) + abs(q_row) < abs(p_col) + abs(q_col):
        for j in range(cols):
            for i in range(rows):
                q[i * q_row + j * q_col] = p[i * p_row + j * p_col]
    else:
        for i in range(rows):
            for j in range(cols):
                q[i * q_row + j * q_col] = p[i * p_row + j * p_col]
