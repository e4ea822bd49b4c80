"""ADAPTER, to be deleted when `torch` holds what is left of it, if that still pays."""

import ctypes
import mmap
import sys

_LARGE = 1 << 22
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None
_madvise = None
if _ADVICE is not None:
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def prefer_huge(address: int, size: int) -> None:
    """Ask the system to back ``size`` bytes, not touched yet, by huge pages, if that pays."""
    if size < _LARGE or _madvise is None:
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    _madvise(first, (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, _ADVICE)
