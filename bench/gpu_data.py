"""Inputs of a case, in as many buffers as it takes to get past the L2 cache."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu_grid import Case
from bench.gpu_session import Session
from cupynorm._problem import numpy_dtype

__all__ = ["Inputs", "make_inputs", "poison"]

BLOCK = 4_194_301  # a prime: neighbouring rows and buffers never hold the same numbers in step
MOST_BUFFERS = 64
L2_MULTIPLE = 4  # what is rotated is at least this many times the L2 cache


@dataclass(frozen=True)
class Inputs:
    """Buffers of one case; call number i uses x[i] and y[i]."""

    x: list[Any]  # each (rows, N)
    y: list[Any]
    flat_x: list[Any]  # the whole memory of each, aligned
    flat_y: list[Any]
    weight: Any  # (N,) or None
    bias: Any

    def __len__(self) -> int:
        return len(self.x)


def buffers_for(case: Case, l2_bytes: int) -> int:
    """How many pairs of x and y to rotate through."""
    return min(MOST_BUFFERS, max(2, -(-L2_MULTIPLE * l2_bytes // case.copy_bytes)))


def make_inputs(session: Session, case: Case) -> Inputs:
    """Random rows; y is poisoned, so that an element that nobody writes is NaN."""
    count = 2 if session.simulated else buffers_for(case, session.l2_bytes)
    offset = 1 if case.layout == "offset" else 0
    length = offset + case.rows * case.pitch
    flat_x = [random_flat(session, case.dtype, length, i) for i in range(count)]
    flat_y = [session.cupy.empty(length, dtype=numpy_dtype(case.dtype)) for _ in range(count)]
    poison(flat_y)
    weight = bias = None
    if case.affine_dtype:
        weight = random_flat(session, case.affine_dtype, case.N, 101)
        bias = random_flat(session, case.affine_dtype, case.N, 102)

    def rows(flat: Any) -> Any:
        return flat[offset:].reshape(case.rows, case.pitch)[:, : case.N]

    x, y = [rows(f) for f in flat_x], [rows(f) for f in flat_y]
    return Inputs(x, y, flat_x, flat_y, weight, bias)


def poison(arrays: list[Any]) -> None:
    """Fill with ones in every bit: NaN in each floating dtype."""
    for a in arrays:
        a.view("uint8").fill(0xFF)


def random_flat(session: Session, dtype: str, length: int, seed: int) -> Any:
    """Normal numbers around 0.5, never zeros: zeros draw less power and hide wrong addresses.

    One block is made on the host and laid out again and again; cuRAND may not be installed.
    """
    host = random_block(dtype, min(length, BLOCK), seed % 4)
    bits = f"u{host.itemsize}"  # copying bits needs no arithmetic in the dtype
    block = session.cupy.asarray(host.view(bits))
    flat = session.cupy.empty(length, dtype=host.dtype)
    target = flat.view(bits)
    for begin in range(0, length, len(block)):
        part = min(len(block), length - begin)
        target[begin : begin + part] = block[:part]
    return flat


@functools.lru_cache(maxsize=16)
def random_block(dtype: str, length: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * 1.5 + 0.5
    return values.astype(numpy_dtype(dtype))
