"""Parameters of a layer: made on a device, filled from any library or file, shared with torch."""

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _calls, _libraries, _rules
from cupynorm._display import Sections, Table
from cupynorm._libraries import library_of
from cupynorm.modules import _files


class IncompatibleKeys(NamedTuple):
    """What a state and a layer do not have in common.

    Attributes
    ----------
    missing_keys, unexpected_keys : list of str
        Parameters that only the layer has, and names that only the state has.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Stateful(Table):
    """Base of the layers: a weight and a bias, either of which may be None."""

    normalized_shape: tuple[int, ...]
    eps: Any  # a float, or None of an RMS norm
    weight: Any
    bias: Any
    grad: dict[str, Any]
    elementwise_affine: bool
    _kept: tuple[Any, ...] | None  # x and the statistics of the last forward

    def zero_grad(self) -> None:
        """Forget the gradients: the next `backward` starts anew. Arrays already taken stay.

        Examples
        --------
        >>> import cupynorm as cn
        >>> layer = cn.LayerNorm(3)
        >>> layer.zero_grad()
        >>> layer.grad
        {'weight': None, 'bias': None}
        """
        self.grad = dict.fromkeys(self.state_dict())

    def state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Parameters by torch's names, 'weight' and 'bias': the arrays themselves, no copies.

        Parameters
        ----------
        prefix : str, default ''
            Put before each name, as 'encoder.norm1.' for a layer of a model.

        Returns
        -------
        dict of str to array
            Only what the layer has.

        Examples
        --------
        >>> import cupynorm as cn
        >>> list(cn.LayerNorm(2).state_dict("norm."))
        ['norm.weight', 'norm.bias']
        """
        both = {"weight": self.weight, "bias": self.bias}
        return {prefix + name: value for name, value in both.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copy values into the parameters, which stay where they are and keep their dtype.

        Nothing is changed where anything is wrong. Gradients and what `forward` kept stay.

        Parameters
        ----------
        state : mapping of str to array
            Arrays named 'weight' and 'bias', of any library and on any device.
        strict : bool, default True
            Whether missing and unexpected names are errors. A wrong shape always is.

        Returns
        -------
        IncompatibleKeys
            The named tuple (missing_keys, unexpected_keys).

        Raises
        ------
        TypeError, ValueError
            If a value is no array of a floating dtype; if shapes, or under `strict` names, do not
            fit, with all faults in one sentence.

        Examples
        --------
        >>> import cupynorm as cn
        >>> weight = cn.LayerNorm(2, bias=False)
        >>> cn.LayerNorm(2).load_state_dict(weight.state_dict(), strict=False)
        IncompatibleKeys(missing_keys=['bias'], unexpected_keys=[])
        """
        return self._load(state, strict, "state", "")

    def _load(
        self, state: Mapping[str, Any], strict: bool, source: str, prefix: str
    ) -> IncompatibleKeys:
        if not isinstance(state, Mapping):
            msg = f"state is a {type(state).__name__}; pass a mapping of names to arrays"
            raise TypeError(msg)
        mine = self.state_dict(prefix)
        for name in mine.keys() & state.keys():
            check_own(name, mine[name])
        missing = [name for name in mine if name not in state]
        unexpected = [name for name in state if name not in mine]
        hosts = {n: host_of(n, state[n]) for n in mine if n in state}
        faults = [
            f"{name} has shape {host.shape}, the layer's has {tuple(mine[name].shape)}"
            for name, host in hosts.items()
            if host.shape != tuple(mine[name].shape)
        ]
        way_out = "Make a layer of that shape, or reshape the arrays"
        for fault, names in (("it lacks", missing), ("the layer has no", unexpected)):
            if strict and names:
                faults.append(f"{fault} {_listed(names)}")
                way_out = "Pass strict=False to leave out what is on one side only"
        if faults:
            msg = f"cannot load {source} into {self!r}: {'; '.join(faults)}. {way_out}"
            raise ValueError(msg)
        # Copies: a host may be memory of the other parameter.
        hosts = {k: np.array(host, mine[k].dtype, order="C") for k, host in hosts.items()}
        for name, host in hosts.items():
            fill(mine[name], host)
        return IncompatibleKeys(missing, unexpected)

    def save(self, path: str | os.PathLike[str], *, prefix: str = "") -> None:
        """Write the parameters to a .safetensors or .npz file, whole or not at all.

        Parameters
        ----------
        path : str or path-like
            Ends in '.safetensors', which ``safetensors.torch`` reads, or '.npz', which holds
            bfloat16 as float32, as NumPy has no name for it in a file. A file that is there is
            replaced at the end.
        prefix : str, default ''
            As for `state_dict`, to match a layer of a model.

        Raises
        ------
        ValueError, ImportError
            If the name has another ending; if safetensors is needed and not installed.

        Examples
        --------
        >>> import os, tempfile
        >>> import cupynorm as cn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cn.LayerNorm(2).save(f"{folder}/norm.npz", prefix="encoder.norm.")
        ...     os.listdir(folder)
        ['norm.npz']
        """
        state = self.state_dict(prefix)
        _files.write(path, {n: host_of(n, a) for n, a in state.items()})

    def load(
        self, path: str | os.PathLike[str], *, prefix: str = "", strict: bool = True
    ) -> IncompatibleKeys:
        """Copy the parameters from a .safetensors or .npz file, as `load_state_dict` does.

        Parameters
        ----------
        path : str or path-like
            A file that `save`, ``safetensors.torch.save_file`` or ``numpy.savez`` wrote.
        prefix : str, default ''
            As for `save`: one layer comes out of a whole model's file, whose others are not read.
        strict : bool, default True
            As for `load_state_dict`, among the names that begin with `prefix`.

        Returns
        -------
        IncompatibleKeys
            As for `load_state_dict`.

        Raises
        ------
        FileNotFoundError, ValueError, TypeError, ImportError
            As for `save` and `load_state_dict`; if there is no such file, or it is no such format.

        Examples
        --------
        >>> import tempfile
        >>> import cupynorm as cn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cn.LayerNorm(2).save(f"{folder}/norm.npz")
        ...     cn.LayerNorm(2).load(f"{folder}/norm.npz")
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        """
        shapes = {name: tuple(a.shape) for name, a in self.state_dict(prefix).items()}
        names, arrays = _files.read(path, shapes)
        state = {name: arrays.get(name) for name in names if name.startswith(prefix)}
        return self._load(state, strict, os.fspath(path), prefix)

    def _sections(self) -> Sections:
        """Tell what waits for no GPU: no values."""
        rows = [("normalized_shape", str(self.normalized_shape)), ("eps", str(self.eps))]
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            gradient = "no gradient" if self.grad.get(name) is None else "with a gradient"
            told = "none" if value is None else f"{describe(value)}, {gradient}"
            rows.append((name, told))
        kept = "nothing" if self._kept is None else f"x: {describe(self._kept[0])}"
        return [(type(self).__name__, [*rows, ("kept for backward", kept)])]


def _listed(names: list[str], most: int = 10) -> str:
    """Quote names; of a whole model's, the first and how many more."""
    text = ", ".join(repr(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


# --- arrays -------------------------------------------------------------------------------------


def read_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype for a name, a NumPy or a torch dtype; float32 where nothing is said."""
    return _rules.numpy_dtype("float32" if dtype is None else _rules.read_dtype(dtype))


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
    index = device.partition(":")[2]
    with _calls.gpu(f"device={device!r}") as do, do.device(int(index) if index else None):
        array = do.empty(shape, dtype=dtype)
        array.set(host)  # not fill(): that would compile a kernel for one number
    return array


def host_of(label: str, value: Any) -> np.ndarray[Any, Any]:
    """NumPy array with the contents of an array of any library, on any device, or its refusal."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        msg = f"{label} is a {type(value).__name__}, which is no array; pass an array"
        raise TypeError(msg)
    _check_dtype(label, value)
    return _libraries.to_host(value, label)


def _check_dtype(label: str, value: Any) -> None:
    name = _rules.dtype_name(value.dtype)
    if name not in _rules.ITEMSIZE:
        _rules.check_affine_dtype(label, name, _libraries.cast_of(label, value))


def fill(array: Any, host: np.ndarray[Any, Any]) -> None:
    """Copy into an array of NumPy or CuPy; both are of one dtype."""
    if isinstance(array, np.ndarray):
        array[...] = host
    else:
        array.set(host)


def check_own(label: str, array: Any) -> None:
    """Refuse to write, or to let others write, into a parameter that cannot be written."""
    at = f"layer.{label.rpartition('.')[2]}"
    if library_of(array) not in ("numpy", "cupy"):
        made = f"{_libraries.on_host(at, array)}.copy()"
        msg = (
            f"{label} is a {_libraries.kind_of(array)}, and the parameters "
            f"of a layer are NumPy or CuPy arrays; assign one: {at} = {made}"
        )
        raise TypeError(msg)
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        msg = f"{label} is read-only; assign a copy first: {at} = {at}.copy()"
        raise ValueError(msg)
    _check_dtype(at, array)
    _libraries.check_writable(label, array)


def describe(array: Any) -> str:
    """Tell dtype, shape and library of an array, and its device where that is a GPU."""
    if not hasattr(array, "dtype"):
        return f"{type(array).__name__}, which is no array"
    library, device = library_of(array), getattr(array, "device", None)
    where = f" on {device}" if library in ("cupy", "torch", "jax") else ""
    dtype = _rules.dtype_name(array.dtype)
    return f"{dtype} {tuple(int(n) for n in array.shape)}, {library}{where}"


def check_total(name: str, total: Any, term: Any) -> None:
    """Refuse a gradient to which a term cannot be added in place."""
    if total is None or term is None:
        return
    alike = type(total) is type(term) and total.shape == term.shape
    if not (alike and _rules.dtype_name(total.dtype) in _rules.ITEMSIZE) or (
        isinstance(total, np.ndarray) and not total.flags.writeable
    ):
        shape = tuple(int(n) for n in term.shape)
        msg = (
            f"grad[{name!r}] is no array of shape {shape} to which a gradient can be added in "
            "place; call zero_grad() first"
        )
        raise ValueError(msg)


def accumulate(total: Any, term: Any) -> Any:
    """Add `term` to `total` in place, on its device; the term itself where there is no total."""
    if total is None:
        return term
    with contextlib.nullcontext() if isinstance(total, np.ndarray) else total.device:
        total += term
    return total


def from_tensor(label: str, tensor: Any) -> Any:
    """NumPy or CuPy array over the memory of a torch tensor."""
    _check_dtype(label, tensor)
    if tensor.is_cuda:
        from cupynorm._cuda import arrays as do

        return do.from_exporter(tensor.detach())  # what requires grad is exported nowhere
    if tensor.device.type != "cpu":
        msg = f"{label} is on {tensor.device}; move the module to 'cpu' or 'cuda' first"
        raise ValueError(msg)
    return _libraries.to_host(tensor, label)


def to_tensor(label: str, array: Any) -> Any:
    """Torch tensor over the memory of a NumPy or CuPy array."""
    import torch

    check_own(label, array)
    native = getattr(array.dtype, "isnative", True)
    if min(0, *array.strides) < 0 or not native:  # from DLPack steps back would end the process
        made = f"layer.{label}.{'copy()' if native else f'astype({array.dtype.name!r})'}"
        msg = (
            f"{label} has strides {tuple(array.strides)} and dtype {array.dtype}, and torch has no "
            f"step back and no other byte order; assign a copy first: layer.{label} = {made}"
        )
        raise ValueError(msg)
    if isinstance(array, np.ndarray) and _rules.dtype_name(array.dtype) == "bfloat16":
        return torch.from_dlpack(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(array)
