"""Advice on memory reaches the system, for large blocks only."""

import mmap
import sys
from pathlib import Path

import pytest

from cupynorm._cpu import pages as _pages

SMAPS = Path("/proc/self/smaps")


def flags_at(address):
    """What the system says of the mapping that holds an address."""
    found = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            found = low <= address < high
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells how memory is mapped")
@pytest.mark.parametrize(("size", "advised"), [(1 << 21, False), (1 << 23, True)])
def test_large_memory_is_advised(size, advised):
    import ctypes

    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pointer = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(pointer)
        flags = flags_at(address + size // 2)
        if flags is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
            pytest.skip("this kernel knows no transparent huge pages")
        assert "hg" not in flags
        _pages.prefer_huge(address + 5, size - 9)  # at no page's edge, as allocators hand out
        assert ("hg" in flags_at(address + size // 2)) == advised
        assert "hg" not in flags_at(address)  # a page that is not ours as a whole
        del pointer


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(_pages, "_madvise", None)
    _pages.prefer_huge(1, 1 << 40)
    assert sys.platform != "linux" or _pages._ADVICE is not None
