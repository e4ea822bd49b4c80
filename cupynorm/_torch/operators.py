"""The operators `cupynorm::layer_norm_fwd` and `_bwd`, for compilers, exporters and tracers."""

from typing import Any

import torch

from cupynorm._problem import check_affine_shape
from cupynorm._torch import formula as _torch_formula
from cupynorm._torch import tensors as _torch_launch

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]

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


def _fwd(
    x: Any, axes: list[int], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    _check_shapes(x, axes, weight, bias)
    return _torch_launch.forward(x, tuple(axes), weight, bias, eps, True, keep)


def _check_shapes(x: Any, axes: list[int], *values: Any) -> None:
    """A saved program may be run with any tensors; addresses alone would not tell."""
    shape = tuple(x.shape[a] for a in axes)
    for label, value in zip(("weight", "bias"), values, strict=False):
        if value is not None and value.shape != shape:
            check_affine_shape(label, tuple(value.shape), shape)


def _bwd(
    dy: Any,
    x: Any,
    axes: list[int],
    mean: Any,
    rstd: Any,
    weight: Any,
    wanted: list[bool],
    *dtypes: Any,
) -> tuple[Any, ...]:
    _check_shapes(x, axes, weight)
    grads = _torch_launch.backward(
        dy, x, tuple(axes), mean, rstd, weight, (wanted[0], wanted[1], wanted[2]), dtypes
    )
    # A schema has no optional results: what is not wanted is an empty tensor.
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


for _device in ("CPU", "CUDA"):
    _library.impl("layer_norm_fwd", _fwd, _device)
    _library.impl("layer_norm_bwd", _bwd, _device)

layer_norm_fwd = torch.ops.cupynorm.layer_norm_fwd.default
_layer_norm_bwd = torch.ops.cupynorm.layer_norm_bwd.default


@torch.library.register_fake("cupynorm::layer_norm_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(
    x: Any, axes: list[int], weight: Any, bias: Any, eps: float, keep: bool
) -> tuple[Any, Any, Any]:
    form = torch.preserve_format if keep else torch.contiguous_format
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    dtype = _torch_formula.stats_dtype(x.dtype)
    mean, rstd = x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)
    return torch.empty_like(x, memory_format=form), mean, rstd


@torch.library.register_fake("cupynorm::layer_norm_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _bwd_fake(
    dy: Any,
    x: Any,
    axes: list[int],
    mean: Any,
    rstd: Any,
    weight: Any,
    wanted: list[bool],
    *dtypes: Any,
) -> tuple[Any, ...]:
    shape = [x.shape[a] for a in axes]
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    sums = (
        x.new_empty(shape, dtype=dtype) if want else x.new_empty(0)
        for want, dtype in zip(wanted[1:], dtypes, strict=True)
    )
    return (dx, *sums)


def layer_norm_bwd(
    dy: Any,
    x: Any,
    axes: tuple[int, ...],
    mean: Any,
    rstd: Any,
    weight: Any,
    wanted: tuple[bool, bool, bool],
    dtypes: tuple[Any, Any],
) -> tuple[Any, ...]:
    """dx, dweight and dbias by the operator, None where not wanted."""
    grads = _layer_norm_bwd(dy, x, axes, mean, rstd, weight, wanted, *dtypes)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
