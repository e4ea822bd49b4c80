"""Pointers to 16-bit floats whose values numba's loops read and write as float32, in registers."""

import platform
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import config
from numba.core import types
from numba.extending import intrinsic, models, register_model

__all__ = ["F16C", "Narrow", "brain", "half", "narrowed", "widened"]


def _has_instruction() -> bool:
    if config.CPU_NAME or config.CPU_FEATURES:  # code for another CPU than this one
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return True
    return bool(binding.get_host_cpu_features().get("f16c", False))


# LLVM's own conversion of float16 may be a call per element where the CPU has none.
F16C = _has_instruction()
_WORD, _SHORT = ir.IntType(32), ir.IntType(16)


class Narrow(types.Type):
    """The address of 16-bit floats; their values are float32."""

    dtype = types.float32

    def __init__(self, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        super().__init__(name=f"Narrow({'bfloat16' if bfloat16 else 'float16'})")


@register_model(Narrow)
class _NarrowModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Narrow) -> None:
        super().__init__(manager, fe_type, _SHORT.as_pointer())


def _named(bfloat16: bool) -> Any:
    @intrinsic
    def name(typingctx, p):  # type: ignore[no-untyped-def]
        """Take a pointer to uint16 for one to the floats that they are."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return args[0]

        return Narrow(bfloat16)(p), codegen

    return name


half = _named(False)
brain = _named(True)


def _of(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count) if count > 1 else kind


def _all(n: int, kind: Any, count: int) -> Any:
    return ir.Constant(kind, [n] * count if count > 1 else n)


def widened(builder: Any, p: Narrow, address: Any, i: Any, count: int) -> Any:
    """Code that reads ``count`` values from p[i] on: a vector, or a number where count is 1."""
    here, wide = builder.gep(address, [i]), _of(ir.FloatType(), count)
    if not p.bfloat16:
        kind = _of(ir.HalfType(), count)
        source = builder.bitcast(here, kind.as_pointer())
        return builder.fpext(builder.load(source, align=2, typ=kind), wide)
    kind, words = _of(_SHORT, count), _of(_WORD, count)
    source = builder.bitcast(here, kind.as_pointer())
    bits = builder.zext(builder.load(source, align=2, typ=kind), words)
    return builder.bitcast(builder.shl(bits, _all(16, words, count)), wide)


def narrowed(builder: Any, p: Narrow, address: Any, i: Any, value: Any, count: int) -> None:
    """Code that writes them back to p[i] and after, rounded to nearest, ties to even."""
    here = builder.gep(address, [i])
    if not p.bfloat16:
        kind = _of(ir.HalfType(), count)
        target = builder.bitcast(here, kind.as_pointer())
        builder.store(builder.fptrunc(value, kind), target, align=2)
        return
    kind, words = _of(_SHORT, count), _of(_WORD, count)
    bits = builder.bitcast(value, words)
    one, most = _all(1, words, count), _all(0x7FFF, words, count)
    odd = builder.and_(builder.lshr(bits, _all(16, words, count)), one)
    bits = builder.lshr(builder.add(builder.add(bits, most), odd), _all(16, words, count))
    is_nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(is_nan, _all(0x7FC0, words, count), bits)
    target = builder.bitcast(here, kind.as_pointer())
    builder.store(builder.trunc(bits, kind), target, align=2)
