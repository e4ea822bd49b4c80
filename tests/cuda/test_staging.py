"""K3's rows on their way into shared memory: the same bits each way, and each barrier needed."""

import dataclasses
import re

import pytest

import tests.gpu_backend
from cupynorm._cuda.plan import STAGE_ASYNC, STAGE_BULK, STAGE_REGISTERS, VEC_BYTES
from cupynorm._cuda.source import source_of
from cupynorm._rules import ITEMSIZE
from tests.cuda.rows import DX_ALONE, At, case, check, run
from tests.gpu_backend import ON_EACH_MACHINE, SIMULATED
from tests.nvrtc import build, grid
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


def forward(machine, device, dtype="float32", less=1, **options):
    data = case("forward", 3, CHUNKS * VEC_BYTES // ITEMSIZE[dtype] - less, dtype)
    return taken_by_shared(machine, data, device, options), data


def backward(machine, device, dtype="float32", **options):
    data = case("backward", 5, 1060 * VEC_BYTES // ITEMSIZE[dtype] - 1, dtype)
    return taken_by_shared(machine, data, device, options), data


def taken_by_shared(machine, data, device, options):
    result = run(machine, data, device=device, **options)
    assert result.plan.family == "shared"
    return result


# --- bits ---------------------------------------------------------------------------------------


@ON_EACH_MACHINE
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_forward_has_the_same_bits_each_way(machine, dtype):
    """Whatever the alignment: of x, of its pitch, and with x and y in one place."""
    seen, ways = set(), set()
    for device in devices(machine, sm_count=1):
        if device.staging == STAGE_REGISTERS:
            continue  # K5's rows
        for options in ({}, {"at": {"x": At(1, 2)}}, {"at": {"x": At(3)}, "in_place": True}):
            result, data = forward(machine, device, dtype, **options)
            check(result, data)
            seen.add(result.bits())
            ways.add(result.plan.stages[0].constants[2])
    assert len(seen) == 1
    capability = machine.device.compute_capability
    assert ways == {way for way, cc in WAYS.items() if way and cc <= capability}


@ON_EACH_MACHINE
def test_backward_has_the_same_bits_each_way(machine):
    """Fetched into registers too; several rows go through one block's place."""
    seen, ways = set(), set()
    for device in devices(machine, sm_count=2):
        for at in (At(), At(1, 2)):
            places = {"x": at, "dy": At(at.gap, at.offset)}
            result, _ = backward(machine, device, "float16", at=places)
            seen.add(result.bits())
            ways.add(result.plan.stages[0].constants[3:5])
            assert result.plan.partials < 5
    assert len(seen) == 1
    assert (STAGE_REGISTERS, 1) in ways and len(ways) == len(devices(machine))


def test_aligned_rows_need_no_other_granules():
    """Whole granules are copied and nothing else is read: not even a piece at an end."""
    for device in devices(SIMULATED, sm_count=1)[:2]:
        result, data = forward(SIMULATED, device, less=0)
        (traffic,) = result.traffic
        assert set(traffic["x"].read_widths) == {32 if device.compute_capability == 90 else 16}
        assert traffic["x"].read_bytes == data.x.nbytes


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
    "chunk": (forward, 90, "    wait_for(arrived + chunk, 0);", "uninitialized"),
    "chunk-async": (forward, 80, "    wait_for(arrived + chunk, 0);", "uninitialized race"),
    "chunk-before": (
        forward, 90, "if (row.skew && chunk) wait_for(arrived + chunk - 1, 0);", IN_ORDER),
    "fence": (forward, 90, "if (STAGING == STAGE_BULK) fence_bulk();", "mbarrier"),
    "announced": (
        forward, 90, "arrive_expecting(arrived + c, 16 * row.granules_of(c * GRANULES, GRANULES));",
        "deadlock"),
    "initialized": (
        forward, 80, "if (STAGING == STAGE_ASYNC) __syncthreads();", "race mbarrier"),
    "told": (
        forward, 80, "if (STAGING == STAGE_ASYNC) arrive_with_copies(arrived + c);", "deadlock"),
    "row": (backward, 90, "wait_for(arrival, phase);", "uninitialized mbarrier"),
    "phase": (backward, 90, "phase ^= 1;", "uninitialized mbarrier"),
    "taken": (backward, 90, "__syncthreads();  // before the next copies", IN_ORDER),
    "fence-again": (
        backward, 90, "fence_bulk();\n            arrive", "mbarrier",
        "if (row < gridDim.x) fence_bulk();\n            arrive"),
    "taken-async": (backward, 80, "__syncthreads();  // before the next copies", IN_ORDER),
    "announced-row": (
        backward, 90, "arrive_expecting(arrival, 16 * (x_granules + dy_granules));", "deadlock"),
    "told-row": (
        backward, 80, "if (STAGING == STAGE_ASYNC) arrive_with_copies(arrival);", "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_without_it_the_simulator_objects(name, monkeypatch):
    """Where, it says in tests of its own: that would take another compilation each."""
    call, cc, line, kinds, *instead = NEEDED[name]
    device = dataclasses.replace(SIMULATED.device, compute_capability=cc, sm_count=1, max_cluster=1)
    broken(monkeypatch, line, *instead)
    monkeypatch.setattr(Kernel, "site", lambda *_: ("", 0, ()))
    options = {"wanted": DX_ALONE} if call is backward else {}
    with pytest.raises(PtxFault) as info:
        call(SIMULATED, device, at={"x": At(1, 2)}, **options)
    assert info.value.kind in kinds.split(), info.value


def test_without_its_ends_a_row_has_those_of_the_row_before(monkeypatch):
    device = dataclasses.replace(SIMULATED.device, sm_count=1)
    options = {"at": {"x": At(1, 2)}, "wanted": DX_ALONE}
    right, _ = backward(SIMULATED, device, **options)
    broken(monkeypatch, "if (row + step < a.rows) next.put_carried();")
    wrong, _ = backward(SIMULATED, device, **options)
    assert right.rows()[0] == wrong.rows()[0]
    assert right.rows()[1] != wrong.rows()[1]


# --- what the compiler makes of it --------------------------------------------------------------

INSTRUCTIONS = {
    "cp.async": r"\bcp\.async\.c[ag]\.shared\.global\b",
    "bulk": r"\bcp\.async\.bulk\.shared::cluster\.global\.mbarrier::complete_tx::bytes\b",
    "mbarrier": r"\bmbarrier\.init\b",
}


def shared_stages(arch, vecs, way="CC"):
    """Without clusters, which would take K3's rows."""
    shape = grid.row_major("float32", vecs, way=way)
    return grid.stages(arch, "float32", shape, ("float32", "float32"), max_cluster=1)


@pytest.mark.parametrize(
    ("arch", "held"),
    [("75", set()), ("80", {"cp.async", "mbarrier"}), ("90", {"bulk", "mbarrier"})],
)
def test_ptx_holds_the_copies_of_its_architecture(arch, held):
    for vecs, way in ((3 * 1024, "CC"), (1536, "CCd"))[arch == "75" :]:
        stage = shared_stages(arch, vecs, way)[0]
        assert stage.family.startswith("shared")
        ptx, log = build.ptx_of(source_of(stage), build.virtual_options(arch))
        assert {name for name, text in INSTRUCTIONS.items() if re.search(text, ptx)} == held, log
        # 16 bytes at once, and from shared memory as many.
        assert not re.search(r"\bcp\.async\.ca\b", ptx)
        assert re.search(r"\bld\.shared\.v4\.u32\b", ptx) or not held


def test_no_plan_asks_a_device_for_what_it_lacks():
    for arch in grid.ARCHS:
        names = " ".join(
            stage.name for vecs in (2049, 3072, 6000) for stage in shared_stages(arch, vecs)
        )
        newest = DeviceLimits.of(arch).compute_capability
        assert ("_bulk" in names) == (int(newest) >= 90)
        assert ("_async" in names) == (80 <= int(newest) < 90)
