"""`python -m tests.nvrtc --all --write`: compile the exhaustive grid and keep its table."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from cupynorm._cuda.plan import Stage
from cupynorm._cuda.source import source_of
from tests.nvrtc import build, grid, report
from tests.nvrtc.check import faults
from tests.nvrtc.facts import Facts


def _chosen(archs: list[str], everything: bool) -> Iterator[tuple[str, Stage]]:
    for arch, x_dtype, family, op in itertools.product(archs, grid.DTYPES, grid.FAMILIES, grid.OPS):
        every = everything and grid.whole(arch, op)
        for stage in grid.entries(arch, x_dtype, family, op, everything=every):
            yield arch, stage


def _batches(stages: dict[tuple[str, str], Stage]) -> list[tuple[build.Entry, ...]]:
    return build.batches((arch, name, source_of(s)) for (arch, name), s in stages.items())


def _machine_code(stage: Stage) -> tuple[float, int]:
    return build.machine_code(source_of(stage), stage.name, build.READ)


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
    stages = {(arch, stage.name): stage for arch, stage in _chosen(chosen.arch, chosen.all)}
    longest = {(arch, stage.name): stage for arch, stage in _chosen(chosen.arch, False)}
    samples = [entry for batch in _batches(longest) for entry in batch][::8]
    read = [key for key in longest if key[0] == build.READ and chosen.write]
    facts: dict[tuple[str, str], Facts] = {}
    bad = []
    with ProcessPoolExecutor(chosen.jobs) as pool:
        batches = _batches(stages)
        for done, found in enumerate(pool.map(build.build_batch, batches), 1):
            facts |= found
            print(f"{done} of {len(batches)} batches", end="\r", file=sys.stderr, flush=True)
        for entry, wrong in zip(samples, pool.map(build.taken_for_another, samples), strict=True):
            bad += [f"{entry.name}: {what} is not what is taken for it" for what in wrong]
        code = dict(zip(read, pool.map(_machine_code, (longest[k] for k in read)), strict=True))
    for (arch, name), stage in stages.items():
        bad += [f"sm_{arch} {name}: {fault}" for fault in faults(stage, facts[arch, name], arch)]
    print(*bad, sep="\n")
    records = [
        report.record_of(arch, stage, facts[arch, name], code.get((arch, name)))
        for (arch, name), stage in stages.items()
    ]
    for row in report.summary(records):
        print("  ".join(cell.ljust(22) for cell in row).rstrip())
    print(f"{len(records)} entries, {len(bad)} faults. Cells: {report.LEGEND}")
    if bad:
        return 1
    if chosen.write:
        report.RESULTS.mkdir(parents=True, exist_ok=True)
        report.TABLE_PAGE.write_text(report.kept_page(state, _commit(), records), encoding="utf-8")
        report.TABLE_ROWS.write_text(report.kept_rows(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
