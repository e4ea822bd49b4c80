"""The CSV: its columns, what they mean, and how a result becomes a row."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu_contender import Result
from bench.gpu_grid import Case

__all__ = ["COLUMNS", "TIMED", "Table", "rows_of"]

# Column, then its meaning; bench/README.md prints the same list, and a test compares the two.
COLUMNS = {
    "op": "layer_norm_fwd, _bwd or _fwd_bwd, empty_kernel, python_call or first_call",
    "group": "1GB, 33MB, few rows, layout, layouts: which sweep the case belongs to",
    "dtype": "of x, y, dy and dx",
    "weight_dtype": "of weight, bias and their gradients; empty: none",
    "rows": "M",
    "N": "columns, the normalized axis",
    "layout": "C; offset: base one element off; pitch: rows 16 bytes apart; F-C, F-F, C-F: x and y "
    "by column (F) or by row; NCHW: N is C; columns: each an array of its own, y by row",
    "peer": "cupynorm, a copy, or another library",
    "kernel": "name of the specialization that ran",
    "method": "graph (CUDA graph of many calls), launches, or blocking (the host waits at the end "
    "of a batch); host for Python time",
    "status": "ok, wrong (no number), error, skipped, simulated (no number)",
    "error": "max of abs(y - float64) / (epsilon(dtype) * max(1, size of the terms and of y)); "
    "backward: of the gradient that comes nearest to its limit",
    "median_us": "microseconds per call, median over rounds",
    "p10_us": "10th percentile over rounds",
    "p90_us": "90th percentile over rounds",
    "rounds": "how many samples",
    "bytes": "the floor of the op: see 6 above",
    "gb_per_s": "bytes / median_us, 1 GB = 1e9 bytes; a copy is charged its own bytes",
    "fraction_of_copy": "gb_per_s over that of the fastest copy of the same case",
    "ratio_to_peer": "cupynorm's median_us over this row's; below 1, cupynorm is faster",
    "gpu": "name",
    "driver": "version",
    "cuda": "runtime version",
    "nvrtc": "version",
    "cupy": "version",
    "numpy": "version",
    "torch": "version",
    "triton": "version",
    "commit": "of the measured tree",
    "tree": "hash of the package's text, for trees without git",
    "date": "UTC, of the run",
    "note": "why skipped, wrong or in error",
}
TIMED = ("median_us", "p10_us", "p90_us", "rounds", "gb_per_s", "fraction_of_copy", "ratio_to_peer")
_MACHINE = (
    "gpu",
    "driver",
    "cuda",
    "nvrtc",
    "cupy",
    "numpy",
    "torch",
    "triton",
    "commit",
    "tree",
    "date",
)


class Table:
    """Rows that reach the disk as they come, so that a run that is cut short leaves what it has."""

    def __init__(self, path: Path, machine: dict[str, str], simulated: bool) -> None:
        self.path, self.simulated = path, simulated
        self.machine = {name: machine.get(name, "") for name in _MACHINE}
        self.rows: list[dict[str, Any]] = []
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writeheader()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; a simulated run says nothing about time and leaves those cells empty."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            for row in rows:
                row = {**row, **self.machine}
                if self.simulated:
                    row.update(dict.fromkeys(TIMED, ""))
                    if row["status"] == "ok":
                        row["status"] = "simulated"
                writer.writerow({k: _cell(v) for k, v in row.items()})
                self.rows.append(row)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(value.split())[:300] if isinstance(value, str) else value


def rows_of(case: Case, results: list[Result]) -> list[dict[str, Any]]:
    """Rows of one case: bandwidths, and the two ratios within the same run."""
    rate = {}
    for r in results:
        if r.times:
            nbytes = case.copy_bytes // 32 * 32 if r.name.startswith("copy") else case.moved_bytes
            rate[r.name] = (nbytes, nbytes / r.times.median / 1e3)
    roof = max((gb for name, (_, gb) in rate.items() if name.startswith("copy")), default=None)
    ours = next((r.times.median for r in results if r.ours and r.times), None)
    return [_row(case, r, *rate.get(r.name, (case.moved_bytes, None)), roof, ours) for r in results]


def _row(
    case: Case, r: Result, nbytes: int, gb: float | None, roof: float | None, ours: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": case.op,
        "group": case.group,
        "dtype": case.dtype,
        "weight_dtype": case.affine_dtype or "",
        "rows": case.rows,
        "N": case.N,
        "layout": case.layout,
        "peer": r.name,
        "kernel": r.kernel,
        "method": r.method,
        "status": r.status,
        "error": "" if r.error is None else r.error,
        "bytes": nbytes,
        "note": r.note,
    }
    if r.times and gb:
        row |= {
            "median_us": r.times.median,
            "p10_us": r.times.p10,
            "p90_us": r.times.p90,
            "rounds": r.times.rounds,
            "gb_per_s": gb,
            "fraction_of_copy": gb / roof if roof else "",
            "ratio_to_peer": ours / r.times.median if ours else "",
        }
    return row
