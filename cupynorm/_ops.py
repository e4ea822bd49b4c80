"""What is computed, as data, and the named tuples that come out."""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Op:
    """An operation; its name is that of functions, kernel entries and sentences."""

    name: str


LAYER_NORM = Op("layer_norm")


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
    >>> y, mean, rstd = result
    >>> rstd.round(3)
    array([[1.225]])
    """

    y: Any
    mean: Any
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
    >>> gradients.dbias
    array([4., 2., 4.])
    """

    dx: Any
    dweight: Any
    dbias: Any
