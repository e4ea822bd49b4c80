"""An operator for each operation and direction, for compilers, exporters and tracers.

`cupynorm::layer_norm_fwd` and `_bwd`, and so on by the names of operations; an addition has no
backward of its own.
"""

from typing import Any

import torch

from cupynorm._libraries import check_companion
from cupynorm._ops import OPS, Op
from cupynorm._rules import check_affine_shape, check_residual, dtype_name, stats_shape
from cupynorm._torch import tensors

_library = torch.library.Library("cupynorm", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
FORWARD: dict[str, Any] = {}  # by name of the operation
_BACKWARD: dict[str, Any] = {}


def _define(op: Op) -> None:
    residual = ", Tensor residual" if op.residual else ""
    results = ["y"] + ["sum"] * op.residual + ["mean"] * op.center + ["rstd"]
    told = ", ".join(f"Tensor {name}" for name in results)
    # keep: y has x's strides, else it is row-major. wanted: dx, dweight, dbias.
    schemas = [
        f"{op.name}_fwd(Tensor x, int[] axes, Tensor? weight, Tensor? bias, float eps, bool keep"
        f"{residual}) -> ({told})"
    ]
    if not op.residual:
        schemas.append(
            f"{op.name}_bwd(Tensor dy, Tensor x, int[] axes, Tensor? mean, Tensor rstd,"
            " Tensor? weight, bool[3] wanted, ScalarType dweight_dtype, ScalarType dbias_dtype,"
            " Tensor? dsum=None) -> (Tensor dx, Tensor dweight, Tensor dbias)"
        )
    for schema in schemas:
        _library.define(schema, tags=_tags)

    def fwd(x: Any, axes: list[int], weight: Any, *more: Any) -> Any:
        bias, eps, keep, *added = more
        _check_shapes(x, axes, weight, bias, *added)
        return tensors.forward(x, weight, bias, (op, tuple(axes), eps, keep), *added)

    def fwd_fake(x: Any, axes: list[int], weight: Any, *more: Any) -> Any:
        bias, _, keep, *added = more
        _check_devices(x, weight=weight, bias=bias, residual=added[0] if added else None)
        shape, dtype = stats_shape(x.shape, axes), tensors.stats_dtype(x.dtype)
        y = tensors.new_y(x, keep)
        total = (torch.empty_like(y, dtype=residual.dtype) for residual in added)
        return y, *total, *(x.new_empty(shape, dtype=dtype) for _ in range(1 + op.center))

    def bwd(dy: Any, x: Any, axes: list[int], mean: Any, rstd: Any, *rest: Any) -> tuple[Any, ...]:
        weight, wanted, to_weight, to_bias, *dsum = rest
        _check_shapes(x, axes, weight)
        call = op, tuple(axes), tuple(wanted), (to_weight, to_bias)
        given = (t for t in dsum if t is not None)
        grads = tensors.backward(dy, x, (mean, rstd), weight, call, *given)
        # A schema has no optional results: what is not wanted is an empty tensor.
        return tuple(x.new_empty(0) if grad is None else grad for grad in grads)

    made = {"fwd": (fwd, fwd_fake, FORWARD), "bwd": (bwd, _bwd_fake, _BACKWARD)}
    for direction, (function, fake, operators) in list(made.items())[: len(schemas)]:
        name = f"{op.name}_{direction}"
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"cupynorm::{name}", fake, lib=_library)
        operators[op.name] = getattr(torch.ops.cupynorm, name).default


def _check_devices(x: Any, **others: Any) -> None:
    """The dispatcher takes a meta tensor beside x for a call on meta tensors."""
    for label, value in others.items():
        if value is not None and value.device != x.device:
            check_companion(label, value, x)


def _check_shapes(
    x: Any, axes: list[int], weight: Any, bias: Any = None, residual: Any = None
) -> None:
    """A saved program may be run with any tensors; addresses alone would not tell."""
    _check_devices(x, weight=weight, bias=bias, residual=residual)
    shape = tuple(x.shape[a] for a in axes)
    for label, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != shape:
            check_affine_shape(label, tuple(value.shape), shape)
    if residual is not None:
        of_residual, of_x = ((tuple(t.shape), dtype_name(t.dtype)) for t in (residual, x))
        check_residual(*of_residual, *of_x)


def _bwd_fake(dy: Any, x: Any, axes: list[int], *rest: Any) -> tuple[Any, ...]:
    mean, rstd, weight, wanted, *dtypes, dsum = rest if len(rest) > 6 else (*rest, None)
    _check_devices(x, dy=dy, mean=mean, rstd=rstd, weight=weight, dsum=dsum)
    shape = [x.shape[a] for a in axes]
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    sums = (
        x.new_empty(shape, dtype=dtype) if want else x.new_empty(0)
        for want, dtype in zip(wanted[1:], dtypes, strict=True)
    )
    return (dx, *sums)


for _op in OPS.values():
    _define(_op)


def backward(
    dy: Any, x: Any, stats: tuple[Any, Any], weight: Any, call: tuple[Any, ...], *dsum: Any
) -> tuple[Any, ...]:
    """dx, dweight and dbias by the operator, None where not wanted; as `tensors.backward`."""
    op, axes, wanted, dtypes = call
    grads = _BACKWARD[op.name](dy, x, axes, *stats, weight, wanted, *dtypes, *dsum)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
