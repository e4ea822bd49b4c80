"""What is done today for strided columns: copied to row-major first, or composed of formulas."""

from collections.abc import Callable
from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS, largest_error, limit
from bench.gpu_clock import launched
from bench.gpu_contender import Builder, Contender, Unavailable
from bench.gpu_data_layouts import LayoutInputs, rows_of_layout
from bench.gpu_grid_layouts import LayoutCase
from bench.gpu_session import Session
from bench.peers import as_torch, load, torch_contender

__all__ = ["LAYOUT_PEERS", "composite", "layout_peers", "permuted"]

# contiguous-then-rows: cupy.ascontiguousarray, our row kernel, and a copy where y is not row-major.
LAYOUT_PEERS = (
    "contiguous-then-rows",
    "stack-then-rows",
    "torch-permute",
    "composite",
    "cuml-scale",
)


def composite(xp: Any, x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    """Layer norm over axis 1 as ConvNeXt's channels-first module composes it, in float32."""
    wide = x.astype("float64" if x.dtype == "float64" else "float32")
    u = wide.mean(1, keepdims=True)
    s = ((wide - u) ** 2).mean(1, keepdims=True)
    y = (wide - u) / xp.sqrt(s + wide.dtype.type(eps))
    if weight is not None:
        along = (slice(None),) + (None,) * (x.ndim - 2)
        y = weight.astype(wide.dtype)[along] * y + bias.astype(wide.dtype)[along]
    return y.astype(x.dtype)


def _needs_arithmetic(session: Session) -> None:
    if session.simulated:
        msg = "the simulated device has no array arithmetic"
        raise Unavailable(msg)


def _contiguous(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    if case.layout == "columns":
        msg = "columns of their own are stacked, not made contiguous"
        raise Unavailable(msg)
    row_major = case.layout[-1] == "C"
    if not row_major:
        _needs_arithmetic(session)
    cupy, images = session.cupy, case.layout == "NCHW"
    weight, bias = inputs.weight, inputs.bias

    def call(i: int) -> Any:
        x, y = inputs.x[i], inputs.y[i]
        if images:
            x, y = x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1)
        dense = cupy.ascontiguousarray(x)  # x itself for C to F
        if row_major and not images:
            return cn.layer_norm(dense, case.N, weight, bias, EPS, out=y)
        y[...] = cn.layer_norm(dense, case.N, weight, bias, EPS)
        return inputs.y[i]

    return Contender("contiguous-then-rows", call, kernel="ascontiguousarray + rows")


def _stack(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    if case.layout != "columns":
        msg = "x is one array"
        raise Unavailable(msg)
    _needs_arithmetic(session)
    cupy, weight, bias = session.cupy, inputs.weight, inputs.bias

    def call(i: int) -> Any:
        dense = cupy.stack(inputs.columns[i], axis=1)
        return cn.layer_norm(dense, case.N, weight, bias, EPS, out=inputs.y[i])

    # As ours: its list of addresses is made by the host in each call.
    return Contender("stack-then-rows", call, kernel="stack + rows", capture=launched)


def _composite(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    _needs_arithmetic(session)
    if case.layout != "NCHW":
        msg = "it is the formula of channels-first images"
        raise Unavailable(msg)
    cupy, weight, bias = session.cupy, inputs.weight, inputs.bias
    return Contender(
        "composite", lambda i: composite(cupy, inputs.x[i], weight, bias), kernel="composite"
    )


def permuted(torch: Any, case: LayoutCase, flat: Any, weight: Any, bias: Any) -> Any:
    """Layer norm of x over its flat tensor, by torch's row kernel, with y in the case's layout."""
    images = case.layout == "NCHW"
    x = flat.view(case.N, case.rows).t() if case.layout[0] in "Fc" else flat.view(case.shape)
    x = x.permute(0, 2, 3, 1) if images else x
    y = torch.nn.functional.layer_norm(x.contiguous(), (case.N,), weight, bias, EPS)
    if images:
        return y.permute(0, 3, 1, 2).contiguous()
    return y.t().contiguous().t() if case.layout[-1] == "F" else y


def _torch(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    def make(torch: Any) -> Callable[[int], Any]:
        weight, bias = as_torch(torch, inputs.weight), as_torch(torch, inputs.bias)
        flats = [as_torch(torch, flat) for flat in inputs.flat_x]
        return lambda i: permuted(torch, case, flats[i], weight, bias)

    return torch_contender(session, "torch-permute", make)


def _cuml(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    """Scale rows to mean 0 and deviation 1: no eps, no weight, the biased deviation."""
    if case.layout != "F-C" or inputs.weight is not None:
        msg = "scale(axis=1) takes a matrix, and neither weight nor bias"
        raise Unavailable(msg)
    scale = load("cuml.preprocessing").scale

    def error(i: int, y: Any) -> float:
        x = rows_of_layout(case, inputs.x[i])
        off = largest_error(session.xp, session.plain(x), None, None, session.plain(y), eps=0.0)
        return 0.0 if off <= limit(case.dtype, case.N, ours=False) else float("inf")

    # It waits for the device in the middle, which nothing that is captured may do.
    return Contender(
        "cuml-scale",
        lambda i: scale(inputs.x[i], axis=1),
        kernel="cuml.preprocessing.scale",
        capture=launched,
        error=error,
    )


_MAKERS = {
    "contiguous-then-rows": _contiguous,
    "stack-then-rows": _stack,
    "torch-permute": _torch,
    "composite": _composite,
    "cuml-scale": _cuml,
}


def layout_peers(
    session: Session, case: LayoutCase, inputs: LayoutInputs, names: tuple[str, ...]
) -> list[Builder]:
    """Builders of the peers that are asked for."""
    return [
        (name, lambda make=_MAKERS[name]: make(session, case, inputs))
        for name in names
        if name in _MAKERS
    ]
