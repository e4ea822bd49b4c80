"""`python -m tests.nvrtc --all --write`: compile the exhaustive grid and keep its table."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

from cupynorm._cuda.plan import Stage
from cupynorm._cuda.source import source_of
from tests.nvrtc import grid, report
from tests.nvrtc.build import build
from tests.nvrtc.check import faults


def _compile(job: tuple[str, Stage]) -> tuple[report.Record, list[str]]:
    arch, stage = job
    facts = build(source_of(stage), stage.name, arch)
    return report.record_of(arch, stage, facts), faults(stage, facts, arch)


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    compiled = ("kernels", "cupynorm/_cuda")
    changed = git("status", "--porcelain", "--", *compiled)
    return git("rev-parse", "--short", "HEAD") + (" with changes on top" if changed else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nvrtc", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every entry on every architecture")
    parser.add_argument("--arch", nargs="*", default=grid.ARCHS, choices=grid.ARCHS)
    parser.add_argument("--write", action="store_true", help="keep the table in bench/results/")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    if chosen.write and not (chosen.all and set(chosen.arch) == set(grid.ARCHS)):
        parser.error("--write keeps the table of everything: it needs --all and no --arch")
    state = grid.state_of_the_text()
    jobs = [
        (arch, stage)
        for arch in chosen.arch
        for x_dtype in grid.DTYPES
        for family in grid.FAMILIES
        for stage in grid.entries(arch, x_dtype, family, everything=chosen.all)
    ]
    records, bad = [], 0
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for record, found in pool.map(_compile, jobs, chunksize=4):
            records.append(record)
            bad += bool(found)
            for fault in found:
                print(f"sm_{record['arch']} {record['name']}: {fault}", flush=True)
    for row in report.summary(records):
        print("  ".join(cell.ljust(22) for cell in row).rstrip())
    print(f"{len(records)} entries, {bad} with faults. Cells: {report.LEGEND}")
    if bad:
        return 1
    if chosen.write:
        report.RESULTS.mkdir(parents=True, exist_ok=True)
        report.TABLE_PAGE.write_text(report.kept_page(state, _commit(), records), encoding="utf-8")
        report.TABLE_ROWS.write_text(report.kept_rows(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
