"""What Dask adds to the same blocks in a plain loop, and what a second core or worker gains.

    python bench/dask_overhead.py [--rounds 9] [--mb 100] [--blocks 4] [--to bench/results]

Cases: blocks of whole rows, one `layer_norm` each; blocks that split the rows, with the same task
functions in the loop; and many blocks of 256 bytes, which show what a task costs. Every task runs
on one thread (CUPYNORM_NUM_THREADS=1) but for "loop, 2 threads". x lies in memory, with a cluster
in its workers' memory; y stays there as blocks. The timed call makes the graph, runs it and waits.

Results are checked against float64 first. Contenders take turns within a round, so that a slow
spell hits all alike; times are medians, and `over loop` is the median of the ratios round by round.
`cpu ms` and `cpu over loop` are the same of the processor time of this process and of the workers:
on a machine that others use too it says more than the clock does, and how loaded it was stands
beside it. Bytes: x read once and y written once (a split x is read twice).
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["CUPYNORM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cpu_machine  # isort: skip

import dask
import dask.array as da
import distributed
import numpy as np
import psutil

import cupynorm as cn
import cupynorm.dask as cd
from bench.progress import progress, say
from cupynorm.dask import _moments as _dask_moments
from tests import oracle

COLS = 1000
EPS = 1e-5
PAUSE, RELEASE = 0.05, 0.5  # seconds; in the latter a cluster's workers free what a turn left
TINY = (1, 64)
Grid = tuple[int, int]
Calls = dict[str, Callable[[], Any]]


def cases(mb: float, blocks: int) -> dict[str, tuple[Grid, Grid]]:  # name: block shape, grid
    block = (round(mb * 1e6 / 4 / COLS), COLS)
    return {
        "whole rows": (block, (blocks, 1)),
        "split rows": (block, (1, blocks)),
        "tiny blocks": (TINY, (1000, 1)),
    }


def source(block: Grid, grid: Grid) -> da.Array:
    """x whose blocks are made where they are wanted."""

    def make(block_info: Any = None) -> np.ndarray:
        seed = block_info[None]["chunk-location"]
        return np.random.default_rng(seed).standard_normal(block, np.float32)

    chunks = tuple((n,) * count for n, count in zip(block, grid, strict=True))
    return da.map_blocks(make, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))


def affine(N: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(N, np.float32) for _ in range(2)]


def loop(blocks: list[np.ndarray], w: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """One after the other, what Dask's tasks do."""
    width = blocks[0].shape[1]
    if w.size == width:
        return [cn.layer_norm(block, width, w, b, EPS) for block in blocks]
    stats = _dask_moments.statistics(
        [_dask_moments.block_moments(block, (1,)) for block in blocks], EPS
    )
    columns = [slice(lo, lo + width) for lo in range(0, w.size, width)]
    return [
        _dask_moments.normalize_block(block, stats, w[part], b[part], (1,), "K")
        for block, part in zip(blocks, columns, strict=True)
    ]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    os.environ["CUPYNORM_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ["CUPYNORM_NUM_THREADS"] = "1"


def contenders(block: Grid, grid: Grid, clusters: dict[str, Any]) -> Calls:
    w, b = affine(block[1] * grid[1])
    x = source(block, grid)
    (local,) = dask.persist(x, scheduler="sync")
    keys = dask.core.flatten(local.__dask_keys__())
    graph = dict(local.__dask_graph__())
    blocks = [getattr(graph[key], "value", graph[key]) for key in keys]
    check(local, blocks, w, b)

    def two() -> Any:
        with threads(2):
            return loop(blocks, w, b)

    def here(**scheduler: Any) -> Callable[[], Any]:
        return lambda: dask.persist(cd.layer_norm(local, None, w, b, EPS), **scheduler)

    calls: Calls = {"loop": lambda: loop(blocks, w, b)}
    if grid[1] == 1:
        calls["loop, 2 threads"] = two
    calls["dask sync"] = here(scheduler="sync")
    calls["dask threads, 1 worker"] = here(scheduler="threads", num_workers=1)
    calls["dask threads, 2 workers"] = here(scheduler="threads", num_workers=2)
    for name, client in clusters.items():
        there = computed(client, x)

        def run(client: Any = client, there: Any = there) -> Any:
            return computed(client, cd.layer_norm(there, None, w, b, EPS))

        calls[name] = run
    return calls


def computed(client: Any, x: da.Array) -> da.Array:
    """x in the memory of the client's workers, when it is there."""
    with client.as_current():
        there = client.persist(x)
        distributed.wait(there)
        return there


def check(x: da.Array, blocks: list[np.ndarray], w: np.ndarray, b: np.ndarray) -> None:
    """Refuse to time what is wrong: the first rows against float64."""
    whole = blocks[:1] if blocks[0].shape[1] == w.size else blocks
    rows = np.concatenate([block[:16] for block in whole], axis=1)
    exact = oracle.layer_norm(rows, (1,), w, b, EPS)[0]
    lazily = cd.layer_norm(x, None, w, b, EPS)[: rows.shape[0]].compute(scheduler="sync")
    looped = np.concatenate([y[:16] for y in loop(blocks, w, b)[: len(whole)]], axis=1)
    bound = 2 * oracle.tolerance("float32", w.size)
    for name, y in (("Dask", lazily), ("the loop", looped)):
        error = (np.abs(y - exact) / (1 + np.abs(exact))).max()
        if not error < bound:
            sys.exit(f"{name} is wrong: {error:.3g} > {bound:.3g}")


def processor_time(with_workers: bool) -> float:
    """Seconds of all threads of this process and, if asked, of the processes it started."""
    spent = time.process_time()
    for child in psutil.Process().children(recursive=True) if with_workers else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system
    return spent


def measure(calls: Calls, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor, by rounds; the first round is not kept."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        order.append(order.pop(0))  # nobody always follows the same one
        for name in order:
            gone = name.startswith("cluster")
            start = time.perf_counter(), processor_time(gone)
            result = calls[name]()
            spent = time.perf_counter() - start[0], processor_time(gone) - start[1]
            del result
            time.sleep(RELEASE if gone else PAUSE)
            if turn:
                times[name].append(spent)
    return times


def rows_of(
    case: str,
    block: Grid,
    grid: Grid,
    times: dict[str, list[tuple[float, float]]],
    host: dict[str, str],
) -> Iterator[dict[str, Any]]:
    count = math.prod(grid)
    moved = math.prod(block) * 4 * count * 2
    loop_clock, loop_cpu = zip(*times["loop"], strict=True)
    for name, spent in times.items():
        clock, cpu_time = zip(*spent, strict=True)
        low, middle, high = statistics.quantiles(clock, n=4)
        ratio = statistics.median(a / b for a, b in zip(clock, loop_clock, strict=True))
        cpu_ratio = statistics.median(a / b for a, b in zip(cpu_time, loop_cpu, strict=True))
        added = statistics.median(a - b for a, b in zip(cpu_time, loop_cpu, strict=True)) / count
        yield {
            "case": case,
            "contender": name,
            "block rows": block[0],
            "block cols": block[1],
            "blocks": count,
            "bytes": moved,
            "ms": round(middle * 1e3, 3),
            "ms q1": round(low * 1e3, 3),
            "ms q3": round(high * 1e3, 3),
            "ms least": round(min(clock) * 1e3, 3),
            "over loop": round(ratio, 4),
            "cpu ms": round(statistics.median(cpu_time) * 1e3, 3),
            "cpu over loop": round(cpu_ratio, 4),
            "cpu us per block over loop": round(added * 1e6, 1),
            "GB/s": round(moved / middle / 1e9, 3),
            "rounds": len(spent),
            "load": round(os.getloadavg()[0], 2),
        } | host


@contextlib.contextmanager
def workers(count: int) -> Iterator[Any]:
    """Worker processes of one thread each."""
    with (
        distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mb", type=float, default=100, help="of a block, 10^6 bytes")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    args = parser.parse_args()
    host = cpu_machine.machine() | {
        "dask": dask.__version__,
        "distributed": distributed.__version__,
    }
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    found: list[dict[str, Any]] = []
    with workers(1) as one, workers(2) as two:
        clusters = {"cluster, 1 worker": one, "cluster, 2 workers": two}
        every = list(cases(args.mb, args.blocks).items())
        for case, (block, grid) in progress(every, "bench.dask_overhead"):
            times = measure(contenders(block, grid, clusters), args.rounds)
            for row in rows_of(case, block, grid, times, host):
                found.append(row)
                say(
                    f"{case:12}{row['contender']:24}{row['ms']:9.2f} ms"
                    f" ({row['ms q1']:.2f} to {row['ms q3']:.2f}, least {row['ms least']:.2f}),"
                    f" {row['over loop']:.3f} loops; processor {row['cpu ms']:.2f} ms,"
                    f" {row['cpu over loop']:.3f} loops"
                )
    if args.to:
        print(cpu_machine.write(found, args.to, "dask-overhead"))


if __name__ == "__main__":
    main()
