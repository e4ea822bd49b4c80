"""Norms of NumPy arrays against everybody who offers them on the CPU, by one protocol.

    python -m bench.cpu [--seconds 2] [--groups shapes,small] [--peers torch,...] [--out folder]

The protocol and the columns: bench/README.md. A CSV and a summary are written into the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench import command_line, some_of, table
from bench.cases import GROUPS, ITEMSIZE, OPS, cpu_cases
from bench.contender import SECONDS
from bench.device import Device
from bench.machine import describe, threads
from bench.peers import OPTIONAL, contenders, names
from bench.plots import draw, read
from bench.table import sweep

MINUTES = 6.0  # after which no case begins: with tables and Dask `make bench` ends within ten


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a result of ours is wrong."""
    parser = command_line("cpu", __doc__)
    choices = {"groups": GROUPS, "peers": names("cpu"), "dtypes": ITEMSIZE}
    choices["ops"] = dict.fromkeys(op.direction for op in OPS.values())
    for name, allowed in choices.items():
        about = {"type": some_of(allowed), "help": ",".join(allowed)}
        default = ",".join(p for p in allowed if p not in OPTIONAL)
        parser.add_argument(f"--{name}", default=default, **about)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of turns, per case")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the summary")
    parser.add_argument("--plots", action="store_true", help="draw the table beside itself")
    given = parser.parse_args(argv)
    threads()
    try:
        import torch

        torch.set_num_threads(threads())
    except ImportError:
        print("torch is not installed: nothing is compared with it")
    host, path = describe(), None
    said = ", ".join(f"{k} {v}" for k, v in host.items() if v)
    print(said)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / f"cpu-{host['date']}-{host['commit']}.csv"
    made, device = table.Table(path, host), Device(60 * MINUTES)
    cases = cpu_cases(given.groups)
    cases = [c for c in cases if c.direction in given.ops and c.dtype in given.dtypes]
    print(sweep(device, made, cases, lambda inputs: contenders(inputs, given.peers), given.seconds))
    text = table.markdown(table.summary(made.rows))
    print(text)
    if path:
        page = path.with_suffix(".md")
        page.write_text(f"# Summary of `{path.name}`\n\n{said}.\n\n{text}", encoding="utf-8")
        print(path, page, *(draw(read(path), given.out) if given.plots else ()), sep="\n")
    return int(any(r["status"] == "wrong" for r in table.faults(made.rows)))


if __name__ == "__main__":
    sys.exit(main())
