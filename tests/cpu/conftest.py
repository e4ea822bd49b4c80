"""Both ways that a NumPy array can be taken."""

import pytest

from cupynorm._cpu.engine import state, without_numba


@pytest.fixture(params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        assert state()[0], state()[1]
        yield "numba"
    else:
        with without_numba():
            yield "numpy"
