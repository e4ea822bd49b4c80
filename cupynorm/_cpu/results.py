"""Memory of NumPy results: that of one that nobody holds any more serves the next."""

import collections
import functools
import math
import os
import sys
from typing import Any

import numpy as np

from cupynorm._cpu import pages as _pages

__all__ = ["LEAST", "empty", "empty_like", "limit"]

# Fresh memory costs more than layer norm: the system clears every page when it is first written,
# 2 us for each 4 KiB on the machine of bench/NOTES.md, and half of the time of 16384x1024 even in
# pages of 2 MiB. So a call's result takes the place of an earlier one, as in CuPy's memory pool and
# onnxruntime's arena.

Array = np.ndarray[Any, Any]

LEAST = 1 << 17  # bytes; smaller memory malloc keeps by itself
_LINE = 64  # bytes of a cache line: a vector that begins on one takes one access, not two
_SPARE = 1.25  # as large as this, a kept block serves a smaller result
# Bytes kept at most, and of the machine's memory one part of so many: a scheduler that watches its
# workers' memory, as Dask's does, counts what is kept as used.
_MOST, _SHARE = 1 << 28, 16


class _Block:
    __slots__ = ("address", "memory", "most", "size")

    def __init__(self, size: int, most: int) -> None:
        self.memory, self.address = _pages.fresh(size, _LINE)
        self.size, self.most = size, most


# Blocks that nobody uses, the longest unused first. A deque's own methods are atomic, and nothing
# here may take a lock: a result can die anywhere, in the middle of these lines too. So it is copied
# before a look at each: tuple(_free) may collect garbage, results in it, and then raises.
_free: collections.deque[_Block] = collections.deque()


@functools.cache
def _default() -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return _MOST
    return min(_MOST, memory // _SHARE)


def limit() -> int:
    """Bytes that may be kept: what ``CUPYNORM_KEPT_MIB`` says, else 256 MiB."""
    text = os.environ.get("CUPYNORM_KEPT_MIB", "").strip()
    if not text:
        return _default()
    if not text.isdecimal():
        msg = (
            f"CUPYNORM_KEPT_MIB={text!r} is not a number of MiB; set it to how much memory of"
            " earlier results may be kept for later ones, 0 for none, or unset it"
        )
        raise ValueError(msg)
    return int(text) << 20


def _give_back(block: _Block) -> None:
    _free.append(block)
    while sum(b.size for b in _free.copy()) > block.most:
        try:
            _free.popleft()
        except IndexError:  # another thread was faster
            return


class _Loan:
    """What a result's memory belongs to, and who hands it back when the last view is gone."""

    __slots__ = ("__array_interface__", "_block")

    def __init__(self, block: _Block, shape: tuple[int, ...], letters: str) -> None:
        self._block = block
        data = block.address, False
        self.__array_interface__ = {
            "shape": shape, "typestr": letters, "data": data, "version": 3
        }  # fmt: skip

    def __del__(self, ending: Any = sys.is_finalizing) -> None:
        if not ending():  # modules are taken apart then, this one and those that it needs
            _give_back(self._block)


def _take(size: int) -> _Block | None:
    for block in _free.copy():
        if size <= block.size <= _SPARE * size:
            try:
                _free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return None


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """``numpy.empty``, in the memory of an earlier result where one of this size is free."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST:
        return np.empty(shape, dtype)
    block = _take(size)
    if block is None:
        most = limit()
        if size > most:
            return np.empty(shape, dtype)
        try:
            block = _Block(size, most)
        except (MemoryError, OSError):  # of no memory to map; what is kept may be what lacks
            _free.clear()
            return np.empty(shape, dtype)
    if dtype.kind == "f":
        result: Array = np.asarray(_Loan(block, shape, dtype.str))
    else:  # bfloat16, which has no letters of its own
        result = np.asarray(_Loan(block, (size,), "|u1")).view(dtype).reshape(shape)
    return result


def empty_like(x: Array, order: Any = "K") -> Array:
    """``numpy.empty_like``, in the memory of an earlier result where one of this size is free."""
    if type(x) is np.ndarray and x.nbytes >= LEAST and x.dtype.isnative:
        if x.flags.c_contiguous and order != "F":
            return empty(x.shape, x.dtype)
        if x.flags.f_contiguous and order != "C":
            return empty(x.shape[::-1], x.dtype).T
    return np.empty_like(x, order=order)
