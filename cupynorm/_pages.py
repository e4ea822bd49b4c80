"""Memory in pages of 2 MiB: fresh ones of 4 KiB cost more than layer norm itself."""

import ctypes
import functools
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["fresh", "may_take", "prefer_huge"]

# NumPy asks for huge pages from 4 MiB up, torch does not: a forward of 4096x4096 into a fresh
# tensor took 30 ms, with huge pages 10 (two threads); forward and backward of 4096x768, where
# glibc gives a part back to the system and takes it again, went from 1700 page faults to 280.
_LARGE = 1 << 22
_HUGE = 1 << 21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None
_FREE = getattr(mmap, "MADV_FREE", None) if sys.platform == "linux" else None
# A forked child has a copy, as of all other memory: by default it would write to its parent's.
_OWN = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_madvise = None
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def prefer_huge(address: int, size: int) -> None:
    """Ask the system to back ``size`` bytes, not touched yet, by huge pages, if that pays.

    It is advice: a refusal costs speed alone, and where it is turned off nothing changes.
    """
    if size >= _LARGE and _madvise is not None:
        _madvise(*_whole_pages(address, size), _ADVICE)


def fresh(size: int, alignment: int) -> tuple[Any, int]:
    """Memory of so many bytes, and the aligned address at which it begins.

    Large memory is mapped anew and begins on a huge page: malloc's may lie in pages that were small
    before.
    """
    if size < _LARGE:
        memory = np.empty(size + alignment, np.uint8)
    else:
        memory, alignment = np.frombuffer(mmap.mmap(-1, size + _HUGE, **_OWN), np.uint8), _HUGE
    address = -(-memory.ctypes.data // alignment) * alignment
    prefer_huge(address, size)
    return memory, address


def may_take(address: int, size: int) -> None:
    """Let the system take these bytes back when it runs short of memory; their values may be lost.

    As long as it does not, the next write finds the same pages. In huge pages 64 MiB take 25 us; in
    small ones it would be a third of the time of writing them, and is not done.
    """
    if size >= _LARGE and _madvise is not None and _FREE is not None and _huge_pages():
        _madvise(*_whole_pages(address, size), _FREE)


@functools.cache
def _huge_pages() -> bool:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return False
    return "[never]" not in text


def _whole_pages(address: int, size: int) -> tuple[int, int]:
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
