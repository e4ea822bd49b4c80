"""One command for a machine with a CUDA GPU: prove, then measure, into a folder; no network.

    python -m bench.gpu --out folder           environment, GPU tests, sanitizer, benchmarks, plots
    python -m bench.gpu --steps backward,plots --out folder    some of it, with all of the time
    python -m bench.gpu --tune --out folder    candidates for each row of the plan tables
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

from bench import gpu_proofs, gpu_training
from bench.gpu_backward import backward
from bench.gpu_calls import calls, first_call
from bench.gpu_forward import forward
from bench.gpu_grid import GRIDS
from bench.gpu_grid_backward import BACKWARD_GRIDS
from bench.gpu_grid_layouts import LAYOUT_GRIDS
from bench.gpu_layouts import layouts
from bench.gpu_machine import ROOT, describe
from bench.gpu_proofs import Outcome
from bench.gpu_session import Session
from bench.gpu_summary import verdict, write_summary
from bench.gpu_table import Table
from bench.gpu_tune import tune
from bench.gpu_tune_backward import tune_backward
from bench.peers import PEERS
from bench.peers_backward import BACKWARD_PEERS
from bench.peers_layouts import LAYOUT_PEERS

__all__ = ["main"]

# What has a deadline gets this share of the time that is left, against those that still come.
SHARES = {"calls": 0.05, "training": 0.1, "forward": 0.3, "backward": 0.35, "layouts": 0.2}
# The proofs get half of the time, or all of it if nothing is measured, by these weights.
PROOFS = {"short set": 1, "GPU tests": 5, "sanitizer": 4}
STEPS = ("tests", "sanitizer", *SHARES, "plots")
ALL_PEERS = tuple(dict.fromkeys(PEERS + BACKWARD_PEERS + LAYOUT_PEERS))


@dataclass
class Run:
    """What the steps share, and what became of each."""

    folder: Path
    session: Session
    given: argparse.Namespace
    outcomes: list[tuple[str, str, str]] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)

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
    size.add_argument("--quick", action="store_true", help="the short grids (default)")
    size.add_argument("--full", action="store_true", help="every point")
    parser.add_argument("--tune", action="store_true", help="measure candidates for the plan table")
    parser.add_argument("--simulate", action="store_true", help="on the simulated device, tiny")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    parser.add_argument("--seconds", type=float, help="for the whole run; quick: 560")
    parser.add_argument("--peers", default=",".join(ALL_PEERS), help=f"of {','.join(ALL_PEERS)}")
    given = parser.parse_args(argv)
    given.folder = given.out or given.folder or Path("out")
    given.steps = [s for s in given.steps.split(",") if s]
    given.peers = tuple(p for p in given.peers.split(",") if p)
    for option, allowed in (("steps", STEPS), ("peers", ALL_PEERS)):
        unknown = set(getattr(given, option)) - set(allowed)
        if unknown:
            parser.error(f"--{option}: {', '.join(sorted(unknown))} is not one of {allowed}")
    if given.simulate and given.folder.resolve().is_relative_to(ROOT / "bench" / "results"):
        parser.error(f"a simulated run measures nothing; {given.folder} is for measured results")
    return given


def proofs(run: Run) -> None:
    """Tests and sanitizer; their output goes to one log, and they leave most of the time."""
    log, simulate, steps = run.folder / "checks.txt", run.given.simulate, run.given.steps
    if not {"tests", "sanitizer"} & set(steps):
        return
    wanted = [n for n in PROOFS if ("sanitizer" if n == "sanitizer" else "tests") in steps]
    total = min(run.session.time_left(), 3600.0) * (0.5 if set(SHARES) & set(steps) else 0.97)
    seconds = {n: total * PROOFS[n] / sum(PROOFS[w] for w in wanted) for n in wanted}
    log.write_text("", encoding="utf-8")
    if "tests" in steps:
        short = seconds["short set"]
        run.step("short set", lambda: gpu_proofs.run_short_set(log, short, simulate))
        if simulate:
            run.step("GPU tests", lambda: ("skipped", "they need a GPU"))
        else:
            run.step("GPU tests", lambda: gpu_proofs.run_tests(log, seconds["GPU tests"]))
    if "sanitizer" in steps:
        each = seconds["sanitizer"] / len(gpu_proofs.TOOLS)
        for tool in gpu_proofs.TOOLS:
            if simulate:
                run.step(tool, lambda: ("skipped", "it needs a GPU"))
            else:
                run.step(tool, lambda t=tool: gpu_proofs.run_sanitizer(t, log, each))


def measurements(run: Run) -> None:
    """Python cost and forward in one CSV, backward and layouts in others; a training beside."""
    waiting = [name for name in SHARES if name in run.given.steps]
    while waiting:
        share = SHARES[waiting[0]] / sum(SHARES[name] for name in waiting)
        with run.session.until(share * run.session.time_left()):
            {
                "calls": python_cost,
                "training": training,
                "forward": forwards,
                "backward": backwards,
                "layouts": strided,
            }[waiting.pop(0)](run)


def table_of(run: Run, name: str) -> Table:
    """The table of that name, begun once."""
    if name not in run.tables:
        path = run.folder / f"{name}.csv"
        run.tables[name] = Table(path, run.session.machine, run.session.simulated)
    return run.tables[name]


def size_of(run: Run) -> str:
    return "tiny" if run.session.simulated else "full" if run.given.full else "quick"


def python_cost(run: Run) -> None:
    """Calls on small arrays."""
    table = table_of(run, "forward")
    run.measure("Python cost", table, lambda: calls(run.session, table))
    run.measure("first call", table, lambda: first_call(run.session, table))


def training(run: Run) -> None:
    """A transformer with torch's norms and with ours."""
    run.step("training", lambda: gpu_training.step(run.folder, run.session))


def forwards(run: Run) -> None:
    """Forward table and its figures."""
    table, grid = table_of(run, "forward"), GRIDS[size_of(run)]()
    run.measure("forward", table, lambda: forward(run.session, table, grid, run.given.peers))
    figures(run, table)


def backwards(run: Run) -> None:
    """Backward table, forward and backward together in it, and its figures."""
    table, grid = table_of(run, "backward"), BACKWARD_GRIDS[size_of(run)]()
    run.measure("backward", table, lambda: backward(run.session, table, grid, run.given.peers))
    figures(run, table)


def strided(run: Run) -> None:
    """Table of layouts: strided columns, channels first, columns of their own."""
    table, grid = table_of(run, "layouts"), LAYOUT_GRIDS[size_of(run)]()
    run.measure("layouts", table, lambda: layouts(run.session, table, grid, run.given.peers))


def figures(run: Run, table: Table) -> None:
    """Draw a table if that was asked for."""
    if "plots" in run.given.steps:
        run.step("plots", lambda: plots(table.path, run.session.simulated))


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
    """Candidates, in a table of their own; of the forward, the backward, or both by halves."""
    table, most = table_of(run, "tune"), 1 if run.session.simulated else None
    wanted = [(n, do) for n, do in (("forward", tune), ("backward", tune_backward))
              if n in run.given.steps]  # fmt: skip
    for k, (name, do) in enumerate(wanted):
        with run.session.until(run.session.time_left() / (len(wanted) - k)):
            report = run.folder / f"tune-{name}.md"
            run.measure(
                f"tune {name}", table, lambda d=do, r=report: d(run.session, table, r, most)
            )


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
