"""A compiled entry: its program, its parameters, its lines."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .api import Fault
from .buffer import Buffer
from .build import CompileError, compile_ptx, engine_path, kept
from .decode import Program, decode
from .fault import PtxFault

_KINDS = {"f": "floating-point number", "b": "struct"}


def program_of(ptx: str, entry: str) -> Program:
    """The decoded entry; kept on disk, for the other process that runs tests."""
    went_in = (ptx, entry, engine_path().name, Path(decode.__code__.co_filename).read_text())
    return pickle.loads(kept("program", lambda: pickle.dumps(decode(ptx, entry)), *went_in))


class Kernel:
    """One entry of one text, for one architecture."""

    def __init__(self, source: str, entry: str, arch: str) -> None:
        self.entry = entry
        self._source, self._arch = source, arch
        try:
            ptx = compile_ptx(source, arch)
        except CompileError as error:
            raise PtxFault("compile", f"{entry}: {error}") from None
        self.program = program_of(ptx, entry)
        self._lines = source.splitlines()
        self._is_ptx = ptx is source
        self.cluster = self.program.cluster
        self.static_bytes = self.program.static_shared
        self.launch_bounds = self.program.max_threads

    def pack(self, args: Sequence[Any]) -> bytes:
        """The block of parameters, each argument checked against its parameter's type."""
        parameters = self.program.parameters
        if len(args) != len(parameters):
            msg = f"{self.entry} takes {len(parameters)} arguments, got {len(args)}"
            raise PtxFault("argument", msg)
        packed = bytearray(sum(p.size for p in parameters) + 64)
        for k, (arg, p) in enumerate(zip(args, parameters, strict=True)):
            raw, kind = _bytes_of(arg)
            if kind != p.kind[0].replace("s", "u") or len(raw) != p.size:
                wanted = _KINDS.get(p.kind[0], "integer or pointer")
                msg = (
                    f"parameter {k} of {self.entry} is a {p.size}-byte {wanted}, but the "
                    f"launch passes {arg!r}, a {type(arg).__name__} of {len(raw)} bytes"
                )
                raise PtxFault("argument", msg)
            packed[p.offset : p.offset + p.size] = raw
        return bytes(packed)

    @functools.cached_property
    def _sites(self) -> list[tuple[int, ...]]:
        """Lines of each instruction: compiled again, since few launches ask for them."""
        located = program_of(compile_ptx(self._source, self._arch, "-lineinfo"), self.entry)
        assert located.instructions.tobytes() == self.program.instructions.tobytes()
        return located.sites

    def site(self, pc: int) -> tuple[str, int, tuple[int, ...]]:
        """Of an instruction: (`line 12: its text`, 12, lines that it was inlined at)."""
        of_ptx, *lines = self._sites[pc] if 0 <= pc < len(self._sites) else (0,)
        lines = [of_ptx] if self._is_ptx else lines
        if not lines or not 0 < lines[0] <= len(self._lines):
            return "an unknown line", 0, ()
        return self._text(lines[0]), lines[0], tuple(lines[1:])

    def _text(self, line: int) -> str:
        known = 0 < line <= len(self._lines)
        return f"line {line}: {self._lines[line - 1].strip()}" if known else f"line {line}"

    def _place(self, pc: int) -> str:
        """An instruction within a sentence."""
        text, _, callers = self.site(pc)
        return ", called from ".join([text, *map(self._text, callers)])

    def exception(self, fault: Fault) -> PtxFault:
        """The engine's report with source lines for instructions."""
        told = fault.message.decode()
        message = re.sub(r"@\{([0-9a-f]+)\}", lambda found: self._place(int(found[1], 16)), told)
        where = self.entry
        if fault.has_thread:
            where = f"block {tuple(fault.block)}, thread {tuple(fault.thread)} of {self.entry}"
        message += f"\n  in {where}"
        text, line, callers = self.site(fault.pc)
        if line:
            message += f"\n  at {text}"
            message += "".join(f"\n  called from {self._text(caller)}" for caller in callers)
        return PtxFault(fault.kind.decode(), message, line)


def _bytes_of(arg: Any) -> tuple[bytes, str]:
    """What CuPy passes for an argument, and the kind of parameter that may take it."""
    if isinstance(arg, Buffer):
        return arg.ptr.to_bytes(8, "little"), "u"
    if isinstance(arg, (bool, np.bool_)):
        return bytes([arg]), "u"
    if isinstance(arg, int):
        return (arg & (2**64 - 1)).to_bytes(8, "little"), "u"
    if isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.size == 1):
        kind = arg.dtype.kind
        return arg.tobytes(), "f" if kind == "f" else "u" if kind in "iu" else "b"
    if isinstance(arg, float):
        return np.float64(arg).tobytes(), "f"
    msg = f"Unsupported type {type(arg)}"  # as CuPy has it
    raise TypeError(msg)


kernel = functools.cache(Kernel)
