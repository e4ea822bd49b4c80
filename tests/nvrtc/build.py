"""Compiles CUDA text as `cupy.RawKernel` does; keeps the facts on disk, by what went in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from cupy.cuda import nvrtc

# Asked here and not where it is used: that loads the library, and later a stand-in may have taken
# CuPy's place.
NVRTC_VERSION = nvrtc.getVersion()

# As CuPy 14.2 calls NVRTC for a RawKernel without options of its own; the -I of CuPy's headers are
# left out, since the kernels include nothing. `test_cupy_passes_these_options` holds this to CuPy.
CUPY_OPTIONS = (
    "--std=c++17",
    "-ftz=true",
    "-arch=sm_{arch}",
    "--device-as-default-execution-space",
)
# Makes the ptxas inside NVRTC report; it changes no code, which the same test shows.
VERBOSE = "--ptxas-options=-v"

CACHE = Path(__file__).resolve().parents[2] / ".nvrtc_cache"


@dataclass(frozen=True)
class Facts:
    """What NVRTC and its ptxas made of one entry."""

    complaints: tuple[str, ...]  # errors and warnings
    has_entry: bool
    registers: int  # per thread
    stack: int  # bytes per thread, and so the next two
    spill_stores: int
    spill_loads: int
    static_shared: int  # bytes per block
    local: int  # .local declarations in the PTX
    loads128: int  # instructions in the PTX, of global memory
    stores128: int
    copies128: int  # cp.async past L1, to shared memory
    bulk_copies: int
    ftz: int  # float32 instructions that flush subnormals
    no_ftz: int  # those that could and do not
    approximate: int  # divisions and roots that are not IEEE
    fusable: int  # products whose sum with something ptxas may fuse, or not, as it likes


def options(arch: str) -> tuple[str, ...]:
    return tuple(option.format(arch=arch) for option in CUPY_OPTIONS)


@cache
def version() -> str:
    """Version of the NVRTC in use; the wheel's patch level where the wheel is installed."""
    short = ".".join(str(part) for part in NVRTC_VERSION)
    try:
        wheel = importlib.metadata.version("nvidia-cuda-nvrtc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return short
    return wheel if wheel.startswith(f"{short}.") else short


def _compile(source: str, chosen: tuple[str, ...], *wanted: str) -> tuple[list[bytes], str]:
    """What is wanted of NVRTC's getters, and its log; nothing where the text does not compile."""
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, chosen)
        except nvrtc.NVRTCError as error:
            return [b""] * len(wanted), f"error: {error}\n{nvrtc.getProgramLog(program)}"
        made = [getattr(nvrtc, name)(program) for name in wanted]
        return made, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def compile_text(source: str, chosen: tuple[str, ...]) -> tuple[str, bytes, str]:
    """PTX, cubin and log; without the first two where it does not compile."""
    (ptx, cubin), log = _compile(source, chosen, "getPTX", "getCUBIN")
    return ptx.rstrip(b"\0").decode(), cubin, log


def ptx_of(source: str, chosen: tuple[str, ...]) -> tuple[str, str]:
    """PTX and log, for a virtual architecture (compute_90), which has no cubin."""
    (ptx,), log = _compile(source, chosen, "getPTX")
    return ptx.rstrip(b"\0").decode(), log


def ptxas() -> str | None:
    """Path of the ptxas in NVIDIA's wheel; never the machine's own, whose version could be any."""
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "bin" / "ptxas"
        if path.exists():
            return str(path)
    return None


def run_ptxas(ptx: str, arch: str) -> str:
    """Log of the wheel's ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            ptxas(),
            "-v",
            f"-arch=sm_{arch}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _number(pattern: str, text: str, missing: int) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else missing


_ARITHMETIC = re.compile(
    r"\b(?:add|sub|mul|fma|div|sqrt|rcp|rsqrt|min|max|abs|neg)((?:\.\w+)*)\.f32\b"
)


def _fusable(ptx: str) -> int:
    """Sums of a product that is not rounded by itself (`mul.rn`)."""
    products = set(re.findall(r"\bmul(?:\.ftz)?\.f(?:32|64)\s+(%f\w+),", ptx))
    sums = re.findall(r"\b(?:add|sub)(?:\.ftz)?\.f(?:32|64)\s+%f\w+, (%f\w+), (%f\w+);", ptx)
    return sum(a in products or b in products for a, b in sums)


def facts_of(ptx: str, log: str, name: str) -> Facts:
    """Read the PTX and ptxas's words; numbers that ptxas did not state are -1."""
    arithmetic = _ARITHMETIC.findall(ptx)
    flushing = sum(".ftz" in modifiers for modifiers in arithmetic)
    return Facts(
        complaints=tuple(
            line for line in log.splitlines() if re.search("error|warning", line, re.I)
        ),
        has_entry=f".visible .entry {name}(" in ptx,
        registers=_number(r"Used (\d+) registers", log, -1),
        stack=_number(r"(\d+) bytes stack frame", log, -1),
        spill_stores=_number(r"(\d+) bytes spill stores", log, -1),
        spill_loads=_number(r"(\d+) bytes spill loads", log, -1),
        static_shared=_number(r"(\d+) bytes smem", log, 0),
        local=len(re.findall(r"^\s*\.local\b", ptx, re.M)),
        loads128=len(re.findall(r"\bld\.global(?:\.[\w:]+)*\.v4\.[bfu]32\b", ptx)),
        stores128=len(re.findall(r"\bst\.global(?:\.[\w:]+)*\.v4\.[bfu]32\b", ptx)),
        copies128=len(re.findall(r"\bcp\.async\.cg\.shared\.global\b.*, 16;", ptx)),
        bulk_copies=len(re.findall(r"\bcp\.async\.bulk\.shared::cluster\.global\b", ptx)),
        ftz=flushing,
        no_ftz=len(arithmetic) - flushing,
        fusable=_fusable(ptx),
        approximate=len(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\b", ptx)),
    )


def without_comments(source: str) -> str:
    """The text as the compiler takes it: a changed comment makes nothing stale."""
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in source.splitlines())
    return "\n".join(line for line in lines if line)


@cache
def _own_text() -> str:
    return Path(__file__).read_text(encoding="utf-8")


def build(source: str, name: str, arch: str) -> Facts:
    """Facts of entry `name` compiled for sm_`arch`, from the cache where nothing has changed."""
    chosen = (*options(arch), VERBOSE)
    went_in = "\0".join([without_comments(source), name, *chosen, version(), _own_text()])
    path = CACHE / f"{hashlib.sha256(went_in.encode()).hexdigest()[:32]}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return Facts(**{**kept, "complaints": tuple(kept["complaints"])})
    ptx, _, log = compile_text(source, chosen)
    facts = facts_of(ptx, log, name)
    CACHE.mkdir(exist_ok=True)
    # Renamed when complete: another worker may be reading.
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(facts)))
    part.replace(path)
    return facts
