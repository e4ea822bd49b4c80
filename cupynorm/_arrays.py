"""Names of before, until nobody asks for them."""

from cupynorm._libraries import (
    Strided as Strided,
)
from cupynorm._libraries import (
    check_companion as check_companion,
)
from cupynorm._libraries import (
    check_overlap as check_overlap,
)
from cupynorm._libraries import (
    check_writable as check_writable,
)
from cupynorm._libraries import (
    classify as classify,
)
from cupynorm._libraries import (
    element_strides as element_strides,
)
from cupynorm._libraries import (
    library_of as library_of,
)
