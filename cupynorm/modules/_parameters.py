"""Arrays that a layer holds: made on a device, filled from any library, shared with torch."""

import contextlib
import re
from typing import Any

import numpy as np

from cupynorm import _rules
from cupynorm._libraries import library_of

Array = np.ndarray[Any, Any]


def read_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype for a name, a NumPy or a torch dtype; float32 where nothing is said."""
    if dtype is None:
        return np.dtype(np.float32)
    if isinstance(dtype, type) or (isinstance(dtype, str) and dtype != "bfloat16"):
        dtype = np.dtype(dtype)  # numpy.float32, float, "f4"
    name = dtype if isinstance(dtype, str) else _rules.dtype_name(dtype)
    if name not in _rules.ITEMSIZE:
        msg = (
            f"dtype={dtype!r} is not one that layer norm computes with; "
            f"pass one of {', '.join(_rules.ITEMSIZE)}"
        )
        raise TypeError(msg)
    return _rules.numpy_dtype(name)


def read_device(device: Any) -> str:
    """'cpu', 'cuda' for the current GPU, or 'cuda:1'."""
    if library_of(device) == "cupy":  # a Device, as a CuPy array's .device gives it
        return f"cuda:{device.id}"
    name = "cpu" if device is None else str(device)  # torch.device prints itself so
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        msg = (
            f"device={device!r} is none of 'cpu' (NumPy), 'cuda' and 'cuda:1' (CuPy); pass one of "
            "them"
        )
        raise ValueError(msg)
    return name


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any], device: str, value: float) -> Any:
    """Array of one value, of NumPy or on a GPU of CuPy, as `read_device` names it."""
    host = np.full(shape, value, dtype)
    if device == "cpu":
        return host
    try:
        from cupynorm._cuda import arrays as do
    except ImportError as error:
        msg = (
            f"device={device!r} needs CuPy, which cannot be imported ({error}); "
            "pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
        )
        raise ImportError(msg) from error
    index = device.partition(":")[2]
    try:
        with do.device(int(index) if index else None):
            array = do.empty(shape, dtype=dtype)
            array.set(host)  # not fill(): that would compile a kernel for one number
    except RuntimeError as error:  # CuPy's, where there is no driver or no such GPU
        msg = (
            f"device={device!r} cannot be used ({error}); run `python -m cupynorm`, which tells why"
        )
        raise RuntimeError(msg) from error
    return array


def to_host(label: str, value: Any) -> Array:
    """NumPy array with the contents of an array of any library, on any device, or its refusal."""
    host: Array
    if library_of(value) == "cupy":
        host = value.get()
    elif hasattr(value, "detach"):  # torch
        host = from_tensor(label, value.cpu())
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        host = np.asarray(value)
    else:
        msg = f"{label} is a {type(value).__name__}, which is no array; pass an array"
        raise TypeError(msg)
    _check_dtype(label, host.dtype)
    return host


def _check_dtype(label: str, dtype: Any) -> None:
    _rules.check_affine_dtype(label, _rules.dtype_name(dtype), f"{label} as float32")


def fill(array: Any, host: Array) -> None:
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
    dtype = _rules.dtype_name(array.dtype)
    return f"{dtype} {tuple(int(n) for n in array.shape)}, {library}{where}"


def accumulate(total: Any, term: Any) -> Any:
    """Add `term` to `total` in place, on its device; the term itself where there is no total."""
    if total is None:
        return term
    with contextlib.nullcontext() if isinstance(total, np.ndarray) else total.device:
        total += term
    return total


def from_tensor(label: str, tensor: Any) -> Any:
    """NumPy or CuPy array over the memory of a torch tensor."""
    import torch

    tensor = tensor.detach()  # what requires grad is exported nowhere
    _check_dtype(label, tensor.dtype)
    if tensor.is_cuda:
        from cupynorm._cuda import arrays as do

        return do.from_exporter(tensor)
    if tensor.device.type != "cpu":
        msg = f"{label} is on {tensor.device}; move the module to 'cpu' or 'cuda' first"
        raise ValueError(msg)
    if tensor.dtype == torch.bfloat16:  # NumPy's DLPack does not know it; the same bytes do
        bits = np.from_dlpack(tensor.view(torch.uint16))
        return bits.view(_rules.numpy_dtype("bfloat16"))
    return np.from_dlpack(tensor)


def to_tensor(label: str, array: Any) -> Any:
    """Torch tensor over the memory of a NumPy or CuPy array."""
    import torch

    if any(stride < 0 for stride in array.strides):  # from DLPack it would end the process
        msg = (
            f"{label} has strides {tuple(array.strides)}, and torch has no negative ones; "
            f"assign a copy first: layer.{label} = layer.{label}.copy()"
        )
        raise ValueError(msg)
    if isinstance(array, np.ndarray) and _rules.dtype_name(array.dtype) == "bfloat16":
        return torch.from_dlpack(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(array)
