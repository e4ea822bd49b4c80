"""Names of before, until nobody asks for them."""

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
