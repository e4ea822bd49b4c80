"""A call prepared once for many arrays of one kind."""

from importlib import import_module
from typing import Any, NoReturn

from cupynorm import _calls, _rules, dask, frames
from cupynorm._libraries import kind_of
from cupynorm._ops import LAYER_NORM, named

__all__ = ["PreparedLayerNorm", "prepare"]


class PreparedLayerNorm:
    """A layer norm whose rules, plan and kernel are settled; what `cupynorm.prepare` gives.

    Call it as ``f(x)`` or ``f(x, out=y)``, with any x of the shape, strides, dtype, library and
    device that it was prepared for. It holds weight and bias, by reference, and no x; a copy or a
    pickle of it holds copies of them.

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

    __slots__ = "_affine", "_call", "_device", "_door", "_facts", "_how", "_into", "_looks", "_turn"

    def __init__(self, door: Any, state: tuple[Any, ...], affine: tuple[Any, Any]) -> None:
        self._door, self._affine = door, affine
        self._facts, self._turn, self._how, x_look, self._device = state
        self._looks = x_look, *(None if a is None else door.look(a) for a in affine)
        self._call = _calls.call_of(door, self._facts, self._turn)
        self._into: tuple[Any, Any] = None, None  # how `out` looked last, and the call for it

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x, into `out` if that is given."""
        door, (weight, bias), facts = self._door, self._affine, self._facts
        if type(x) not in door.types:
            self._refuse("type", kind_of(x), kind_of(door.types[0]))
        select, look, looks = door.select, door.look, self._looks
        plain = select is None or select(x, weight, bias, out) is door
        if (
            plain
            and look(x) == looks[0]
            and (weight is None or look(weight) == looks[1])
            and (bias is None or look(bias) == looks[2])
        ):
            if out is None:
                found = self._call(x, weight, bias, None)
            elif type(out) in door.types and look(out) == self._into[0]:
                found = self._into[1](x, weight, bias, out)
            else:
                found = self._by_rules(x, out)
                if type(out) in door.types:  # as the next one may look, too
                    steps = facts.strides | {"y": door.strides(out)}
                    met = facts._replace(strides=steps, out=True)
                    self._into = door.look(out), _calls.call_of(door, met, self._turn)
        else:
            self._admit(x)
            if select is not None and (why := select(x, weight, bias, out).refuses_prepared):
                raise ValueError(why)
            found = self._by_rules(x, out)
        return named(facts.op, True, found) if facts.stats else found

    def _by_rules(self, x: Any, out: Any, *added: Any) -> Any:
        return _calls.normalize(self._facts.op, x, *self._affine, out, self._how, *added)

    def __repr__(self) -> str:
        """What it takes."""
        facts, (weight, bias) = self._facts, self._affine
        affine = [n for n, a in (("weight", weight), ("bias", bias)) if a is not None]
        library = self._door.types[0].__module__.partition(".")[0]
        parts = (
            f"<cupynorm.PreparedLayerNorm of {library} {facts.dtypes['x']} {facts.shape} "
            f"on {self._device}",
            *([] if facts.op == LAYER_NORM else [facts.op.name]),
            f"axes {facts.axes}",
            " and ".join(affine) if affine else "no weight or bias",
            f"eps {facts.eps}",
            *(["statistics"] if facts.stats else []),
            self._door.describe(facts),
        )
        return ", ".join(parts) + ">"

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it where it is unpickled or copied, for the weight and bias that come along."""
        door = type(self._door).__module__
        state = self._facts, self._turn, self._how, self._looks[0], self._device
        return _rebuilt, (type(self), door, state, self._affine)

    def _admit(self, x: Any) -> None:
        """Refuse an x that this call was not prepared for."""
        facts = self._facts
        if tuple(x.shape) != facts.shape:
            self._refuse("shape", tuple(x.shape), facts.shape)
        if _rules.dtype_name(x.dtype) != facts.dtypes["x"]:
            self._refuse("dtype", x.dtype, facts.dtypes["x"])
        mine, its = facts.strides["x"], self._door.strides(x)
        steps = zip(facts.shape, mine or (), its or (), strict=False)
        if (mine is None) != (its is None) or any(n > 1 and s != t for n, s, t in steps):
            size = x.dtype.itemsize if hasattr(x, "strides") else 1  # in bytes, but for torch
            self._refuse("strides", *(s and tuple(size * n for n in s) for s in (its, mine)))
        if str(x.device) != self._device:
            self._refuse("device", x.device, self._device)

    def _refuse(self, what: str, got: Any, expected: Any) -> NoReturn:
        msg = (
            f"x has {what} {got}, but this call was prepared for {what} {expected}; prepare again "
            "with cupynorm.prepare(x, ...), or call cupynorm.layer_norm(x, ...), which takes any"
        )
        raise ValueError(msg)


class PreparedAddNorm(PreparedLayerNorm):
    """As `PreparedLayerNorm`, where a residual is added first: ``f(x, residual)``."""

    __slots__ = ()

    def __call__(self, x: Any, residual: Any, out: Any = None, sum_out: Any = None) -> Any:  # type: ignore[override]
        """Normalize x + residual, into `out`, and give the sum, into `sum_out`."""
        if type(x) not in self._door.types:
            self._refuse("type", kind_of(x), kind_of(self._door.types[0]))
        self._admit(x)
        found = self._by_rules(x, out, residual, sum_out)
        return named(self._facts.op, self._facts.stats, found)


def _rebuilt(
    kind: type[PreparedLayerNorm], door: str, state: tuple[Any, ...], affine: tuple[Any, Any]
) -> PreparedLayerNorm:
    return kind(import_module(door).DOOR, state, affine)


def prepare(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    order: str = "K",
    return_stats: bool = False,
    op: str = "layer_norm",
    residual: Any = None,
) -> PreparedLayerNorm:
    """Settle all of a `layer_norm` call that does not depend on the values of x.

    Or of another operation, which `op` names. Argument rules, the plan, and the kernel, compiled if
    need be, are looked up here, so that a call of the result costs a few comparisons and a launch.
    ``f(x, out=y)`` allocates nothing and waits for nothing: it can be captured in a CUDA graph.

    Parameters
    ----------
    x : array
        An example of what will come, a NumPy or CuPy array or a torch tensor on the CPU or a CUDA
        device. Its values do not matter and it is not kept.
    normalized_shape : int or tuple of int, optional
        As for `layer_norm`.
    weight, bias : array, optional
        As for `layer_norm`, of shape `normalized_shape`. They are kept by reference: what is
        written into them later counts, and so does other memory that they are given (a torch
        parameter's ``.data``). If their memory cannot be used as it is (not row-major; on the CPU,
        another dtype than that of the statistics), each call makes copies of them.
    eps : float, optional
        As for `layer_norm`; by default that of the operation.
    axis, order, return_stats : optional
        As for `layer_norm`; with `return_stats` each call gives mean and rstd, too.
    op : str, default 'layer_norm'
        The function: 'layer_norm', 'rms_norm', 'add_layer_norm' or 'add_rms_norm', and with
        ``zero_centered_`` before its name for ``1 + weight``.
    residual : array, optional
        An example of what is added, of an operation that adds. Its call is
        ``f(x, residual, out=y, sum_out=residual)``.

    Returns
    -------
    PreparedLayerNorm
        ``f(x)`` or ``f(x, out=y)``, which gives what `layer_norm` gives, bit for bit, for any x of
        the same shape, strides, dtype, library and device. `out` follows the rules of
        `layer_norm`: it may be x itself, and a partial overlap is refused.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm` does for bad arguments; TypeError for an x of another library: JAX has
        ``jax.jit`` for this, Dask arrays and tables are not computed call by call. The result
        raises ValueError for an x that is not as the example was, with both values.

    Notes
    -----
    A call with `return_stats` allocates the statistics; rows so long that two kernels share one
    (see `explain`) need a workspace, which each call takes from the memory pool. CuPy arrays run on
    CuPy's current stream, tensors on torch's. Prepared calls are not differentiable: where grad
    mode is on and a tensor requires grad, and inside ``torch.compile`` or ``torch.func``, they
    raise ValueError; under ``torch.no_grad()`` a model's parameters may be passed as they are.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> weight = np.ones(3)
    >>> f = cn.prepare(x, 3, weight, eps=0.0)
    >>> y = np.empty_like(x)
    >>> f(x, out=y).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    >>> weight *= 2
    >>> f(x)[0].round(3)
    array([-2.449,  0.   ,  2.449])
    """
    operation = _rules.resolve_op(op)
    how = normalized_shape, axis, _rules.default_eps(operation, eps), order, return_stats
    if dask.is_collection(x) or frames.is_table(x):
        _refuse_kind(x)
    added = (residual, None) if operation.residual else ()
    checked = _calls.check(operation, x, weight, bias, None, how, *added)
    door = _calls.doors[type(checked.x)]  # whoever may watch this example
    if door.look is None:
        _refuse_kind(x)
    for label, array in zip(("x", "weight", "bias"), checked.arrays[:3], strict=True):
        if array is not None and type(array) not in door.types:
            msg = (
                f"{label} is a {kind_of(array)}, and prepared calls know plain tensors alone; "
                "call cupynorm.torch.layer_norm"
            )
            raise TypeError(msg)
    x, *affine = checked.arrays[:3]
    state = checked.facts, checked.turn, how, door.look(x), str(x.device)
    return (PreparedAddNorm if added else PreparedLayerNorm)(door, state, tuple(affine))


def _refuse_kind(x: Any) -> NoReturn:
    msg = (
        f"x is a {kind_of(x)}, for which nothing can be prepared; cupynorm.prepare takes NumPy "
        "and CuPy arrays and torch tensors on the CPU or, where CuPy is installed, a CUDA device. "
        "Call cupynorm.layer_norm(x, ...)"
    )
    raise TypeError(msg)
