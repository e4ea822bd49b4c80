"""Compiles CUDA text as `cupy.RawKernel` does; keeps the facts on disk, by what went in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cupy.cuda import nvrtc

from tests.nvrtc.facts import (
    Facts,
    complaints_of,
    digest_of,
    facts_of,
    machine_facts,
    parts_of,
    words_of,
)

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

CACHE = Path(__file__).resolve().parents[2] / ".nvrtc_cache"


# NVRTC's PTX for an architecture is that for another, but for the `.target`: the text asks for no
# more than 75, 80 and 90, and from sm_100 on NVRTC has another optimizer. ptxas makes the same
# machine code for sm_86 and sm_89. `taken_for_another` looks whether that is so.
SAME_PTX = {"86": "80", "89": "80", "90": "80", "120": "100"}
SAME_CODE = {"89": "86"}
READ = "90"  # the architecture whose machine code is disassembled
BATCH = 8  # entries that one run of NVRTC and of ptxas compiles: the text is read once


@dataclass(frozen=True)
class Entry:
    """An entry on architectures of the same PTX, in ascending order."""

    name: str
    source: str
    archs: tuple[str, ...]

    @property
    def head(self) -> str:
        """What comes before it in the text."""
        return self.source.rpartition(_EXTERN)[0]

    @property
    def text(self) -> str:
        return self.source.removeprefix(self.head)

    @property
    def codes(self) -> dict[str, str]:
        """By architecture, the one whose machine code it has."""
        return {a: a if SAME_CODE.get(a) not in self.archs else SAME_CODE[a] for a in self.archs}


_EXTERN = 'extern "C" __global__'


def options(arch: str) -> tuple[str, ...]:
    return tuple(option.format(arch=arch) for option in CUPY_OPTIONS)


@cache
def version() -> str:
    """Version of the NVRTC in use; the wheel's patch level where the wheel is installed."""
    short = ".".join(str(part) for part in NVRTC_VERSION)
    wheel = _wheels_version("nvidia-cuda-nvrtc-cu12")
    return wheel if wheel.startswith(f"{short}.") else short


@cache
def _wheels_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def compiled(source: str, chosen: tuple[str, ...], *wanted: str) -> tuple[list[bytes], str]:
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


def ptx_of(source: str, chosen: tuple[str, ...]) -> tuple[str, str]:
    """PTX and log, for a virtual architecture (compute_90), which has no cubin."""
    (ptx,), log = compiled(source, chosen, "getPTX")
    return ptx.rstrip(b"\0").decode(), log


@cache
def _program(package: str, name: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations or () if spec else ()
    paths = (Path(folder) / "bin" / name for folder in folders)
    return next((path for path in paths if path.exists()), None)


def run_ptxas(ptx: str, arch: str) -> tuple[str, bytes]:
    """Log and cubin of the wheel's ptxas, without the latter where it finds an error."""
    # Never the machine's own, whose version could be any.
    ptxas = _program("nvidia.cuda_nvcc", "ptxas")
    if ptxas is None:
        msg = "compiling many entries takes ptxas: pip install nvidia-cuda-nvcc-cu12"
        raise RuntimeError(msg)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(re.sub(r"^\.target .*$", f".target sm_{arch}", ptx, flags=re.M))
        made = path.with_suffix(".cubin")
        command = [str(ptxas), "-v", f"-arch=sm_{arch}", str(path), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr, made.read_bytes() if made.exists() else b""


def elf_sections(cubin: bytes) -> dict[str, bytes]:
    at, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    held = [cubin[offset : offset + length] for *_, offset, length in headers]
    ends = [held[names].index(b"\0", header[0]) for header in headers]
    return {
        held[names][header[0] : end].decode(): content
        for header, end, content in zip(headers, ends, held, strict=True)
    }


@cache
def without_comments(source: str) -> str:
    """The text as the compiler takes it: a changed comment makes nothing stale."""
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in source.splitlines())
    return "\n".join(line for line in lines if line)


def kept(make: Callable[[], Any] | None, *went_in: str, anew: bool = False) -> Any:
    """What was made of that, from the disk; made and kept where it is not there, if it can be."""
    versions = (version(), _wheels_version("nvidia-cuda-nvcc-cu12"), _FACTS_TEXT)
    name = hashlib.sha256("\0".join([*went_in, *versions]).encode()).hexdigest()[:32]
    path = CACHE / f"{name}.json"
    if path.exists() and not anew:
        return json.loads(path.read_text())
    if make is None:
        return None
    made = make()
    publish(path, json.dumps(made).encode())
    return made


def publish(path: Path, made: bytes) -> None:
    """Write a file that is renamed when it is complete: another worker may be reading."""
    CACHE.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(made)
    part.replace(path)


_FACTS_TEXT = Path(__file__).with_name("facts.py").read_text(encoding="utf-8")


def virtual_options(arch: str) -> tuple[str, ...]:
    """Options that stop at the PTX."""
    return tuple(option.replace("sm_", "compute_") for option in options(arch))


def batches(wanted: Iterable[tuple[str, str, str]]) -> list[tuple[Entry, ...]]:
    """Of architectures, names and texts, what to compile together."""
    archs: dict[tuple[str, str, str], list[str]] = {}
    for arch, name, source in wanted:
        archs.setdefault((name, source, SAME_PTX.get(arch, arch)), []).append(arch)
    together: dict[tuple[str, str], list[Entry]] = {}
    for (name, source, _), some in archs.items():
        entry = Entry(name, source, tuple(sorted(some, key=int)))
        together.setdefault((entry.head, entry.archs[0]), []).append(entry)
    return [
        tuple(group[begin : begin + BATCH])
        for group in together.values()
        for begin in range(0, len(group), BATCH)
    ]


def build_batch(batch: tuple[Entry, ...]) -> dict[tuple[str, str], Facts]:
    """Facts by architecture and name, from the disk where nothing has changed.

    A text that has not changed has the PTX that it had, and a PTX that has not changed the machine
    code: ptxas is asked for new PTX alone.
    """
    found = {}
    for entry in batch:
        digest = kept(None, "digest", *_text_key(entry))
        facts_kept = {a: kept(None, str(digest), code) for a, code in entry.codes.items()}
        if None in facts_kept.values():
            _compile_batch(batch)
            return build_batch(batch)
        for arch, held in facts_kept.items():
            found[arch, entry.name] = Facts(**{**held, "complaints": tuple(held["complaints"])})
    return found


def _text_key(entry: Entry) -> tuple[str, ...]:
    return (
        without_comments(entry.head),
        without_comments(entry.text),
        *virtual_options(entry.archs[0]),
    )


def _compile_batch(batch: tuple[Entry, ...]) -> None:
    text = "\n".join([batch[0].head, *(e.text for e in batch)])
    ptx, log = ptx_of(text, virtual_options(batch[0].archs[0]))
    around, bodies = parts_of(ptx)
    bodies = {entry.name: bodies.get(entry.name, "") for entry in batch}
    complaints = complaints_of(log)
    digests = {e.name: digest_of(around, bodies[e.name], e.name, complaints) for e in batch}
    for entry in batch:
        # Over one that an interrupted run has left: another batch may have had another PTX.
        kept(lambda e=entry: digests[e.name], "digest", *_text_key(entry), anew=True)
    for code in dict.fromkeys(code for entry in batch for code in entry.codes.values()):
        names = {digests[e.name]: e.name for e in batch if code in e.codes.values()}
        new = [(digest, name) for digest, name in names.items() if kept(None, digest, code) is None]
        said = run_ptxas(around + "".join(bodies[name] for _, name in new), code)[0] if new else ""
        for digest, name in new:
            words = "\n".join([*complaints, words_of(said).get(name, said)])
            facts = facts_of(around + bodies[name], words, name)
            kept(lambda made=facts: asdict(made), digest, code)


def build(source: str, name: str, arch: str) -> Facts:
    """Facts of one entry for sm_`arch`."""
    return build_batch((Entry(name, source, (arch,)),))[arch, name]


def taken_for_another(entry: Entry) -> list[str]:
    """Architectures whose PTX or machine code is not what is taken for it."""

    def wrong() -> list[str]:
        ptx = {a: ptx_of(entry.source, virtual_options(a))[0] for a in entry.archs}
        digests = {
            a: digest_of(around, bodies.get(entry.name, ""), entry.name, ())
            for a, (around, bodies) in ((a, parts_of(text)) for a, text in ptx.items())
        }
        found = [f"PTX of sm_{a}" for a in digests if digests[a] != digests[entry.archs[0]]]
        for a, code in entry.codes.items():
            texts = [code_of(ptx[b], entry.name, b) for b in {a, code}]
            found += [f"code of sm_{a}"] * (texts[0] != texts[-1])
        return found

    return kept(wrong, "taken for another", *entry.archs, *_text_key(entry))


def code_of(ptx: str, name: str, arch: str) -> bytes:
    """Machine code, without what surrounds it."""
    return elf_sections(run_ptxas(ptx, arch)[1])[f".text.{name}"]


def machine_code(source: str, name: str, arch: str) -> tuple[float, int]:
    """What `machine_facts` reads, with the disassembler of NVIDIA's wheel, which is a newer one."""

    def read() -> tuple[float, int]:
        ptx, _ = ptx_of(source, virtual_options(arch))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(run_ptxas(ptx, arch)[1])
            command = [str(_program("nvidia.cu13", "nvdisasm")), "-c", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return machine_facts(done.stdout)

    return tuple(kept(read, "machine code", without_comments(source), name, *options(arch)))
