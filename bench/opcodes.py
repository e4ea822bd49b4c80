"""Byte codes that a call executes in the package's own Python: a count that no other load moves."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import cupynorm

__all__ = ["opcodes"]

_PACKAGE = str(Path(cupynorm.__file__).parent)


def opcodes(call: Callable[[], Any], warm: int = 3) -> int:
    """Count the byte codes of frames from `cupynorm/` in one call, after some that are not counted.

    What is compiled (NumPy, CuPy, the loops) counts nothing, nor does a stand-in for CuPy.
    """
    for _ in range(warm):
        call()
    count = 0

    def within(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return within

    def entered(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return within

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
