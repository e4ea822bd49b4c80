"""Backward of NumPy arrays whose rows are scattered: gathered, computed, put back by blocks."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._cpu.gather import ALONE, bits, blocks_of, rows_of_block

__all__ = ["layer_norm_bwd"]

Array = np.ndarray[Any, Any]

_RUNS = 64  # of blocks, with column sums of their own
_SUMS = 1 << 22  # elements that the column sums of all runs may have together


def layer_norm_bwd(
    engine: ModuleType,
    kind: str,
    dy: Array,
    x: Array,
    axes: tuple[int, ...],
    mean: Array,
    rstd: Array,
    w: Array | None,
    dx: Array | None,
    summed: bool,
) -> Array | None:  # (2, N)
    """Write dx and give the column sums, as the engine's rows() does, for any layout."""
    outer = [a for a in range(x.ndim) if a not in axes]
    # Neighbours in memory last, so that a block reads whole cache lines.
    turn = [*sorted(outer, key=lambda a: -abs(x.strides[a])), *axes]
    if kind in ("float16", "bfloat16"):  # as integers: ml_dtypes' copies go one by one
        dy, x = dy.view(bits(dy)), x.view(bits(x))
        dx = None if dx is None else dx.view(bits(dx))
    dyt, xt, means, rstds = (a.transpose(turn) for a in (dy, x, mean, rstd))
    dxt = None if dx is None else dx.transpose(turn)
    N = math.prod(xt.shape[len(outer) :])
    rows = rows_of_block(N)
    blocks = blocks_of(xt.shape[: len(outer)], rows)
    runs = min(len(blocks), _RUNS, max(1, _SUMS // (2 * N)))
    sums = np.zeros((runs, 2, N)) if summed else None

    def make_task() -> _threads.Task:
        room = np.empty((2, min(rows, x.size // N) * N), x.dtype.newbyteorder("="))

        def gathered(source: Array, memory: Array) -> Array:
            table = memory[: source.size]
            np.copyto(table.reshape(source.shape), source)
            return table.reshape(-1, N)

        def task(index: int) -> None:
            run = slice(len(blocks) * index // runs, len(blocks) * (index + 1) // runs)
            for block in blocks[run]:
                x_rows, dy_rows = gathered(xt[block], room[0]), gathered(dyt[block], room[1])
                dtype = np.float64 if kind == "float64" else np.float32
                stats = (a[block].astype(dtype, order="C").reshape(-1) for a in (means, rstds))
                dx_rows = None if dxt is None else dy_rows
                part = engine.rows(kind, dy_rows, x_rows, dx_rows, w, *stats, summed)
                if sums is not None:
                    with np.errstate(all="ignore"):
                        sums[index] += part
                if dxt is not None:
                    np.copyto(dxt[block], dy_rows.reshape(dxt[block].shape))

        return task

    threads = 1 if x.size < ALONE else _threads.num_threads()
    _threads.run(make_task, runs, threads)
    with np.errstate(all="ignore"):
        return None if sums is None else np.add.reduce(sums, axis=0)
