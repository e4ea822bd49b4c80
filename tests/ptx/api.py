"""The engine's C interface: structures as the C++ ones, functions with their types."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

from .build import engine_path

# `Instruction` of state.hpp.
INSTRUCTION = np.dtype([
    ("handler", "u2"),
    *((name, "u1") for name in ("negate", "space", "width", "count", "flags", "wide_base")),
    *((name, "i4") for name in ("guard", "target", "suspect", "base")),
    ("used", "u4"), ("unused", "u4"), ("offset", "i8"), ("dst", "i4", 8), ("src", "i4", 8),
])  # fmt: skip

_U64_COUNTERS = (
    "read_bytes", "written_bytes", "reads", "writes", "warp_reads", "warp_writes",
    "read_sectors", "write_sectors", "distinct_read_bytes", "distinct_written_bytes",
    "distinct_read_sectors", "distinct_write_sectors",
)  # fmt: skip


class Counters(ctypes.Structure):
    """`Counters` of memory.hpp."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _U64_COUNTERS),
        ("read_widths", ctypes.c_uint64 * 6),
        ("write_widths", ctypes.c_uint64 * 6),
        *((name, ctypes.c_uint64) for name in ("wavefronts", "minimal_wavefronts", "max_ways")),
    ]


class Fault(ctypes.Structure):
    """`Fault` of state.hpp."""

    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 3072),
        ("has_thread", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("pc", ctypes.c_int32),
    ]


class LaunchRequest(ctypes.Structure):
    """`LaunchRequest` of state.hpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("program", "constants", "suspects", "parameters", "gaps")
        ),
        *(
            (name, ctypes.c_uint32)
            for name in ("instructions", "register_bytes", "predicates", "suspect_count",
                         "gap_count", "shared_granule_shift")
        ),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        *(
            (name, ctypes.c_uint32)
            for name in ("cluster", "shared_bytes", "shuffled", "apart", "early", "count")
        ),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
    ]  # fmt: skip


@functools.cache
def api() -> ctypes.CDLL:
    """The loaded engine with typed functions; a region is an address."""
    library = ctypes.CDLL(str(engine_path()))
    pointer, u64, u32, flag = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    text = ctypes.POINTER(ctypes.c_char_p)
    for name, result, arguments in (
        ("ptx_handler", u32, (u32, text, text)),
        ("ptx_special_registers", ctypes.c_char_p, ()),
        ("ptx_instruction_bytes", u32, ()),
        ("ptx_region_new", pointer, (u64, u64, u32, ctypes.c_char_p)),
        ("ptx_region_free", None, (pointer,)),
        ("ptx_region_base", u64, (pointer,)),
        ("ptx_region_define", None, (pointer, u64, u64)),
        ("ptx_region_defined", pointer, (pointer,)),
        ("ptx_region_set", None, (pointer, flag, flag)),
        ("ptx_shared_region", pointer, ()),
        ("ptx_remote_region", pointer, ()),
        ("ptx_launch", flag, (ctypes.POINTER(LaunchRequest), ctypes.POINTER(Fault))),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.ptx_instruction_bytes() == INSTRUCTION.itemsize
    library.ptx_handler(2**32 - 1, None, None)  # fills the table: a program may come from the disk
    return library


@dataclass(frozen=True)
class Handler:
    """What runs an instruction of that name: its number, and its operands' letters."""

    number: int
    operands: str


@functools.cache
def handlers() -> dict[str, Handler]:
    """By name: every instruction that the engine executes."""
    name, operands = ctypes.c_char_p(), ctypes.c_char_p()
    count = api().ptx_handler(2**32 - 1, name, operands)
    found = {}
    for number in range(count):
        api().ptx_handler(number, name, operands)
        found.setdefault(name.value.decode(), Handler(number, operands.value.decode()))
    return found


@functools.cache
def special_registers() -> list[str]:
    """In the engine's order."""
    return api().ptx_special_registers().decode().split()
