"""What numba lacks: pointers, vectors of 64 bytes, 16-bit floats, and squares turned in registers.

LLVM would vectorize a flagged scalar loop too, but in an order that changes with the CPU and its
version, with a scalar remainder of up to 63 elements, and in a scalar loop where x and y overlap.
Here the order of every sum is written down: sixteen float32 lanes everywhere, which are one AVX-512
register, two of AVX2, four of SSE or NEON.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import config, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from cupynorm._cpu.compiled import inner

_BYTES = 64  # of a vector, and of a cache line
_SIDE = 32  # bytes of a side of a square: a register of AVX2
_WORD, _SHORT, _LONG = ir.IntType(32), ir.IntType(16), ir.IntType(64)


def _has_instruction() -> bool:
    if config.CPU_NAME or config.CPU_FEATURES:  # code for another CPU than this one
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return True
    return bool(binding.get_host_cpu_features().get("f16c", False))


# LLVM's own conversion of float16 may be a call per element where the CPU has none.
F16C = _has_instruction()


# --- types --------------------------------------------------------------------------------------


class Narrow(types.Type):  # type: ignore[misc]
    """The address of 16-bit floats, which are read and written as float32, in registers."""

    dtype = types.float32

    def __init__(self, kind: str) -> None:
        self.bfloat16 = kind == "bfloat16"
        super().__init__(name=f"Narrow({kind})")


class Lanes(types.Type):  # type: ignore[misc]
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


@register_model(Narrow)
class _NarrowModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Narrow) -> None:
        super().__init__(manager, fe_type, _SHORT.as_pointer())


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Lanes) -> None:
        super().__init__(manager, fe_type, fe_type.vector)


def _many(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count) if count > 1 else kind


def _all(n: int, kind: Any) -> Any:
    return ir.Constant(kind, [n] * kind.count if isinstance(kind, ir.VectorType) else n)


def _itemsize(p: Any) -> int:
    return 2 if isinstance(p, Narrow) else int(p.dtype.bitwidth) // 8


def _stored(p: Any, lanes: Lanes) -> ir.VectorType:
    """The LLVM type of so many lanes in p's memory."""
    return ir.VectorType(_SHORT, lanes.count) if isinstance(p, Narrow) else lanes.vector


def _vector_at(builder: Any, vector: ir.VectorType, p: Any, i: Any) -> Any:
    return builder.bitcast(builder.gep(p, [i]), vector.as_pointer())


def _broadcast(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    none = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(none, scalar, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, none, _all(0, ir.VectorType(_WORD, vector.count)))


def _llvm(builder: Any, name: str, vector: ir.VectorType, result: Any, args: list[Any]) -> Any:
    """Call LLVM's own function of that name for vectors of this type."""
    letter = {_SHORT: "i16", ir.FloatType(): "f32", ir.DoubleType(): "f64"}[vector.element]
    full = f"llvm.{name}.v{vector.count}{letter}"
    full += ".p0" if name.startswith("masked") else ""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
    return builder.call(function, args)


def _mask(builder: Any, lanes: int, count: Any, last: bool = False) -> Any:
    """Mask of the first ``count`` lanes, or of the last."""
    index = ir.VectorType(_WORD, lanes)
    count = builder.sub(ir.Constant(_LONG, lanes), count) if last else count
    split = _broadcast(builder, builder.trunc(count, _WORD), index)
    return builder.icmp_signed(">=" if last else "<", ir.Constant(index, list(range(lanes))), split)


# --- 16-bit floats ------------------------------------------------------------------------------


def _wide(builder: Any, p: Any, bits: Any) -> Any:
    """16 bits, one or a vector of them, as float32; what p holds else stays as it is."""
    if not isinstance(p, Narrow):
        return bits
    count = getattr(bits.type, "count", 1)
    wide, words = _many(ir.FloatType(), count), _many(_WORD, count)
    if not p.bfloat16:
        return builder.fpext(builder.bitcast(bits, _many(ir.HalfType(), count)), wide)
    return builder.bitcast(builder.shl(builder.zext(bits, words), _all(16, words)), wide)


def _narrow(builder: Any, p: Any, value: Any) -> Any:
    """float32 as 16 bits, rounded to nearest, ties to even, where p holds such."""
    if not isinstance(p, Narrow):
        return value
    count = getattr(value.type, "count", 1)
    words, shorts = _many(_WORD, count), _many(_SHORT, count)
    if not p.bfloat16:
        return builder.bitcast(builder.fptrunc(value, _many(ir.HalfType(), count)), shorts)
    bits, up = builder.bitcast(value, words), _all(16, words)
    odd = builder.and_(builder.lshr(bits, up), _all(1, words))
    bits = builder.lshr(builder.add(builder.add(bits, _all(0x7FFF, words)), odd), up)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _all(0x7FC0, words), bits), shorts)


def _instruction(signature: Callable[..., Any]) -> Any:
    """Make an instruction of ``build(builder, kinds, args)``: numba's types, and the values.

    ``signature`` gives numba's from the types; its parameters are those of the instruction. Not by
    `intrinsic`, which looks through all that numba knows at each call: a tenth of a first call.
    """

    def made(build: Callable[..., Any]) -> Any:
        type_callable(build)(lambda context: signature)

        @lower_builtin(build, types.VarArg(types.Any))
        def lower(context, builder, signature, args):  # type: ignore[no-untyped-def]
            value = build(builder, signature.args, args)
            return context.get_dummy_value() if value is None else value

        return build

    return made


# --- pointers: a view of an array would be counted, with atomics, per row -----------------------


def _kind_of(name: str) -> Any:
    if name in ("float16", "bfloat16"):
        return Narrow(name)
    return types.CPointer(getattr(types, name))


@intrinsic(prefer_literal=True)
def at(typingctx, address, kind):  # type: ignore[no-untyped-def]
    """Take an integer for the address of elements of the dtype that a constant names.

    Or an array; 0 is that of an empty one.
    """
    if not isinstance(kind, types.Literal):
        return None
    is_array = isinstance(address, types.Array)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        result = context.get_value_type(signature.return_type)
        if not is_array:
            return builder.inttoptr(args[0], result)
        array = context.make_array(address)(context, builder, args[0])
        full = builder.icmp_signed("!=", array.nitems, ir.Constant(_LONG, 0))
        data = builder.bitcast(array.data, result)
        return builder.select(full, data, ir.Constant(result, None))

    given = address if is_array else types.int64
    return _kind_of(kind.literal_value)(given, kind), codegen


def record_at(dtype: Any) -> Any:
    """Make what takes an integer for the address of a record of this NumPy dtype, and a number."""
    from numba import from_dtype

    record = from_dtype(dtype)

    @intrinsic
    def at_record(typingctx, address, number):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64, types.int64), codegen

    return at_record


@intrinsic
def pointer(typingctx, x, i):  # type: ignore[no-untyped-def]
    """Address of x[i], of a contiguous x, counted in memory."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(x.dtype)(x, types.intp), codegen


@_instruction(lambda q, p: p(q, p))
def typed(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Take the pointer q for one to what p points to."""
    return builder.bitcast(args[0], args[1].type)


@_instruction(lambda p: (_kind_of("uint16") if isinstance(p, Narrow) else p)(p))
def raw(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Take a pointer to 16-bit floats for one to their bits; others stay as they are."""
    return args[0]


@_instruction(lambda p: types.int64(p))
def address(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Tell the integer that a pointer is."""
    return builder.ptrtoint(args[0], _LONG)


@_instruction(lambda p, i: p(p, types.intp))
def advance(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Move the pointer p by i elements."""
    return builder.gep(args[0], [args[1]])


@_instruction(lambda p, i: p.dtype(p, types.intp))
def item(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Read p[i]."""
    return _wide(builder, kinds[0], builder.load(builder.gep(args[0], [args[1]])))


@_instruction(lambda p, i, value: types.void(p, types.intp, p.dtype))
def put(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Write p[i]."""
    builder.store(_narrow(builder, kinds[0], args[2]), builder.gep(args[0], [args[1]]))


def _constant(number: Callable[[Any], int], builder: Any, kinds: Any, args: Any) -> Any:
    return ir.Constant(_LONG, number(kinds[0]))


def _constant_of(number: Callable[[Any], int]) -> Any:
    return _instruction(lambda p: types.intp(p))(functools.partial(_constant, number))


size_of = _constant_of(_itemsize)  # bytes from one element of p to the next
lanes = _constant_of(lambda p: Lanes(p.dtype).count)  # elements of p in one vector
square = _constant_of(lambda p: _SIDE // _itemsize(p))  # elements of p on a side of a square


@intrinsic
def like(typingctx, p, value):  # type: ignore[no-untyped-def]
    """Cast a scalar to the type of p's values."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.cast(builder, args[1], value, p.dtype)

    return p.dtype(p, value), codegen


# --- vectors ------------------------------------------------------------------------------------


@_instruction(lambda p, i: Lanes(p.dtype)(p, types.intp))
def load(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Read the vector that begins at p[i], at any alignment."""
    p = kinds[0]
    vector = _stored(p, Lanes(p.dtype))
    here = _vector_at(builder, vector, *args)
    return _wide(builder, p, builder.load(here, align=_itemsize(p), typ=vector))


@_instruction(lambda p, i, count, rest: rest(p, types.intp, types.intp, rest))
def load_first(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Read ``count`` lanes from p[i] on and touch no memory after; the others come from rest."""
    p, lanes = kinds[0], kinds[3]
    vector = _stored(p, lanes)
    here, mask = _vector_at(builder, vector, *args[:2]), _mask(builder, lanes.count, args[2])
    zeros = ir.Constant(vector, None)
    given = [here, ir.Constant(_WORD, _itemsize(p)), mask, zeros]
    found = _llvm(builder, "masked.load", vector, vector, given)
    return builder.select(mask, _wide(builder, p, found), args[3])


def _stores(p: Any, i: Any, v: Any) -> Any:
    return types.void(p, types.intp, v)


def _stores_some(p: Any, i: Any, count: Any, v: Any) -> Any:
    return types.void(p, types.intp, types.intp, v)


def _store(builder: Any, kinds: Any, args: Any, *, past: bool = False, last: bool = False) -> None:
    count, value = args[2:-1], _narrow(builder, kinds[0], args[-1])
    here, align = _vector_at(builder, value.type, *args[:2]), _itemsize(kinds[0])
    if count:
        mask = _mask(builder, value.type.count, count[0], last)
        some = [value, here, ir.Constant(_WORD, align), mask]
        _llvm(builder, "masked.store", value.type, ir.VoidType(), some)
    elif past and not isinstance(kinds[0], Narrow):  # 16-bit vectors are half a line
        one = builder.module.add_metadata([ir.Constant(_WORD, 1)])
        builder.store(value, here, align=_BYTES).set_metadata("nontemporal", one)
    else:
        builder.store(value, here, align=align)


# The vector v to p[i] and after; `store_past` past the caches, to a p[i] on a line of them. Of the
# others the first, or last, ``count`` lanes go there, each to its place, and nothing else does.
store = _instruction(_stores)(functools.partial(_store))
store_past = _instruction(_stores)(functools.partial(_store, past=True))
store_first = _instruction(_stores_some)(functools.partial(_store))
store_last = _instruction(_stores_some)(functools.partial(_store, last=True))


@_instruction(lambda p, value: Lanes(p.dtype)(p, p.dtype))
def splat(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Make a vector of p's lanes that all hold the scalar value."""
    return _broadcast(builder, args[1], Lanes(kinds[0].dtype).vector)


def _alike(a: Any, b: Any) -> Any:
    return a(a, b)


add = _instruction(_alike)(lambda builder, kinds, args: builder.fadd(*args))
sub = _instruction(_alike)(lambda builder, kinds, args: builder.fsub(*args))
mul = _instruction(_alike)(lambda builder, kinds, args: builder.fmul(*args))


@_instruction(lambda a, b, c: a(a, b, c))
def fma(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Compute a * b + c, rounded once: the same bits on every CPU, as no compiler chooses."""
    return _llvm(builder, "fma", kinds[0].vector, kinds[0].vector, list(args))


@_instruction(lambda v, count: v(v, types.int64))
def keep_last(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Keep the last ``count`` lanes of v, with zero in those before."""
    v = kinds[0]
    kept = _mask(builder, v.count, args[1], last=True)
    return builder.select(kept, args[0], ir.Constant(v.vector, None))


@_instruction(lambda v: v.dtype(v))
def fold(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Sum the lanes: halves are added until one lane is left."""
    part, count = args[0], kinds[0].count
    while count > 1:
        count //= 2
        index = ir.VectorType(_WORD, count)
        low, high = (
            builder.shuffle_vector(part, part, ir.Constant(index, list(range(k, k + count))))
            for k in (0, count)
        )
        part = builder.fadd(low, high)
    return builder.extract_element(part, ir.Constant(_WORD, 0))


# --- squares ------------------------------------------------------------------------------------


def _interleaved(builder: Any, a: Any, b: Any, start: int) -> Any:
    """The elements of a and b in turn, half of them, from ``start`` on."""
    side = a.type.count
    index = [i // 2 + start + side * (i % 2) for i in range(side)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, side), index))


@_instruction(lambda p, pitch, q, qp: types.void(p, types.intp, q, types.intp))
def _turn(builder, kinds, args):  # type: ignore[no-untyped-def]
    """Write a square at p to q, transposed; each has its elements from line to line."""
    align = _itemsize(kinds[0])
    vector = ir.VectorType(args[0].type.pointee, _SIDE // align)

    def line_at(base: Any, step: Any, line: int) -> Any:
        return _vector_at(builder, vector, base, builder.mul(step, ir.Constant(_LONG, line)))

    lines = [
        builder.load(line_at(args[0], args[1], k), align=align, typ=vector)
        for k in range(vector.count)
    ]
    half = vector.count // 2
    for _ in range(vector.count.bit_length() - 1):  # each doubles what stands together
        pairs = zip(lines[:half], lines[half:], strict=True)
        lines = [_interleaved(builder, a, b, start) for a, b in pairs for start in (0, half)]
    for k, line in enumerate(lines):
        builder.store(line, line_at(args[2], args[3], k), align=align)


@inner
def _turned(p, pitch, q, qp, rows, cols):  # type: ignore[no-untyped-def]
    """Copy columns at p, ``pitch`` apart, to rows at q, ``qp`` apart."""
    side = square(p)
    tall, wide = rows // side * side, cols // side * side
    if abs(qp) > abs(pitch):  # along the lines that lie farther apart, in caches and in pages
        for i in range(0, tall, side):
            for j in range(0, wide, side):
                _turn(advance(p, j * pitch + i), pitch, advance(q, i * qp + j), qp)
    else:
        for j in range(0, wide, side):
            for i in range(0, tall, side):
                _turn(advance(p, j * pitch + i), pitch, advance(q, i * qp + j), qp)
    for j in range(cols):
        for i in range(tall if j < wide else 0, rows):
            q[i * qp + j] = p[j * pitch + i]


@inner
def move(p, p_row, p_col, q, q_row, q_col, rows, cols):  # type: ignore[no-untyped-def]
    """Copy a table from p to q, which do not overlap; strides in elements."""
    if p_row == 1 and q_col == 1:
        _turned(p, p_col, q, q_row, rows, cols)
    elif p_col == 1 and q_row == 1:
        _turned(p, p_row, q, q_col, cols, rows)
    elif abs(p_row) + abs(q_row) < abs(p_col) + abs(q_col):
        for j in range(cols):
            for i in range(rows):
                q[i * q_row + j * q_col] = p[i * p_row + j * p_col]
    else:
        for i in range(rows):
            for j in range(cols):
                q[i * q_row + j * q_col] = p[i * p_row + j * p_col]
