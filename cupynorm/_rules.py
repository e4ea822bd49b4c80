"""Every rule about the arguments of a call, and every sentence that says what is wrong with them.

Rules look at shapes, dtypes and plain values, never at memory: `_calls` applies them once to what a
call looks like. Whose array something is, and whether two overlap, `_libraries` tells.
"""

import functools
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from cupynorm._libraries import bfloat16
from cupynorm._ops import OPS, Op

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_CHOICES = "float16, bfloat16, float32 or float64"


def stats_dtype(x_dtype: str) -> str:
    """Name of the dtype in which mean and rstd are computed and returned."""
    return "float64" if x_dtype == "float64" else "float32"


def stats_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Shape of mean and rstd: x's with the normalized axes of length 1."""
    return tuple(1 if a in axes else n for a, n in enumerate(shape))


def dtype_name(dtype: Any) -> str:
    """Name of a dtype of any library: 'float32' for numpy's '>f4' and for torch.float32."""
    if isinstance(dtype, np.dtype):
        return _numpy_name(dtype)
    # Not cached: other libraries' dtypes may warn when compared with NumPy's.
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def name_of_dtype(dtype: Any) -> str:
    """Name of a dtype that is given by name, as NumPy's or as another library's."""
    if isinstance(dtype, str) and dtype == "bfloat16":  # of which NumPy knows nothing
        return dtype
    try:
        return _numpy_name(np.dtype(dtype))
    except TypeError:
        return dtype_name(dtype)  # of another library, or no dtype at all


def read_dtype(dtype: Any) -> str:
    """Name of a dtype, given as `name_of_dtype` takes it, that is one of the four."""
    name = name_of_dtype(dtype)
    if name not in ITEMSIZE:
        msg = f"dtype={dtype!r} is no float of 16 to 64 bits; pass one of {', '.join(ITEMSIZE)}"
        raise TypeError(msg)
    return name


@functools.cache
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # builds the string anew each time, which costs microseconds


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is ml_dtypes'."""
    return bfloat16() if name == "bfloat16" else np.dtype(name)


def check_x_dtype(name: str, cast: str, function: str = "layer_norm") -> None:
    """Refuse every dtype of x that is not one of the four floating ones."""
    if name not in ITEMSIZE:
        msg = f"x has dtype {name}; {function} takes {_CHOICES}. Cast it first: {cast}"
        raise TypeError(msg)


def resolve_op(name: Any) -> Op:
    """Read the name of an operation."""
    if name not in OPS:
        msg = f"op={name!r} is not one of {', '.join(OPS)}; pass one of these names"
        raise ValueError(msg)
    return OPS[name]


def integers(value: Any, label: str) -> tuple[int, ...]:
    """Read an int or a sequence of ints; `label` is what the caller calls it."""
    items = tuple(value) if isinstance(value, Sequence) else (value,)
    try:
        if isinstance(value, str) or any(isinstance(item, bool) for item in items):
            raise TypeError
        return tuple(operator.index(item) for item in items)
    except TypeError:
        msg = f"{label} must be an int or a tuple of ints, not {value!r}; pass e.g. 1 or (1, 2)"
        raise TypeError(msg) from None


def read_shape(normalized_shape: Any) -> tuple[int, ...]:
    """Read trailing dimensions where there is no x yet."""
    shape = integers(normalized_shape, "normalized_shape")
    if not shape or min(shape) < 0:
        msg = (
            f"normalized_shape={normalized_shape!r} is no shape to normalize over; pass the "
            "trailing dimensions of x, e.g. normalized_shape=64"
        )
        raise ValueError(msg)
    return shape


def resolve_axes(shape: tuple[int, ...], normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    """Non-negative axes of x to normalize, in the order that `weight` is indexed by."""
    if normalized_shape is not None and axis is not None:
        msg = (
            f"got both normalized_shape={normalized_shape!r} and axis={axis!r}, which say the same "
            "thing in two ways; pass one of them"
        )
        raise TypeError(msg)
    if not shape:
        msg = "x has shape () and so no axis to normalize; reshape it, e.g. x.reshape(1)"
        raise ValueError(msg)
    ndim = len(shape)
    if axis is not None:
        return _axes_from_axis(shape, integers(axis, "axis"))
    if normalized_shape is None:
        return (ndim - 1,)
    wanted = integers(normalized_shape, "normalized_shape")
    if not wanted:
        msg = (
            "normalized_shape=() names no dimension to normalize; pass the trailing dimensions "
            f"of x, e.g. normalized_shape={shape[-1:]} for x with shape {shape}"
        )
        raise ValueError(msg)
    if wanted != shape[-len(wanted) :]:
        msg = (
            f"normalized_shape={wanted} does not equal the trailing dimensions of x with shape "
            f"{shape}; pass normalized_shape={shape[-len(wanted) :]}, or axis= for other axes"
        )
        raise ValueError(msg)
    return tuple(range(ndim - len(wanted), ndim))


def _axes_from_axis(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    ndim = len(shape)
    if not wanted:
        msg = "axis=() names no axis to normalize; pass at least one, e.g. axis=-1"
        raise ValueError(msg)
    for a in wanted:
        if not -ndim <= a < ndim:
            msg = (
                f"axis={a} is out of range for x with shape {shape}; "
                f"pass one from {-ndim} to {ndim - 1}"
            )
            raise ValueError(msg)
    axes = tuple(a % ndim for a in wanted)
    if len(set(axes)) != len(axes):
        msg = f"axis={wanted} names an axis twice for x with shape {shape}; name each axis once"
        raise ValueError(msg)
    return axes


def axis_order(axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Permutation that brings weight's dimensions into ascending axis order; None if they are."""
    order = tuple(sorted(range(len(axes)), key=axes.__getitem__))
    return None if order == tuple(range(len(axes))) else order


def check_affine_dtype(label: str, dtype: str, cast: str) -> None:
    """Refuse a weight or bias that is not of a floating dtype."""
    if dtype not in ITEMSIZE:
        msg = f"{label} has dtype {dtype}; it must be {_CHOICES}. Cast it first: {cast}"
        raise TypeError(msg)


def check_affine_shape(label: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a weight or bias whose shape is not that of the normalized axes."""
    if shape != expected:
        msg = (
            f"{label} has shape {shape}, but the normalized axes have shape {expected}; "
            f"pass {label}.reshape({expected}) or an array of that shape"
        )
        raise ValueError(msg)


def exact(value: Any) -> bool:
    """Whether a look-up tells a shape or axis from others: 1.0 and True equal 1."""
    kind = type(value)
    if kind is not tuple:
        return kind is int or value is None
    # One length is by far the most frequent, and costs a fifth of what the general way does.
    return type(value[0]) is int if len(value) == 1 else {*map(type, value)} == _INT


_INT = {int}


def eps_of(op: Op, eps: Any, x_dtype: str) -> float:
    """Read eps; an RMS norm may name none, and has torch's: that of the statistics' dtype."""
    if eps is None and not op.center:
        return float(np.finfo(stats_dtype(x_dtype)).eps)
    return check_eps(eps)


def default_eps(op: Op, eps: Any) -> Any:
    """The eps of a call that may name none, None where it goes by x's dtype."""
    return 1e-5 if eps is None and op.center else eps


def check_eps(eps: Any) -> float:
    """Read eps: any finite real number."""
    if not isinstance(eps, numbers.Real) or isinstance(eps, bool):
        msg = (
            f"eps must be a real number, not {eps!r} of type {type(eps).__name__}; pass one such "
            "as 1e-5"
        )
        raise TypeError(msg)
    try:
        value = float(eps)
    except OverflowError:  # an int beyond float64
        value = math.inf
    if value - value != 0.0:  # math.isfinite, in what torch.compile can trace
        msg = f"eps={value} is not finite; pass a finite number such as 1e-5"
        raise ValueError(msg)
    return value


def check_order(order: Any) -> None:
    """Refuse an `order` other than K, C and F."""
    if order not in ("K", "C", "F"):
        msg = (
            f"order={order!r} is not one of 'K' (x's layout), 'C' (row-major), 'F' (column-major); "
            "pass one of them"
        )
        raise ValueError(msg)


def check_out(label: str, out: Any, like: str, x: Any, order: str) -> None:
    """Refuse a result whose shape or dtype is not that of x, or a layout asked for twice."""
    for what, got, wanted in (
        ("shape", tuple(out.shape), tuple(x.shape)),
        ("dtype", out.dtype, x.dtype),
    ):
        if got != wanted:
            fault = f"{label} has {what} {got}, but {like} has {what} {wanted}"
            _refuse_out(fault, f"make it {like}'s {what}")
    if order != "K":
        fault = f"got both {label}= and order={order!r}"
        _refuse_out(fault, f"{label} keeps its own layout; drop order=")


def check_residual(shape: tuple[int, ...], dtype: str, x_shape: tuple[int, ...], x: str) -> None:
    """Refuse a residual whose shape is not x's, or whose dtype does not go with x's."""
    if shape != x_shape:
        msg = f"residual has shape {shape}, but x has shape {x_shape}; make it x's shape"
        raise ValueError(msg)
    choices = (x, "float32") if ITEMSIZE[x] == 2 else (x,)
    if dtype not in choices:
        wanted = " or ".join(choices)
        msg = f"residual has dtype {dtype}, but {wanted} goes with x of dtype {x}; cast residual"
        raise ValueError(msg)


def check_beside_x(
    of: tuple[str, str], shape: tuple[int, ...], expected: tuple[int, ...], x_shape: tuple[int, ...]
) -> None:
    """Refuse a gradient or statistic whose shape does not go with x's.

    `of` is what it is called and the name of the function that is differentiated.
    """
    if shape != expected:
        label, function = of
        way_out = (
            f"pass the gradient of {function}(x), which has x's shape"
            if label in ("dy", "dsum")
            else f"pass what {function}(x, ..., return_stats=True) gave, for the same axes"
        )
        msg = f"{label} has shape {shape}, but {expected} goes with x of shape {x_shape}; {way_out}"
        raise ValueError(msg)


def refuse_none(label: str, shape: tuple[int, ...]) -> NoReturn:
    """Refuse None for what there must be."""
    msg = f"{label} is a NoneType, which is no array; pass an array of shape {shape}"
    raise TypeError(msg)


def refuse_dtype_beside_x(label: str, dtype: str, expected: str, x_dtype: str) -> NoReturn:
    """Refuse a gradient or statistic whose dtype does not go with x's."""
    msg = f"{label} has dtype {dtype}, but {expected} goes with x of dtype {x_dtype}; cast {label}"
    raise ValueError(msg)


def check_mask(output_mask: Any, has_weight: bool, has_bias: bool) -> tuple[bool, bool, bool]:
    """Read which of dx, dweight and dbias are wanted; the last is where there may be a bias."""
    if output_mask is None:
        return True, has_weight, has_bias
    mask = tuple(output_mask) if isinstance(output_mask, Iterable) else ()
    wanted = (True,) * (2 + has_bias)
    if len(mask) != len(wanted) or not all(isinstance(m, (bool, np.bool_)) for m in mask):
        which = "three bools, for dx, dweight and dbias" if has_bias else "two, for dx and dweight"
        msg = f"output_mask={output_mask!r} is not {which}; pass e.g. output_mask={wanted}"
        raise TypeError(msg)
    return bool(mask[0]), bool(mask[1]), has_bias and bool(mask[2])


def _refuse_out(fault: str, way_out: str) -> NoReturn:
    msg = f"{fault}; {way_out}"
    raise ValueError(msg)
