"""Every entry of the plan table compiles clean for every architecture, as CuPy compiles it."""

import re
import struct

import pytest

from cupynorm._cuda.plan import CHUNK_VECS
from cupynorm._cuda.rows import FORWARD

TABLE = [row for row in FORWARD if row.cluster == 1]
from cupynorm._cuda.rows import BACKWARD

BWD_TABLE = [row for row in BACKWARD if row.cluster == 1 and row.max_vecs != 2048]
from cupynorm._cuda.source import source_of
from tests.nvrtc import build, grid, grid_bwd, grid_column, report
from tests.nvrtc.check import faults
from tests.report import put_table

pytest.importorskip("cupy", reason="cupy brings the way to NVRTC")


@pytest.mark.parametrize("x_dtype", grid.DTYPES)
@pytest.mark.parametrize("arch", grid.ARCHS)
def test_entries_keep_what_the_plan_states(arch, x_dtype, pytestconfig):
    found, records = {}, []
    for family in grid.FAMILIES:
        stages = grid.entries(arch, x_dtype, family)
        assert stages or not is_there(arch, x_dtype, family)
        for stage in stages:
            facts = build.build(source_of(stage), stage.name, arch)
            records.append(report.record_of(arch, stage, facts))
            found[stage.name] = faults(stage, facts, arch)
    put_table(pytestconfig, report.title(), [report.line(arch, x_dtype, records)])
    assert not {name: what for name, what in found.items() if what}


def is_there(arch, x_dtype, family):
    """Whether the plans of an architecture use a family."""
    if "cluster" in family:
        return int(arch) >= 90
    if arch != grid.FULL and grid_column.is_left_out(x_dtype, family):
        return False
    # Sums over rows of 16-bit types fit no block of sm_75 beside K3's rows: K5 takes those.
    return (arch, x_dtype[-2:], family) != ("75", "16", "shared_bwd")


def lengths(on_one_block, chunks):
    """Every length up to a limit, then the ends of every chunk, in vectors."""
    far = range(on_one_block, chunks * CHUNK_VECS + 1, CHUNK_VECS // 2)
    return (*range(1, on_one_block), *far, *(v + 1 for v in far))


def test_sampled_lengths_miss_no_entry():
    x_dtype = "bfloat16"
    every = {
        stage.name
        for vecs in lengths(3 * CHUNK_VECS, 114)
        for rows in (grid.FEW, 64, grid.MANY)
        for stage in grid.stages(grid.FULL, x_dtype, vecs, rows, (None, None))
    }
    assert every == set(grid.shapes(grid.FULL, x_dtype))


def test_sampled_lengths_miss_no_backward_entry():
    for x_dtype in ("bfloat16", "float64"):
        every = {
            stage.name
            for vecs in lengths(BWD_TABLE[-2].max_vecs + 2, 34)
            for stage in grid_bwd.stages(grid.FULL, x_dtype, vecs, x_dtype)
        }
        assert every == set(grid_bwd.shapes(grid.FULL, x_dtype))


def test_each_run_compiles_every_row_of_the_backward_table():
    for arch in grid.ARCHS:
        names = " ".join(s.name for f in grid.FAMILIES for s in grid.entries(arch, "float32", f))
        for row in BWD_TABLE:
            assert f"layer_norm_bwd_{row.family}_" in names
        for part in ("split_sums", "split_merge", "split_apply"):
            assert f"layer_norm_bwd_{part}_" in names
        assert "column_totals_" in names


def test_each_run_compiles_every_row_of_the_plan_table():
    for arch in grid.ARCHS:
        reachable = {row for row in TABLE if row.family != "shared"}
        names = " ".join(s.name for f in grid.FAMILIES for s in grid.entries(arch, "float32", f))
        for row in reachable - {TABLE[-1]}:
            most = -(-row.max_vecs // row.threads_per_row)
            assert f"_{row.family}_f32_t{row.threads_per_row}_v{most}" in names
        assert "split_stats" in names and "split_normalize" in names
        assert "fwd_shared" in names
        assert ("fwd_cluster" in names) == (int(arch) >= 90)


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


def elf_sections(cubin: bytes) -> dict[str, bytes]:
    at, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    held = [cubin[offset : offset + length] for *_, offset, length in headers]
    ends = [held[names].index(b"\0", header[0]) for header in headers]
    return {
        held[names][header[0] : end].decode(): content
        for header, end, content in zip(headers, ends, held, strict=True)
    }


def short_stage(arch: str):
    return grid.stages(arch, "float16", 30, grid.MANY, ("float16", "float16"))[0]


@pytest.mark.parametrize("arch", grid.ARCHS)
def test_cupy_passes_these_options(monkeypatch, arch):
    source = source_of(short_stage(arch))
    theirs, cubin = compile_with_cupy(monkeypatch, source, arch)
    assert not re.search(r"^\s*#\s*include", source, re.M)  # or its -I would matter
    assert tuple(o for o in theirs if not o.startswith("-I")) == build.options(arch)
    assert build.compile_text(source, build.options(arch))[1] == cubin
    _, verbose, _ = build.compile_text(source, (*build.options(arch), build.VERBOSE))
    # From sm_100 on a note in the cubin holds ptxas's command line; the rest is the same.
    here, there = elf_sections(verbose), elf_sections(cubin)
    assert any(name.startswith(".text.layer_norm_fwd") for name in there)
    assert {name for name in there if here.get(name) != there[name]} <= {".note.nv.tkinfo"}


@pytest.mark.parametrize("arch", grid.ARCHS)
def test_the_wheels_ptxas_agrees(arch):
    if build.ptxas() is None:
        pytest.skip("nvidia-cuda-nvcc-cu12 is not installed")
    stage = grid.stages(arch, "bfloat16", 2048, grid.MANY, ("bfloat16", "bfloat16"))[0]
    ptx, _, log = build.compile_text(source_of(stage), (*build.options(arch), build.VERBOSE))
    facts = build.facts_of(ptx, log, stage.name)
    assert facts.registers > 0
    assert build.facts_of(ptx, build.run_ptxas(ptx, arch), stage.name) == facts


# ---- the cache and the kept table ----------------------------------------------------------------


def test_cache_is_asked_by_all_that_goes_in(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    calls = []
    compile_text = build.compile_text
    monkeypatch.setattr(build, "compile_text", lambda *a: calls.append(a) or compile_text(*a))
    source = """extern "C" __global__ void entry(float4* y) {
        y[threadIdx.x].x /= 3;  // a comment
    }"""
    first = build.build(source, "entry", "90")
    assert build.build(source.replace("a comment", "another"), "entry", "90") == first
    assert len(calls) == 1
    build.build(source, "entry", "80")
    build.build(source.replace("3;", "5;"), "entry", "90")
    assert len(calls) == 3


def test_kept_table_is_of_the_current_kernels():
    text = report.TABLE_PAGE.read_text(encoding="utf-8") if report.TABLE_PAGE.exists() else ""
    state = re.search(r"state of the compiled text: `(\w+)`", text)
    assert state and state[1] == grid.state_of_the_text(), (
        f"{report.TABLE_PAGE.name} is of other kernels or plans; run `{report.COMMAND}`"
    )
    names = report.TABLE_ROWS.read_text(encoding="utf-8")
    for stage in grid.all_entries("90"):
        assert f"\n{stage.name}," in names
