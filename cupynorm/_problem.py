"""Names of before, until nobody asks for them."""

from dataclasses import dataclass

from cupynorm._rules import (
    ITEMSIZE as ITEMSIZE,
)
from cupynorm._rules import (
    axis_order as axis_order,
)
from cupynorm._rules import (
    check_affine_dtype as check_affine_dtype,
)
from cupynorm._rules import (
    check_affine_shape as check_affine_shape,
)
from cupynorm._rules import (
    check_beside_x as check_beside_x,
)
from cupynorm._rules import (
    check_eps as check_eps,
)
from cupynorm._rules import (
    check_order as check_order,
)
from cupynorm._rules import (
    check_out as check_out,
)
from cupynorm._rules import (
    check_x_dtype as check_x_dtype,
)
from cupynorm._rules import (
    dtype_name as dtype_name,
)
from cupynorm._rules import (
    integers as integers,
)
from cupynorm._rules import (
    numpy_dtype as numpy_dtype,
)
from cupynorm._rules import (
    refuse_dtype_beside_x as refuse_dtype_beside_x,
)
from cupynorm._rules import (
    resolve_axes as resolve_axes,
)
from cupynorm._rules import (
    rows_and_cols as rows_and_cols,
)
from cupynorm._rules import (
    stats_dtype as stats_dtype,
)
from cupynorm._rules import (
    stats_shape as stats_shape,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One call shape: all that a plan may depend on, and nothing of the data."""

    op: str  # "layer_norm_fwd"
    x_dtype: str
    weight_dtype: str | None
    bias_dtype: str | None
    outer: int
    M: int  # rows of one outer step
    N: int  # columns: elements that share a mean
    x_strides: tuple[int, int, int]  # elements, for (outer, M, N)
    y_strides: tuple[int, int, int]
    stats: bool

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.outer * self.M


@dataclass(frozen=True, slots=True)
class GradientProblem:
    """One shape of a backward call: all that its plan may depend on, and nothing of the data."""

    x_dtype: str
    weight_dtype: str | None
    dweight_dtype: str | None  # None: not wanted
    dbias_dtype: str | None
    dx: bool  # wanted
    outer: int
    M: int
    N: int
    dy_strides: tuple[int, int, int]  # elements, for (outer, M, N)
    x_strides: tuple[int, int, int]
    dx_strides: tuple[int, int, int]

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.outer * self.M
