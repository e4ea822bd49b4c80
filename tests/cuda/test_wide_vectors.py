"""Vectors of 32 bytes on sm_100 and newer: the bits of 16-byte ones, in half as many accesses."""

import dataclasses

import pytest

from cupynorm._cuda.plan import VEC_BYTES
from cupynorm._cuda.source import source_of
from cupynorm._rules import ITEMSIZE
from tests.cuda.rows import FAMILIES, At, case, run
from tests.gpu_backend import SIMULATED, SM90, SimulatedMachine
from tests.nvrtc import build, grid

WIDE = SimulatedMachine(dataclasses.replace(SM90, compute_capability=100))
# Rows whose last rounds are full, broken off, and odd in number; the lanes of K1 with one round.
VECS = {
    "warp": (24, 64, 150),
    "block": (300,),
    "shared": (2 * 1024 + 70,),
    "split": (3 * 1024 + 70,),
}
PLACES = (At(), At(0, 4), At(1, 2))  # in elements: the pitch of the second alternates by 16 bytes


def rows_of(dtype, vecs, less=0, direction="forward"):
    return case(direction, 3, vecs * VEC_BYTES // ITEMSIZE[dtype] - less, dtype)


@pytest.mark.parametrize(
    ("family", "dtype"),
    list(zip(FAMILIES, ("float16", "float32", "bfloat16", "float64"), strict=True)),
)
def test_forward_has_the_same_bits(family, dtype):
    for vecs in VECS[family]:
        for at, less in zip(PLACES, (0, 0, 3), strict=True):
            data, to = rows_of(dtype, vecs, less), At(at.gap, at.offset)
            here, there = (
                run(machine, data, family, at={"x": at, "y": to}) for machine in (WIDE, SIMULATED)
            )
            assert here.bits() == there.bits()


@pytest.mark.parametrize("vecs", [64, 300])
def test_backward_has_the_same_bits(vecs):
    for at, less in zip(PLACES, (0, 0, 3), strict=True):
        data = rows_of("float32", vecs, less, "backward")
        here, there = (run(machine, data, at={"x": at, "dx": at}) for machine in (WIDE, SIMULATED))
        assert here.bits() == there.bits()


@pytest.mark.parametrize(
    ("family", "vecs", "widths"),
    [
        ("warp", 32, {16}),  # one round
        ("warp", 256, {32}),
        ("warp", 96, {16, 32}),  # a pair of rounds and one alone
        ("block", 512, {32}),
        ("split", 3 * 1024, {32}),
    ],
)
def test_aligned_rounds_go_in_pairs(family, vecs, widths):
    data = rows_of("float32", vecs)
    x, result = data.x, run(WIDE, data, family)
    for traffic in result.traffic:
        assert set(traffic["x"].read_widths) == widths
        assert traffic["x"].read_sector_use == 1.0
        assert traffic["x"].read_bytes == x.nbytes
    y = result.traffic[-1]["y"]
    assert (set(y.write_widths), y.write_sector_use, y.written_bytes) == (widths, 1.0, x.nbytes)


def test_a_row_at_half_a_sector_takes_narrow_vectors():
    (traffic,) = run(WIDE, rows_of("float32", 256), "warp", at={"x": At(4)}).traffic
    assert (set(traffic["x"].read_widths), set(traffic["y"].write_widths)) == ({16}, {32})


def test_staged_rows_are_stored_wide():
    (traffic,) = run(WIDE, rows_of("float32", 3 * 1024), "shared").traffic
    assert set(traffic["y"].write_widths) == {32}


def test_ptx_has_them_from_sm_100_and_cuda_12_9_on():
    pytest.importorskip("cupy", reason="cupy brings the way to NVRTC")
    older = "#undef __CUDACC_VER_MINOR__\n#define __CUDACC_VER_MINOR__ 8\n"
    for arch, before, wide in (("90", "", False), ("100", "", True), ("100", older, False)):
        stage = grid.stages(arch, "float32", 128, grid.MANY, (None, None))[0]
        ptx, _, log = build.compile_text(before + source_of(stage), build.options(arch))
        assert ptx, log
        assert ("ld.global.L1::no_allocate.v8.b32" in ptx) == wide
        assert ("st.global.cs.v8.b32" in ptx) == wide
