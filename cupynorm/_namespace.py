"""Arrays of any array-API library: layout and `out` around the reference path."""

from typing import Any

from cupynorm import _problem, _reference
from cupynorm._arrays import check_companion, check_overlap, check_writable, library_of

__all__ = ["check_out", "layer_norm", "layer_norm_backward", "ordered"]


def layer_norm(
    x: Any,
    axes: tuple[int, ...],
    weight: Any,
    bias: Any,
    eps: float,
    order: str,
    out: Any,
) -> tuple[Any, Any, Any]:
    """Layer norm by array-API calls; arguments are checked, axes ascending."""
    from array_api_compat import array_namespace

    xp = array_namespace(x)
    if out is not None:
        check_out(x, weight, bias, order, out)
    y, mean, rstd = _reference.layer_norm_fwd(xp, x, axes, weight, bias, eps)
    if out is not None:
        out[...] = y
        return out, mean, rstd
    return ordered(y, order), mean, rstd


def layer_norm_backward(
    dy: Any,
    x: Any,
    axes: tuple[int, ...],
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: tuple[bool, bool, bool],
    dtype: str,
) -> tuple[Any, Any, Any]:
    """Gradients by array-API calls, dweight and dbias in `dtype`; arguments are checked."""
    from array_api_compat import array_namespace

    xp = array_namespace(x)
    dx, *sums = _reference.layer_norm_bwd(xp, dy, x, axes, mean, rstd, weight)
    dweight, dbias = (
        xp.astype(total, getattr(xp, dtype), copy=False) if wanted else None
        for total, wanted in zip(sums, mask[1:], strict=True)
    )
    return dx if mask[0] else None, dweight, dbias


def check_out(x: Any, weight: Any, bias: Any, order: str, out: Any) -> None:
    """Refuse an `out` that does not fit, or that its library or autograd cannot have written."""
    check_companion("out", out, x)
    library = library_of(x)
    if library == "jax":
        msg = "out= is given but JAX arrays cannot be written to; use the returned array"
        raise TypeError(msg)
    _problem.check_out(tuple(out.shape), out.dtype, tuple(x.shape), x.dtype, order)
    if library == "torch":
        import torch

        tensors = [t for t in (x, weight, bias, out) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            msg = (
                "out= is given but an argument requires grad, and autograd cannot follow a write "
                "to out; call without out=, or inside torch.no_grad() on detached tensors"
            )
            raise ValueError(msg)
        check_writable(out)
        check_overlap("x", x, out, same_allowed=True)
        for label, other in (("weight", weight), ("bias", bias)):
            if other is not None:
                check_overlap(label, other, out, same_allowed=False)


def ordered(y: Any, order: str) -> Any:
    """Give y the layout asked for where the library lets a caller choose one."""
    if order == "K":
        return y
    if hasattr(y, "contiguous"):  # torch
        if order == "C":
            return y.contiguous()
        back = tuple(range(y.ndim))[::-1]
        return y.permute(back).contiguous().permute(back)
    if order == "F":
        msg = (
            f"order='F' is given but {library_of(y)} arrays have no layout to choose; use order='K'"
        )
        raise ValueError(msg)
    return y
