"""The engine's C interface: structures as the C++ ones, functions with their types."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass

import numpy as np

from .build import HERE, engine_path

TYPES = {
    "char": ctypes.c_char, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32,
    "i32": ctypes.c_int32, "u64": ctypes.c_uint64, "i64": ctypes.c_int64,
    "Index3": ctypes.c_uint32 * 3,
}  # fmt: skip


def structure(name: str) -> type[ctypes.Structure]:
    """A C++ struct of plain fields, as the engine's text declares it."""
    text = "".join(path.read_text() for path in sorted(HERE.glob("*.hpp")))
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", text, re.M | re.S)[1]
    fields = []
    for declared in re.sub(r"//.*", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+\**) (.*)", declared, re.S).groups()
        for field, length in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            one = ctypes.c_void_p if "*" in kind else TYPES[kind]
            fields.append((field, one * int(length) if length else one))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Counters, Fault, LaunchRequest = map(structure, ("Counters", "Fault", "LaunchRequest"))
INSTRUCTION = np.dtype(structure("Instruction"))


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
