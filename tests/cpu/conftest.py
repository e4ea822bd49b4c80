"""Both ways that a NumPy array can be taken."""

import pytest

from cupynorm._cpu import arrays


@pytest.fixture(params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        assert arrays.describe().startswith("numba"), arrays.describe()
        yield "numba"
    else:
        with arrays.without_numba():
            yield "numpy"
