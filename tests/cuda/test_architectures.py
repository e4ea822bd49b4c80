"""Every row kernel as it is compiled for other architectures: the bits are those of sm_90."""

import pytest

from cupynorm._cuda.plan import Device
from tests.cuda.rows import FAMILIES, At, case, length, run
from tests.gpu_backend import SIMULATED, SimulatedMachine
from tests.ptx.limits import DeviceLimits

# Those of which NVRTC makes PTX of their own: `SAME_PTX` of tests/nvrtc/build.py.
MACHINES = {
    arch: SimulatedMachine(Device(int(arch), 132, DeviceLimits.of(arch).opt_in_shared))
    for arch in ("75", "80", "100")
}


@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("family", [*FAMILIES, "cluster"])
def test_the_bits_of_sm_90(arch, direction, family):
    """Rows at odd addresses of 16-bit types, whose conversions differ.

    And of float32 where NVRTC has another optimizer, or rows come another way (K3).
    """
    if (arch, family, direction) == ("75", "shared", "forward"):
        pytest.skip("rows are copied to shared memory from sm_80 on")
    # 64 KiB hold the rows of x and dy, and not the sums over rows besides.
    sums = (arch, family) != ("75", "shared")
    some = [("bfloat16", At(1, 2))]
    some += [("float16", At(1, 2))] * (arch == "75" and family == "warp")
    some += [("float32", At())] * (arch == "100" or family == "shared")
    for dtype, at in some:
        data = case(direction, 3, length(family, dtype, direction), dtype)
        places = dict.fromkeys(data.shaped, at)
        expected, got = (
            run(m, data, family, at=places, wanted=(True, sums, sums))
            for m in (SIMULATED, MACHINES[arch])
        )
        assert got.bits() == expected.bits()
