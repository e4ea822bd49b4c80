"""Compile kernel text with g++, unchanged, into a library that the runtime can run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".simt_cache"
CXX = os.environ.get("CXX", "g++")

# -O1: variables stay in registers, as on a GPU, and line numbers stay readable.
# -fno-gnu-unique: statics of templates must not be shared between kernel libraries.
KERNEL_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",  # line tables are all that a report needs, and take a third less time
    "-fPIC",
    "-fsanitize=thread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-w",
]
RUNTIME_FLAGS = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
    "-static-libstdc++",
    "-static-libgcc",
]


class CompileError(RuntimeError):
    """g++ refused the kernel text; the message is its own."""


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    """Flags that make fmaf and half conversions single instructions, where the CPU has them."""
    if platform.machine() != "x86_64":
        return ()
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    return tuple(flag for flag, name in (("-mfma", "fma"), ("-mf16c", "f16c")) if name in known)


@functools.cache
def _compiler_version() -> str:
    if shutil.which(CXX) is None:
        msg = f"the kernel tests need a C++ compiler: {CXX!r} is not on the PATH"
        raise CompileError(msg)
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*parts: str) -> str:
    joined = "\0".join((_compiler_version(), *_cpu_flags(), *parts))
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        msg = f"{' '.join(command[:1])} failed:\n{done.stderr}"
        raise CompileError(msg)


def _publish(made: Path, path: Path) -> None:
    """Give a finished file its final name, unless another process was first.

    Never replaced: a process that has loaded the first file and then met a second one of the same
    name would run two runtimes.
    """
    with contextlib.suppress(FileExistsError):
        os.link(made, path)


@functools.cache
def runtime_path() -> Path:
    """Path of the runtime, compiled without the sanitizer; once per content."""
    files = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.hpp")])
    files = [f for f in files if f.name != "prelude.hpp"]
    path = CACHE / f"runtime-{_digest(*RUNTIME_FLAGS, *(f.read_text() for f in files))}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / "runtime.so"
            _run([CXX, *RUNTIME_FLAGS, str(HERE / "runtime.cpp"), "-o", str(made)])
            _publish(made, path)
    return path


def kernel_paths(source: str, entry: str) -> tuple[Path, Path]:
    """Paths of the library built from `source` for `entry`, and of the text its lines refer to."""
    prelude = HERE / "prelude.hpp"
    runtime = runtime_path()
    # A kernel's library names the runtime's by its whole path: a copied folder builds its own.
    name = _digest(*KERNEL_FLAGS, prelude.read_text(), str(runtime), entry, source)
    library, text = CACHE / f"{name}.so", CACHE / f"{name}.cpp"
    if library.exists() and text.exists():
        return library, text
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made_text, made_object = Path(scratch) / text.name, Path(scratch) / "kernel.o"
        made = Path(scratch) / "kernel.so"
        made_text.write_text(f'{source}\n#line 1 "simt_entry"\nSIMT_ENTRY({entry})\n')
        # The debug information names the text by its final place.
        mapped = f"-fdebug-prefix-map={scratch}={CACHE}"
        command = [CXX, *KERNEL_FLAGS, *_cpu_flags(), mapped, "-include", str(prelude)]
        _run([*command, "-c", str(made_text), "-o", str(made_object)])
        # Not linked with libtsan: the runtime answers the sanitizer's calls.
        _run([CXX, "-shared", "-Wl,-Bsymbolic", str(made_object), str(runtime), "-o", str(made)])
        _publish(made_text, text)
        _publish(made, library)
    return library, text


@functools.cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime, the same one that the kernel libraries link."""
    return ctypes.CDLL(str(runtime_path()))


def source_lines(library: Path, offsets: list[int], text: Path) -> list[list[int]]:
    """Lines of `text` for code offsets in `library`: for each, the innermost call first."""
    if not offsets:
        return []
    # The offsets are return addresses: the call is the instruction before.
    wanted = [hex(max(o - 1, 0)) for o in offsets]
    command = ["addr2line", "-i", "-a", "-e", str(library), *wanted]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [[] for _ in offsets]
    frames: list[list[int]] = []
    for row in out.splitlines():
        file, _, line = row.partition(" ")[0].rpartition(":")
        if not file:  # an address starts the next group
            frames.append([])
        elif os.path.basename(file) == text.name and line.isdigit():
            frames[-1].append(int(line))
    return frames
