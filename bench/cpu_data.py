"""Inputs of a CPU case, and its exact results: computed once, compared with everybody's."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cpu_grid import CpuCase
from bench.gpu_check import EPSILON, limit
from bench.gpu_grid import BWD, FWD
from cupynorm._problem import numpy_dtype, stats_dtype
from tests import oracle

__all__ = ["CpuInputs", "errors", "make_inputs", "verdict"]

Array = np.ndarray[Any, Any]
SAMPLE, SAMPLED = 16, 2**24  # rows at each end and between whose y and dx are compared; elements
BLOCK = 2**20  # elements that the oracle takes at once: in longdouble 16 MiB a temporary


@dataclass(frozen=True)
class CpuInputs:
    """Arrays of one case; weight, bias and statistics as the library takes and gives them."""

    case: CpuCase
    x: Array
    dy: Array | None  # where there is a backward
    weight: Array | None  # (N,)
    bias: Array | None
    mean: Array | None  # like x with the axis of length 1, for the backward alone
    rstd: Array | None

    def rows(self, a: Array) -> Array:
        """(M, N) of an array of x's shape: a view where its layout allows one."""
        return np.moveaxis(a, self.case.axis, -1).reshape(-1, self.case.N)

    @functools.cached_property
    def sample(self) -> Array:
        """Indices of the rows that are compared: both ends, and some between."""
        M, N = self.case.M, self.case.N
        some = np.random.default_rng(3).integers(0, M, SAMPLE)
        ends = np.r_[: min(M, SAMPLE), max(0, M - SAMPLE) : M]
        return np.unique(np.r_[ends, some])[: max(1, SAMPLED // N)]

    def sampled(self, a: Array) -> Array:
        """The sampled rows of an array of x's shape, (rows, N), without laying out the others."""
        moved = np.moveaxis(a, self.case.axis, -1)
        return moved[np.unravel_index(self.sample, moved.shape[:-1])]

    @functools.cached_property
    def y(self) -> Array:
        """Exact y of the sampled rows."""
        x = self.sampled(self.x)
        return oracle.layer_norm(x, (1,), self.weight, self.bias, self.case.eps)[0]

    @functools.cached_property
    def dx(self) -> tuple[Array, Array]:
        """Exact dx of the sampled rows, and the size of the terms that it is a sum of."""
        given = self.sampled(self.dy), self.sampled(self.x), (1,), self.weight, self.case.eps
        return oracle.layer_norm_backward(*given)[0], oracle.gradient_scales(*given)[0]

    @functools.cached_property
    def totals(self) -> list[tuple[Array, Array, Array]]:
        """Of dweight and dbias: exact values, roots of the sums of squares, sums of sizes."""
        x, dy = self.rows(self.x), self.rows(self.dy)
        sums: list[list[Any]] = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        step = max(1, BLOCK // self.case.N)
        for begin in range(0, len(x), step):
            part, slope = x[begin : begin + step], dy[begin : begin + step].astype(np.float64)
            x_hat, mean, rstd = oracle.layer_norm(part, (1,), None, None, self.case.eps)
            sizes = np.abs(x_hat) + np.abs(mean * rstd), 1.0
            for total, factor, size in zip(sums, (x_hat, 1.0), sizes, strict=True):
                terms = slope * factor
                total[0] = total[0] + terms.sum(axis=0, dtype=np.longdouble)
                total[1] = total[1] + (terms * terms).sum(axis=0)
                total[2] = total[2] + (np.abs(slope) * size).sum(axis=0)
        return [(exact.astype(np.float64), np.sqrt(sq), size) for exact, sq, size in sums]


@functools.lru_cache(maxsize=2)
def _array(shape: tuple[int, ...], dtype: str, order: str, seed: int) -> Array:
    """x or dy; the ops of a shape follow each other and share them."""
    a = np.empty(shape, numpy_dtype(dtype), order=order)
    center = np.float32(0.5 if seed == 0 else 0.0)
    a[...] = np.random.default_rng(seed).standard_normal(shape, np.float32) + center
    return a


def make_inputs(case: CpuCase) -> CpuInputs:
    """Random arrays, the same in every run; statistics rounded from float64 or wider."""
    x = _array(case.shape, case.dtype, case.order, 0)
    dy = None if case.op == FWD else _array(case.shape, case.dtype, case.order, 1)
    rng = np.random.default_rng(2)
    weight, bias = (rng.standard_normal(case.N, np.float32).astype(x.dtype) for _ in "wb")
    if not case.affine:
        weight = bias = None
    mean = rstd = None
    if case.op == BWD:
        mean, rstd = _statistics(CpuInputs(case, x, None, None, None, None, None))
    return CpuInputs(case, x, dy, weight, bias, mean, rstd)


def _statistics(inputs: CpuInputs) -> list[Array]:
    case, x = inputs.case, inputs.rows(inputs.x)
    step = max(1, BLOCK // case.N)
    blocks = (x[begin : begin + step] for begin in range(0, len(x), step))
    parts = [oracle.layer_norm(part, (1,), None, None, case.eps)[1:] for part in blocks]
    moved = np.moveaxis(inputs.x, case.axis, -1).shape[:-1]
    made = (np.concatenate(part).reshape(moved) for part in zip(*parts, strict=True))
    return [np.expand_dims(a, case.axis).astype(stats_dtype(case.dtype)) for a in made]


def errors(inputs: CpuInputs, result: tuple[Array | None, ...]) -> dict[str, float]:
    """Largest error of y, dx, dweight and dbias, whichever the op has; NaN where any element is.

    y and dx: in units of epsilon(dtype) * max(1, size of what is added up); dweight and dbias: of
    epsilon(their dtype) * max(|exact|, root of the sum of the squared terms), which is what a sum
    of random terms comes to, plus epsilon of the statistics' dtype * the sum of sizes.
    """
    case = inputs.case
    left, found = list(result), {}
    if case.op != BWD:
        y, bias = inputs.y, 0.0 if inputs.bias is None else inputs.bias.astype(np.float64)
        unit = np.maximum(1.0, np.maximum(np.abs(y), np.abs(y - bias)))
        found["y"] = _largest(inputs.sampled(_given(left.pop(0), "y", case.shape)), y, unit, case)
    if case.op != FWD:
        dx, scale = inputs.dx
        got = inputs.sampled(_given(left.pop(0), "dx", case.shape))
        found["dx"] = _largest(got, dx, np.maximum(scale, np.abs(dx)), case)
        narrow, wide = EPSILON[case.dtype], EPSILON[stats_dtype(case.dtype)]
        for label, (exact, root, size) in zip(("dweight", "dbias"), inputs.totals, strict=True):
            unit = np.maximum(np.abs(exact), root) + wide / narrow * size
            found[label] = _largest(_given(left.pop(0), label, (case.N,)), exact, unit, case)
    return found


def _given(a: Array | None, label: str, shape: tuple[int, ...]) -> Array:
    """Whoever leaves a result out has not done the work that the others are timed on."""
    if a is None or a.shape != shape:
        msg = f"{label} came back as {None if a is None else a.shape}, not as {shape}"
        raise ValueError(msg)
    return a


def _largest(got: Array, exact: Array, unit: Array, case: CpuCase) -> float:
    return float((np.abs(got.astype(np.float64) - exact) / unit).max()) / EPSILON[case.dtype]


def verdict(inputs: CpuInputs, found: dict[str, float], ours: bool) -> tuple[float, float]:
    """The error that is nearest to its limit or furthest beyond it, and that limit."""
    case = inputs.case
    terms = {k: case.N if k in ("y", "dx") else case.M for k in found}
    allowed = {k: limit(case.dtype, terms[k], ours) for k in found}
    worst = max(found, key=lambda k: (found[k] if found[k] == found[k] else np.inf) / allowed[k])
    return found[worst], allowed[worst]
