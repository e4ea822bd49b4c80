"""CuPy for the tests of its arrays: the stand-in, and the real one where there is a GPU."""

import pytest

from tests.conftest import Backend, why_not

HERE = ["simulated"] if why_not(Backend.CUPY) else ["simulated", "gpu"]


@pytest.fixture(params=[pytest.param(h, marks=[pytest.mark.gpu] * (h == "gpu")) for h in HERE])
def cp(request):
    """CuPy: the stand-in or the real one."""
    return request.getfixturevalue("sim") if request.param == "simulated" else __import__("cupy")
