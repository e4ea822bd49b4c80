"""Every entry of the plan table compiles clean for every architecture, as CuPy compiles it."""

import csv
import dataclasses
import itertools
import re

import pytest

from cupynorm._cuda.plan import CHUNK_VECS, STAGE_ASYNC, STAGE_BULK
from cupynorm._cuda.rows import BACKWARD
from cupynorm._cuda.source import source_of
from tests.nvrtc import build, grid, report
from tests.nvrtc.check import blocks_by_registers, faults
from tests.nvrtc.facts import machine_facts
from tests.ptx.limits import DeviceLimits

FULL = "90"  # the architecture that has every family
# What a test run compiles: of every dtype on one architecture, of one on each other, one entry of
# so many. The kept table has every entry, is written without a fault, and is held to the text.
EACH = 16
RUNS = [
    (arch, dtype)
    for arch, usual in zip(grid.ARCHS, itertools.cycle(grid.DTYPES))
    for dtype in (grid.DTYPES if arch == FULL else [usual])
]


@pytest.mark.parametrize(("arch", "x_dtype"), RUNS)
def test_entries_keep_what_the_plan_states(arch, x_dtype):
    """Some of the longest of each kernel, with the registers of the kept table, which has all."""
    found, kept, stages = {}, kept_registers(arch), []
    for family in grid.FAMILIES:
        of_family = [s for op in grid.OPS for s in grid.entries(arch, x_dtype, family, op)]
        assert of_family or not is_there(arch, x_dtype, family)
        stages += of_family
    stages, facts = stages[RUNS.index((arch, x_dtype)) % EACH :: EACH], {}
    for batch in build.batches((arch, stage.name, source_of(stage)) for stage in stages):
        facts |= build.build_batch(batch)
    for stage in stages:
        of_it = facts[arch, stage.name]
        found[stage.name] = faults(stage, of_it, arch)
        if kept and kept.get(stage.name) != str(of_it.registers):
            found[stage.name].append(f"{of_it.registers} registers, not {kept.get(stage.name)}")
    assert not {name: what for name, what in found.items() if what}


def kept_registers(arch):
    """By entry, as text; nothing where another NVRTC compiled them."""
    if f"NVRTC {build.version()}," not in report.TABLE_PAGE.read_text(encoding="utf-8"):
        return {}
    with report.TABLE_ROWS.open(encoding="utf-8", newline="") as lines:
        return {row["entry"]: row[f"sm_{arch}"] for row in csv.DictReader(lines)}


def is_there(arch, x_dtype, family):
    """Whether the plans of an architecture use a family."""
    if "cluster" in family:
        return int(arch) >= 90
    # Sums over rows of 16-bit types fit no block of sm_75 beside K3's rows: K5 takes those.
    return (arch, x_dtype[-2:], family) != ("75", "16", "shared_bwd")


def lengths(on_one_block, chunks):
    """Every length up to a limit, then the ends of every chunk, in vectors."""
    far = range(on_one_block, chunks * CHUNK_VECS + 1, CHUNK_VECS // 2)
    return (*range(1, on_one_block), *far, *(v + 1 for v in far))


@pytest.mark.parametrize(
    ("kind", "x_dtype", "far", "rows"),
    [
        ("rows", "bfloat16", (3 * CHUNK_VECS, 114), (grid.FEW, 64, grid.MANY)),
        ("rows_bwd", "bfloat16", (BACKWARD[-2].max_vecs + 2, 34), (grid.MANY,)),
        ("rows_bwd", "float64", (BACKWARD[-2].max_vecs + 2, 34), (grid.MANY,)),
    ],
)
def test_sampled_lengths_miss_no_entry(kind, x_dtype, far, rows):
    way, flags = ("CCd", (x_dtype, None)) if kind == "rows_bwd" else ("CC", grid.NONE)
    every = {
        stage.name
        for vecs, M in itertools.product(lengths(*far), rows)
        for stage in grid.stages(FULL, x_dtype, grid.row_major(x_dtype, vecs, M, way), flags)
    }
    assert every == set(grid.shapes(kind, FULL, x_dtype))


def test_an_entry_has_no_text_of_a_caller():
    """Beside the files: words that are numbers, flags and names out of a list."""
    for stage in grid.all_entries(FULL):
        assert re.fullmatch("[a-zA-Z0-9_]+", stage.name)
        assert {stage.x_dtype, stage.weight_dtype, stage.bias_dtype} <= {*grid.DTYPES, None}
        assert all(type(number) in (int, bool) for number in (*stage.constants, *stage.block))


# ---- the compiler is called as CuPy calls it -----------------------------------------------------


class _Captured(Exception):
    """Carries the cubin out of CuPy, which has no device to load it."""


def compile_with_cupy(monkeypatch, source: str, arch: str) -> tuple[tuple[str, ...], bytes]:
    """The options that CuPy passes for a RawKernel, and the cubin that it would load."""
    import cupy._core.raw as raw
    from cupy.cuda import compiler

    seen = []

    class Nvrtc:
        def __getattr__(self, name):
            return getattr(real, name)

        def compileProgram(self, program, chosen):
            seen.append(tuple(chosen))
            return real.compileProgram(program, chosen)

    class Cache:
        def load(self, name):
            return None

        def save(self, name, cubin, source):
            raise _Captured(cubin)

    real = compiler.nvrtc
    by_arch = compiler._get_arch_for_options_for_nvrtc.__wrapped__
    monkeypatch.setattr(compiler, "nvrtc", Nvrtc())
    monkeypatch.setattr(compiler, "_kernel_cache_backend", Cache())
    monkeypatch.setattr(compiler, "_get_arch", lambda: arch)
    # Memoized per device, and there is none.
    monkeypatch.setattr(
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: by_arch(arch)
    )
    with pytest.raises(_Captured) as caught:
        # code, path, options, backend, translate_cucomplex, cooperative, jitify, names, log
        raw._get_raw_module.__wrapped__(source, None, (), "nvrtc", False, False, False, None, None)
    return seen[-1], caught.value.args[0]


def short_stage(arch: str):
    return grid.stages(arch, "float16", grid.row_major("float16", 30), ("float16", "float16"))[0]


@pytest.mark.parametrize("arch", grid.ARCHS)
def test_cupy_passes_these_options(monkeypatch, arch):
    source = source_of(short_stage(arch))
    theirs, cubin = compile_with_cupy(monkeypatch, source, arch)
    assert not re.search(r"^\s*#\s*include", source, re.M)  # or its -I would matter
    assert tuple(o for o in theirs if not o.startswith("-I")) == build.options(arch)
    (ptx, ours), _ = build.compiled(source, build.options(arch), "getPTX", "getCUBIN")
    assert ours == cubin
    ptx = ptx.rstrip(b"\0").decode()
    # And the wheel's ptxas makes the same of the PTX, here and where the table is made.
    name = short_stage(arch).name
    assert build.code_of(ptx, name, arch) == build.elf_sections(cubin)[f".text.{name}"]
    assert ptx == build.ptx_of(source, build.virtual_options(arch))[0]


# ---- the cache and the kept table ----------------------------------------------------------------


def test_cache_is_asked_by_all_that_goes_in(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    calls, assembled = [], []
    ptx_of, run_ptxas = build.ptx_of, build.run_ptxas
    monkeypatch.setattr(build, "ptx_of", lambda *a: calls.append(a) or ptx_of(*a))
    monkeypatch.setattr(build, "run_ptxas", lambda *a: assembled.append(a) or run_ptxas(*a))
    source = """extern "C" __global__ void entry(float4* y) {
        y[threadIdx.x].x /= 3;  // a comment
    }"""
    first = build.build(source, "entry", "90")
    assert build.build(source.replace("a comment", "another"), "entry", "90") == first
    assert len(calls) == 1
    build.build(source, "entry", "80")
    build.build(source.replace("3;", "5;"), "entry", "90")
    assert len(calls) == len(assembled) == 3
    # Another text of the same PTX.
    assert build.build(source.replace("3;", "(1 + 2);"), "entry", "90") == first
    assert (len(calls), len(assembled)) == (4, 3)


def test_entries_built_together_are_as_built_alone(monkeypatch, tmp_path):
    stages = grid.entries("90", "float64", "split", everything=True)[:3]
    wanted = [(arch, s.name, source_of(s)) for s in stages for arch in ("80", "86", "89", "90")]
    monkeypatch.setattr(build, "CACHE", tmp_path / "together")
    (batch,) = build.batches(wanted)
    together = build.build_batch(batch)
    assert len(together) == len(wanted)
    monkeypatch.setattr(build, "CACHE", tmp_path / "alone")
    for arch, name, source in wanted[:: 4 + 1]:
        assert build.build(source, name, arch) == together[arch, name]


def test_architectures_have_what_is_taken_for_them():
    """The longest of all kernels are looked at where the table is made."""
    wanted = [
        (arch, stage.name, source_of(stage))
        for arch in grid.ARCHS
        for stage in grid.entries(arch, "float64", "shared")[:1]
    ]
    entries = [entry for batch in build.batches(wanted) for entry in batch]
    assert any(len(entry.archs) > 1 for entry in entries)
    assert not [wrong for entry in entries for wrong in build.taken_for_another(entry)]


def test_an_architecture_of_its_own_is_found():
    source = entry_source("#if __CUDA_ARCH__ == 860\n" + COPY + "#endif")
    entry = build.Entry("entry", source, ("80", "86", "89"))
    assert build.taken_for_another(entry) == ["PTX of sm_86", "code of sm_89"]


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0020*/              @!P0 LDG.E.64 R10, [R12.64] ;
        /*0030*/                   FADD.FTZ R14, R11, R15 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R12.64] ;
        /*0050*/                   LDG.E.U16 R5, [R12.64] ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP;
"""


def test_machine_code_is_read():
    # 62 bytes in 8 instructions; three loads before the add has the third's upper half.
    assert machine_facts(SASS) == (8 * 16 / 62, 3)
    assert machine_facts(SASS.replace("R11, R15", "R9, R15")) == (8 * 16 / 62, 5)


def test_kept_table_is_of_the_current_kernels():
    text = report.TABLE_PAGE.read_text(encoding="utf-8") if report.TABLE_PAGE.exists() else ""
    state = re.search(r"state of the compiled text: `(\w+)`", text)
    assert state and state[1] == grid.state_of_the_text(), (
        f"{report.TABLE_PAGE.name} is of other kernels or plans; run `{report.COMMAND}`"
    )
    with report.TABLE_ROWS.open(encoding="utf-8", newline="") as lines:
        kept = {
            (a, row["entry"]) for row in csv.DictReader(lines) for a in grid.ARCHS if row[f"sm_{a}"]
        }
    assert kept == {(arch, stage.name) for arch in grid.ARCHS for stage in grid.all_entries(arch)}


# ---- what the matrix must not let pass: each kind of fault, in an entry made to have it ----------


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
FUSABLE = COPY + "    y[n].x += v.x * v.y; y[n].y = v.x * v.y;"
KEEPING = COPY + '    asm volatile("add.f32 %0, %0, %0;" : "+f"(v.x)); y[n].x = v.x;'


def stage_like(**changes):
    """A stage of one vector per thread, for the entries above."""
    stage = grid.stages("90", "float32", grid.row_major("float32", 8))[0]
    usual = {"name": "entry", "constants": (128, 8, 1, 1), "blocks_per_sm": 1}
    return dataclasses.replace(stage, **usual | changes)


SHARED = {"family": "shared", "template": "fwd_shared"}
FAULTY = {
    "spills": (entry_source(SPILLING, "1024, 1"), {}, "spill stores"),
    "narrow": (entry_source(NARROW), {}, "0 global loads of 128 bits, 1 vectors to load"),
    "narrow-stores": (entry_source(NARROW), {}, "0 global stores of 128 bits, 1 vectors to store"),
    "local": (entry_source(LOCAL), {}, "variables in local memory"),
    "approximate": (entry_source(APPROXIMATE), {}, "not IEEE"),
    "fusable": (entry_source(FUSABLE), {}, "1 sums of products"),
    "subnormals": (entry_source(KEEPING), {}, "1 float32 instructions keep subnormals"),
    "warning": (entry_source(COPY + "    int unused;"), {}, "NVRTC says"),
    "error": (entry_source(COPY + "    undeclared = 1;"), {}, "NVRTC says"),
    "name": (entry_source(COPY).replace("entry(", "other("), {}, "no entry entry was compiled"),
    "occupancy": (
        entry_source(COPY), {"block": (1024, 1, 1), "blocks_per_sm": 3}, "threads allow 2"),
    "shared": (entry_source(COPY), {"shared_bytes": 228 * 1024}, "takes 232448 per block"),
    "shared-occupancy": (
        entry_source(COPY), {"shared_bytes": 100 * 1024, "blocks_per_sm": 3},
        "shared memory allow 2"),
    "static": (
        entry_source("    __shared__ float s[8]; s[threadIdx.x & 7] = n; __syncthreads();" + COPY
                     + "    y[n].x = s[n & 7];"),
        {"shared_bytes": 232448},
        "32 of static shared memory",
    ),
    "no-async": (entry_source(COPY), SHARED | {"constants": (1, 512, STAGE_ASYNC)}, "copies by"),
    "no-bulk": (entry_source(COPY), SHARED | {"constants": (1, 512, STAGE_BULK)}, "copies by"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found(fault):
    source, changes, sentence = FAULTY[fault]
    facts = build.build(source, "entry", "90")
    found = faults(stage_like(**changes), facts, "90")
    assert any(sentence in said for said in found), (found, facts)


def test_a_clean_entry_has_no_fault():
    facts = build.build(entry_source(COPY), "entry", "90")
    assert faults(stage_like(), facts, "90") == []
    assert facts.loads128 == facts.stores128 == 1


def test_registers_bound_the_blocks():
    """Figures of NVIDIA's occupancy calculator: registers, threads, blocks."""
    limits = DeviceLimits.of("90")
    known = ((64, 128, 8), (65, 128, 7), (72, 128, 7), (80, 128, 6), (80, 256, 3), (128, 512, 1))
    for registers, threads, blocks in (*known, (255, 128, 2)):
        assert blocks_by_registers(limits, registers, threads) == blocks
