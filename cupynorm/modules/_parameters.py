"""Arrays that a layer holds: made on a device, filled from any library, shared with torch."""

import re
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._arguments import path_of
from cupynorm._arrays import library_of

__all__ = [
    "accumulate",
    "describe",
    "fill",
    "from_tensor",
    "new_array",
    "read_device",
    "read_dtype",
    "to_host",
    "to_tensor",
]

_CPU = -1


def read_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype for a name, a NumPy or a torch dtype; float32 where nothing is said."""
    if dtype is None:
        return np.dtype(np.float32)
    if isinstance(dtype, type) or (isinstance(dtype, str) and dtype != "bfloat16"):
        dtype = np.dtype(dtype)  # numpy.float32, float, "f4"
    name = dtype if isinstance(dtype, str) else _problem.dtype_name(dtype)
    if name not in _problem.ITEMSIZE:
        msg = (
            f"dtype={dtype!r} is not one that layer norm computes with; "
            f"pass one of {', '.join(_problem.ITEMSIZE)}"
        )
        raise TypeError(msg)
    return _problem.numpy_dtype(name)


def read_device(device: Any) -> int | None:
    """Index of a GPU, None for the current one, -1 for the host."""
    if device is None:
        return _CPU
    if library_of(device) == "cupy":  # a Device, as a CuPy array's .device gives it
        return int(device.id)
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", str(device))  # torch.device prints itself so
    if match is None:
        msg = (
            f"device={device!r} is none of 'cpu' (NumPy), 'cuda' and 'cuda:1' (CuPy); pass one of "
            "them"
        )
        raise ValueError(msg)
    if match[1]:
        return _CPU
    return None if match[2] is None else int(match[2])


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any], index: int | None, value: float) -> Any:
    """Array of one value, of NumPy or on a GPU of CuPy, as `read_device` tells it."""
    host = np.full(shape, value, dtype)
    if index == _CPU:
        return host
    device = "cuda" if index is None else f"cuda:{index}"
    try:
        do = path_of("cupy")
    except ImportError as error:
        msg = (
            f"device={device!r} needs CuPy, which cannot be imported ({error}); "
            "pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
        )
        raise ImportError(msg) from error
    try:
        with do.device(index):
            array = do.empty(shape, dtype=dtype)
            array.set(host)  # not fill(): that would compile a kernel for one number
    except RuntimeError as error:  # CuPy's, where there is no driver or no such GPU
        msg = (
            f"device={device!r} cannot be used ({error}); run `python -m cupynorm`, which tells why"
        )
        raise RuntimeError(msg) from error
    return array


def to_host(label: str, value: Any) -> np.ndarray[Any, Any]:
    """NumPy array with the contents of an array of any library, on any device.

    Raises
    ------
    TypeError
        If it is no array, or its dtype is not one of the four floating ones.
    """
    host: np.ndarray[Any, Any]
    if library_of(value) == "cupy":
        host = value.get()
    elif hasattr(value, "detach"):  # torch
        _check_dtype(label, value.dtype)
        host = from_tensor(label, value.cpu())
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        host = np.asarray(value)
    else:
        msg = f"{label} is a {type(value).__name__}, which is no array; pass an array"
        raise TypeError(msg)
    _check_dtype(label, host.dtype)
    return host


def _check_dtype(label: str, dtype: Any) -> None:
    name = _problem.dtype_name(dtype)
    _problem.check_affine_dtype(label, name, f"{label} as float32")


def fill(array: Any, host: np.ndarray[Any, Any]) -> None:
    """Copy a NumPy array into one of NumPy or CuPy, in its dtype; neither is replaced."""
    host = np.ascontiguousarray(host, dtype=array.dtype)
    if isinstance(array, np.ndarray):
        array[...] = host
    else:
        array.set(host)


def describe(array: Any) -> str:
    """Tell dtype, shape and library of an array, and its device where that is a GPU."""
    library, device = library_of(array), getattr(array, "device", None)
    where = f" on {device}" if library in ("cupy", "torch", "jax") else ""
    dtype = _problem.dtype_name(array.dtype)
    return f"{dtype} {tuple(int(n) for n in array.shape)}, {library}{where}"


def accumulate(total: Any, term: Any) -> Any:
    """Add `term` to `total` in place, on its device; the term itself where there is no total."""
    if total is None:
        return term
    if isinstance(total, np.ndarray):
        total += term
    else:
        with total.device:
            total += term
    return total


def from_tensor(label: str, tensor: Any) -> Any:
    """NumPy or CuPy array over the memory of a torch tensor."""
    import torch

    tensor = tensor.detach()  # what requires grad is exported nowhere
    _check_dtype(label, tensor.dtype)
    kind = tensor.device.type
    if kind == "cuda":
        return path_of("cupy").from_exporter(tensor)
    if kind != "cpu":
        msg = f"{label} is on {tensor.device}; move the module to 'cpu' or 'cuda' first"
        raise ValueError(msg)
    if tensor.dtype == torch.bfloat16:  # NumPy's DLPack does not know it; the same bytes do
        bits = np.from_dlpack(tensor.view(torch.uint16))
        return bits.view(_problem.numpy_dtype("bfloat16"))
    return np.from_dlpack(tensor)


def to_tensor(label: str, array: Any) -> Any:
    """Torch tensor over the memory of a NumPy or CuPy array.

    Raises
    ------
    ValueError
        If it runs backwards: torch 2.13 ends the process when DLPack brings a negative stride.
    """
    import torch

    if any(stride < 0 for stride in array.strides):
        msg = (
            f"{label} has strides {tuple(array.strides)}, and torch has no negative ones; "
            f"assign a copy first: layer.{label} = layer.{label}.copy()"
        )
        raise ValueError(msg)
    if isinstance(array, np.ndarray) and _problem.dtype_name(array.dtype) == "bfloat16":
        return torch.from_dlpack(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(array)
