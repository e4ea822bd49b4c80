"""Layer norm, its gradient and its tangent in array-API calls; moments of parts, merged, applied.

The path of every library without one of its own. Nothing is written in place and no step depends
on the values, so that the library that owns x can differentiate, trace, vectorize or delay it all.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from cupynorm._layout import Facts
from cupynorm._libraries import library_of
from cupynorm._ops import LAYER_NORM, Op
from cupynorm._rules import dtype_name, stats_dtype, stats_shape


class Rows:
    """x seen as rows over `axes`, ascending: sums and means, in the dtype of the statistics."""

    def __init__(self, xp: Any, x: Any, axes: tuple[int, ...], op: Op = LAYER_NORM) -> None:
        self.xp, self.x, self.axes, self.op = xp, x, axes, op
        self.dtype = getattr(xp, stats_dtype(dtype_name(x.dtype)))
        self.shape = tuple(x.shape[a] for a in axes)  # of weight and bias
        self.n = math.prod(self.shape)
        # A power of two that is at most 1/n: scaling by it is exact, and a sum of n scaled terms
        # overflows no sooner than its largest term. A symbolic n has no bits to look at.
        plain = type(self.n) is int
        self.unit = 2.0 ** -max(self.n - 1, 0).bit_length() if plain else 1.0

    def wide(self, value: Any) -> Any:
        """Cast to the dtype of the statistics."""
        return self.xp.astype(value, self.dtype, copy=False)

    def narrow(self, value: Any) -> Any:
        """Cast to x's dtype."""
        return self.xp.astype(value, self.x.dtype, copy=False)

    def along(self, value: Any) -> Any:
        """Weight, bias or a tangent of one, broadcastable against x."""
        shape = tuple(n if a in self.axes else 1 for a, n in enumerate(self.x.shape))
        return self.xp.reshape(self.wide(value), shape)

    def scale(self, weight: Any) -> Any:
        """What the weight multiplies x_hat by."""
        return self.along(weight) + 1.0 if self.op.unit_weight else self.along(weight)

    def scaled(self, x_hat: Any, weight: Any, bias: Any) -> Any:
        """y in x's dtype."""
        y = x_hat if weight is None else x_hat * self.scale(weight)
        return self.narrow(y if bias is None else y + self.along(bias))

    def mean(self, terms: Any, factor: Any = None) -> Any:
        """Mean of each row, or of its product with `factor`; length 1 is kept."""
        scaled = terms if self.unit == 1.0 else terms * self.unit
        if factor is not None:
            scaled = scaled * factor
        return _sum(self.xp, scaled, self.axes) / (self.n * self.unit)

    def over_rows(self, terms: Any) -> Any:
        """Sum over all rows, of weight's shape."""
        batch = tuple(a for a in range(self.x.ndim) if a not in self.axes)
        return self.xp.reshape(_sum(self.xp, terms, batch), self.shape) if batch else terms

    def standardized(self, eps: float) -> tuple[Any, Any, Any]:
        """x_hat, mean and rstd as functions of x, by the corrected two-pass algorithm.

        Without a centre there is no mean, and one pass.
        """
        values = self.wide(self.x)
        if not self.op.center:
            rstd = 1.0 / self.xp.sqrt(self.mean(values, values) + eps)
            return values * rstd, None, rstd
        start = self.mean(values)
        offset = values - start
        # `start` is rounded, at 1e6 in float32 by 0.03, and every offset is off by that much.
        # Their mean is that error, and being small it is known precisely.
        shift = self.mean(offset)
        centred = offset - shift
        rstd = 1.0 / self.xp.sqrt(self.mean(centred, centred) + eps)
        return centred * rstd, start + shift, rstd

    def restored(self, mean: Any, rstd: Any) -> Any:
        """x_hat by the statistics that were given out, whose mean is rounded."""
        if not self.op.center:
            return self.wide(self.x) * rstd
        offset = self.wide(self.x) - mean
        return (offset - self.mean(offset)) * rstd


def normalize(rows: Rows, weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    """y in x's dtype; mean and rstd in that of the statistics, NaN where rows are empty."""
    x_hat, mean, rstd = rows.standardized(eps)
    return rows.scaled(x_hat, weight, bias), mean, rstd


def gradients(
    rows: Rows,
    of: tuple[Any, ...],
    weight: Any,
    hat: tuple[Any, Any],
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """dx in x's dtype; dweight and dbias in that of the statistics, None where y has no gradient.

    `of` holds the gradients of y, mean and rstd, each of which may be None, and where there is one
    that which flows into x from elsewhere; `hat` x_hat and rstd.
    """
    dy, dmean, drstd, *dsum = of
    x_hat, rstd = hat
    dx = dweight = dbias = None
    slope = None if dy is None else rows.wide(dy)
    if wanted[0]:
        if slope is None:
            dx = rows.xp.zeros_like(x_hat)
        else:
            g = slope if weight is None else slope * rows.scale(weight)
            dx = _projected(rows, g, hat)
        if dmean is not None:
            dx = dx + dmean / rows.n
        if drstd is not None:
            dx = dx - drstd * rstd * rstd * x_hat / rows.n
        if dsum:
            dx = dx + rows.wide(dsum[0])
        dx = rows.narrow(dx)
    if slope is not None and wanted[1]:
        dweight = rows.over_rows(slope * x_hat)
    if slope is not None and wanted[2]:
        dbias = rows.over_rows(slope)
    return dx, dweight, dbias


def tangents(
    rows: Rows, of: tuple[Any, Any, Any], weight: Any, hat: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    """Forward-mode derivatives of y, mean and rstd by those of x, weight and bias.

    A tangent that is None is zero; `hat` is x_hat and rstd.
    """
    dx, dweight, dbias = of
    x_hat, rstd = hat
    zeros = rows.xp.zeros_like
    dy, dmean, drstd = zeros(x_hat), zeros(rstd) if rows.op.center else None, zeros(rstd)
    if dx is not None:
        slope = rows.wide(dx)
        dmean = rows.mean(slope) if rows.op.center else None
        drstd = -rstd * rstd * rows.mean(slope, x_hat)
        dy = _projected(rows, slope, hat)
        if weight is not None:
            dy = dy * rows.scale(weight)
    if dweight is not None:
        dy = dy + x_hat * rows.along(dweight)
    if dbias is not None:
        dy = dy + rows.along(dbias)
    return rows.narrow(dy), dmean, drstd


def _projected(rows: Rows, z: Any, hat: tuple[Any, Any]) -> Any:
    """The derivative of x_hat by x, a symmetric matrix for each row, applied to z."""
    x_hat, rstd = hat
    lifted = z - rows.mean(z) if rows.op.center else z
    return rstd * (lifted - x_hat * rows.mean(z, x_hat))


def _sum(xp: Any, terms: Any, axes: tuple[int, ...]) -> Any:
    """Sum over `axes`, kept with length 1, in an order that depends on their length alone.

    `xp.sum` chooses its order by strides, thread count and number of rows, and so would give one
    row different bits in different batches. Halving the row by elementwise sums cannot, and a tree
    rounds less too. XLA and Dask rearrange what they are given and torch's axes may have symbols
    for lengths, so they get the plain sum, which they know how to split and to differentiate.
    """
    n = math.prod([terms.shape[a] for a in axes])
    if n == 0 or any(name in xp.__name__ for name in ("dask", "jax", "torch")):
        # dtype is spelled out: `sum` of the standards before 2023 widens float32 without it.
        return xp.sum(terms, axis=axes, dtype=terms.dtype, keepdims=True)
    batch = tuple(a for a in range(terms.ndim) if a not in axes)
    kept = stats_shape(terms.shape, axes)
    rows = xp.permute_dims(terms, (*batch, *axes))
    rows = xp.reshape(rows, (*(terms.shape[a] for a in batch), n))
    if isinstance(rows, np.ndarray):
        # NumPy's sums along contiguous rows go by their length, and make no arrays on the way.
        return np.add.reduce(np.ascontiguousarray(rows), axis=-1).reshape(kept)
    half = 1 << (n.bit_length() - 1)  # the largest power of two within n
    if n > half:
        folded = rows[..., : n - half] + rows[..., half:]
        rows = xp.concat([folded, rows[..., n - half : half]], axis=-1)
    while half > 1:
        half //= 2
        rows = rows[..., :half] + rows[..., half:]
    return xp.reshape(rows, kept)


def quiet(xp: Any) -> Any:
    """A context for rows that hold NaN or Inf, of which libraries warn that compute by NumPy.

    torch does not, and torch.compile cannot trace errstate.
    """
    return contextlib.nullcontext() if "torch" in xp.__name__ else np.errstate(all="ignore")


# --- parts of rows --------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of the elements of one part that share a row; arrays in the statistics' dtype.

    They have the part's shape with length 1 on the normalized axes.
    """

    terms: int  # elements of a row
    mean: Any
    lack: Any  # what the rounded mean lacks
    spread: Any  # root of the variance: the variance of values near 1e30 is no float32


def moments(xp: Any, x: Any, axes: tuple[int, ...], op: Op = LAYER_NORM) -> Moments:
    """Moments of one part, by float64; the bits go by its shape and values, not its strides.

    Without a centre the mean is 0, and the variance the mean square.
    """
    rows = Rows(xp, x, axes)
    wide = Rows(xp, xp.astype(x, xp.float64, copy=False), axes)
    if rows.dtype != xp.float64:
        wide.unit = 1.0  # sums of narrower values do not overflow there
    nothing = xp.zeros(stats_shape(x.shape, axes), dtype=rows.dtype)
    if not wide.n:
        return Moments(0, nothing, nothing, nothing)
    if not op.center:
        zero = xp.astype(nothing, xp.float64, copy=False)
        return _rounded(xp, wide.n, (zero, zero, wide.mean(wide.x, wide.x)), rows.dtype)
    start = wide.mean(wide.x)
    offset = wide.x - start
    shift = wide.mean(offset)
    variance = wide.mean(offset, offset) - shift * shift
    return _rounded(xp, wide.n, (start, shift, variance), rows.dtype)


def merge(xp: Any, parts: Sequence[Moments]) -> Moments:
    """Chan, Golub and LeVeque's merge of any number of parts about one shift, in their order."""
    some = [part for part in parts if part.terms]
    if len(some) < 2:
        return (some or parts)[0]
    terms = sum(part.terms for part in some)
    shares = [part.terms / terms for part in some]

    def wide(value: Any) -> Any:
        return xp.astype(value, xp.float64, copy=False)

    start = wide(some[0].mean)  # means that share a large offset lose nothing about it
    away = [(wide(part.mean) - start) + wide(part.lack) for part in some]
    shift = sum(share * a for share, a in zip(shares, away, strict=True))
    variance = sum(
        share * (wide(part.spread) ** 2 + (a - shift) ** 2)
        for share, part, a in zip(shares, some, away, strict=True)
    )
    return _rounded(xp, terms, (start, shift, variance), some[0].mean.dtype)


def _rounded(xp: Any, terms: int, wide: tuple[Any, Any, Any], dtype: Any) -> Moments:
    """Moments from the mean, in two summands, and the variance, in float64."""
    start, shift, variance = wide
    mean = xp.astype(start + shift, dtype, copy=False)
    lack = xp.astype((start - xp.astype(mean, xp.float64)) + shift, dtype, copy=False)
    # Rounding may leave the variance a hair below zero; NaN passes.
    spread = xp.sqrt(xp.where(variance < 0.0, 0.0 * variance, variance))
    return Moments(terms, mean, lack, xp.astype(spread, dtype, copy=False))


def rstd_of(xp: Any, whole: Moments, eps: float) -> Any:
    """1 / sqrt(var + eps) of whole rows, NaN where they are empty."""
    if not whole.terms:
        return whole.spread + math.nan
    wide = xp.astype(whole.spread, xp.float64, copy=False)
    return xp.astype(1.0 / xp.sqrt(wide * wide + eps), whole.spread.dtype, copy=False)


def apply(rows: Rows, whole: Moments, rstd: Any, weight: Any, bias: Any) -> Any:
    """y of a part of rows by the moments and rstd of the whole ones."""
    x_hat = ((rows.wide(rows.x) - whole.mean) - whole.lack) * rstd
    return rows.scaled(x_hat, weight, bias)


# --- the door -------------------------------------------------------------------------------------


class Door:
    """How arrays of any array-API library come in; nothing is kept for them."""

    look = None
    select = None

    @staticmethod
    def strides(_: Any) -> None:
        """None: memory is the library's own affair."""

    @staticmethod
    def device(_: Any) -> None:
        """None: nothing here depends on it."""

    @staticmethod
    def normalizer(facts: Facts) -> Callable[..., Any]:
        """The forward of arrays of this kind."""

        def call(x: Any, weight: Any, bias: Any, *more: Any) -> Any:
            targets, xp, summed = [more[0], *more[2:]], array_namespace(x), x
            for out in targets:
                _check_memory(x, facts.order, out)
            with quiet(xp):
                if facts.op.residual:
                    summed = xp.astype(x, more[1].dtype, copy=False) + more[1]
                rows = Rows(xp, summed, facts.axes, facts.op)
                y, mean, rstd = normalize(rows, weight, bias, facts.eps)
            found = [xp.astype(y, x.dtype, copy=False), summed][: len(targets)]
            for i, out in enumerate(targets):
                if out is not None:
                    out[...] = found[i]
                    found[i] = out
            if facts.stats:
                found += [rstd] if mean is None else [mean, rstd]
            return tuple(found) if len(found) > 1 else found[0]

        return call

    @staticmethod
    def differentiator(facts: Facts) -> Callable[..., Any]:
        """The backward of arrays of this kind."""
        dtypes = facts.dtypes
        wanted = "dx" in facts.strides, "dweight" in dtypes, "dbias" in dtypes

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *dsum: Any) -> tuple[Any, ...]:
            xp = array_namespace(x)
            rows = Rows(xp, x, facts.axes, facts.op)
            with quiet(xp):
                hat = rows.restored(mean, rstd), rstd
                dx, *sums = gradients(rows, (dy, None, None, *dsum), weight, hat, wanted)
            named = zip(("dweight", "dbias"), sums, strict=True)
            return dx, *(
                None if total is None else xp.astype(total, getattr(xp, dtypes[name]), copy=False)
                for name, total in named
            )

        return call


DOOR = Door()


def _check_memory(x: Any, order: str, out: Any) -> None:
    """Refuse an `out` or a layout that x's library does not offer."""
    library = library_of(x)
    if out is not None and library == "jax":
        msg = "out= is given but JAX arrays cannot be written to; use the returned array"
        raise TypeError(msg)
    if order == "F":
        msg = f"order='F' is given but {library} arrays have no layout to choose; use order='K'"
        raise ValueError(msg)
