"""The one memo: from the arguments of a call to a settled call, forward and backward.

All that a rule may ask of arguments is known from what they look like: of each array its type,
dtype, shape, strides and device, and the plain values beside them. So every rule is applied once
for each look, and the call that comes of it is kept; only overlap needs addresses, at each call.

A door is what a library's arrays come in by: an object with ``look(array)``, ``strides(array)``,
``device(array)``, ``select`` (None, or a function of a call's arrays that gives another door),
``types`` (those that are plain arrays), ``normalizer(facts)``, ``differentiator(facts)`` and
``describe(facts)``. A door whose ``look`` is None has nothing kept for it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _libraries, _rules
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
    arrays: tuple[Any, ...]  # as the call takes them

    @property
    def x(self) -> Any:
        """The array that is normalized, or was."""
        return self.arrays[self.facts.backward]


def normalize(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How, *added: Any) -> Any:
    """Forward: y, or a tuple of y, the sum if there is one, and the statistics if they are wanted.

    `added` is residual and sum_out, of an operation that has them.
    """
    door, plain = doors.get(type(x)), type(how[2]) is float or how[2] is None
    if door is not None:
        if door.select is not None:
            door = door.select(x, weight, bias, out, *added)
        look = door.look
        if look is not None:
            try:
                key: tuple[Any, ...] = (
                    door,
                    op.name,
                    how,
                    look(x),
                    weight if weight is None else look(weight),
                    bias if bias is None else look(bias),
                    out if out is None else look(out),
                )
                if added:
                    key += tuple(None if a is None else look(a) for a in added)
                call = settled().get(key)
            except (AttributeError, TypeError, RuntimeError):  # no array, a shape that is a list
                call = None
            if call is not None and (
                plain
                and (type(how[0]) is int or _rules.exact(how[0]))
                and (how[1] is None or _rules.exact(how[1]))
            ):
                return call(x, weight, bias, out, *added) if added else call(x, weight, bias, out)
    checked = check(op, x, weight, bias, out, how, *added)
    result = _settle(checked, how, plain)(*checked.arrays)
    given = out, *added[1:]  # the caller's own objects
    if type(result) is not tuple:
        return result if out is None else out
    own = (made if a is None else a for a, made in zip(given, result, strict=False))
    return *own, *result[len(given) :]


def differentiate(op: Op, arrays: tuple[Any, ...], how: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """Backward: (dx, dweight, dbias), None for what is not wanted.

    `arrays` are dy, x, mean, rstd, weight and, where there is one, dsum, which is added to dx;
    `how` is (normalized_shape, axis, output_mask).
    """
    mask = how[2]
    plain = mask is None or (type(mask) is tuple and {*map(type, mask)} == {bool})
    door, call = doors.get(type(arrays[1])), None
    if door is not None and plain and _rules.exact(how[0]) and _rules.exact(how[1]):
        if door.select is not None:
            door = door.select(arrays[1], arrays[0], *arrays[2:])
        with contextlib.suppress(AttributeError, TypeError, RuntimeError):  # no arrays
            call = settled().get(_key(door, op, how, arrays)) if door.look is not None else None
    if call is None:
        checked = _check_backward(op, arrays, how)
        call, arrays = _settle(checked, how, plain), checked.arrays
    return call(*arrays)  # type: ignore[no-any-return]


def _key(door: Any, op: Op, how: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a settled call may depend on."""
    return door, op.name, how, *(None if a is None else door.look(a) for a in arrays)


def _settle(checked: Checked, how: Any, plain: bool) -> Callable[..., Any]:
    """The call for arrays that look like these, kept if `how` equals nothing but itself.

    `plain` says so of the values that are no shapes or axes.
    """
    door, facts, turn, arrays = checked
    call = call_of(door, facts, turn)
    if plain and door.look is not None and _rules.exact(how[0]) and _rules.exact(how[1]):
        keep(_key(door, facts.op, how, arrays), call)
    return call


def call_of(door: Any, facts: Facts, turn: tuple[int, ...] | None) -> Callable[..., Any]:
    """The door's call; weight, bias and their gradients have the caller's order of dimensions."""
    call: Callable[..., Any]
    call = door.differentiator(facts) if facts.backward else door.normalizer(facts)
    if turn is None:
        return call
    turned, back = _libraries.turned, tuple(int(i) for i in np.argsort(turn))

    def forward(x: Any, weight: Any, bias: Any, *more: Any) -> Any:
        return call(x, turned(weight, turn), turned(bias, turn), *more)

    def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *dsum: Any) -> Any:
        dx, *sums = call(dy, x, mean, rstd, turned(weight, turn), *dsum)
        return dx, *(turned(total, back) for total in sums)

    return backward if facts.backward else forward


def check(op: Op, x: Any, weight: Any, bias: Any, out: Any, how: How, *added: Any) -> Checked:
    """Apply every rule that a forward call has, but for what needs addresses; nothing is run."""
    normalized_shape, axis, eps, order, stats = how
    _rules.check_order(order)
    x, axes, turn = _check_x(op, x, normalized_shape, axis)
    shape, dtype = tuple(x.shape), _rules.dtype_name(x.dtype)
    eps = _rules.eps_of(op, eps, dtype)
    affine = tuple(shape[a] for a in axes)
    if weight is not None:
        weight = checked_affine("weight", weight, x, affine)
    if bias is not None:
        bias = checked_affine("bias", bias, x, affine)
    if out is not None:
        out = _checked_out("out", out, "x", x, order)
    if op.residual:
        residual, sum_out = added
        if residual is None:
            _rules.refuse_none("residual", shape)
        residual = companion_of("residual", residual, x)
        name = _rules.dtype_name(residual.dtype)
        _rules.check_residual(tuple(residual.shape), name, shape, dtype)
        if sum_out is not None:
            sum_out = _checked_out("sum_out", sum_out, "residual", residual, order)
        added = residual, sum_out
    door = door_of(x, weight, bias, out, *added)
    strides = {"x": door.strides(x)}
    made = result_strides(shape, strides["x"], order)
    strides["y"] = made if out is None else door.strides(out)
    given = {"x": x, "weight": weight, "bias": bias}
    if op.residual:
        given["residual"] = residual
        strides["residual"] = door.strides(residual)
        strides["sum"] = made if sum_out is None else door.strides(sum_out)
    dtypes = {k: _rules.dtype_name(a.dtype) for k, a in given.items() if a is not None}
    asked = eps, order, out is not None, bool(stats), door.device(x)
    facts = Facts(op, False, shape, tuple(sorted(axes)), dtypes, strides, *asked)
    return Checked(door, facts, turn, (x, weight, bias, out, *added))


def _checked_out(label: str, out: Any, like: str, x: Any, order: str) -> Any:
    """What a result is to be written to, beside an x that it is like."""
    out = companion_of(label, out, x)
    _rules.check_out(label, out, like, x, order)
    _libraries.check_writable(label, out)
    return out


def _check_backward(op: Op, arrays: tuple[Any, ...], how: tuple[Any, Any, Any]) -> Checked:
    """Apply every rule that a backward call has; nothing is run."""
    dy, x, mean, rstd, weight, *dsum = arrays
    x, axes, turn = _check_x(op, x, *how[:2])
    shape, dtype = tuple(x.shape), _rules.dtype_name(x.dtype)
    if weight is not None:
        weight = checked_affine("weight", weight, x, tuple(shape[a] for a in axes))
    mask = _rules.check_mask(how[2], weight is not None, op.center)
    axes = tuple(sorted(axes))
    sums = _rules.stats_dtype(dtype)
    of_rows = _rules.stats_shape(shape, axes)
    dy, *dsum = (
        _beside((k, op.function), a, x, shape, dtype)
        for k, a in zip(("dy", "dsum"), (dy, *dsum), strict=False)
    )
    if op.center:
        mean = _beside(("mean", op.function), mean, x, of_rows, sums)
    rstd = _beside(("rstd", op.function), rstd, x, of_rows, sums)
    dtypes = {"x": dtype}
    if weight is not None:
        dtypes["weight"] = sums = _rules.dtype_name(weight.dtype)
    dtypes |= {k: sums for k, wanted in zip(("dweight", "dbias"), mask[1:], strict=True) if wanted}
    door = door_of(x, dy, mean, rstd, weight, *dsum)
    strides = {"x": door.strides(x), "dy": door.strides(dy)}
    if dsum:
        strides["dsum"] = door.strides(dsum[0])
    if mask[0]:
        strides["dx"] = result_strides(shape, strides["x"], "K")
    facts = Facts(op, True, shape, axes, dtypes, strides, device=door.device(x))
    return Checked(door, facts, turn, (dy, x, mean, rstd, weight, *dsum))


# --- arrays ---------------------------------------------------------------------------------------


def _check_x(
    op: Op, x: Any, normalized_shape: Any, axis: Any
) -> tuple[Any, tuple[int, ...], tuple[int, ...] | None]:
    """x as an array of a library, the axes as they were named, weight's permutation."""
    given, x = x, take_in("x", x)
    dtype = _rules.dtype_name(x.dtype)
    if dtype not in _rules.ITEMSIZE:
        _rules.check_x_dtype(dtype, _libraries.cast_of("x", x, given), op.function)
    axes = _rules.resolve_axes(tuple(x.shape), normalized_shape, axis)
    return x, axes, _rules.axis_order(axes)


def checked_affine(label: str, value: Any, x: Any, expected: tuple[int, ...]) -> Any:
    """A weight or bias that has passed every rule."""
    given, value = value, companion_of(label, value, x)
    dtype = _rules.dtype_name(value.dtype)
    if dtype not in _rules.ITEMSIZE:
        _rules.check_affine_dtype(label, dtype, _libraries.cast_of(label, value, given))
    _rules.check_affine_shape(label, tuple(value.shape), expected)
    return value


def _beside(of: tuple[str, str], value: Any, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array that lives with x and has the shape and dtype that go with it; `of`: as there."""
    if value is None:
        _rules.refuse_none(of[0], shape)
    value = companion_of(of[0], value, x)
    _rules.check_beside_x(of, tuple(value.shape), shape, tuple(x.shape))
    name = _rules.dtype_name(value.dtype)
    if name != dtype:
        _rules.refuse_dtype_beside_x(of[0], name, dtype, _rules.dtype_name(x.dtype))
    return value


def companion_of(label: str, value: Any, x: Any) -> Any:
    """Take in a subclass or a mere exporter; refuse what lives elsewhere than x."""
    value = take_in(label, value, x)
    _libraries.check_companion(label, value, x)
    return value


def take_in(label: str, x: Any, beside: Any = None) -> Any:
    """Look at an array; a mere exporter becomes an array of NumPy or CuPy over its memory."""
    x, path = _libraries.classify(x, label, beside)
    if path != "gpu-exporter":
        return x
    with gpu(f"{label} on a GPU") as arrays:
        return arrays.from_exporter(x)


@contextlib.contextmanager
def gpu(what: str) -> Iterator[Any]:
    """CuPy's door, for `what` needs it, and a sentence where CuPy or a GPU is missing."""
    with _libraries.needing(f"{what} needs CuPy", _libraries.GET_CUPY):
        from cupynorm._cuda import arrays
    try:
        yield arrays
    except RuntimeError as error:  # CuPy's, where there is no driver or no such GPU
        msg = (
            f"{what} cannot be used ({error}); run `python -m cupynorm`, which tells why, or use "
            "the CPU"
        )
        raise RuntimeError(msg) from error


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
    from cupynorm._reference import DOOR as of_others

    return of_others
