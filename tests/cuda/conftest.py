"""CuPy for the tests of its arrays: the stand-in, and the real one where there is a GPU."""

import pytest

from tests.conftest import Backend, why_not
from tests.cuda.calls import capability_for
from tests.ptx.cupy_stand_in import simulated_cupy

HERE = ["simulated"] if why_not(Backend.CUPY) else ["simulated", "gpu"]


@pytest.fixture
def sim(request):
    """The stand-in, with two devices; `sim.simulator` knows what was launched and allocated."""
    with simulated_cupy(
        compute_capability=capability_for(request), devices=2, reload=("cupynorm._cuda.arrays",)
    ) as module:
        yield module


@pytest.fixture(params=[pytest.param(h, marks=[pytest.mark.gpu] * (h == "gpu")) for h in HERE])
def cp(request):
    """CuPy: the stand-in or the real one."""
    return request.getfixturevalue("sim") if request.param == "simulated" else __import__("cupy")
