"""What prepared calls of all libraries have in common."""

from typing import Any, NoReturn

from cupynorm import _problem
from cupynorm._arguments import Call

__all__ = ["PreparedLayerNorm"]


class PreparedLayerNorm:
    """A layer norm whose rules, plan and kernel are settled; what `cupynorm.prepare` gives.

    Call it as ``f(x)`` or ``f(x, out=y)``, with any x of the shape, strides, dtype, library and
    device that it was prepared for. It holds weight and bias by reference, and no x.

    Notes
    -----
    The formula is that of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450;
    `cupynorm.layer_norm` says how it is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> f = cn.prepare(np.empty((2, 3)), eps=0.0)
    >>> f(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    """

    __slots__ = (
        "_device",
        "_dtype",
        "_given",
        "_order",
        "_path",
        "_shape",
        "_stats",
        "_strides",
        "_type",
    )

    def __init__(self, call: Call, order: str, return_stats: bool, path: str) -> None:
        x = call.x
        self._given = call._replace(x=None)
        self._order, self._stats, self._path = order, return_stats, path
        self._type, self._shape, self._dtype = type(x), x.shape, x.dtype
        self._strides, self._device = self._strides_of(x), self._device_of(x)

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x, into `out` if that is given."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """What it takes and what runs."""
        call = self._given
        affine = [name for name in ("weight", "bias") if getattr(call, name) is not None]
        library = self._type.__module__.partition(".")[0]
        lines = (
            f"<cupynorm.PreparedLayerNorm of {library} {_problem.dtype_name(self._dtype)} "
            f"{tuple(self._shape)} on {self._device}",
            f"axes {call.axes}",
            " and ".join(affine) if affine else "no weight or bias",
            f"eps {call.eps}",
            *(["statistics"] if self._stats else []),
            self._path,
        )
        return ", ".join(lines) + ">"

    @staticmethod
    def _strides_of(x: Any) -> tuple[int, ...]:
        return tuple(x.strides)

    @staticmethod
    def _device_of(x: Any) -> Any:
        return x.device

    def _admit(self, x: Any) -> None:
        """Refuse an x that this call was not prepared for."""
        if type(x) is not self._type:
            _refuse("type", _name(type(x)), _name(self._type))
        if x.shape != self._shape:
            _refuse("shape", tuple(x.shape), tuple(self._shape))
        if x.dtype != self._dtype:
            _refuse("dtype", x.dtype, self._dtype)
        mine, its = self._strides, self._strides_of(x)
        if any(n > 1 and s != t for n, s, t in zip(self._shape, mine, its, strict=True)):
            _refuse("strides", its, mine)
        device = self._device_of(x)
        if device != self._device:
            _refuse("device", device, self._device)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _refuse(what: str, got: Any, expected: Any) -> NoReturn:
    msg = (
        f"x has {what} {got}, but this call was prepared for {what} {expected}; prepare again with "
        "cupynorm.prepare(x, ...), or call cupynorm.layer_norm(x, ...), which takes any"
    )
    raise ValueError(msg)
