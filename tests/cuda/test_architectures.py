"""Every row kernel as it is compiled for other architectures: the bits are those of sm_90."""

import itertools

import pytest

from cupynorm._cuda.plan import Device
from tests.cuda.rows import At, case, length, run
from tests.gpu_backend import SIMULATED, SimulatedMachine
from tests.ptx.limits import DeviceLimits

# Those of which NVRTC makes PTX of their own: `SAME_PTX` of tests/nvrtc/build.py.
MACHINES = {
    arch: SimulatedMachine(Device(int(arch), 132, DeviceLimits.of(arch).opt_in_shared))
    for arch in ("75", "80", "100")
}
SAMPLES = [  # every family on each; both directions where rows come another way (K3), or K4 is met
    *itertools.product(("100",), ("forward",), ("warp", "shared", "cluster"), ("float32",)),
    *itertools.product(("100",), ("backward",), ("block", "split", "cluster"), ("bfloat16",)),
    *itertools.product(("80",), ("forward",), ("warp", "shared", "split"), ("bfloat16",)),
    *itertools.product(("80",), ("backward",), ("block", "shared"), ("float32",)),
    *itertools.product(("75",), ("forward",), ("block", "split"), ("bfloat16",)),
    *itertools.product(("75",), ("backward",), ("warp", "shared"), ("float16",)),
]


@pytest.mark.parametrize(("arch", "direction", "family", "dtype"), SAMPLES)
def test_the_bits_of_sm_90(arch, direction, family, dtype):
    """Rows of 16-bit types, whose conversions differ, lie at odd addresses."""
    # 64 KiB hold the rows of x and dy, and not the sums over rows besides.
    sums = (arch, family) != ("75", "shared")
    data = case(direction, 3, length(family, dtype, direction), dtype)
    places = dict.fromkeys(data.shaped, At() if dtype == "float32" else At(1, 2))
    expected, got = (
        run(m, data, family, at=places, wanted=(True, sums, sums))
        for m in (SIMULATED, MACHINES[arch])
    )
    assert got.bits() == expected.bits()
