"""Memory in pages of 2 MiB: fresh ones of 4 KiB cost more than layer norm itself."""

import ctypes
import mmap
import sys

__all__ = ["prefer_huge"]

# NumPy asks for huge pages from 4 MiB up, torch does not: a forward of 4096x4096 into a fresh
# tensor took 30 ms, with huge pages 10 (two threads); forward and backward of 4096x768, where
# glibc gives a part back to the system and takes it again, went from 1700 page faults to 280.
_LARGE = 1 << 22
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None) if sys.platform == "linux" else None
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
