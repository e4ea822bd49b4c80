"""Memory in pages of 2 MiB: fresh ones of 4 KiB cost more than layer norm itself."""

import ctypes
import mmap
import sys

__all__ = ["prefer_huge"]

# glibc gives blocks above 32 MiB back to the system with every free: a forward of 4096x4096 into a
# fresh tensor took 30 ms, with huge pages 10 (two threads). Smaller blocks come back with their
# pages, and to advise again on each call cost 4096x768 a tenth.
_LARGE = 1 << 25
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
