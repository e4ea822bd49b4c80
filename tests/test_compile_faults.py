"""What the compile matrix must not let pass: each kind of fault, in an entry made to have it."""

import dataclasses

import pytest

from cupynorm._cuda.plan import STAGE_ASYNC, STAGE_BULK
from tests.nvrtc import build, grid
from tests.nvrtc.check import blocks_by_registers, faults
from tests.simt.limits import DeviceLimits

pytest.importorskip("cupy", reason="cupy brings the way to NVRTC")


def entry_source(body: str, bounds: str = "128, 1") -> str:
    return (
        f'extern "C" __global__ void __launch_bounds__({bounds})\n'
        f"entry(const float4* x, float4* y, long long n) {{\n{body}\n}}\n"
    )


COPY = """
    const int i = threadIdx.x;
    float4 v = x[i];
    v.x = v.x / v.y;
    y[i] = v;
"""
# 64 registers are all that 1024 threads leave each other.
SPILLING = """
    float4 v[64];
    for (int k = 0; k < 64; ++k) v[k] = x[k * 1024 + threadIdx.x];
    __syncthreads();
    for (int k = 0; k < 64; ++k) y[k * 1024 + threadIdx.x] = v[63 - k];
"""
NARROW = """
    const float* from = (const float*)x;
    float* to = (float*)y;
    for (int k = threadIdx.x; k < n; k += 128) to[k] = from[k] / 3;
"""
LOCAL = """
    float v[32];
    for (int k = 0; k < 32; ++k) v[k] = x[k].x / x[k].y;
    y[threadIdx.x] = make_float4(v[n & 31], v[n + 1 & 31], 0, 0);
"""
APPROXIMATE = COPY.replace("v.x / v.y", "__fdividef(v.x, v.y)")
KEEPING = COPY + '    asm volatile("add.f32 %0, %0, %0;" : "+f"(v.x)); y[n].x = v.x;'


def stage_like(**changes):
    """A stage of one vector per thread, for the entries above."""
    stage = grid.stages("90", "float32", 8, grid.MANY, (None, None))[0]
    return dataclasses.replace(
        stage, name="entry", constants=(128, 8, 1, 1), blocks_per_sm=1, **changes
    )


FAULTY = {
    "spills": (entry_source(SPILLING, "1024, 1"), {}, "spill stores"),
    "narrow": (entry_source(NARROW), {}, "0 global loads of 128 bits, 1 vectors to load"),
    "narrow-stores": (entry_source(NARROW), {}, "0 global stores of 128 bits, 1 vectors to store"),
    "local": (entry_source(LOCAL), {}, "variables in local memory"),
    "approximate": (entry_source(APPROXIMATE), {}, "not IEEE"),
    "subnormals": (entry_source(KEEPING), {}, "1 float32 instructions keep subnormals"),
    "warning": (entry_source(COPY + "    int unused;"), {}, "NVRTC says"),
    "error": (entry_source(COPY + "    undeclared = 1;"), {}, "NVRTC says"),
    "name": (entry_source(COPY).replace("entry(", "other("), {}, "no entry entry was compiled"),
    "occupancy": (
        entry_source(COPY),
        {"block": (1024, 1, 1), "blocks_per_sm": 3},
        "threads allow 2",
    ),
    "shared": (entry_source(COPY), {"shared_bytes": 228 * 1024}, "takes 232448 per block"),
    "shared-occupancy": (
        entry_source(COPY),
        {"shared_bytes": 100 * 1024, "blocks_per_sm": 3},
        "shared memory allow 2",
    ),
    "static": (
        entry_source("    __shared__ float s[8]; s[threadIdx.x & 7] = n; __syncthreads();" + COPY
                     + "    y[n].x = s[n & 7];"),
        {"shared_bytes": 232448},
        "32 of static shared memory",
    ),
}  # fmt: skip


def test_missing_copies_and_wide_vectors_are_found():
    facts = build.build(entry_source(COPY), "entry", "100")
    shared = {"family": "shared", "kernel": "layer_norm_fwd_shared"}
    for constants in ((512, STAGE_ASYNC), (512, STAGE_BULK)):
        stage = dataclasses.replace(stage_like(**shared), constants=constants)
        assert any("copies by" in found for found in faults(stage, facts, "100"))
    stage = dataclasses.replace(stage_like(), constants=(128, 32, 2, 1))
    found = " ".join(faults(stage, facts, "100"))
    assert "0 global loads of 256 bits, 1 pairs" in found
    assert "0 global stores of 256 bits, 1 pairs" in found
    assert "256 bits" not in " ".join(faults(stage, facts, "90"))


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found(fault):
    source, changes, sentence = FAULTY[fault]
    stage = dataclasses.replace(stage_like(), **changes)
    facts = build.build(source, "entry", "90")
    assert any(sentence in found for found in faults(stage, facts, "90")), (
        faults(stage, facts, "90"),
        facts,
    )


def test_a_clean_entry_has_no_fault():
    facts = build.build(entry_source(COPY), "entry", "90")
    assert faults(stage_like(), facts, "90") == []
    assert facts.loads128 == facts.stores128 == 1


@pytest.mark.parametrize(
    "registers,threads,blocks",
    [
        (64, 128, 8),
        (65, 128, 7),
        (72, 128, 7),
        (80, 128, 6),
        (80, 256, 3),
        (128, 512, 1),
        (255, 128, 2),
    ],
)
def test_registers_bound_the_blocks(registers, threads, blocks):
    # Figures of NVIDIA's occupancy calculator.
    assert blocks_by_registers(DeviceLimits.of("90"), registers, threads) == blocks
