"""The compile matrix as a table: after a test run, and kept under bench/results/."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupynorm._cuda.plan import Stage
from tests.nvrtc.build import CUPY_OPTIONS, READ, version
from tests.nvrtc.check import blocks_that_fit
from tests.nvrtc.facts import Facts
from tests.nvrtc.grid import ARCHS, DTYPES, FAMILIES, WHOLE, kind_of
from tests.ptx.limits import DeviceLimits

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
TABLE_PAGE = RESULTS / "compile-matrix.md"
TABLE_ROWS = RESULTS / "compile-matrix.csv"
COMMAND = "python -m tests.nvrtc --all --write"
LEGEND = "entries · most registers · bytes spilled · least occupancy"

Record = dict[str, Any]


def record_of(
    arch: str, stage: Stage, facts: Facts, code: tuple[float, int] | None = None
) -> Record:
    """What the table needs of one compiled entry, of some with what machine code shows."""
    limits = DeviceLimits.of(arch)
    blocks = min(blocks_that_fit(limits, facts, stage).values())
    return {
        "arch": arch,
        "family": stage.family,
        "name": stage.name,
        "kernel": f"{stage.op.name} {kind_of(stage)}" + " in a cluster" * (stage.cluster > 1),
        "x_dtype": stage.x_dtype,
        "code": code,
        "registers": facts.registers,
        "spilled": facts.spill_stores + facts.spill_loads + facts.stack,
        "occupancy": blocks * stage.block[0] / limits.threads_per_multiprocessor,
    }


def summary(records: Iterable[Record]) -> list[list[str]]:
    """Rows by architecture, columns by family, under a heading."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cells.setdefault((record["arch"], record["family"]), []).append(record)
    rows = [["", *FAMILIES]]
    for arch in ARCHS:
        if any((arch, family) in cells for family in FAMILIES):
            rows.append([f"sm_{arch}", *(_cell(cells.get((arch, family))) for family in FAMILIES)])
    return rows


def _cell(records: list[Record] | None) -> str:
    if not records:
        return "-"
    most = max(record["registers"] for record in records)
    spilled = sum(record["spilled"] for record in records)
    least = min(record["occupancy"] for record in records)
    return f"{len(records)} · {most} · {spilled} · {least:.0%}"


def machine_table(records: Iterable[Record]) -> list[list[str]]:
    """Rows by kernel, columns by dtype, under a heading."""
    cells: dict[str, dict[str, str]] = {}
    for record in records:
        if record["code"]:
            instructions, loads = record["code"]
            per_16 = f"{instructions:.0f}" if instructions else "-"
            cell = f"{per_16} · {loads} · `{record['name']}`"
            cells.setdefault(record["kernel"], {})[record["x_dtype"]] = cell
    return [
        ["", *DTYPES],
        *([kernel, *(row.get(d, "-") for d in DTYPES)] for kernel, row in cells.items()),
    ]


def _markdown(header: list[str], *body: list[str]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in body),
    ]


def _sm(archs: Iterable[str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


def kept_page(state: str, commit: str, records: list[Record]) -> str:
    """Text of the kept page."""
    lines = [
        "# Compile matrix",
        "",
        "Entries that the plan table can ask for, compiled by NVRTC: every one for",
        f"{_sm(WHOLE) or 'no architecture'}, and for {_sm(a for a in ARCHS if a not in WHOLE)}",
        "the longest of each kernel,",
        f"with the options that CuPy passes: `{' '.join(CUPY_OPTIONS)}`.",
        "Of RMS norm and of rows with a residual the longest of each kernel, everywhere.",
        "",
        "Holds for all, or this page is not written: no warning, no stack frame, no spill, the",
        "blocks per multiprocessor that the plan states, 128-bit loads of x and dy, 128-bit stores",
        "of y and dx, subnormals flushed, IEEE division and root. Registers: `compile-matrix.csv`.",
        "",
        f"- NVRTC {version()}, at commit {commit}; no GPU took part",
        f"- state of the compiled text: `{state}`",
        f"- written by `{COMMAND}`",
        "",
        f"Each cell: {LEGEND}.",
        "",
        *_markdown(*summary(records)),
        "",
        f"Machine code for sm_{READ}, of the longest entry of each kernel: instructions per 16",
        "bytes of global memory · most loads before one of them is used. Both are of the text, not",
        "of a run: branches for rows that are aligned or not all count, bulk copies have no size.",
        "",
        *_markdown(*machine_table(records)),
    ]
    return "\n".join(lines) + "\n"


def kept_rows(records: list[Record]) -> str:
    """Text of the kept CSV: an entry per row, its registers per architecture."""
    by_name: dict[str, dict[str, int]] = {}
    for record in records:
        by_name.setdefault(record["name"], {})[record["arch"]] = record["registers"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["entry", *(f"sm_{arch}" for arch in ARCHS)])
    for name, registers in by_name.items():
        writer.writerow([name, *(registers.get(arch, "") for arch in ARCHS)])
    return out.getvalue()
