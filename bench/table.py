"""The CSV: its columns, how results become rows, what rows say together; a sweep that fills it."""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.cases import BWD, FWD, Case
from bench.contender import SECONDS, Builder, Result, Times, interleave, measure
from bench.device import Device, captured, make_inputs
from bench.machine import GPU_FACTS, LIBRARIES
from bench.peers import copies, empty_kernel

# Their meaning: bench/README.md, which a test compares.
COLUMNS = (
    "op", "group", "dtype", "weight_dtype", "shape", "M", "N", "axis", "layout", "peer", "kernel",
    "method", "status", "error", "median_us", "p10_us", "p90_us", "best_us", "rounds", "bytes",
    "gb_per_s", "fraction_of_copy", "over_torch", "best_over_torch", "ratio_to_peer", "load",
    "note", "cpu", "cpus", "threads", *GPU_FACTS, "python", *LIBRARIES, "commit", "tree", "date",
)  # fmt: skip
TIMED = ("median_us", "p10_us", "p90_us", "best_us", "rounds", "gb_per_s", "fraction_of_copy",
         "over_torch", "best_over_torch", "ratio_to_peer")  # fmt: skip
Rows = list[dict[str, Any]]


class Table:
    """Rows that reach the disk as they come, so that a run that is cut short leaves what it has."""

    def __init__(self, path: Path | None, machine: dict[str, str], simulated: bool = False) -> None:
        self.path, self.machine, self.simulated = path, machine, simulated
        self.rows: Rows = []
        self._write("w", [dict(zip(COLUMNS, COLUMNS, strict=True))])

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; a simulated run says nothing about time and leaves those cells empty."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else ""
        added = []
        for given in rows:
            row = dict.fromkeys(COLUMNS, "") | {"load": load} | self.machine | given
            if self.simulated:
                row |= dict.fromkeys(TIMED, "")
                row["status"] = "simulated" if row["status"] == "ok" else row["status"]
            added.append({k: _cell(row[k]) for k in COLUMNS})
        self.rows += added
        self._write("a", added)

    def _write(self, mode: str, rows: Rows) -> None:
        if self.path:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerows(rows)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return " ".join(value.split())[:300] if isinstance(value, str) else value


def write(rows: Rows, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def dated(rows: Rows, folder: Path, name: str) -> Path:
    """Save them as a CSV that says in its name when it was measured, and of which commit."""
    return write(rows, folder / f"{name}-{rows[0]['date']}-{rows[0]['commit']}.csv")


def timing(t: Times) -> dict[str, Any]:
    found = {"median_us": t.median, "p10_us": t.p10, "p90_us": t.p90, "best_us": t.best}
    return found | {"rounds": t.rounds}


def about(case: Case) -> dict[str, Any]:
    found = {k: getattr(case, k) for k in ("op", "group", "dtype", "M", "N", "axis", "layout")}
    return found | {"weight_dtype": case.affine_dtype or "", "shape": case.label}


def rows_of(case: Case, results: list[Result]) -> Rows:
    """Rows of one case: bandwidths, and the ratios within the same run."""
    timed = [r for r in results if r.times]
    roofs: dict[bool, float] = {}
    for r in timed:
        if r.name.startswith("copy"):
            roofs[r.fresh] = max(roofs.get(r.fresh, 0.0), case.copy_bytes / r.times.median)
    torch = [r.times for r in timed if r.name.startswith("torch")]
    ours = next((r.times.median for r in timed if r.name == "cupynorm"), None)
    rows = []
    for r in results:
        row = about(case) | {"peer": r.name, "kernel": r.kernel, "method": r.method}
        row |= {"status": r.status, "error": r.error, "note": r.note}
        row["bytes"] = case.copy_bytes if r.name.startswith("copy") else case.moved_bytes
        if t := r.times:
            rate, roof = row["bytes"] / t.median, roofs.get(r.fresh)
            row |= timing(t) | {"gb_per_s": rate / 1e3}
            row["fraction_of_copy"] = rate / roof if roof else None
            row["ratio_to_peer"] = ours / t.median if ours else None
            if torch:
                row["over_torch"] = t.median / min(t.median for t in torch)
                row["best_over_torch"] = t.best / min(t.best for t in torch)
        rows.append(row)
    return rows


# -- what rows say together -----------------------------------------------------------------------

OURS = ("cupynorm", "cupynorm out=", "cupynorm.torch")
ABOUT_RATIOS = """Time over time within the same run: below 1, the first is faster. Against a
copy: for as many bytes, so 1.25 is 80 % of its bandwidth."""
HEADS = ("op", "group", "dtype", "time of", "over that of", "cases", "geometric mean",
         "of fastest turns", "worst", "worst case")  # fmt: skip
# Of the fastest copy, from which N up: a forward, a backward, a change of layout at 1 GB moved.
TARGETS = (
    ("forward", lambda r: r["op"] == FWD and r["group"] == "1GB" and r["N"] >= 256, 0.95),
    ("few rows", lambda r: r["op"] == FWD and r["group"] == "few rows", 0.85),
    ("backward", lambda r: r["op"] == BWD and r["group"] == "1GB" and 64 <= r["N"] <= 16384, 0.90),
    ("K5 backward", lambda r: r["op"] == BWD and "split" in r["kernel"], 0.50),
    ("column-major to rows", lambda r: r["layout"] in ("F-C", "columns"), 0.85),
)


def summary(rows: Rows) -> list[tuple[str, ...]]:
    """A line for each op, group, dtype and pair of which both were timed; below 1, ours is faster.

    "torch" is the fastest of torch's ways in each case. Against a copy it is the time for as many
    bytes as the copy moved: 1.25 is 80 % of its bandwidth.
    """
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in (r for r in rows if r["median_us"] != ""):
        key = tuple(row[k] for k in ("op", "group", "dtype", "shape", "layout"))
        peers = cases.setdefault(key, {})
        name = "torch" if row["peer"].startswith("torch") else row["peer"]
        peers[name] = min(row, peers.get(name, row), key=lambda r: r["median_us"])
    found: dict[tuple[str, ...], dict[str, tuple[float, float]]] = {}
    for (*group, shape, layout), peers in cases.items():
        for ours in (p for p in OURS if p in peers):
            for theirs in (p for p in peers if p not in OURS and _comparable(ours, p)):
                a, b = peers[ours], peers[theirs]
                part = a["bytes"] / b["bytes"]
                ratios = tuple(a[k] / b[k] / part for k in ("median_us", "best_us"))
                where = shape if layout == "C" else f"{shape} {layout}"
                found.setdefault((*group, ours, theirs), {})[where] = ratios
    return [(*key, *_figures(ratios)) for key, ratios in found.items()]


def _comparable(ours: str, theirs: str) -> bool:
    """Tensors with torch; who allocates with a copy that does, who does not with the other."""
    if ours == "cupynorm.torch":
        return theirs == "torch"
    return theirs != ("copyto fresh" if ours.endswith("out=") else "copyto")


def _figures(found: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    worst = max(found, key=lambda where: found[where][0])
    means = (statistics.geometric_mean(r[k] for r in found.values()) for k in (0, 1))
    return str(len(found)), *(f"{m:.2f}" for m in means), f"{found[worst][0]:.2f}", worst


def claims(rows: Rows) -> Iterator[str]:
    """Sentences on the targets; none where nothing was timed."""
    shares = [r for r in rows if r["peer"] == "cupynorm" and r["fraction_of_copy"] != ""]
    for name, fits, aim in TARGETS:
        if cases := [r for r in shares if fits(r) and r["dtype"] != "float64" and r["kernel"]]:
            least = min(cases, key=lambda r: r["fraction_of_copy"])
            reached = sum(r["fraction_of_copy"] >= aim for r in cases)
            where = f"{least['fraction_of_copy']:.1%} ({least['dtype']}, {least['shape']})"
            yield f"{name}: {reached} of {len(cases)} reach {aim:.0%} of the copy, least {where}"


def faults(rows: Rows) -> Rows:
    """Rows of ours that are wrong or in error; a candidate may be refused, but never be wrong."""

    ours, candidate = (lambda r: r["peer"].startswith("cupynorm")), (lambda r: "/" in r["peer"])
    wrong = [r for r in rows if r["status"] == "wrong" and (ours(r) or candidate(r))]
    return wrong + [r for r in rows if r["status"] == "error" and ours(r)]


def markdown(lines: list[tuple[str, ...]]) -> str:
    rows = ("| " + " | ".join(row) + " |" for row in (HEADS, ("---",) * len(HEADS), *lines))
    return ABOUT_RATIOS + "\n\n" + "\n".join(rows) + "\n"


# -- a sweep over cases: checked, timed, written as it goes ----------------------------------------

Item = TypeVar("Item")
EVERY = 5.0  # seconds between lines: logs stay readable
EMPTY_LAUNCHES = 500
WARM_SECONDS = 1.0  # an idle GPU takes this long to reach its clocks


def sweep(
    device: Device,
    table: Table,
    cases: Sequence[Case],
    contenders: Callable[[Any], list[Builder]],
    seconds: float = SECONDS,
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured."""
    if device.kind == "cuda" and cases[0].group != "python":
        _fixed_cost(device, table)
    done = 0
    for case in progress(cases, "bench"):
        if device.time_left() < 0:
            break
        try:
            inputs = make_inputs(device, case)
            if not done:
                _warm(device, inputs)
            table.add(rows_of(case, measure(device, inputs, contenders(inputs), seconds)))
        except Exception as error:  # the inputs do not fit, say; other cases may
            note = f"{type(error).__name__}: {error}"
            table.add([about(case) | {"peer": "cupynorm", "status": "error", "note": note}])
            device.recover()
        done += 1
    left = len(cases) - done
    return f"{done} cases" + (f"; {left} left out at the deadline" if left else "")


def _warm(device: Any, inputs: Any) -> None:
    if device.simulated or device.kind == "cpu":
        return
    contender, end = copies(inputs)[0][1](), time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        for i in range(len(inputs)):
            contender.call(i)
        device.synchronize()


def _fixed_cost(device: Any, table: Table) -> None:
    """t0: what a kernel without work takes of a batch; reported apart, never subtracted."""
    call, count = empty_kernel(device), 2 if device.simulated else EMPTY_LAUNCHES
    call(0)
    device.synchronize()
    batch = captured(device, lambda: [call(i) for i in range(count)] and None, count)
    t = interleave({"empty": batch}, device.turn, device.rounds, SECONDS)["empty"]
    row = {"op": "empty_kernel", "peer": "empty", "kernel": "empty_kernel", "method": batch.method}
    table.add([row | timing(t) | {"status": "ok", "bytes": 0}])


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield items, and say now and then which one is at work."""
    said = -EVERY
    for number, item in enumerate(items, 1):
        if time.monotonic() - said >= EVERY or number == len(items):
            print(f"{label} {number}/{len(items)}: {item}", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield item
