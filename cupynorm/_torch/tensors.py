"""Torch tensors to the paths that do the work: who computes, and into what memory."""

from typing import Any

import torch

__all__ = ["backward", "forward", "into", "path_of"]


def _path(device_type: str) -> Any:
    """Import the path of a device when its first tensor arrives."""
    if device_type == "cpu":
        from cupynorm._torch import cpu as _torch_cpu

        _paths["cpu"] = _torch_cpu
        return _torch_cpu
    if device_type == "cuda":
        try:
            from cupynorm._torch import cuda as _torch_cuda
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


def path_of(x: Any) -> Any:
    """Module of x's device that does the work."""
    # x.device.type would cost as much as all the rest of this.
    device_type = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    return _paths.get(device_type) or _path(device_type)


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
    return y, *into(x, axes, weight, bias, eps, y, stats)


def into(
    x: Any, axes: tuple[int, ...], weight: Any, bias: Any, eps: float, y: Any, stats: bool
) -> tuple[Any, Any]:
    """As `forward`, into memory that is there, of any strides; it gives mean and rstd."""
    mean: Any = None
    rstd: Any = None
    if stats:
        mean, rstd = _two_for_rows(x, axes)
    if x.is_meta:  # shape and dtype are all there is
        return mean, rstd
    if y.numel():
        do = path_of(x)
        if x.is_neg() or _negated(weight) or _negated(bias):
            x, weight, bias = (None if t is None else t.resolve_neg() for t in (x, weight, bias))
        do.layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
    elif stats:  # the mean of nothing
        mean.fill_(torch.nan)
        rstd.fill_(torch.nan)
    return mean, rstd


def _negated(tensor: Any) -> bool:
    """Whether memory holds the negative of what the tensor does, as that of conj().imag."""
    return tensor is not None and tensor.is_neg()


def _two_for_rows(x: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Memory for mean and rstd."""
    n, first = len(axes), axes[0]
    if first + n == x.ndim:
        shape = x.shape[:first] + (1,) * n
    else:
        shape = [1 if a in axes else length for a, length in enumerate(x.shape)]
    if x.dtype is torch.float32 or x.dtype is torch.float64:
        return x.new_empty(*shape), x.new_empty(*shape)  # half of what torch.empty costs
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


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
    dweight = _for_sum(x, axes, weight, dtypes[0]) if wanted[1] else None
    dbias = _for_sum(x, axes, weight, dtypes[1]) if wanted[2] else None
    if x.is_meta:
        return dx, dweight, dbias
    if x.numel():
        do = path_of(x)
        if dy.is_neg() or x.is_neg() or _negated(weight):
            dy, x, weight = (None if t is None else t.resolve_neg() for t in (dy, x, weight))
        do.layer_norm_bwd(dy, x, axes, mean, rstd, weight, dx, dweight, dbias)
    else:  # the sum over no rows
        for grad in (dweight, dbias):
            if grad is not None:
                grad.zero_()
    return dx, dweight, dbias


def _for_sum(x: Any, axes: tuple[int, ...], weight: Any, dtype: Any) -> Any:
    """Memory for dweight or dbias, row-major."""
    if weight is not None and weight.dtype is dtype and weight.is_contiguous():
        return torch.empty_like(weight)
    return x.new_empty([x.shape[a] for a in axes], dtype=dtype)
