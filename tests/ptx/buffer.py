"""Guarded device memory that knows, byte by byte, what has been written."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .api import api


class Buffer:
    """Device memory: exact bounds, guard pages, and for each byte whether anybody wrote it.

    Parameters
    ----------
    nbytes : int
        Size; nothing is defined at first and every byte is 0xFF.
    name : str
        What faults and traffic records call it.
    offset : int
        Address of the first byte modulo 256; 0 is what CuPy's allocator gives.
    writable : bool
        Whether kernels may store.
    granule : int
        Bytes (1, 2, 4, 8) told apart by the race check: the narrowest access of the kernel.
    device : int
        Kernels on another device may not touch it.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        name: str = "buffer",
        offset: int = 0,
        writable: bool = True,
        granule: int = 1,
        device: int = 0,
    ) -> None:
        if not 0 <= offset < 256:
            msg = f"offset must be in [0, 256), got {offset}"
            raise ValueError(msg)
        runtime = api()
        self.name, self.nbytes, self.writable, self.device = name, nbytes, writable, device
        shift = granule.bit_length() - 1
        self.region = runtime.ptx_region_new(nbytes, offset, shift, name.encode()[:95])
        if not self.region:
            msg = f"no memory for a buffer of {nbytes} bytes"
            raise MemoryError(msg)
        self.ptr: int = runtime.ptx_region_base(self.region)
        weakref.finalize(self, runtime.ptx_region_free, self.region)

    @classmethod
    def empty(cls, nbytes: int, **options: Any) -> Buffer:
        """Memory that nobody has written."""
        return cls(nbytes, **options)

    @classmethod
    def from_array(cls, array: np.ndarray, **options: Any) -> Buffer:
        """Memory holding the array's elements in C order."""
        options.setdefault("granule", _granule(array.dtype))
        buffer = cls(array.nbytes, **options)
        buffer.write(array)
        return buffer

    def bytes(self) -> np.ndarray:
        """The memory itself as uint8, writable; writing here does not define."""
        return _view(self, self.ptr, self.nbytes)

    def defined(self) -> np.ndarray:
        """One bool per byte: whether anybody wrote it."""
        return _view(self, api().ptx_region_defined(self.region), self.nbytes).view(bool)

    def write(self, array: np.ndarray, start: int = 0) -> None:
        """Copy the array's elements in C order to byte `start`, which defines them."""
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.bytes()[start : start + raw.size] = raw
        api().ptx_region_define(self.region, start, raw.size)

    def to_numpy(self, dtype: Any, shape: Any = None) -> np.ndarray:
        """Copy of the contents."""
        dtype = np.dtype(dtype)
        flat = np.frombuffer(self.bytes().tobytes(), dtype, self.nbytes // dtype.itemsize).copy()
        return flat if shape is None else flat.reshape(shape)


def _granule(dtype: np.dtype) -> int:
    size = dtype.itemsize
    return size if size in (1, 2, 4, 8) else 1


class _Memory:
    """A view into a buffer that keeps the buffer alive."""

    def __init__(self, owner: Buffer, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False),
        }  # fmt: skip


def _view(owner: Buffer, address: int, nbytes: int) -> np.ndarray:
    return np.asarray(_Memory(owner, address, nbytes)) if nbytes else np.empty(0, np.uint8)
