"""One command for a machine with a CUDA GPU: prove, then measure, into a folder; no network.

    python -m bench.gpu --out folder [--only backward,tune] [--simulate]

Nothing that is missing ends the run: summary.md says what each step did. Exit status 1 if a check
failed or nothing was done, 2 if there was nothing to run on.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the GPU

from bench import calls, command_line, some_of, training, tune
from bench.cases import Case, gpu_cases
from bench.device import Gpu, ahead, make_inputs, simulated_cupy
from bench.machine import ROOT, describe
from bench.peers import contenders, names, ours
from bench.plots import draw, read
from bench.table import Table, claims, faults, markdown, summary, sweep

Outcome = tuple[str, str]  # ok, failed or skipped; one sentence
# A step has this share of the time that is left, against those that still come.
SHARES = {"tests": 0.3, "sanitize": 0.15, "calls": 0.03, "forward": 0.17, "backward": 0.2,
          "layouts": 0.1, "training": 0.05}  # fmt: skip
STEPS = (*SHARES, "tune")  # the last only where it is asked for
SECONDS = 560.0  # of a run: a machine that is lent for ten minutes leaves a little for its start
TEST_NEEDS = ("pytest", "hypothesis", "ml_dtypes")
TEST_OPTIONS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o",
                "addopts=--strict-markers --import-mode=importlib")  # fmt: skip
PROCESSES = 8  # that the tests are spread over: most of their time is compilation
TOOLS = ("memcheck", "racecheck", "initcheck")
NO_DEVICE = ("Device not supported", "Unable to find", "No CUDA-capable device")
LOG_CHARACTERS = 200_000
COMPILED_ROWS = 2000  # of a case that is compiled ahead: enough for every family but K5


# -- proofs ---------------------------------------------------------------------------------------


def logged(command: Sequence[str], log: Path, seconds: float) -> tuple[int | None, str]:
    """Run from the repository's root, append what it says to the log; None: out of time."""
    about = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, **about, errors="replace", start_new_session=True)
    try:
        text, _ = child.communicate(timeout=max(1.0, seconds))
        code: int | None = child.returncode
    except subprocess.TimeoutExpired:
        # The sanitizer's own child too: left alone, it would share the GPU with what is timed next.
        os.killpg(child.pid, signal.SIGKILL)
        (text, _), code = child.communicate(), None
    shown = " ".join("python" if c == sys.executable else c for c in command)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shown[:500]}\n{text[-LOG_CHARACTERS:]}\n[exit status {code}]\n\n")
    return code, text


def _last_line(text: str) -> str:
    lines = [line.strip("= \t") for line in text.splitlines() if line.strip("= \t")]
    return lines[-1] if lines else ""


def run_tests(
    log: Path, seconds: float, files: Sequence[str] = (), processes: int = PROCESSES
) -> Outcome:
    """Run the marked tests, whose bodies are the simulator's, through `RawKernel`."""
    if missing := [name for name in TEST_NEEDS if importlib.util.find_spec(name) is None]:
        return "skipped", f"not installed: {', '.join(missing)}"
    every = files or sorted(map(str, (ROOT / "tests").rglob("test_*.py")))
    processes = min(processes, len(every), os.cpu_count() or 1)
    command = [sys.executable, *TEST_OPTIONS, *([] if files else ["-m", "gpu"])]
    with ThreadPoolExecutor(processes) as pool:
        parts = [[*command, *every[k::processes]] for k in range(processes)]
        done = list(pool.map(lambda part: logged(part, log, seconds), parts))
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    for _, text in done:
        for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", _last_line(text)):
            counts[word] += int(number)
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    if late := sum(code is None for code, _ in done):
        return "failed", f"{late} of {processes} processes out of time ({seconds:.0f} s); {told}"
    if not counts["passed"]:
        return "failed", f"no test passed, so nothing was proven: {told or _last_line(done[0][1])}"
    bad = any(code not in (0, 5) for code, _ in done)  # 5: a process had no test of the mark
    return ("failed" if bad else "ok"), told


def run_short_set(log: Path, seconds: float, simulate: bool = False) -> Outcome:
    """Run `bench.sanitize` alone: each family, checked; it needs no pytest, and compiles ahead."""
    command = [sys.executable, "-m", "bench.sanitize", *["--simulate"] * simulate]
    code, text = logged(command, log, seconds)
    said = "out of time" if code is None else _last_line(text)
    return ("ok" if code == 0 else "failed"), said


def run_sanitizer(tool: str, log: Path, seconds: float) -> Outcome:
    beside = str(Path(shutil.which("nvcc") or "nvcc").resolve().parent)  # where CUDA's toolkit is
    places = os.pathsep.join((os.environ.get("PATH", ""), beside))
    path = shutil.which("compute-sanitizer", path=places)
    if path is None:
        return "skipped", "compute-sanitizer is not on the PATH"
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    if tool == "memcheck":
        options += ["--padding", "64"]  # an overrun must not land in the next array
    code, text = logged([path, *options, sys.executable, "-m", "bench.sanitize"], log, seconds)
    if code is None:
        return "failed", f"out of time after {seconds:.0f} s"
    lines = [line.strip("= ") for line in text.splitlines()]
    refused = [line for line in lines if any(n in line for n in NO_DEVICE)]
    if code and refused:
        return "skipped", f"{tool} refuses this device: {refused[0]}"
    found = [line for line in lines if "SUMMARY" in line]
    if code == 0 and not found:
        return "failed", f"{tool} printed no summary"
    return ("ok" if code == 0 else "failed"), (found or [_last_line(text)])[-1]


# -- the run --------------------------------------------------------------------------------------


class Run:
    """What the steps share, and what became of each."""

    def __init__(self, given: argparse.Namespace, device: Gpu, machine: dict[str, str]) -> None:
        self.given, self.device, self.machine = given, device, machine
        self.folder, self.log = given.out, given.out / "checks.txt"
        self.outcomes: list[tuple[str, str, str]] = []
        self.tables: dict[str, Table] = {}

    def table(self, name: str) -> Table:
        if name not in self.tables:
            path = self.folder / f"{name}.csv"
            self.tables[name] = Table(path, self.machine, self.device.simulated)
        return self.tables[name]

    def step(self, name: str, do: Callable[[], Outcome]) -> None:
        """Run a step; whatever it raises is its outcome, and the run goes on."""
        begin = time.monotonic()
        try:
            status, sentence = do()
        except Exception as error:
            traceback.print_exc()
            status, sentence = "failed", f"{type(error).__name__}: {error}"
        self.outcomes.append((name, status, f"{sentence} ({time.monotonic() - begin:.0f} s)"))
        print(": ".join(self.outcomes[-1]), flush=True)
        self.write_summary()

    def measured(self, name: str, table: Table, do: Callable[[], str]) -> None:
        """Run a step that adds rows to a table: failed if one of ours is wrong or missing."""

        def judged() -> Outcome:
            before, sentence = len(table.rows), do()
            rows = table.rows[before:]
            if bad := faults(rows):
                what = " ".join(str(bad[0][k]) for k in ("peer", "op", "dtype", "shape", "note"))
                return "failed", f"{len(bad)} wrong or in error, the first: {what}. {sentence}"
            return "ok", "; ".join([sentence, *claims(rows)])

        self.step(name, judged)

    def write_summary(self) -> None:
        """Write it anew after every step, so that a run that is cut short leaves one."""
        lines = ["# GPU run", ""]
        if self.device.simulated:
            lines += ["**Simulated: this proves the benchmark's logic, and no time.**", ""]
        lines += [f"- {name}: {value}" for name, value in self.machine.items() if value]
        lines += ["", "| step | status | |", "|---|---|---|"]
        for outcome in self.outcomes:
            cells = (" ".join(c.split()).replace("|", "\\|") for c in outcome)
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {note}" for note in dict.fromkeys(self.device.notes))]
        if found := [line for t in self.tables.values() for line in summary(t.rows)]:
            lines += ["", markdown(found)]
        (self.folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def tests(self) -> None:
        left, simulate = self.device.time_left(), self.device.simulated
        self.step("short set", lambda: run_short_set(self.log, left / 3, simulate))
        if not simulate:
            self.step("GPU tests", lambda: run_tests(self.log, self.device.time_left()))

    def sanitize(self) -> None:
        if self.device.simulated:
            return self.step("sanitizer", lambda: ("skipped", "it needs a GPU"))
        with ThreadPoolExecutor(len(TOOLS)) as pool:  # side by side: each is slow, and none timed
            left = self.device.time_left()
            found = {t: pool.submit(run_sanitizer, t, self.log, left) for t in TOOLS}
            for tool, future in found.items():
                self.step(tool, future.result)
        return None

    def calls(self) -> None:
        table, peers = self.table("forward"), self.given.peers
        self.measured("Python cost", table, lambda: calls.on_gpu(self.device, table, peers))
        self.measured("first call", table, lambda: calls.first_call(self.device, table))

    def training(self) -> None:
        self.step("training", lambda: training.step(self.folder, self.device, self.machine))

    def tune(self) -> None:
        table, report = self.table("tune"), self.folder / "tune.md"
        self.measured("tune", table, lambda: tune.tune(self.device, table, report))

    def cases(self, name: str) -> None:
        """Forward, backward or layouts: a table each, and its figures where matplotlib is."""
        table, chosen = self.table(name), gpu_cases(name, self.device.simulated)

        def do() -> str:
            ahead(self.device, [partial(compiled, self.device, case) for case in chosen])
            return sweep(self.device, table, chosen, lambda i: contenders(i, self.given.peers))

        self.measured(name, table, do)
        if not self.device.simulated and importlib.util.find_spec("matplotlib"):
            drawn = lambda: ", ".join(p.name for p in draw(read(table.path), self.folder))  # noqa: E731
            self.step(f"plots of {name}", lambda: ("ok", drawn()))


def compiled(device: Gpu, case: Case) -> None:
    """Call ours once on few rows, so that its kernels are in CuPy's cache."""
    most = COMPILED_ROWS if len(case.shape) == 2 else 2  # images
    case = replace(case, shape=(min(case.shape[0], most), *case.shape[1:]))
    ours(make_inputs(device, case)).call(0)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, 1 if a check failed or nothing was done, 2 if there is no device."""
    parser, everybody = command_line("gpu", __doc__), names("cuda")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    for option, allowed, default in (("only", STEPS, SHARES), ("peers", everybody, everybody)):
        about = {"default": ",".join(default), "help": f"of {','.join(allowed)}"}
        parser.add_argument(f"--{option}", type=some_of(allowed), **about)
    parser.add_argument("--simulate", action="store_true", help="on the simulated device, tiny")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    given = parser.parse_args(argv)
    if given.simulate and given.out.resolve().is_relative_to(ROOT / "bench" / "results"):
        parser.error(f"a simulated run measures nothing; {given.out} is for measured results")
    with contextlib.ExitStack() as stack:
        try:
            if given.simulate:
                stack.enter_context(simulated_cupy())
            import cupy

            cupy.cuda.runtime.getDeviceProperties(0)
        except Exception as error:
            print(f"no GPU to run on: {type(error).__name__}: {error}", file=sys.stderr)
            print("the benchmark's own logic runs anywhere with --simulate", file=sys.stderr)
            return 2
        given.out.mkdir(parents=True, exist_ok=True)
        machine = describe(cupy, given.simulate)
        (given.out / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
        run = Run(given, Gpu(cupy, given.seconds, given.simulate), machine)
        waiting = {name: SHARES.get(name, 1.0) for name in STEPS if name in given.only}
        device, end = run.device, run.device.deadline
        while waiting:
            now, total, name = time.monotonic(), sum(waiting.values()), next(iter(waiting))
            device.deadline = now + waiting.pop(name) / total * min(end - now, 86400.0)
            getattr(run, name, partial(run.cases, name))()
    print(f"results in {given.out}")
    statuses = [status for _, status, _ in run.outcomes]
    return int("failed" in statuses or "ok" not in statuses)


if __name__ == "__main__":
    sys.exit(main())
