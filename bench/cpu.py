"""Layer norm of NumPy arrays against everybody who offers it on the CPU, by one protocol.

    python -m bench.cpu [--seconds 2] [--groups shapes,small] [--peers torch,...] [--out folder]

Everybody is checked against float64 on the same input before anything is timed, has the same
number of threads (CUPYNORM_NUM_THREADS, 2 if it is not set), and takes turns with the others; see
bench/README.md for the protocol and the columns. A CSV and a summary are written into the folder.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cpu_grid import GROUPS, CpuCase, grid
from bench.cpu_machine import THREADS, machine, threads, write
from bench.cpu_summary import fixed_cost, lines, markdown, summary
from bench.cpu_table import rows_of
from bench.gpu_grid import BOTH, BWD, FWD
from bench.plots_cpu import draw, read
from bench.progress import progress, say

__all__ = ["PEERS", "main", "run"]

PEERS = (
    "torch", "torch-view", "torch-contiguous", "torch-back", "torch-composed", "cupynorm.torch",
    "onnxruntime", "onnxruntime out=", "jax", "scikit-learn", "numpy formula",
    "cupynorm", "cupynorm out=", "cupynorm C", "cupynorm numpy", "copyto", "copyto fresh",
)  # fmt: skip
OPTIONAL = ("torch-compile",)  # takes 10 to 30 s to compile each case
# Who is left out where it is slow and would tell nothing new: in sweeps, who is not in the figure.
SLOW = ("numpy formula", "cupynorm numpy")
NOT_SHOWN = (*SLOW, "cupynorm.torch", "scikit-learn")
LEFT_OUT = {"columns": NOT_SHOWN, "rows": NOT_SHOWN, "dtypes": SLOW, "odd": SLOW}
OPS = {"forward": FWD, "backward": BWD, "both": BOTH}
SECONDS = 1.0  # of a case's turns, by default
MINUTES = 6.0  # after which no case begins: with tables and Dask `make bench` ends within ten


def builders(inputs: Any, names: Sequence[str]) -> list[Any]:
    """Who takes part in a case; those that its op or layout rules out say so themselves."""
    from bench.cpu_ours import ours
    from bench.cpu_peers_jax import jax_peer
    from bench.cpu_peers_numpy import copies, formula, scale
    from bench.cpu_peers_onnx import onnx_peers
    from bench.cpu_peers_torch import torch_peers

    made = [
        *torch_peers(inputs),
        *onnx_peers(inputs),
        ("jax", lambda: jax_peer(inputs)),
        ("scikit-learn", lambda: scale(inputs)),
        ("numpy formula", lambda: formula(inputs)),
        *ours(inputs),
        *copies(inputs),
    ]
    left_out = LEFT_OUT.get(inputs.case.group, ())
    return [(name, build) for name, build in made if name in names and name not in left_out]


def run(
    cases: Sequence[CpuCase], names: Sequence[str], seconds: float, minutes: float
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each case, until the time is over."""
    from bench.cpu_contender import measure
    from bench.cpu_data import make_inputs

    end = time.monotonic() + 60 * minutes
    for number, case in enumerate(progress(cases, "bench.cpu")):
        if time.monotonic() > end:
            say(f"{len(cases) - number} cases left out: {minutes:g} minutes are over")
            return
        inputs = make_inputs(case)
        yield rows_of(case, measure(inputs, builders(inputs, names), seconds))


def line(rows: list[dict[str, Any]]) -> str:
    """Who took how long, the fastest first, and who has no number."""
    timed = sorted((r for r in rows if r["median_us"] != ""), key=lambda r: r["median_us"])
    refused = [f"{r['peer']} {r['status']}" for r in rows if r["status"] in ("wrong", "error")]
    shown = [f"{r['peer']} {r['median_us']:.4g}" for r in timed]
    r = rows[0]
    where = f"{r['op'].removeprefix('layer_norm_')} {r['dtype']} {r['shape']} {r['layout']}"
    return f"{where}, us: " + ", ".join(shown + refused)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__.splitlines()[0]
    )
    several = lambda text: tuple(filter(None, text.split(",")))  # noqa: E731
    choices = {"groups": tuple(GROUPS), "peers": PEERS + OPTIONAL, "ops": tuple(OPS),
               "dtypes": ("float32", "float16", "bfloat16", "float64")}  # fmt: skip
    for name, allowed in choices.items():
        default = PEERS if name == "peers" else allowed
        parser.add_argument(f"--{name}", type=several, default=default, help=",".join(allowed))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of turns, per case")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no case begins")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the summary")
    parser.add_argument("--plots", action="store_true", help="draw the table beside itself")
    given = parser.parse_args(argv)
    for name, allowed in choices.items():
        unknown = set(getattr(given, name)) - set(allowed)
        if unknown:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not one of {allowed}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    given = parse(argv)
    os.environ.setdefault(THREADS, "2")
    try:
        import torch

        torch.set_num_threads(threads())
    except ImportError:
        say("torch is not installed: nothing is compared with it")
    host = machine()
    say(", ".join(f"{k} {v}" for k, v in host.items()))
    ops = {OPS[name] for name in given.ops}
    cases = [c for c in grid(given.groups) if c.op in ops and c.dtype in given.dtypes]
    found: list[dict[str, Any]] = []
    for rows in run(cases, given.peers, given.seconds, given.minutes):
        found += rows
        say(line(rows))
    table = summary(found)
    fixed = fixed_cost(found)
    print("\n".join([*lines(table), *filter(None, [fixed])]))
    if given.out and found:
        path = write([row | host for row in found], given.out, "cpu")
        page = path.with_suffix(".md")
        page.write_text(markdown(table, host, path.name, fixed), encoding="utf-8")
        print(path, page, *(draw(read(path), given.out) if given.plots else ()), sep="\n")
    return int(any(r["status"] == "wrong" and r["peer"].startswith("cupynorm") for r in found))


if __name__ == "__main__":
    sys.exit(main())
