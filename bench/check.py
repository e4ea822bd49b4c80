"""The check that precedes every number: float64, two passes, on the very bits that went in.

Independent of the package; the same lines run on NumPy and on CuPy.
"""

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cases import EPS, Case

BLOCK = 2**25  # elements that are widened at a time
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# In units of epsilon(dtype) times the size of what is added up. Ours rounds a handful of times, and
# to 16 bits once, by half a unit.
OURS = {"float16": 0.75, "bfloat16": 0.75, "float32": 8.0, "float64": 16.0}
PEERS_16_BIT = 3.0  # they may round x_hat before the product, and the product before the sum
CHAIN, MOST = 128, 8192.0  # and add up every 128th float32 number one after the other
NAMES = {"forward": ("y",), "backward": ("dx", "dweight", "dbias")}
NAMES["both"] = NAMES["forward"] + NAMES["backward"]


def limit(dtype: str, terms: int, ours: bool) -> float:
    """Largest error that passes; a peer's own inaccuracy stands in its `error` column."""
    if ours:
        return OURS[dtype]
    return PEERS_16_BIT if dtype.endswith("16") else min(MOST, 16.0 + terms / CHAIN)


def widened(xp: Any, a: Any) -> Any:
    """float64 values of any of the four dtypes; bfloat16 by its bits."""
    if str(a.dtype) == "bfloat16":
        a = (xp.ascontiguousarray(a).view("uint16").astype("uint32") << 16).view("float32")
    return a.astype("float64")


def row_means(a: Any) -> Any:
    """Means (M, 1); of long rows by 1024 equal parts, since CuPy gives each sum one block."""
    M, N = a.shape
    if N >= 2**20 and N % 1024 == 0:
        a = a.reshape(M, 1024, N // 1024).mean(axis=2)
    return a.mean(axis=1, keepdims=True)


def _normalized(xp: Any, x: Any, eps: float) -> tuple[Any, Any, Any]:
    """Mean, rstd and x_hat of rows, float64."""
    d = widened(xp, x)
    mean = row_means(d)
    d -= mean
    lack = row_means(d)  # what rounding left of the mean
    d -= lack
    rstd = 1.0 / xp.sqrt(row_means(d * d) + eps)
    return mean + lack, rstd, d * rstd


def statistics(xp: Any, x: Any) -> list[Any]:
    """Mean and rstd (M, 1) as a forward leaves them: float32, or float64 for float64 x."""
    parts = [_normalized(xp, x[block], EPS)[:2] for block in blocks(*x.shape)]
    dtype = "float64" if str(x.dtype) == "float64" else "float32"
    return [xp.concatenate(part).astype(dtype) for part in zip(*parts, strict=True)]


def blocks(M: int, N: int) -> Iterator[slice]:
    """Of rows, few enough to be widened."""
    step = max(1, BLOCK // N)
    return (slice(begin, begin + step) for begin in range(0, M, step))


@dataclass
class Given:
    """What went in, as rows (M, N), where `xp` can compute with it."""

    xp: Any
    x: Any
    dy: Any = None
    weight: Any = None
    bias: Any = None
    eps: float = EPS

    def error_of_y(self, y: Any, rows: Any = slice(None)) -> float:
        """Largest |y - expected| in units of epsilon * max(1, |y|, |x_hat * weight|, |bias|).

        The unit has the terms' size and not y's alone, because a sum that cancels cannot be more
        exact than its terms. `rows`: those that are compared.
        """
        xp, errors = self.xp, []
        b = 0.0 if self.bias is None else widened(xp, self.bias)
        least = 1.0 if self.bias is None else xp.maximum(xp.abs(b), 1.0)
        x, y = self.x[rows], y[rows]
        for block in blocks(*x.shape):
            scaled = _normalized(xp, x[block], self.eps)[2] * self._weight
            expected = scaled + b
            unit = xp.maximum(xp.maximum(xp.abs(scaled), xp.abs(expected)), least)
            errors.append(float((xp.abs(widened(xp, y[block]) - expected) / unit).max()))
        return float(np.max(errors)) / EPSILON[str(y.dtype)]

    def error_of_dx(self, dx: Any, rows: Any = slice(None)) -> float:
        """In units of epsilon * rstd * max(1, the terms of the formula), at least of |expected|."""
        xp, errors = self.xp, []
        x, dy, dx = self.x[rows], self.dy[rows], dx[rows]
        for block in blocks(*x.shape):
            _, rstd, x_hat = _normalized(xp, x[block], self.eps)
            g = widened(xp, dy[block]) * self._weight
            c1, pull = row_means(g), x_hat * row_means(g * x_hat)
            expected = rstd * (g - c1 - pull)
            terms = xp.maximum(xp.maximum(xp.abs(g), xp.abs(pull)), xp.maximum(xp.abs(c1), 1.0))
            unit = xp.maximum(terms * rstd, xp.abs(expected))
            errors.append(float((xp.abs(widened(xp, dx[block]) - expected) / unit).max()))
        return float(np.max(errors)) / EPSILON[str(dx.dtype)]

    @functools.cached_property
    def sums(self) -> list[list[Any]]:
        """Of dweight and dbias: exact, sum of the squared terms, sum of the terms' sizes.

        x_hat counts as the difference of x * rstd and mean * rstd that it is.
        """
        xp = self.xp
        sums: list[list[Any]] = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        for block in blocks(*self.x.shape):
            mean, rstd, x_hat = _normalized(xp, self.x[block], self.eps)
            dy = widened(xp, self.dy[block])
            sizes = xp.abs(dy) * (xp.abs(x_hat) + xp.abs(mean * rstd)), xp.abs(dy)
            for total, terms, size in zip(sums, (dy * x_hat, dy), sizes, strict=True):
                for k, part in enumerate((terms, terms * terms, size)):
                    total[k] = total[k] + part.sum(axis=0)
        return sums

    def error_of_total(self, total: Any, k: int) -> float:
        """Of dweight (k = 0) or dbias (1).

        In units of epsilon(its dtype) * max(|expected|, root of the sum of the squared terms),
        which is what a sum of random terms comes to, plus epsilon of the accumulator * the sizes.
        """
        xp, (exact, squares, sizes) = self.xp, self.sums[k]
        wide = EPSILON["float64" if str(self.x.dtype) == "float64" else "float32"]
        unit = EPSILON[str(total.dtype)] * xp.maximum(xp.abs(exact), xp.sqrt(squares))
        return float((xp.abs(widened(xp, total) - exact) / (unit + wide * sizes)).max())

    @property
    def _weight(self) -> Any:
        return 1.0 if self.weight is None else widened(self.xp, self.weight)


def judge(
    case: Case, given: Given, result: tuple[Any, ...], ours: bool, rows: Any = slice(None)
) -> tuple[float, float]:
    """The error that is nearest to its limit or furthest beyond it, and that limit.

    `result`: y where there is a forward, then dx, dweight and dbias where there is a backward, the
    latter two where there is a weight. Who leaves one out has not done the others' work.
    """
    found = []
    for name, got in zip(NAMES[case.direction], result, strict=True):
        total = name in ("dweight", "dbias")
        if total and not case.affine_dtype:
            continue
        expected = (case.N,) if total else given.x.shape
        if got is None or got.shape != expected:
            msg = f"no {name} of shape {expected} came back"
            raise ValueError(msg)
        if total:
            error = given.error_of_total(got, name == "dbias")
        else:
            error = given.error_of_y(got, rows) if name == "y" else given.error_of_dx(got, rows)
        found.append((error, limit(str(got.dtype), case.M if total else case.N, ours)))
    return worst(found)


def worst(found: list[tuple[float, float]]) -> tuple[float, float]:
    return max(found, key=lambda e: e[0] / e[1] if e[0] == e[0] else math.inf)


def demand(name: Any, error: float, dtype: str, terms: int, ours: bool = True) -> None:
    """Refuse to time what is wrong."""
    if not error <= limit(dtype, terms, ours):
        sys.exit(f"{name} is wrong: error {error:.3g}")
