"""NumPy arrays whose rows are scattered: gathered, normalized and put back block by block."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads

__all__ = ["ALONE", "bits", "blocks_of", "layer_norm_fwd", "rows_of_block"]

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 16  # elements of a block: 256 KiB of float32, within the L2 of one core
_ROWS = 16  # rows whose neighbours share a cache line of float32 when the axis is strided
_LARGEST = 1 << 22  # elements; a block of _ROWS rows may not become larger than this
ALONE = 1 << 16  # elements below which one thread does all; gathering costs more than loops


def rows_of_block(N: int) -> int:
    """How many rows of N elements are gathered together."""
    return max(1, _BLOCK // N, min(_ROWS, _LARGEST // N))


def blocks_of(outer: tuple[int, ...], rows: int) -> list[tuple[slice, ...]]:
    """Index the outer dimensions in blocks of at most ``rows`` rows, near each other in memory."""
    split = 0
    while math.prod(outer[split + 1 :]) > rows:
        split += 1
    if split >= len(outer):
        return [()]
    length = outer[split]
    step = min(length, max(1, rows // math.prod(outer[split + 1 :])))
    count = -(-length // step)
    cuts = [slice(length * i // count, length * (i + 1) // count) for i in range(count)]
    before = np.ndindex(*outer[:split])
    return [(*(slice(i, i + 1) for i in index), cut) for index in before for cut in cuts]


def _stats_view(stats: Array | None, shape: list[int], order: list[int]) -> Array | None:
    return None if stats is None else stats.reshape(shape).transpose(order)


def layer_norm_fwd(
    engine: ModuleType,
    kind: str,
    x: Array,
    axes: tuple[int, ...],
    w: Array | None,
    b: Array | None,
    eps: float,
    y: Array,
    mean: Array | None,
    rstd: Array | None,
) -> None:
    """Normalize x over ``axes`` into y through scratch memory of one block per thread."""
    outer = [a for a in range(x.ndim) if a not in axes]
    # Neighbours in memory last, so that a block reads whole cache lines.
    order = sorted(range(len(outer)), key=lambda i: -abs(x.strides[outer[i]]))
    shape = [x.shape[a] for a in outer]
    means, rstds = (_stats_view(a, shape, order) for a in (mean, rstd))
    turn = [outer[i] for i in order] + list(axes)
    if kind in ("float16", "bfloat16"):  # as integers: ml_dtypes' copies go one by one
        x, y = x.view(bits(x)), y.view(bits(y))
    xt, yt = x.transpose(turn), y.transpose(turn)
    N = math.prod(xt.shape[len(outer) :])
    rows = rows_of_block(N)
    blocks = blocks_of(xt.shape[: len(outer)], rows)
    dtype = x.dtype.newbyteorder("=")

    def make_task() -> _threads.Task:
        scratch = np.empty(min(rows, x.size // N) * N, dtype)

        def task(index: int) -> None:
            block = blocks[index]
            source, target = xt[block], yt[block]
            flat = scratch[: source.size]
            np.copyto(flat.reshape(source.shape), source)
            table = flat.reshape(-1, N)
            stats = [None if a is None else np.empty(len(table), a.dtype) for a in (means, rstds)]
            engine.rows(kind, table, table, w, b, eps, *stats)
            np.copyto(target, flat.reshape(source.shape))
            for whole, part in zip((means, rstds), stats, strict=True):
                if whole is not None and part is not None:
                    whole[block] = part.reshape(whole[block].shape)

        return task

    threads = 1 if x.size < ALONE else _threads.num_threads()
    _threads.run(make_task, len(blocks), threads)


def bits(x: Array) -> np.dtype[Any]:
    """Integers of x's size and byte order."""
    return np.dtype(np.uint16).newbyteorder(x.dtype.byteorder)
