"""The engine compiled by g++, and a kernel's text by NVRTC to PTX; both kept on disk by content."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.nvrtc.build import CACHE, ptx_of, publish, version, virtual_options

HERE = Path(__file__).resolve().parent / "engine"
CXX = os.environ.get("CXX", "g++")
# -ffp-contract=off: what the PTX does not fuse must not be fused here.
FLAGS = [
    "-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall",
    "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-static-libstdc++",
    "-static-libgcc",
]  # fmt: skip


class CompileError(RuntimeError):
    """The compiler refused the text; the message is its own."""


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    """Flags that make a lane's operation one instruction, where the CPU has it."""
    if platform.machine() != "x86_64":
        return ()
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    return tuple(f"-m{name}" for name in ("avx2", "fma", "f16c") if name in known)


@functools.cache
def engine_path() -> Path:
    """Path of the engine's library."""
    if shutil.which(CXX) is None:
        msg = f"the kernel tests need a C++ compiler: {CXX!r} is not on the PATH"
        raise CompileError(msg)
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted(HERE.glob("*.?pp"))
    parts = [compiler, *FLAGS, *_cpu_flags(), *(f.read_text() for f in files)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = CACHE / f"engine-{name}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "engine.so"
        command = [CXX, *FLAGS, *_cpu_flags(), str(HERE / "engine.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            msg = f"{CXX} failed:\n{done.stderr}"
            raise CompileError(msg)
        publish(path, made.read_bytes())
    return path


def kept(kind: str, make: Callable[[], bytes], *went_in: str) -> bytes:
    """What was made of that, from the disk; made and kept where it is not there."""
    path = CACHE / f"{hashlib.sha256(chr(0).join(went_in).encode()).hexdigest()[:32]}.{kind}"
    if path.exists():
        return path.read_bytes()
    made = make()
    publish(path, made)
    return made


def compile_ptx(source: str, arch: str, *more: str) -> str:
    """PTX of the text for compute capability `arch`; PTX comes back as it is."""
    if re.search(r"^\s*\.version \d", source, re.M):
        return source
    chosen = (*virtual_options(arch), *more)

    def compiled() -> bytes:
        ptx, log = ptx_of(source, chosen)
        if not ptx:
            raise CompileError(log)
        return ptx.encode()

    return kept("ptx", compiled, source, *chosen, version()).decode()
