"""model.csv and model.md: what the model predicts, from what, and how it stands to measurements."""

import csv
import io
from collections.abc import Iterable

from bench.gpu_grid import BIG, BWD, FEW, FWD, LAYOUT, SMALL, Case
from bench.model_cases import Predicted, predicted
from bench.model_checks import Measured, geometric_error, published
from bench.model_choices import WORTH, Crossover, choices, crossovers
from bench.model_gpus import GPUS
from bench.model_targets import Target, targets

__all__ = ["BEGIN", "END", "csv_text", "page", "pending_text", "table_of"]

BEGIN, END = "<!-- model: begin -->", "<!-- model: end -->"
COMMAND = "python -m bench.model --markdown"
HEADER = (
    "op", "group", "layout", "dtype", "weight_dtype", "rows", "N", "gpu", "kernels", "us",
    "gb_per_s", "fraction_of_copy", "bottleneck",
)  # fmt: skip
GROUPS = (
    ("Forward, 1 GB moved", FWD, BIG),
    ("Forward, 33 MB moved", FWD, SMALL),
    ("Forward, few rows", FWD, FEW),
    ("Backward, 1 GB moved", BWD, BIG),
    ("Backward, 33 MB moved", BWD, SMALL),
    ("Strided columns and columns of their own, 1 GB moved", FWD, LAYOUT),
    ("Backward of strided columns, 1 GB moved", BWD, LAYOUT),
)
ABOUT = """# Cost model

Written by `{command}`; a test holds it to the code. **Nothing here was measured by
us.** bench/README.md, "The model", tells how it is made.

    time   = t0 + 2 us * (launches - 1) + sum over launches of max(memory, instructions, L2)
    memory = bytes / (S * (1 - exp(-D / S)))

S: what the memory gives. D: what the resident blocks would draw from an idle memory (Little's
law). It is for GPUs alone: what `bench/results/cpu-*.csv` and the like measured is not its affair.
"""
ASSUMED = """## Assumed

Each of these is a guess until a run of `make gpu` stands beside it.

- An idle memory answers after the latency in the table, which comes from the bytes in flight that
  saturate it: at a quarter of them 63 % of the bandwidth flow, at all of them 98 %.
- A kernel that waits for another of the same call costs 2 us. A shuffle and its addition 30 cycles,
  a barrier 60, a cluster's 400, L1 or L2 250, an instruction of a warp that is alone 2.
- Instructions per element, row and thread are those of the machine code
  (`bench/results/instructions.csv`); 40 % of those per row and thread run. Tiles take 4 to 6 more
  per element. A multiprocessor starts 128 a cycle (A100: 96, as it has half the float32 lanes).
- Half of L2 keeps what will be read again; L2 gives 32 bytes per multiprocessor and cycle, one
  multiprocessor draws 64 at most.
- Pieces shorter than 512 bytes reach the shares that Quack measured on an H100. What the warps of a
  block touch side by side counts as one piece; a number in parentheses counts each warp's access
  alone, and is the lower bound.
- Registers and occupancy: `compile-matrix.csv`. Rows are aligned and whole vectors.
"""


def csv_text(rows: Iterable[Predicted]) -> str:
    """Every prediction, a row each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for p in rows:
        c = p.case
        what = c.op, c.group, c.layout, c.dtype, c.affine_dtype or "", c.rows, c.N, p.gpu.name
        times = f"{p.time.us:.4g}", f"{p.gb_per_s:.4g}", f"{p.fraction_of_copy:.3f}"
        writer.writerow([*what, p.families, *times, p.time.bottleneck])
    return out.getvalue()


def table_of(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def page(rows: list[Predicted], measured: list[Measured]) -> str:
    """The whole of model.md."""
    lines = [ABOUT.format(command=COMMAND), *_gpus(), ASSUMED]
    lines += ["## Claims", "", *_targets(targets())]
    lines += ["## Over a copy of the same bytes", ""]
    lines += ["Kernel, and predicted bandwidth over the copy's. Microseconds: `model.csv`.", ""]
    for title, op, group in GROUPS:
        lines += [f"### {title}", "", *_fractions(rows, op, group)]
    lines += [*_choices(), *_measured(measured), *_published()]
    return "\n".join(lines).rstrip() + "\n"


def _gpus() -> list[str]:
    header = ["GPU", "GB/s", "reached", "source", "SMs", "L2 MiB", "KiB in flight", "source",
              "latency us", "t0 us", "source"]  # fmt: skip
    rows = [
        [
            g.name, f"{g.bandwidth:g}", f"{g.achievable:.0%}", g.sources[0], str(g.sm_count),
            f"{g.l2_bytes / 2**20:g}", f"{g.in_flight / 1024:g}", g.sources[1],
            f"{g.latency:.2f}", f"{g.t0:g}", g.sources[2],
        ]
        for g in GPUS
    ]  # fmt: skip
    return ["## GPUs", "", *table_of(header, rows)]


def _targets(found: list[Target]) -> list[str]:
    header = ["#", "claim", "aim", *(g.name for g in GPUS)]
    rows, notes = [], []
    for t in found:
        sign = "≥" if t.upward else "≤"
        aim = f"{sign} {t.aim:.0%}" if t.aim < 1 else f"{sign} {t.aim:g}"
        missed, cells = t.missed(), []
        for g in GPUS:
            cell = f"{t.least[g.name][0]:.2f}"
            cell = f"**{cell}**" if g.name in missed else cell
            cells.append(f"{cell} ({t.free[g.name]:.2f})")
        rows.append([t.number, t.claim, aim, *cells])
        if missed:
            whys: dict[str, list[str]] = {}
            for name in missed:
                whys.setdefault(t.least[name][1], []).append(name)
            told = "; ".join(f"{', '.join(names)} ({why})" for why, names in whys.items())
            notes.append(f"- {t.number}, {t.claim}: {told}.")
    said = [
        "The worst case of each claim, over the copy where no unit stands there; **bold** where",
        "the model says no. In parentheses: if instructions took no time, which is the part of the",
        "model that rests most on guesses. What is in the way, at that case:", "",
    ]  # fmt: skip
    return [*table_of(header, rows), *said, *notes, ""]


def _name(c: Case) -> str:
    size = f"{c.rows} × {c.N}" if c.group == FEW else str(c.N)
    way = {"C": "", "columns": ", columns to C"}.get(c.layout, f", {' to '.join(c.layout)}")
    if c.op == BWD and c.layout != "C":
        way = ", x and dy F"
    return f"{c.dtype}, {size}{way}"


def _fractions(rows: list[Predicted], op: str, group: str) -> list[str]:
    by_case: dict[Case, dict[str, str]] = {}
    for p in rows:
        if (p.case.op, p.case.group) == (op, group):
            cell = f"{p.families} {p.fraction_of_copy:.2f}"
            alone = predicted(p.case, p.gpu, merged=False) if group == LAYOUT else None
            cell += f" ({alone.fraction_of_copy:.2f})" if alone else ""
            by_case.setdefault(p.case, {})[p.gpu.name] = cell
    names = [g.name for g in GPUS]
    body = ([_name(c), *(cells.get(n, "copies") for n in names)] for c, cells in by_case.items())
    return table_of(["N", *names], body)


def _choices() -> list[str]:
    lines = [
        "## The plan tables' thresholds", "",
        "Each row against its neighbours, those of `python -m bench.gpu --tune` that would not",
        "spill by the register counts, in bfloat16 and float32, at its longest N and at three",
        "quarters of it, each warp's access alone: the best one's time over today's. **Bold**:",
        f"under {WORTH:.2f} in the geometric mean over the GPUs.", "",
    ]  # fmt: skip
    body, agreed = [], 0
    for c in choices():
        if c.mean > 0.99 and min(c.ratios.values()) > WORTH:
            agreed += 1
            continue
        cells = [f"{c.ratios[g.name]:.2f}" if g.name in c.ratios else "–" for g in GPUS]
        mean = f"**{c.mean:.2f}**" if c.clear else f"{c.mean:.2f}"
        body.append([c.threshold, c.today, c.model, mean, *cells])
    header = ["threshold", "today", "the model's choice", "mean", *(g.name for g in GPUS)]
    lines += table_of(header, body)
    lines += [f"The other {agreed} thresholds are the model's choice, or within 1 %.", ""]
    return [*lines, *_crossovers(crossovers())]


def _crossovers(found: list[Crossover]) -> list[str]:
    header = ["row", *(g.name for g in GPUS)]
    body = []
    for x in found:
        cells = []
        for g in GPUS:
            share = x.shares.get(g.name, "–")
            ratio = f" ({x.ratios[g.name]:.2f})" if g.name in x.ratios else ""
            words = {None: "never", 0.05: "always"}
            cells.append(words.get(share, str(share)) + ratio)
        body.append([f"{x.vecs * 16 // 1024} KiB", *cells])
    return [
        "K3 or K5: from how many rows per multiprocessor on K3 is no slower, and K5's",
        "time over K3's at 0.5, the table's threshold for rows from 128 KiB on. –: K3 holds none",
        "such.",
        "", *table_of(header, body),
    ]  # fmt: skip


def _measured(found: list[Measured]) -> list[str]:
    lines = ["## Against our own measurements", ""]
    if not found:
        return [*lines, "No run on a GPU is committed. `make gpu` fills this table.", ""]
    error = geometric_error(1 + m.error for m in found)
    lines += [f"{len(found)} cases, off by {error:.0%} in the geometric mean.", ""]
    header = ["table", "case", "GPU", "us", "predicted", "error", "over the copy", "predicted"]
    body = []
    for m in found:
        share = f"{m.measured_fraction:.2f}" if m.measured_fraction else "–"
        us = f"{m.measured_us:.4g}", f"{m.predicted_us:.4g}", f"{m.error:+.0%}"
        what = f"{m.case.op[11:]} {m.case.rows} × {_name(m.case)}"
        body.append([m.table, what, m.gpu.name, *us, share, f"{m.predicted_fraction:.2f}"])
    return [*lines, *table_of(header, body)]


def _published() -> list[str]:
    found = published()
    errors = {
        way: geometric_error(1 + p.error for p in found if p.case.op == op)
        for way, op in (("forward", FWD), ("backward", BWD))
    }
    told = " and ".join(f"{e:.0%} {way}" for way, e in errors.items())
    header = [
        "published by others, not ours",
        "GPU",
        "",
        "shape",
        "GB/s",
        "model of our plan",
        "error",
    ]
    body = [
        [
            p.what, p.gpu.name, p.case.op[-3:], f"{p.case.rows} × {p.case.N}",
            f"{p.published:.0f}", f"{p.predicted:.0f}", f"{p.error:+.0%}",
        ]
        for p in found
    ]  # fmt: skip
    return [
        "## Against what others publish", "",
        "bfloat16, GB/s of two passes (three backward). Their kernels are not ours: a row tells",
        "whether the model's roofs are where kernels have been seen, and where another design is",
        f"ahead of our plan. oink ran on a GB300. Off by {told} in the geometric mean.", "",
        *table_of(header, body),
    ]  # fmt: skip


def pending_text() -> str:
    """The part of PENDING.md that the model writes."""
    lines = [
        BEGIN, "",
        f"Predicted by the cost model ([model.md](model.md), `{COMMAND}`).", "",
        *_targets(targets()), END,
    ]  # fmt: skip
    return "\n".join(lines)
