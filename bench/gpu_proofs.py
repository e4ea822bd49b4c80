"""The steps that prove before anything is timed: the GPU tests, and compute-sanitizer."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bench.gpu_machine import ROOT

__all__ = ["run_sanitizer", "run_short_set", "run_tests"]

TEST_NEEDS = ("pytest", "hypothesis", "ml_dtypes", "array_api_compat")
TOOLS = ("memcheck", "racecheck", "initcheck")
NO_DEVICE = ("Device not supported", "Unable to find", "No CUDA-capable device")
LOG_CHARACTERS = 200_000

Outcome = tuple[str, str]  # ok, failed or skipped; one sentence


def _logged(command: list[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """Run from the repository's root, append what it says to the log; None: out of time."""
    shown = " ".join(["python" if c == sys.executable else c for c in command])
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = child.communicate(timeout=max(1.0, seconds))
        code: int | None = child.returncode
    except subprocess.TimeoutExpired:
        # The sanitizer's own child too: left alone, it would share the GPU with what is timed next.
        os.killpg(child.pid, signal.SIGKILL)
        (text, _), code = child.communicate(), None
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shown}\n{text[-LOG_CHARACTERS:]}\n[exit status {code}]\n\n")
    return code, text


def _last_line(text: str) -> str:
    lines = [line.strip("= \t") for line in text.splitlines() if line.strip("= \t")]
    return lines[-1] if lines else ""


def run_tests(
    log: Path, seconds: float, arguments: tuple[str, ...] = ("-m", "gpu", "tests")
) -> Outcome:
    """Run the marked tests, whose bodies are those of the simulator, through the real RawKernel."""
    missing = [name for name in TEST_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        return "skipped", f"not installed: {', '.join(missing)}; the short set ran instead"
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--strict-markers --import-mode=importlib",
    ]
    code, text = _logged([sys.executable, "-m", "pytest", *options, *arguments], log, seconds)
    if code is None:
        return "failed", f"out of time after {seconds:.0f} s"
    if code == 5:
        return "failed", "no test is marked gpu here: nothing was proven"
    if code == 0 and not re.search(r"\b\d+ passed", text):
        return "failed", f"every test was skipped: {_last_line(text)}"
    return ("ok" if code == 0 else "failed"), _last_line(text)


def run_short_set(log: Path, seconds: float, simulate: bool = False) -> Outcome:
    """Run `bench.sanitize` alone: each family, checked, with exact array bounds."""
    command = [sys.executable, "-m", "bench.sanitize", *(["--simulate"] if simulate else [])]
    code, text = _logged(command, log, seconds)
    return ("ok" if code == 0 else "failed"), _last_line(text) or "out of time"


def run_sanitizer(tool: str, log: Path, seconds: float) -> Outcome:
    """Run `bench.sanitize` under compute-sanitizer."""
    path = shutil.which("compute-sanitizer") or _beside_nvcc()
    if path is None:
        return "skipped", "compute-sanitizer is not on the PATH"
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    if tool == "memcheck":
        options += ["--padding", "64"]  # an overrun must not land in the next array
    command = [path, *options, sys.executable, "-m", "bench.sanitize"]
    code, text = _logged(command, log, seconds)
    if code is None:
        return "failed", f"out of time after {seconds:.0f} s"
    if code and any(sentence in text for sentence in NO_DEVICE):
        return "skipped", f"{tool} refuses this device: {_sentence(text)}"
    found = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    if code == 0 and not found:
        return "failed", f"{tool} printed no summary"
    return ("ok" if code == 0 else "failed"), (found or [_last_line(text)])[-1]


def _sentence(text: str) -> str:
    return next(line.strip("= ") for line in text.splitlines() if any(s in line for s in NO_DEVICE))


def _beside_nvcc() -> str | None:
    with contextlib.suppress(TypeError):
        found = Path(shutil.which("nvcc")).resolve().parent / "compute-sanitizer"  # type: ignore[arg-type]
        return str(found) if found.exists() else None
    return None
