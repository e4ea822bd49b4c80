"""What is computed, as data, and the named tuples that come out."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Op:
    """An operation; no two have one name, which is that of kernel entries, too."""

    name: str
    center: bool = True  # subtract the mean; without: no mean among the results, and no bias
    unit_weight: bool = False  # the weight is told from one: x_hat * (1 + weight)
    residual: bool = False  # x is x + residual, rounded to residual's dtype: a result, too

    @property
    def function(self) -> str:
        """Name of the public function, for sentences."""
        return self.name.removeprefix("zero_centered_")

    @property
    def alone(self) -> "Op":
        """The operation on a sum that is there already, which is what has a backward."""
        return OPS[self.name.replace("add_", "")]


LAYER_NORM = Op("layer_norm")
RMS_NORM = Op("rms_norm", center=False)
ADD_LAYER_NORM = Op("add_layer_norm", residual=True)
ADD_RMS_NORM = Op("add_rms_norm", center=False, residual=True)
# The same with 1 + weight.
ZERO_CENTERED = {
    op: replace(op, name=f"zero_centered_{op.name}", unit_weight=True)
    for op in (LAYER_NORM, RMS_NORM, ADD_LAYER_NORM, ADD_RMS_NORM)
}
OPS = {op.name: op for op in (*ZERO_CENTERED, *ZERO_CENTERED.values())}


class LayerNormResult(NamedTuple):
    """What `layer_norm(..., return_stats=True)` gives.

    Attributes
    ----------
    y : array
        Normalized x: its shape, dtype, library and device.
    mean : array
        Mean over the normalized axes, float32 (float64 for float64 x), shaped like x with the
        normalized axes of length 1.
    rstd : array
        1 / sqrt(var + eps), dtype and shape as `mean`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> result = cn.layer_norm(np.array([[1.0, 2.0, 3.0]]), eps=0.0, return_stats=True)
    >>> result.mean.shape
    (1, 1)
    """

    y: Any
    mean: Any
    rstd: Any


class RMSNormResult(NamedTuple):
    """What `rms_norm(..., return_stats=True)` gives."""

    y: Any
    rstd: Any


class _AddNorm(NamedTuple):
    y: Any
    sum: Any


class AddNormResult(_AddNorm):
    """What `add_layer_norm` and `add_rms_norm` give."""

    __slots__ = ()

    def __new__(cls, y: Any, *total: Any) -> Any:  # of one iterable by torch, for its subclasses
        return super().__new__(cls, *((y, *total) if total else y))


class AddLayerNormResult(NamedTuple):
    """What `add_layer_norm(..., return_stats=True)` gives."""

    y: Any
    sum: Any
    mean: Any
    rstd: Any


class AddRMSNormResult(NamedTuple):
    """What `add_rms_norm(..., return_stats=True)` gives."""

    y: Any
    sum: Any
    rstd: Any


class LayerNormGradients(NamedTuple):
    """What `layer_norm_backward` gives; None for what `output_mask` leaves out.

    Attributes
    ----------
    dx : array or None
        Gradient of x: its shape, dtype, library and device.
    dweight : array or None
        Gradient of weight, summed over all rows: weight's shape and dtype.
    dbias : array or None
        Gradient of bias, summed over all rows: shape and dtype as `dweight`.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    >>> y, mean, rstd = cn.layer_norm(x, return_stats=True)
    >>> mask = (False, True, True)
    >>> gradients = cn.layer_norm_backward(x, x, 3, mean, rstd, output_mask=mask)
    >>> gradients.dx is None
    True
    """

    dx: Any
    dweight: Any
    dbias: Any


class RMSNormGradients(NamedTuple):
    """What `rms_norm_backward` gives; None for what `output_mask` leaves out."""

    dx: Any
    dweight: Any


# What gives more than y, by center, residual and whether statistics are wanted.
_RESULTS: dict[tuple[bool, bool, bool], Any] = {
    (True, False, True): LayerNormResult,
    (False, False, True): RMSNormResult,
    (True, True, False): AddNormResult,
    (False, True, False): AddNormResult,
    (True, True, True): AddLayerNormResult,
    (False, True, True): AddRMSNormResult,
}


def named(op: Op, stats: bool, found: Any) -> Any:
    """A result of one array as it is; of several as the tuple that names them."""
    kind = _RESULTS.get((op.center, op.residual, bool(stats)))
    return found if kind is None else kind(*found)
