"""Inputs of a case, in as many buffers as it takes to get past the L2 cache of a GPU."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.cases import BWD, EPS, FWD, Case
from bench.check import Given, judge, statistics

BLOCK = 4_194_301  # a prime: neighbouring rows and buffers never hold the same numbers in step


@dataclass
class Inputs:
    """Buffers of one case; call number i uses those of index i."""

    device: Any
    case: Case
    x: list[Any]  # each of `case.shape`
    y: list[Any] = field(default_factory=list)  # of a forward alone; NaN, so what is left out shows
    dy: list[Any] = field(default_factory=list)
    mean: list[Any] = field(default_factory=list)  # of a backward alone: as x with N = 1
    rstd: list[Any] = field(default_factory=list)
    weight: Any = None  # (N,)
    bias: Any = None
    columns: list[list[Any]] = field(default_factory=list)  # of each x, where it is a list of them
    copy_from: list[Any] = field(default_factory=list)  # flat, half of `case.copy_bytes` or more
    copy_to: list[Any] = field(default_factory=list)
    _given: dict[int, Given] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, a: Any) -> Any:
        """(M, N) of an array of x's shape: a view where its layout allows one."""
        if a.ndim > 2 or self.case.axis not in (-1, 1):
            axes = [k for k in range(a.ndim) if k != self.case.axis % a.ndim]
            a = a.transpose(*axes, self.case.axis % a.ndim)
        return a.reshape(-1, a.shape[-1])

    def poison(self) -> None:
        poison(self.copy_to)

    def judge(self, i: int, result: tuple[Any, ...], ours: bool, eps: float) -> tuple[float, float]:
        plain = self.device.plain
        if i not in self._given:
            dy = self.rows(plain(self.dy[i])) if self.dy else None
            affine = (None if a is None else plain(a) for a in (self.weight, self.bias))
            self._given[i] = Given(self.device.xp, self.rows(plain(self.x[i])), dy, *affine)
        given, left = self._given[i], [None if a is None else plain(a) for a in result]
        whole = [a is not None and a.shape == self.case.shape for a in left]
        left = [self.rows(a) if all_of_it else a for a, all_of_it in zip(left, whole, strict=True)]
        given = given if eps == EPS else replace(given, eps=eps)
        return judge(self.case, given, tuple(left), ours, self.device.sample(self.case))


def make_inputs(device: Any, case: Case) -> Inputs:
    """Random numbers, the same in every run; dy has mean zero: its sums stay within float16."""
    count, length = device.buffers(case), case.M * case.pitch + (case.layout in ("offset", "apart"))
    y_length = length + 2 * (case.layout == "apart")
    flat_x = [random_flat(device, case.dtype, length, i) for i in range(count)]
    x_by_column, y_by_column = case.layout[0] in "Fc", case.layout[-1] == "F"
    made = Inputs(device, case, [placed(case, flat, x_by_column) for flat in flat_x])
    if case.affine_dtype:
        affine = (random_flat(device, case.affine_dtype, case.N, seed) for seed in (101, 102))
        made.weight, made.bias = affine
    if case.layout == "columns":
        made.columns = [list(flat.reshape(case.N, case.M)) for flat in flat_x]
    if case.op == FWD:
        made.copy_from = flat_x
        made.copy_to = [device.lib.empty(y_length, dtype=flat_x[0].dtype) for _ in range(count)]
        made.y = [placed(case, flat, y_by_column) for flat in made.copy_to]
    else:
        flat_dy = [random_flat(device, case.dtype, y_length, i + 2, 0.0) for i in range(count)]
        made.dy = [placed(case, flat, y_by_column) for flat in flat_dy]
        half = case.copy_bytes // 2 // case.itemsize  # a copy reads one half, writes the other
        made.copy_from = [random_flat(device, case.dtype, half, i) for i in range(count)]
        made.copy_to = [device.lib.empty(half, dtype=flat_x[0].dtype) for _ in range(count)]
    made.poison()
    if case.op == BWD:  # statistics as x is, with the axis of length 1, rounded from float64
        shape = list(case.shape)
        shape[case.axis] = 1
        pairs = [statistics(device.xp, made.rows(device.plain(x))) for x in made.x]
        for k, left in enumerate((made.mean, made.rstd)):
            left += [device.lib.asarray(pair[k].reshape(shape)) for pair in pairs]
    return made


def placed(case: Case, flat: Any, by_column: bool) -> Any:
    """An array of the case's shape over the end of flat memory."""
    if by_column and case.layout != "NCHW":
        return flat.reshape(case.N, case.M).transpose(1, 0)
    if len(case.shape) > 2:
        return flat.reshape(case.shape)
    return flat[len(flat) - case.M * case.pitch :].reshape(case.M, case.pitch)[:, : case.N]


def poison(arrays: list[Any]) -> None:
    """Fill with ones in every bit: NaN in each floating dtype."""
    for a in arrays:
        a.view("uint8").fill(0xFF)


def random_flat(device: Any, dtype: str, length: int, seed: int, center: float = 0.5) -> Any:
    """Normal numbers, never all zeros: zeros draw less power and hide wrong addresses.

    One block is made on the host and laid out again and again; cuRAND may not be installed.
    """
    host = random_block(dtype, min(length, BLOCK), seed % 4, center)
    bits = f"u{host.itemsize}"  # copying bits needs no arithmetic in the dtype
    block = device.lib.asarray(host.view(bits))
    flat = device.lib.empty(length, dtype=host.dtype)
    target = flat.view(bits)
    for begin in range(0, length, len(block)):
        part = min(len(block), length - begin)
        target[begin : begin + part] = block[:part]
    return flat


@functools.lru_cache(maxsize=16)
def random_block(dtype: str, length: int, seed: int, center: float) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * 1.5 + center
    return values.astype(numpy_dtype(dtype))


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of that name; bfloat16 comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
