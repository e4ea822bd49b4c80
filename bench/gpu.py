"""One command for a machine with a CUDA GPU: prove, then measure, into a folder; no network.

    python -m bench.gpu --out folder           environment, GPU tests, sanitizer, benchmark, plots
    python -m bench.gpu --tune --out folder    candidates for each row of the plan table
    python -m bench.gpu --simulate --out folder  the same logic without a GPU, and without a time

Nothing that is missing ends the run: summary.md says what each step did. Exit status 1 if a check
failed, 2 if there was nothing to run on.
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import gpu_proofs
from bench.gpu_calls import calls, first_call
from bench.gpu_forward import forward
from bench.gpu_grid import GRIDS
from bench.gpu_machine import ROOT, describe
from bench.gpu_proofs import Outcome
from bench.gpu_session import Session
from bench.gpu_summary import verdict, write_summary
from bench.gpu_table import Table
from bench.gpu_tune import tune
from bench.peers import PEERS

__all__ = ["main"]

STEPS = ("tests", "sanitizer", "forward", "calls", "plots")


@dataclass
class Run:
    """What the steps share, and what became of each."""

    folder: Path
    session: Session
    given: argparse.Namespace
    outcomes: list[tuple[str, str, str]] = field(default_factory=list)

    def step(self, name: str, do: Callable[[], Outcome]) -> None:
        """Run a step; whatever it raises is its outcome, and the run goes on."""
        begin = time.monotonic()
        try:
            status, sentence = do()
        except Exception as error:
            traceback.print_exc()
            status, sentence = "failed", f"{type(error).__name__}: {error}"
        took = f"{time.monotonic() - begin:.0f} s"
        self.outcomes.append((name, status, f"{sentence} ({took})"))
        print(f"{name}: {status}: {sentence} ({took})", flush=True)
        write_summary(self.folder, self.session, self.outcomes)

    def measure(self, name: str, table: Table, do: Callable[[], str]) -> None:
        """Run a step that adds rows to a table, and judge those rows."""

        def judged() -> Outcome:
            before = len(table.rows)
            sentence = do()
            return verdict(table.rows[before:], sentence)

        self.step(name, judged)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the results")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="the short grid, about 4 minutes (default)"
    )
    size.add_argument("--full", action="store_true", help="every point")
    parser.add_argument("--tune", action="store_true", help="measure candidates for the plan table")
    parser.add_argument("--simulate", action="store_true", help="on the simulated device, tiny")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    parser.add_argument("--seconds", type=float, help="for the whole run; quick: 560")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}")
    given = parser.parse_args(argv)
    given.folder = given.out or given.folder or Path("out")
    given.steps = [s for s in given.steps.split(",") if s]
    given.peers = tuple(p for p in given.peers.split(",") if p)
    for option, allowed in (("steps", STEPS), ("peers", PEERS)):
        unknown = set(getattr(given, option)) - set(allowed)
        if unknown:
            parser.error(f"--{option}: {', '.join(sorted(unknown))} is not one of {allowed}")
    if given.simulate and given.folder.resolve().is_relative_to(ROOT / "bench" / "results"):
        parser.error(f"a simulated run measures nothing; {given.folder} is for measured results")
    return given


def proofs(run: Run) -> None:
    """Tests and sanitizer; their output goes to one log, and they leave most of the time."""
    log, simulate = run.folder / "checks.txt", run.given.simulate
    total = min(run.session.time_left(), 3600.0)
    log.write_text("", encoding="utf-8")
    if "tests" in run.given.steps:
        run.step("short set", lambda: gpu_proofs.run_short_set(log, 0.1 * total, simulate))
        if simulate:
            run.step("GPU tests", lambda: ("skipped", "they need a GPU"))
        else:
            run.step("GPU tests", lambda: gpu_proofs.run_tests(log, 0.3 * total))
    if "sanitizer" in run.given.steps:
        for tool in gpu_proofs.TOOLS:
            if simulate:
                run.step(tool, lambda: ("skipped", "it needs a GPU"))
            else:
                run.step(tool, lambda t=tool: gpu_proofs.run_sanitizer(t, log, 0.1 * total))


def measurements(run: Run) -> None:
    """Forward table and Python cost, in one CSV."""
    session, given = run.session, run.given
    table = Table(run.folder / "forward.csv", session.machine, session.simulated)
    if "calls" in given.steps:
        run.measure("Python cost", table, lambda: calls(session, table))
        run.measure("first call", table, lambda: first_call(session, table))
    if "forward" in given.steps:
        grid = GRIDS["tiny" if session.simulated else "full" if given.full else "quick"]()
        run.measure("forward", table, lambda: forward(session, table, grid, given.peers))
        if "plots" in given.steps:
            run.step("plots", lambda: plots(run.folder / "forward.csv", session.simulated))


def plots(table: Path, simulated: bool) -> Outcome:
    """Draw where matplotlib is; elsewhere say how to draw from the table."""
    if simulated:
        return "skipped", "a simulated run has no time to draw"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "skipped", f"no matplotlib here: python -m bench.plots {table.name} --out folder"
    from bench.plots import draw, read

    return "ok", ", ".join(p.name for p in draw(read(table), table.parent))


def tuning(run: Run) -> None:
    """Candidates, in a table of their own."""
    table = Table(run.folder / "tune.csv", run.session.machine, run.session.simulated)
    report, most = run.folder / "tune.md", 1 if run.session.simulated else None
    run.measure("tune", table, lambda: tune(run.session, table, report, most))


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, 1 if a check failed, 2 if there is no device."""
    given = parse(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    seconds = given.seconds or (float("inf") if given.full else 560.0)
    with contextlib.ExitStack() as stack:
        try:
            if given.simulate:
                from bench.gpu_simulated import simulated_session_cupy

                stack.enter_context(simulated_session_cupy())
            import cupy

            cupy.cuda.runtime.getDeviceProperties(0)
        except Exception as error:
            print(f"no GPU to run on: {type(error).__name__}: {error}", file=sys.stderr)
            print("the benchmark's own logic runs anywhere with --simulate", file=sys.stderr)
            return 2
        machine = describe(cupy, given.simulate)
        session = Session(cupy, machine, given.simulate, time.monotonic() + seconds)
        (given.folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
        run = Run(given.folder, session, given)
        if given.tune:
            tuning(run)
        else:
            proofs(run)
            measurements(run)
    print(f"results in {given.folder}")
    return int(any(status == "failed" for _, status, _ in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
