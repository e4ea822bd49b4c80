"""Rows of the CPU benchmark's CSV: their columns, what they mean, how a result becomes one."""

import os
from typing import Any

from bench.cpu_contender import CpuResult
from bench.cpu_grid import CpuCase

__all__ = ["CPU_COLUMNS", "rows_of"]

# Column, then its meaning; bench/README.md prints the same list, and a test compares the two.
CPU_COLUMNS = {
    "op": "layer_norm_fwd, _bwd or _fwd_bwd",
    "group": "shapes, small, layouts, dtypes, odd, scale, columns, rows: why the case is there",
    "dtype": "of x, y, weight and bias, dy and all gradients",
    "shape": "of x",
    "M": "rows",
    "N": "columns, the normalized axis",
    "axis": "that is normalized",
    "layout": "of x in memory: C or F",
    "affine": "with weight and bias; without, eps is 0 too",
    "peer": "cupynorm, another library, or a copy",
    "status": "ok, wrong (no number), error, skipped",
    "error": "largest distance from float64, in units of the dtype's epsilon and the terms' size",
    "median_us": "microseconds per call, median over turns",
    "p10_us": "10th percentile over turns",
    "p90_us": "90th percentile over turns",
    "best_us": "fastest turn",
    "rounds": "how many turns",
    "bytes": "the least that the op can move: see below",
    "gb_per_s": "bytes / median_us, 1 GB = 1e9 bytes; a copy is charged its own bytes",
    "fraction_of_copy": "gb_per_s over that of numpy.copyto in the same case: into kept memory for "
    "whoever keeps its result, into fresh memory for whoever allocates it",
    "over_torch": "median_us over that of the fastest of torch's own ways in the same case",
    "best_over_torch": "the same of best_us",
    "load": "of the machine over the last minute: beyond `cpus`, others had a share",
    "note": "why skipped, wrong or in error",
}


def rows_of(case: CpuCase, results: list[CpuResult]) -> list[dict[str, Any]]:
    """Rows of one case, with the two ratios within the same run."""
    timed = [r for r in results if r.times and r.best]
    copies = {r.kept: case.copy_bytes / r.times.median for r in timed if _copies(r)}
    torch = [r for r in timed if r.name.startswith("torch")]
    medians = min((r.times.median for r in torch), default=None)
    bests = min((r.best for r in torch), default=None)
    rows = []
    for r in results:
        row = _about(case) | {"peer": r.name, "status": r.status, "error": r.error, "note": r.note}
        if r.times and r.best:
            nbytes = case.copy_bytes if _copies(r) else case.moved_bytes
            speed, roof = nbytes / r.times.median, copies.get(r.kept)
            row |= {"median_us": r.times.median, "p10_us": r.times.p10, "p90_us": r.times.p90}
            row |= {"best_us": r.best, "rounds": r.times.rounds, "bytes": nbytes}
            row |= {"gb_per_s": speed / 1e3, "fraction_of_copy": speed / roof if roof else None}
            row["over_torch"] = r.times.median / medians if medians else None
            row["best_over_torch"] = r.best / bests if bests else None
        rows.append({name: _cell(row.get(name)) for name in CPU_COLUMNS})
    return rows


def _copies(r: CpuResult) -> bool:
    return r.name.startswith("copyto")


def _about(case: CpuCase) -> dict[str, Any]:
    return {
        "op": case.op,
        "group": case.group,
        "dtype": case.dtype,
        "shape": case.label,
        "M": case.M,
        "N": case.N,
        "axis": case.axis,
        "layout": case.order,
        "affine": case.affine,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return " ".join(value.split())[:300] if isinstance(value, str) else value
