"""Torch tensors to the paths that do the work: who computes, and into what memory."""

from typing import Any

import torch

from cupynorm._torch_formula import stats_dtype

__all__ = ["backward", "forward"]


def _path(device_type: str) -> Any:
    """Import the path of a device when its first tensor arrives."""
    if device_type == "cpu":
        from cupynorm import _torch_cpu

        _paths["cpu"] = _torch_cpu
        return _torch_cpu
    if device_type == "cuda":
        try:
            from cupynorm import _torch_cuda
        except ImportError as error:
            msg = (
                "x is on a GPU, and CuPy, which compiles and launches the kernels, cannot be "
                f"imported ({error}); pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
            )
            raise ImportError(msg) from error
        _paths["cuda"] = _torch_cuda
        return _torch_cuda
    msg = (
        f"x is on device type {device_type}, which has no layer_norm here; move it to 'cpu' or "
        "'cuda', or call torch.nn.functional.layer_norm"
    )
    raise ValueError(msg)


_paths: dict[str, Any] = {}


def forward(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, stats: bool, keep: bool
) -> tuple[Any, Any, Any]:
    """y, and with ``stats`` mean and rstd.

    Parameters
    ----------
    x, weight, bias : tensor
        Checked; plain strided memory, no autograd or other transform to be heeded.
    axes : tuple of int
        Ascending.
    eps : float
        Added to the variance.
    stats : bool
        Whether mean and rstd are wanted; None otherwise.
    keep : bool
        Whether y keeps x's strides; row-major otherwise.
    """
    if keep or x.is_contiguous():
        y = torch.empty_like(x)
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean: Any = None
    rstd: Any = None
    if stats:
        mean, rstd = _empty_stats(x, axes), _empty_stats(x, axes)
    if x.is_meta:  # shape and dtype are all there is
        return y, mean, rstd
    if y.numel():
        kind = "cpu" if x.is_cpu else x.device.type
        do = _paths.get(kind) or _path(kind)
        do.layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
    elif stats:  # the mean of nothing
        mean.fill_(torch.nan)
        rstd.fill_(torch.nan)
    return y, mean, rstd


def _empty_stats(x: Any, axes: tuple[int, ...]) -> Any:
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    return torch.empty(shape, dtype=stats_dtype(x.dtype), device=x.device)


def backward(
    dy: Any,
    x: Any,
    axes: tuple[int, ...],
    mean: Any,
    rstd: Any,
    weight: Any,
    wanted: tuple[bool, bool, bool],
    dtypes: tuple[Any, Any],
) -> tuple[Any, Any, Any]:
    """dx, dweight and dbias, None where not wanted; ``dtypes`` are those of the latter two."""
    dx = torch.empty_like(x) if wanted[0] else None
    shape = [x.shape[a] for a in axes]
    dweight, dbias = (
        torch.empty(shape, dtype=dtype, device=x.device) if want else None
        for want, dtype in zip(wanted[1:], dtypes, strict=True)
    )
    if x.is_meta:
        return dx, dweight, dbias
    if x.numel():
        kind = "cpu" if x.is_cpu else x.device.type
        do = _paths.get(kind) or _path(kind)
        do.layer_norm_bwd(dy, x, axes, mean, rstd, weight, dx, dweight, dbias)
    else:  # the sum over no rows
        for grad in (dweight, dbias):
            if grad is not None:
                grad.zero_()
    return dx, dweight, dbias
