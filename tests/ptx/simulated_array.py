"""Arrays of a simulated device: CuPy's ndarray as far as a launcher sees it, in guarded memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .buffer import Buffer

REFUSAL = (
    "Implicit conversion to a NumPy array is not allowed. "
    "Please use `.get()` to construct a NumPy array explicitly."
)


class MemoryPointer:
    """Address on a device; keeps the memory alive."""

    def __init__(self, mem: Buffer, offset: int) -> None:
        self.mem = mem
        self.ptr = mem.ptr + offset if mem.nbytes else 0
        self.device_id = mem.device


class Flags(NamedTuple):
    """Layout of an array."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool
    forc: bool


class Array:
    """Base of each simulated `cupy.ndarray`; the subclass that make_cupy() makes knows its `_sim`.

    Not a NumPy array, and not convertible to one except by get(), as on a device.
    """

    _sim: Any
    __array_ufunc__ = None  # NumPy functions must not take it for a sequence
    __array_priority__ = 100

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: str = "C",
    ) -> None:
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.shape = tuple(int(n) for n in shape)
        self.strides = _strides(self.shape, self.dtype, order) if strides is None else strides
        self.base: Array | None = None
        if memptr is None:
            memptr = self._sim.alloc(self.nbytes, self.dtype, self.shape)
        self.data = memptr
        self._offset = memptr.ptr - memptr.mem.ptr if memptr.mem.nbytes else 0

    # ---- what it is ----

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    device = property(lambda self: self._sim.device_type(self.data.device_id))
    T = property(lambda self: self.transpose())

    @property
    def flags(self) -> Flags:
        """Layout; recomputed, as shape and strides say."""
        flags = self._host().flags
        return Flags(flags.c_contiguous, flags.f_contiguous, self.base is None, flags.forc)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "stream": 1,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.data.device_id)

    def __dlpack__(self, **_: Any) -> Any:
        return SimpleNamespace(simulated_array=self)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(REFUSAL)

    def __eq__(self, other: object) -> Any:
        msg = "CuPy compares element by element; the simulated ndarray does not"
        raise NotImplementedError(msg)

    def __len__(self) -> int:
        if not self.shape:
            msg = "len() of unsized object"
            raise TypeError(msg)
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<simulated cupy.ndarray {self.data.mem.name} {self.dtype}{list(self.shape)}>"

    # ---- its memory, seen from the host ----

    def _host(self) -> np.ndarray:
        """NumPy view of the elements."""
        return self._over(self.data.mem.bytes(), self.dtype)

    def _over(self, raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, dtype)
        return np.ndarray(self.shape, dtype, raw.data, self._offset, self.strides)

    def _defined(self) -> np.ndarray:
        """View of the per-byte marks, shaped like the array with the bytes of an element last."""
        if not self.size:
            return np.empty((*self.shape, self.itemsize), bool)
        marks, size = self.data.mem.defined(), self.itemsize
        return np.ndarray((*self.shape, size), bool, marks.data, self._offset, (*self.strides, 1))

    def _view_of(self, host: np.ndarray) -> Array:
        """The array whose elements the NumPy view `host` of this one shows."""
        view = type(self).__new__(type(self))
        view.dtype, view.shape, view.strides = host.dtype, host.shape, host.strides
        mem = self.data.mem
        address = host.__array_interface__["data"][0]
        view._offset = address - mem.ptr if host.size else 0
        view.data = MemoryPointer(mem, view._offset)
        view.base = self if self.base is None else self.base
        return view

    def _copy_as(self, host: np.ndarray) -> Array:
        """New array on this one's device with the contents and the layout of `host`."""
        with self.device:
            made = type(self)(host.shape, host.dtype, strides=_compact(host))
        made._host()[...] = host
        made._defined()[...] = self._all_defined(host.shape)[..., None]
        return made

    def _all_defined(self, shape: tuple[int, ...]) -> np.ndarray:
        marks = self._defined().all(axis=-1)
        return marks.reshape(shape) if marks.shape != shape else marks

    def get(self, stream: Any = None, order: str = "C") -> np.ndarray:
        return np.array(self._host(), order="K" if order == "A" else order)

    def set(self, values: np.ndarray) -> None:
        self._host()[...] = values
        self._defined()[...] = True

    # ---- views and copies ----

    def __getitem__(self, key: Any) -> Array:
        view = self._host()[key if isinstance(key, tuple) else (key,)]
        if not isinstance(view, np.ndarray):  # a scalar: CuPy gives a 0-d array
            key = key if isinstance(key, tuple) else (key,)
            view = self._host()[(*key, ...)]
        if view.size and not np.may_share_memory(view, self._host()):
            msg = "the simulated ndarray takes basic indexing only"
            raise NotImplementedError(msg)
        return self._view_of(view)

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self[key]
        if isinstance(value, Array):
            target._host()[...] = value._host()
            target._defined()[...] = value._defined().all(axis=-1)[..., None]
        elif isinstance(value, np.ndarray) and value.ndim:
            msg = f"Unsupported type {type(value)}"
            raise TypeError(msg)
        else:
            target.set(value)

    def reshape(self, *shape: Any, order: str = "C") -> Array:
        """View where the strides allow one, copy otherwise."""
        shape = shape[0] if len(shape) == 1 else shape
        host = self._host().reshape(shape, order=order)
        if not self.size or np.may_share_memory(host, self._host()):
            return self._view_of(host)
        return self._copy_as(host)

    def ravel(self, order: str = "C") -> Array:
        """One-dimensional; view where the strides allow one."""
        return self.reshape(-1, order=order)

    def transpose(self, *axes: Any) -> Array:
        return self._view_of(self._host().transpose(*axes))

    def view(self, dtype: Any) -> Array:
        return self._view_of(self._host().view(dtype))

    def astype(self, dtype: Any, order: str = "K", *, copy: bool = True) -> Array:
        """Converted copy, or the array itself where nothing changes and `copy` is false."""
        host = self._host()
        converted = host.astype(dtype, order=order, copy=copy)
        if converted is host:
            return self
        return self._copy_as(converted)

    def copy(self, order: str = "C") -> Array:
        return self._copy_as(self._host().copy(order=order))

    def fill(self, value: Any) -> None:
        self.set(value)


def _strides(shape: tuple[int, ...], dtype: np.dtype, order: str) -> tuple[int, ...]:
    """Strides of a new array; lengths of 0 count as 1, as NumPy counts them."""
    lengths = [max(n, 1) for n in shape]
    before = (lambda i: lengths[:i]) if order == "F" else (lambda i: lengths[i + 1 :])
    return tuple(dtype.itemsize * math.prod(before(i)) for i in range(len(shape)))


def _compact(host: np.ndarray) -> tuple[int, ...]:
    """Strides of `host` with gaps closed: the order of the axes kept."""
    return np.empty_like(host, order="K").strides
