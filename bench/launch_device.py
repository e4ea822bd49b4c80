"""CuPy without a GPU, to time the Python of a call: plain arrays, launches that only count."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.simt.cupy_stand_in import simulated_cupy

__all__ = ["counting_cupy"]


class _Memory:
    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr: int) -> None:
        self.ptr, self.device_id = ptr, 0


class _Array:
    """What a launcher reads of a row-major array, as plain attributes."""

    __slots__ = ("data", "device", "dtype", "flags", "shape", "strides")

    def __init__(self, shape: tuple[int, ...], dtype: Any, data: _Memory | None = None) -> None:
        self.shape, self.dtype, self.data = shape, dtype, data or _POOL
        self.strides = _STRIDES.get((shape, dtype)) or _row_major(shape, dtype)
        self.flags, self.device = _ROW_MAJOR, _DEVICE

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Classification asks the type for it."""
        return {}


_ROW_MAJOR, _DEVICE = SimpleNamespace(c_contiguous=True), SimpleNamespace(id=0)
_POOL = _Memory(1 << 44)  # an allocation that costs next to nothing
_STRIDES: dict[Any, tuple[int, ...]] = {}


def _row_major(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    steps = tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    _STRIDES[shape, dtype] = steps
    return steps


class _Kernel:
    """`RawKernel` whose function counts its launches."""

    def __init__(self, source: str, name: str) -> None:
        self.launches = 0
        self.max_dynamic_shared_size_bytes = 0

    @property
    def kernel(self) -> Any:
        """What `_cuda` keeps."""

        def launch(
            grid: Any, block: Any, arguments: Any, shared: int = 0, stream: Any = None
        ) -> None:
            self.launches += 1

        return launch


@contextlib.contextmanager
def counting_cupy() -> Iterator[Any]:
    """`import cupy` gives such a CuPy inside; ``from_numpy`` makes an array of one."""
    with simulated_cupy(reload=("cupynorm._cuda.arrays",)) as cupy:
        kind = type("ndarray", (_Array,), {"__module__": "cupy", "__slots__": ()})

        def from_numpy(host: np.ndarray) -> Any:
            return kind(host.shape, host.dtype, _Memory(host.ctypes.data))

        cupy.cuda.runtime.getDevice = itertools.repeat(0).__next__  # a compiled function, as CuPy's
        cupy.ndarray, cupy.RawKernel, cupy.from_numpy = kind, _Kernel, from_numpy
        cupy.empty_like = lambda x, order="K": kind(x.shape, x.dtype)
        yield cupy
