"""What every layer has: named parameters and gradients, state dicts, files."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from cupynorm._display import Sections, Table
from cupynorm.modules import _files, _parameters


class IncompatibleKeys(NamedTuple):
    """What a state and a layer do not have in common.

    Attributes
    ----------
    missing_keys : list of str
        Parameters of the layer that the state does not hold.
    unexpected_keys : list of str
        Names in the state that the layer does not have.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Stateful(Table):
    """Base of the layers: a weight and a bias, either of which may be None."""

    normalized_shape: tuple[int, ...]
    eps: float
    weight: Any
    bias: Any
    grad: dict[str, Any]
    _kept: tuple[Any, Any, Any] | None  # x, mean, rstd of the last forward

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
        >>> cn.LayerNorm(2).state_dict("norm.")
        {'norm.weight': array([1., 1.], dtype=float32), 'norm.bias': array([0., 0.], dtype=float32)}
        """
        both = (("weight", self.weight), ("bias", self.bias))
        return {prefix + name: value for name, value in both if value is not None}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copy values into the parameters, which stay where they are and keep their dtype.

        Nothing is changed where anything is wrong. Gradients and what `forward` kept stay.

        Parameters
        ----------
        state : mapping of str to array
            Arrays named 'weight' and 'bias', of any library and on any device: this call copies,
            from torch tensors and between devices too.
        strict : bool, default True
            Whether missing and unexpected names are errors. A wrong shape always is.

        Returns
        -------
        IncompatibleKeys
            The named tuple (missing_keys, unexpected_keys).

        Raises
        ------
        ValueError
            If shapes do not fit, or under `strict` names; all faults in one sentence.
        TypeError
            If a value is no array or has another than the four floating dtypes.

        Examples
        --------
        >>> import numpy as np
        >>> import cupynorm as cn
        >>> layer = cn.LayerNorm(2)
        >>> layer.load_state_dict({"weight": np.array([2.0, 3.0])}, strict=False)
        IncompatibleKeys(missing_keys=['bias'], unexpected_keys=[])
        """
        return self._load(state, strict, "state", "")

    def _load(
        self, state: Mapping[str, Any], strict: bool, source: str, prefix: str
    ) -> IncompatibleKeys:
        mine = self.state_dict(prefix)
        missing = [name for name in mine if name not in state]
        unexpected = [name for name in state if name not in mine]
        hosts = {n: _parameters.to_host(n, state[n]) for n in mine if n in state}
        faults = [
            f"{name} has shape {host.shape}, the layer's has {tuple(mine[name].shape)}"
            for name, host in hosts.items()
            if host.shape != tuple(mine[name].shape)
        ]
        if strict and missing:
            faults.append(f"it lacks {_listed(missing)}")
        if strict and unexpected:
            faults.append(f"the layer has no {_listed(unexpected)}")
        if faults:
            msg = f"cannot load {source} into {self!r}: {'; '.join(faults)}. "
            if strict and (missing or unexpected):
                msg += "Pass strict=False to leave out what is on one side only"
            else:
                msg += "Make a layer of that shape, or reshape the arrays"
            raise ValueError(msg)
        for name, host in hosts.items():
            _parameters.fill(mine[name], host)
        return IncompatibleKeys(missing, unexpected)

    def save(self, path: str | os.PathLike[str], *, prefix: str = "") -> None:
        """Write the parameters to a .safetensors or .npz file, whole or not at all.

        Parameters
        ----------
        path : str or path-like
            Ends in '.safetensors' (needs the package safetensors) or '.npz'. A file that is there
            is replaced at the end, so no reader meets half of one.
        prefix : str, default ''
            As for `state_dict`, to match a layer of a model.

        Raises
        ------
        ValueError, ImportError
            If the name has another ending; if safetensors is needed and not installed.

        Notes
        -----
        The names are torch's, and ``safetensors.torch`` reads the file. An .npz holds bfloat16
        as float32, which is exact, because NumPy has no name for it in a file. Neither format
        can run code when it is read.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> import cupynorm as cn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "norm.npz")
        ...     cn.LayerNorm(2).save(file, prefix="encoder.norm.")
        ...     cn.LayerNorm(2).load(file, prefix="encoder.norm.")
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        """
        state = self.state_dict(prefix)
        _files.write(path, {n: _parameters.to_host(n, a) for n, a in state.items()})

    def load(
        self, path: str | os.PathLike[str], *, prefix: str = "", strict: bool = True
    ) -> IncompatibleKeys:
        """Copy the parameters from a .safetensors or .npz file, as `load_state_dict` does.

        Parameters
        ----------
        path : str or path-like
            A file that `save`, ``safetensors.torch.save_file`` or ``numpy.savez`` wrote.
        prefix : str, default ''
            Take names that begin so, and read them without it: with 'encoder.norm1.' one layer
            comes out of a whole model's file. Only its arrays are read.
        strict : bool, default True
            As for `load_state_dict`, among the names that begin with `prefix`.

        Returns
        -------
        IncompatibleKeys
            The named tuple (missing_keys, unexpected_keys), with the prefix.

        Raises
        ------
        FileNotFoundError, ValueError, TypeError, ImportError
            As for `save` and `load_state_dict`; if there is no such file, or it is not of the
            format that its ending says.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import cupynorm as cn
        >>> layer = cn.LayerNorm(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "norm.npz")
        ...     np.savez(file, weight=np.array([2.0, 3.0]), bias=np.zeros(2))
        ...     keys = layer.load(file)
        >>> layer.weight
        array([2., 3.], dtype=float32)
        """
        names, arrays = _files.read(path, set(self.state_dict(prefix)))
        state = {name: arrays.get(name) for name in names if name.startswith(prefix)}
        return self._load(state, strict, os.fspath(path), prefix)

    def _sections(self) -> Sections:
        """Tell what waits for no GPU: no values."""
        shape = tuple(int(n) for n in self.normalized_shape)
        rows = [("normalized_shape", str(shape)), ("eps", str(self.eps))]
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            gradient = "no gradient" if self.grad.get(name) is None else "with a gradient"
            told = "none" if value is None else f"{_parameters.describe(value)}, {gradient}"
            rows.append((name, told))
        kept = "nothing" if self._kept is None else f"x: {_parameters.describe(self._kept[0])}"
        return [(type(self).__name__, [*rows, ("kept for backward", kept)])]


def _listed(names: list[str], most: int = 10) -> str:
    """Quote names; of a whole model's, the first and how many more."""
    text = ", ".join(repr(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
