"""The fixture that the tests of tensors share."""

import pytest

from cupynorm._cpu.engine import without_numba


@pytest.fixture(params=["compiled", "plain"])
def loops(request):
    """With numba's loops and without numba."""
    if request.param == "compiled":
        yield
    else:
        with without_numba():
            yield
