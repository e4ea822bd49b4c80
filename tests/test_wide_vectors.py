"""Vectors of 32 bytes on sm_100 and newer: the bits of 16-byte ones, in half as many accesses."""

import dataclasses

import pytest

from cupynorm._cuda.plan import VEC_BYTES
from cupynorm._cuda.source import source_of
from cupynorm._problem import ITEMSIZE
from tests import gradient_rows
from tests.gpu_backend import SIMULATED, SM90, SimulatedMachine
from tests.nvrtc import build, grid
from tests.row_cases import FAMILIES, affine, run, values
from tests.row_kernels import At

WIDE = SimulatedMachine(dataclasses.replace(SM90, compute_capability=100))
# Rows whose last rounds are full, broken off, and odd in number; the lanes of K1 with one round.
VECS = {
    "warp": (24, 64, 150),
    "block": (300,),
    "shared": (2 * 1024 + 70,),
    "split": (3 * 1024 + 70,),
}
PLACES = (At(), At(0, 4), At(1, 2))  # in elements: the pitch of the second alternates by 16 bytes


def rows_of(family, dtype, vecs, less):
    N = vecs * VEC_BYTES // ITEMSIZE[dtype] - less
    return values(3, N, dtype), affine(N)


@pytest.mark.parametrize(
    ("family", "dtype"),
    list(zip(FAMILIES, ("float16", "float32", "bfloat16", "float64"), strict=True)),
)
def test_forward_has_the_same_bits(family, dtype):
    for vecs in VECS[family]:
        for at, less in zip(PLACES, (0, 0, 3), strict=True):
            x, vectors = rows_of(family, dtype, vecs, less)
            here, there = (
                run(machine, family, x, *vectors, x_at=at, y_at=At(at.gap, at.offset))
                for machine in (WIDE, SIMULATED)
            )
            assert here.bits() == there.bits()


@pytest.mark.parametrize("vecs", [64, 300])
def test_backward_has_the_same_bits(vecs):
    for at, less in zip(PLACES, (0, 0, 3), strict=True):
        N = vecs * 4 - less
        dy, x = gradient_rows.pair(3, N)
        here, there = (
            gradient_rows.differentiate(machine, dy, x, affine(N)[0], x_at=at, dx_at=at)
            for machine in (WIDE, SIMULATED)
        )
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
    x, vectors = rows_of(family, "float32", vecs, 0)
    result = run(WIDE, family, x, *vectors)
    for traffic in result.traffic:
        assert set(traffic["x"].read_widths) == widths
        assert traffic["x"].read_sector_use == 1.0
        assert traffic["x"].read_bytes == x.nbytes
    y = result.traffic[-1]["y"]
    assert (set(y.write_widths), y.write_sector_use, y.written_bytes) == (widths, 1.0, x.nbytes)


def test_a_row_at_half_a_sector_takes_narrow_vectors():
    x, vectors = rows_of("warp", "float32", 256, 0)
    (traffic,) = run(WIDE, "warp", x, *vectors, x_at=At(4)).traffic
    assert (set(traffic["x"].read_widths), set(traffic["y"].write_widths)) == ({16}, {32})


def test_staged_rows_are_stored_wide():
    x, vectors = rows_of("shared", "float32", 3 * 1024, 0)
    (traffic,) = run(WIDE, "shared", x, *vectors).traffic
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
