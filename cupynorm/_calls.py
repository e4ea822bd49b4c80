"""The one memo: from the arguments of a call to a settled call, forward and backward.

All that a rule may ask of arguments is known from what they look like: of each array its type,
dtype, shape, strides and device, and the plain values beside them. So every rule is applied once
for each look, and the call that comes of it is kept; only overlap needs addresses, at each call.

A door is what a library's arrays come in by: an object with ``look(array)``, ``strides(array)``,
``device(array)``, ``select`` (None, or a function of a call's arrays that gives another door),
``types`` (those that are plain arrays), ``normalizer(facts)``, ``differentiator(facts)`` and
``describe(facts)``. A door whose ``look`` is None has nothing kept for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _libraries, _reference, _rules
from cupynorm._layout import Facts, result_strides
from cupynorm._memo import keep, settled
from cupynorm._ops import Op

# By exact type of x; filled on first sight.
doors: dict[type, Any] = {}

# How a call is to be done, besides its arrays: (normalized_shape, axis, eps, order, return_stats).
How = tuple[Any, Any, Any, Any, Any]


class Checked(NamedTuple):
    """A call whose arguments have passed every rule."""

    door: Any
    facts: Facts
    turn: tuple[int, ...] | None  # permutes weight's dimensions to ascending axes
    x: Any
    weight: Any
    bias: Any
    out: Any


def normalize(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Any:
    """Forward: y, or (y, mean, rstd) where `how` asks for statistics."""
    door = doors.get(type(x))
    if door is None:
        return _settle(op, x, weight, bias, out, how)
    if door.select is not None:
        door = door.select(x, weight, bias, out)
    look = door.look
    if look is None:
        return _settle(op, x, weight, bias, out, how)
    try:
        call = settled.get(
            (
                door,
                op,
                how,
                look(x),
                weight if weight is None else look(weight),
                bias if bias is None else look(bias),
                out if out is None else look(out),
            )
        )
    except (AttributeError, TypeError):  # no array, or a shape that is a list
        call = None
    if (
        call is None
        or type(how[2]) is not float
        or not (type(how[0]) is int or _rules.exact(how[0]))
        or not (how[1] is None or _rules.exact(how[1]))
    ):
        return _settle(op, x, weight, bias, out, how)
    return call(x, weight, bias, out)


def _settle(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Any:
    """Apply the rules, keep the call, do it."""
    checked = check(op, x, weight, bias, out, how)
    result = settle(checked, how)(*checked[3:])
    if out is None or checked.out is out:
        return result
    return (out, *result[1:]) if checked.facts.stats else out  # the caller's own object


def settle(checked: Checked, how: How) -> Callable[..., Any]:
    """``call(x, weight, bias, out)`` for arrays that look like these, from the memo or for it."""
    door, facts, turn, x, weight, bias, out = checked
    kept = (
        door.look is not None
        and type(how[2]) is float
        and _rules.exact(how[0])
        and _rules.exact(how[1])
    )
    key: Any = None
    if kept:
        looks = (None if a is None else door.look(a) for a in (x, weight, bias, out))
        key = (door, facts.op, how, *looks)
        if key in settled:
            return settled[key]
    call = forward_of(door, facts, turn)
    if kept:
        keep(key, call)
    return call


def forward_of(door: Any, facts: Facts, turn: tuple[int, ...] | None) -> Callable[..., Any]:
    """The door's call, for a weight and bias whose dimensions stand in the caller's order."""
    call: Callable[..., Any] = door.normalizer(facts)
    if turn is None:
        return call

    def turning(x: Any, weight: Any, bias: Any, out: Any) -> Any:
        return call(x, _libraries.turned(weight, turn), _libraries.turned(bias, turn), out)

    return turning


def check(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How) -> Checked:
    """Apply every rule that a forward call has, but for what needs addresses; nothing is run."""
    normalized_shape, axis, eps, order, return_stats = how
    eps = _rules.check_eps(eps)
    _rules.check_order(order)
    x, dtype, axes, turn = _check_x(x, normalized_shape, axis)
    shape = tuple(x.shape)
    affine = tuple(shape[a] for a in axes)
    dtypes = {"x": dtype}
    if weight is not None:
        weight = checked_affine("weight", weight, x, affine)
        dtypes["weight"] = _rules.dtype_name(weight.dtype)
    if bias is not None:
        bias = checked_affine("bias", bias, x, affine)
        dtypes["bias"] = _rules.dtype_name(bias.dtype)
    if out is not None:
        out = companion_of("out", out, x)
        _rules.check_out(tuple(out.shape), out.dtype, shape, x.dtype, order)
    door = door_of(x, weight, bias, out)
    steps = door.strides(x)
    if out is not None:
        to = door.strides(out)
    else:
        to = None if steps is None else result_strides(shape, steps, order)
    strides = {"x": steps, "y": to}
    facts = Facts(
        op,
        False,
        shape,
        tuple(sorted(axes)),
        dtypes,
        strides,
        eps,
        order,
        out is not None,
        bool(return_stats),
        door.device(x),
    )
    if out is not None:
        _libraries.check_writable(out)
    return Checked(door, facts, turn, x, weight, bias, out)


def differentiate(op: Op, arrays: tuple[Any, ...], how: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """Backward: (dx, dweight, dbias), None for what is not wanted.

    `arrays` are dy, x, mean, rstd and weight; `how` is (normalized_shape, axis, output_mask).
    """
    door = doors.get(type(arrays[1]))
    call = None
    if door is not None:
        if door.select is not None:
            door = door.select(arrays[1], arrays[0], *arrays[2:])
        if door.look is not None and _exactly(how):
            looks = (a if a is None else door.look(a) for a in arrays)
            try:
                call = settled.get((door, op, how, *looks))
            except (AttributeError, TypeError):
                call = None
    if call is not None:
        return call(*arrays)  # type: ignore[no-any-return]
    return _settle_backward(op, arrays, how)


def _exactly(how: tuple[Any, Any, Any]) -> bool:
    mask = how[2]
    told = mask is None or (type(mask) is tuple and {*map(type, mask)} == _BOOL)
    return told and _rules.exact(how[0]) and _rules.exact(how[1])


_BOOL = {bool}


def _settle_backward(op: Op, arrays: tuple[Any, ...], how: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """Apply the rules, keep the call, do it."""
    dy, x, mean, rstd, weight = arrays
    normalized_shape, axis, output_mask = how
    x, dtype, axes, turn = _check_x(x, normalized_shape, axis)
    shape = tuple(x.shape)
    if weight is not None:
        weight = checked_affine("weight", weight, x, tuple(shape[a] for a in axes))
    mask = _rules.check_mask(output_mask, weight is not None)
    dy = _beside("dy", dy, x, shape, dtype)
    axes = tuple(sorted(axes))
    of_sums = _rules.stats_dtype(dtype)
    stats_shape = tuple(1 if a in axes else n for a, n in enumerate(shape))
    mean = _beside("mean", mean, x, stats_shape, of_sums)
    rstd = _beside("rstd", rstd, x, stats_shape, of_sums)
    dtypes = {"x": dtype}
    if weight is not None:
        dtypes["weight"] = of_sums = _rules.dtype_name(weight.dtype)
    for name, wanted in zip(("dweight", "dbias"), mask[1:], strict=True):
        if wanted:
            dtypes[name] = of_sums
    given = dy, x, mean, rstd, weight
    door = door_of(x, dy, mean, rstd, weight)
    strides = {"x": door.strides(x), "dy": door.strides(dy)}
    if mask[0]:
        strides["dx"] = None if strides["x"] is None else result_strides(shape, strides["x"], "K")
    facts = Facts(op, True, shape, axes, dtypes, strides, device=door.device(x))
    call = _turning_back(door.differentiator(facts), turn)
    if door.look is not None and _exactly(how):
        keep((door, op, how, *(None if a is None else door.look(a) for a in given)), call)
    found: tuple[Any, ...] = call(*given)
    return found


def _turning_back(call: Callable[..., Any], turn: tuple[int, ...] | None) -> Callable[..., Any]:
    """Dimensions of weight and of its gradients stand in the order in which axes were named."""
    if turn is None:
        return call
    back = tuple(int(i) for i in np.argsort(turn))

    def turning(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
        dx, *sums = call(dy, x, mean, rstd, _libraries.turned(weight, turn))
        return dx, *(_libraries.turned(total, back) for total in sums)

    return turning


# --- arrays ---------------------------------------------------------------------------------------


def _check_x(
    x: Any, normalized_shape: Any, axis: Any
) -> tuple[Any, str, tuple[int, ...], tuple[int, ...] | None]:
    """x as an array of a library, its dtype, the axes as they were named, weight's permutation."""
    x = take_in("x", x)
    dtype = _rules.dtype_name(x.dtype)
    if dtype not in _rules.ITEMSIZE:
        _rules.check_x_dtype(dtype, _libraries.cast_of("x", x))
    axes = _rules.resolve_axes(tuple(x.shape), normalized_shape, axis)
    return x, dtype, axes, _rules.axis_order(axes)


def checked_affine(label: str, value: Any, x: Any, expected: tuple[int, ...]) -> Any:
    """A weight or bias that has passed every rule."""
    value = companion_of(label, value, x)
    dtype = _rules.dtype_name(value.dtype)
    if dtype not in _rules.ITEMSIZE:
        _rules.check_affine_dtype(label, dtype, _libraries.cast_of(label, value))
    _rules.check_affine_shape(label, tuple(value.shape), expected)
    return value


def _beside(label: str, value: Any, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array that lives with x and has the shape and dtype that go with it."""
    value = companion_of(label, value, x)
    _rules.check_beside_x(label, tuple(value.shape), shape, tuple(x.shape))
    name = _rules.dtype_name(value.dtype)
    if name != dtype:
        _rules.refuse_dtype_beside_x(label, name, dtype, _rules.dtype_name(x.dtype))
    return value


def companion_of(label: str, value: Any, x: Any) -> Any:
    """Take in a subclass or a mere exporter; refuse what lives elsewhere than x."""
    value = take_in(label, value)
    _libraries.check_companion(label, value, x)
    return value


def take_in(label: str, x: Any) -> Any:
    """Look at an array; a mere exporter becomes an array of NumPy or CuPy over its memory."""
    x, path = _libraries.classify(x, label)
    if path != "gpu-exporter":
        return x
    try:
        from cupynorm._cuda import arrays
    except ImportError as error:
        msg = (
            f"{label} is on a GPU, and CuPy, which would take it, cannot be imported ({error}); "
            "pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
        )
        raise ImportError(msg) from error
    return arrays.from_exporter(x)


def door_of(x: Any, *others: Any) -> Any:
    """By which door an array of a library comes in, beside these."""
    door = doors.get(type(x))
    if door is None:
        door = doors[type(x)] = _find(x)
    return door if door.select is None else door.select(x, *others)


def _find(x: Any) -> Any:
    library = _libraries.library_of(x)
    if library == "cupy":
        from cupynorm._cuda.arrays import DOOR

        return DOOR
    if library == "torch":
        from cupynorm._torch.doors import DOOR as of_tensors

        return of_tensors
    if library == "numpy":
        from cupynorm._cpu.arrays import DOOR as of_numpy

        return of_numpy
    return _OF_OTHERS


_OF_OTHERS = _reference.Door()
