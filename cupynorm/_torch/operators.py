"""The operators `cupynorm::layer_norm_fwd` and `_bwd`, for compilers, exporters and tracers."""

from typing import Any

import torch

from cupynorm._rules import check_affine_shape, stats_shape
from cupynorm._torch import tensors

_library = torch.library.Library("cupynorm", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
# keep: y has x's strides, else it is row-major. wanted: dx, dweight, dbias.
_library.define(
    "layer_norm_fwd(Tensor x, int[] axes, Tensor? weight, Tensor? bias, float eps, bool keep)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=_tags,
)
_library.define(
    "layer_norm_bwd(Tensor dy, Tensor x, int[] axes, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool[3] wanted, ScalarType dweight_dtype, ScalarType dbias_dtype)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_tags,
)
# Of which each argument is one of a schema, so that more than six are named by position.
layer_norm_fwd = torch.ops.cupynorm.layer_norm_fwd.default
_layer_norm_bwd = torch.ops.cupynorm.layer_norm_bwd.default


def _fwd(
    x: Any, axes: list[int], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    _check_shapes(x, axes, weight, bias)
    return tensors.forward(x, weight, bias, (tuple(axes), eps, keep))


def _check_shapes(x: Any, axes: list[int], *values: Any) -> None:
    """A saved program may be run with any tensors; addresses alone would not tell."""
    shape = tuple(x.shape[a] for a in axes)
    for label, value in zip(("weight", "bias"), values, strict=False):
        if value is not None and value.shape != shape:
            check_affine_shape(label, tuple(value.shape), shape)


def _bwd(dy: Any, x: Any, axes: list[int], mean: Any, rstd: Any, *rest: Any) -> tuple[Any, ...]:
    weight, wanted, *dtypes = rest
    _check_shapes(x, axes, weight)
    call = tuple(axes), tuple(wanted), tuple(dtypes)
    grads = tensors.backward(dy, x, (mean, rstd), weight, call)
    # A schema has no optional results: what is not wanted is an empty tensor.
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


for _device in ("CPU", "CUDA"):
    _library.impl("layer_norm_fwd", _fwd, _device)
    _library.impl("layer_norm_bwd", _bwd, _device)


@torch.library.register_fake("cupynorm::layer_norm_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(
    x: Any, axes: list[int], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    shape = stats_shape(x.shape, axes)
    dtype = tensors.stats_dtype(x.dtype)
    mean, rstd = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    return tensors.new_y(x, keep), mean, rstd


@torch.library.register_fake("cupynorm::layer_norm_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _bwd_fake(dy: Any, x: Any, axes: list[int], *rest: Any) -> tuple[Any, ...]:
    _, _, _, wanted, *dtypes = rest
    shape = [x.shape[a] for a in axes]
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    sums = (
        x.new_empty(shape, dtype=dtype) if want else x.new_empty(0)
        for want, dtype in zip(wanted[1:], dtypes, strict=True)
    )
    return (dx, *sums)


def layer_norm_bwd(
    dy: Any, x: Any, stats: tuple[Any, Any], weight: Any, call: tuple[Any, Any, Any]
) -> tuple[Any, ...]:
    """dx, dweight and dbias by the operator, None where not wanted; as `tensors.backward`."""
    axes, wanted, dtypes = call
    grads = _layer_norm_bwd(dy, x, axes, *stats, weight, wanted, *dtypes)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
