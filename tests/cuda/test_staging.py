"""The same bits on every architecture; K3's rows on their way, with each barrier needed."""

import dataclasses
import itertools

import pytest

import tests.gpu_backend
from cupynorm._cuda.plan import STAGE_ASYNC, STAGE_BULK, STAGE_REGISTERS, VEC_BYTES, Device
from cupynorm._cuda.source import source_of
from cupynorm._rules import ITEMSIZE
from tests.cuda.rows import DX_ALONE, At, case, check, length, run
from tests.gpu_backend import ON_EACH_MACHINE, SIMULATED, SimulatedMachine
from tests.ptx.kernel import Kernel
from tests.ptx.launch import PtxFault
from tests.ptx.limits import DeviceLimits

WAYS = {STAGE_REGISTERS: 75, STAGE_ASYNC: 80, STAGE_BULK: 90}
CHUNKS = 2300  # vectors: two chunks and a part of a third, so that one group has two


def devices(machine, **changes):
    """The machine as each architecture would plan for it, newest first; a GPU runs older plans.

    Without clusters, which would take K3's rows.
    """
    return [
        dataclasses.replace(machine.device, compute_capability=cc, max_cluster=1, **changes)
        for cc in sorted(WAYS.values(), reverse=True)
        if cc <= machine.device.compute_capability
    ]


def shared(machine, device, direction, dtype="float32", **options):
    """A run of rows that K3 takes; of the backward several go through one block's place."""
    rows, vecs = (3, CHUNKS) if direction == "forward" else (5, 1060)
    data = case(direction, rows, vecs * VEC_BYTES // ITEMSIZE[dtype] - 1, dtype)
    result = run(machine, data, device=device, **options)
    assert result.plan.family == "shared"
    return result, data


# --- bits ---------------------------------------------------------------------------------------


@ON_EACH_MACHINE
@pytest.mark.parametrize(
    ("direction", "dtype"),
    [("forward", "bfloat16"), ("forward", "float64"), ("backward", "float64")],
)
def test_the_same_bits_each_way(machine, direction, dtype):
    """Whatever the alignment: of x, of its pitch, and with x and y in one place.

    The backward fetches into registers too.
    """
    seen, ways, backward = set(), set(), direction == "backward"
    every = devices(machine, sm_count=2 if backward else 1)
    for device in every if backward else (d for d in every if d.staging != STAGE_REGISTERS):
        places = [{}, {"at": {"x": At(1, 2), "dy": At(2, 1)}}]
        if not backward:  # where K5 takes the rows of registers
            places.append({"at": {"x": At(3)}, "in_place": True})
        for options in places:
            result, data = shared(machine, device, direction, dtype, **options)
            check(result, data)
            seen.add(result.bits())
            ways.add(result.plan.stages[0].constants[2 + backward :][:2])
            assert not backward or result.plan.partials < 5
            assert all(t["x"].read_bytes == data.x.nbytes for t in result.traffic)
    assert len(seen) == 1
    capability = machine.device.compute_capability
    assert {way for way, *_ in ways} == {
        way for way, cc in WAYS.items() if (way or backward) and cc <= capability
    }
    assert not backward or (STAGE_REGISTERS, 1) in ways


# --- every family on other architectures ----------------------------------------------------------

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


# --- each barrier is needed ---------------------------------------------------------------------


def broken(monkeypatch, line, instead=""):
    """Kernels whose text has something else in place of `line`."""

    def text(stage):
        source = source_of(stage)
        assert source.count(line) == 1, line
        return source.replace(line, instead)

    monkeypatch.setattr(tests.gpu_backend, "source_of", text)


IN_ORDER = "uninitialized race in-flight"
NEEDED = {
    "chunk": ("forward", 90, "    wait_for(arrived + chunk, 0);", "uninitialized"),
    "chunk-async": ("forward", 80, "    wait_for(arrived + chunk, 0);", "uninitialized race"),
    "chunk-before": (
        "forward", 90, "if (row.skew && chunk) wait_for(arrived + chunk - 1, 0);", IN_ORDER),
    "fence": ("forward", 90, "if (STAGING == STAGE_BULK) fence_bulk();", "mbarrier"),
    "announced": (
        "forward", 90,
        "arrive_expecting(arrived + c, 16 * row.granules_of(c * GRANULES, GRANULES));", "deadlock"),
    "initialized": (
        "forward", 80, "if (STAGING == STAGE_ASYNC) __syncthreads();", "race mbarrier"),
    "told": (
        "forward", 80, "if (STAGING == STAGE_ASYNC) arrive_with_copies(arrived + c);", "deadlock"),
    "row": ("backward", 90, "wait_for(arrival, phase);", "uninitialized mbarrier"),
    "phase": ("backward", 90, "phase ^= 1;", "uninitialized mbarrier"),
    "taken": ("backward", 90, "__syncthreads();  // before the next copies", IN_ORDER),
    "fence-again": (
        "backward", 90, "fence_bulk();\n            arrive", "mbarrier",
        "if (row < gridDim.x) fence_bulk();\n            arrive"),
    "taken-async": ("backward", 80, "__syncthreads();  // before the next copies", IN_ORDER),
    "announced-row": (
        "backward", 90, "arrive_expecting(arrival, 16 * (x_granules + dy_granules));", "deadlock"),
    "told-row": (
        "backward", 80, "if (STAGING == STAGE_ASYNC) arrive_with_copies(arrival);", "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_without_it_the_simulator_objects(name, monkeypatch):
    """Where, it says in tests of its own: that would take another compilation each."""
    direction, cc, line, kinds, *instead = NEEDED[name]
    device = dataclasses.replace(SIMULATED.device, compute_capability=cc, sm_count=1, max_cluster=1)
    broken(monkeypatch, line, *instead)
    monkeypatch.setattr(Kernel, "site", lambda *_: ("", 0, ()))
    options = {"wanted": DX_ALONE} if direction == "backward" else {}
    with pytest.raises(PtxFault) as info:
        shared(SIMULATED, device, direction, at={"x": At(1, 2)}, **options)
    assert info.value.kind in kinds.split(), info.value
