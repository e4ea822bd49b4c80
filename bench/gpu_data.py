"""Inputs of a case, in as many buffers as it takes to get past the L2 cache."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu_check import largest_error, limit
from bench.gpu_grid import Case
from bench.gpu_session import Session
from cupynorm._problem import numpy_dtype

__all__ = [
    "Inputs",
    "buffers_for",
    "make_affine",
    "make_inputs",
    "placed_rows",
    "poison",
    "random_flat",
]

BLOCK = 4_194_301  # a prime: neighbouring rows and buffers never hold the same numbers in step
MOST_BUFFERS = 64
L2_MULTIPLE = 4  # what is rotated is at least this many times the L2 cache


@dataclass(frozen=True)
class Inputs:
    """Buffers of one forward case; call number i uses x[i] and y[i]."""

    case: Case
    x: list[Any]  # each (rows, N)
    y: list[Any]
    flat_x: list[Any]  # the whole memory of each, aligned
    flat_y: list[Any]
    weight: Any  # (N,) or None
    bias: Any

    def __len__(self) -> int:
        return len(self.x)

    @property
    def copy_from(self) -> list[Any]:
        """What the copies beside the case read."""
        return self.flat_x

    @property
    def copy_to(self) -> list[Any]:
        """What they write."""
        return self.flat_y

    def poison(self) -> None:
        """Spoil y before a check."""
        poison(self.flat_y)

    def judge(self, session: Session, i: int, y: Any, ours: bool) -> tuple[float, float]:
        """Error of the result of call i, and the largest that passes."""
        arrays = (self.x[i], self.weight, self.bias, y)
        plain = [None if a is None else session.plain(a) for a in arrays]
        allowed = limit(self.case.dtype, self.case.N, ours)
        return largest_error(session.xp, *plain), allowed


def buffers_for(session: Session, case: Case) -> int:
    """How many sets of x and y, or of x, dy and dx, to rotate through."""
    if session.simulated:
        return 2
    return min(MOST_BUFFERS, max(2, -(-L2_MULTIPLE * session.l2_bytes // case.copy_bytes)))


def make_inputs(session: Session, case: Case) -> Inputs:
    """Random rows; y is poisoned, so that an element that nobody writes is NaN."""
    count = buffers_for(session, case)
    length = offset_of(case) + case.rows * case.pitch
    flat_x = [random_flat(session, case.dtype, length, i) for i in range(count)]
    flat_y = [session.cupy.empty(length, dtype=numpy_dtype(case.dtype)) for _ in range(count)]
    poison(flat_y)
    x, y = ([placed_rows(case, f) for f in flats] for flats in (flat_x, flat_y))
    return Inputs(case, x, y, flat_x, flat_y, *make_affine(session, case))


def offset_of(case: Case) -> int:
    """Elements before the first row."""
    return 1 if case.layout == "offset" else 0


def placed_rows(case: Case, flat: Any) -> Any:
    """Rows of a case in memory of `offset_of(case) + rows * pitch` elements."""
    return flat[offset_of(case) :].reshape(case.rows, case.pitch)[:, : case.N]


def make_affine(session: Session, case: Case) -> tuple[Any, Any]:
    """Weight and bias, or None twice."""
    if not case.affine_dtype:
        return None, None
    weight, bias = (random_flat(session, case.affine_dtype, case.N, seed) for seed in (101, 102))
    return weight, bias


def poison(arrays: list[Any]) -> None:
    """Fill with ones in every bit: NaN in each floating dtype."""
    for a in arrays:
        a.view("uint8").fill(0xFF)


def random_flat(session: Session, dtype: str, length: int, seed: int, center: float = 0.5) -> Any:
    """Normal numbers, never all zeros: zeros draw less power and hide wrong addresses.

    One block is made on the host and laid out again and again; cuRAND may not be installed.
    """
    host = random_block(dtype, min(length, BLOCK), seed % 4, center)
    bits = f"u{host.itemsize}"  # copying bits needs no arithmetic in the dtype
    block = session.cupy.asarray(host.view(bits))
    flat = session.cupy.empty(length, dtype=host.dtype)
    target = flat.view(bits)
    for begin in range(0, length, len(block)):
        part = min(len(block), length - begin)
        target[begin : begin + part] = block[:part]
    return flat


@functools.lru_cache(maxsize=16)
def random_block(dtype: str, length: int, seed: int, center: float) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * 1.5 + center
    return values.astype(numpy_dtype(dtype))
