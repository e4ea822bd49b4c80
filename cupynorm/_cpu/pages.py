"""Memory in pages of 2 MiB: fresh ones of 4 KiB cost more than layer norm itself."""

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

__all__ = ["fresh", "prefer_huge"]

# NumPy asks for huge pages from 4 MiB up, torch does not: a forward of 4096x4096 into a fresh
# tensor took 30 ms, with huge pages 10 (two threads); forward and backward of 4096x768, where
# glibc gives a part back to the system and takes it again, went from 1700 page faults to 280.
_LARGE = 1 << 22
_HUGE = 1 << 21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None
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
    if size < _LARGE or _madvise is None:
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    _madvise(first, (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, _ADVICE)


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
