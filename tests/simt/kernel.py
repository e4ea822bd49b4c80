"""A compiled entry, loaded: its parameters, its static shared memory, its lines."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .api import Fault, api
from .buffer import Buffer
from .build import CompileError, kernel_paths, source_lines
from .fault import SimtFault

_LETTERS = {"i": "integer", "p": "pointer", "f": "floating-point number", "s": "struct"}


class Kernel:
    """One entry of one text."""

    def __init__(self, source: str, entry: str) -> None:
        self.entry = entry
        try:
            self.path, self._text = kernel_paths(source, entry)
        except CompileError as error:
            raise SimtFault("compile", f"{entry}: {error}") from None
        self._lines = source.splitlines()
        self._library = library = ctypes.CDLL(str(self.path))
        self.address = ctypes.cast(library.simt_call, ctypes.c_void_p).value or 0
        out = (ctypes.c_int * 512)()
        count = library.simt_signature(out)
        self.signature = [(chr(out[2 * i]), out[2 * i + 1]) for i in range(count)]
        library.simt_static_shared.restype = ctypes.c_void_p
        low, high = (library.simt_static_shared(stop) or 0 for stop in (0, 1))
        self.static_bytes = high - low
        self.static_region = None
        if self.static_bytes:
            self.static_region = api().simt_static_shared_new(low, self.static_bytes)
        self.mapped_range = _mapped_range(self.path)
        # Literal bounds only: the text may hold an expression, which only its compiler can tell.
        bounds = re.findall(
            rf"__global__[^;{{}}]*?__launch_bounds__\(\s*(\d+)[^;{{}}]*?\b{entry}\s*\(", source
        )
        self.launch_bounds = int(bounds[-1]) if bounds else None
        clusters = re.findall(
            rf"__global__[^;{{}}]*?__cluster_dims__\(([^()]*)\)[^;{{}}]*?\b{entry}\s*\(", source
        )
        # Blocks of a cluster along x, y and z.
        dims = [int(n) for n in clusters[-1].split(",")] if clusters else []
        self.cluster = (*dims, 1, 1, 1)[:3]

    def pack(self, args: Sequence[Any]) -> list[ctypes.Array[ctypes.c_char]]:
        """Bytes of each argument, checked against the entry's own parameter types."""
        if len(args) != len(self.signature):
            msg = f"{self.entry} takes {len(self.signature)} arguments, got {len(args)}"
            raise SimtFault("argument", msg)
        packed = []
        for i, (arg, (letter, size)) in enumerate(zip(args, self.signature, strict=True)):
            raw, letters = _bytes_of(arg)
            if letter not in letters or len(raw) != size:
                msg = (
                    f"parameter {i} of {self.entry} is a {size}-byte {_LETTERS[letter]}, but the "
                    f"launch passes {arg!r}, a {type(arg).__name__} of {len(raw)} bytes"
                )
                raise SimtFault("argument", msg)
            packed.append(ctypes.create_string_buffer(raw, len(raw)))
        return packed

    def describe(self, offsets: Sequence[int]) -> list[list[tuple[str, int]]]:
        """For each code offset, the calls that lead there as (`line 12: its text`, 12).

        The innermost comes first, inlined calls included; at least one, with line 0 if unknown.
        """
        out = []
        for lines in source_lines(self.path, list(offsets), self._text):
            known = [n for n in lines if 0 < n <= len(self._lines)]
            calls = [(f"line {n}: {self._lines[n - 1].strip()}", n) for n in known]
            out.append(calls or [("an unknown line", 0)])
        return out

    def exception(self, fault: Fault) -> SimtFault:
        """The runtime's report with source lines for code offsets."""
        message = fault.message.decode()
        tokens = sorted(set(re.findall(r"@\{([0-9a-f]+)\}", message)))
        frames = list(fault.pcs[: fault.depth])
        calls = self.describe([*(int(t, 16) for t in tokens), *frames])
        for token, own in zip(tokens, calls, strict=False):
            message = message.replace(f"@{{{token}}}", own[0][0])
        stack = [call for group in calls[len(tokens) :] for call in group if call[1]]
        where = self.entry
        if fault.has_thread:
            where = f"block {tuple(fault.block)}, thread {tuple(fault.thread)} of {self.entry}"
        message += f"\n  in {where}"
        for i, (text, _) in enumerate(stack):
            message += f"\n  {'called from' if i else 'at'} {text}"
        return SimtFault(fault.kind.decode(), message, stack[0][1] if stack else 0)


def _bytes_of(arg: Any) -> tuple[bytes, str]:
    """What CuPy passes for an argument, and the letters of the parameters that may take it."""
    if isinstance(arg, Buffer):
        return arg.ptr.to_bytes(8, "little"), "pi"
    if isinstance(arg, (bool, np.bool_)):
        return bytes([arg]), "i"
    if isinstance(arg, int):
        return (arg & (2**64 - 1)).to_bytes(8, "little"), "pi"
    if isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.size == 1):
        kind = arg.dtype.kind
        return arg.tobytes(), "f" if kind == "f" else "pi" if kind in "iu" else "s"
    if isinstance(arg, float):
        return np.float64(arg).tobytes(), "f"
    msg = f"Unsupported type {type(arg)}"  # as CuPy has it
    raise TypeError(msg)


def _mapped_range(path: Path) -> tuple[int, int]:
    """Lowest and highest address at which the library is mapped."""
    rows = [row.split() for row in Path("/proc/self/maps").read_text().splitlines()]
    spans = [row[0].split("-") for row in rows if row[-1] == str(path)]
    return min(int(low, 16) for low, _ in spans), max(int(high, 16) for _, high in spans)


kernel = functools.cache(Kernel)
