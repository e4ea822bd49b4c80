"""ADAPTER, to be deleted when tensors call `engine`: the old names of calls by address."""

import functools
from collections.abc import Callable
from typing import Any

from cupynorm._cpu import arrays, engine, threads
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM


def available() -> bool:
    return not arrays._plain.get() and engine.available() and engine.available("float16")


def _table(kind: str, M: int, N: int, backward: bool, names: Any) -> Problem:
    dtypes = {"x": kind} | {
        n: engine.computed(kind) for n in names if n.startswith("d") and len(n) > 2
    }
    strides = {n: (0, N, 1) for n in names if len(n) < 3}
    return Problem(
        LAYER_NORM, backward, tuple(dtypes.items()), 1, M, N, tuple(strides.items()), (M, 1)
    )


@functools.lru_cache(256)
def _forward(kind: str, M: int, N: int, eps: float, num_threads: Any) -> Any:
    return engine.normalizer(_table(kind, M, N, False, ("x", "y")), eps, num_threads)


@functools.lru_cache(256)
def _backward(kind: str, M: int, N: int, names: Any, num_threads: Any) -> Any:
    return engine.differentiator(_table(kind, M, N, True, names), num_threads)


def forward_alone(kind: str, eps: float) -> tuple[Callable[..., None], tuple[Any, ...], int]:
    def call(x, y, M, N, w, b, eps, low, high, mean, rstd, half):  # type: ignore[no-untyped-def]
        _forward(kind, M, N, eps, threads.num_threads)(x, y, w, b, mean, rstd)

    return call, (0.0, 0.0, 0), engine.ALONE


def layer_norm_fwd(
    kind: str,
    x: int,
    y: int,
    M: int,
    N: int,
    weight: int,
    bias: int,
    eps: float,
    mean: int,
    rstd: int,
    num_threads: Callable[[], int] = threads.num_threads,
) -> None:
    _forward(kind, M, N, eps, num_threads)(x, y, weight, bias, mean, rstd)


def layer_norm_bwd(
    kind: str,
    dy: int,
    x: int,
    dx: int,
    M: int,
    N: int,
    mean: int,
    rstd: int,
    weight: int,
    dweight: int,
    dbias: int,
    num_threads: Callable[[], int] = threads.num_threads,
) -> None:
    names = [n for n, a in (("dx", dx), ("dweight", dweight), ("dbias", dbias)) if a]
    call = _backward(kind, M, N, ("dy", "x", *names), num_threads)
    call(dy, x, mean, rstd, weight, dx, dweight, dbias)
