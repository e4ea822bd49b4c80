"""What Dask adds to the same blocks in a plain loop, and what a second core or worker gains.

Blocks of whole rows, one `layer_norm` each; blocks that split the rows, with the same functions of
moments in the loop; and many blocks of 256 bytes, which show what a task costs. Every task runs on
one thread but for "loop, 2 threads". x lies in memory, with a cluster in its workers'; y stays
there. The timed call makes the graph, runs it and waits. Checked against float64, then timed in
turns: medians; `cpu` is the processor time of this process and the workers.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array as da
import distributed
import numpy as np
import psutil

import cupynorm as cn
import cupynorm.dask as cd
from bench import command_line, saved
from bench.cases import EPS
from bench.check import Given, demand
from bench.machine import THREADS, describe
from bench.table import dated, progress
from cupynorm._ops import LAYER_NORM

COLS = 1000
PAUSE, RELEASE = 0.05, 0.5  # seconds; in the latter a cluster's workers free what a turn left
Grid = tuple[int, int]
Calls = dict[str, Callable[[], Any]]


def loop(blocks: list[np.ndarray], w: np.ndarray, b: np.ndarray, threads: int = 1) -> Any:
    """One after the other, what Dask's tasks do."""
    os.environ[THREADS], width = str(threads), blocks[0].shape[1]
    try:
        if w.size == width:
            return [cn.layer_norm(block, width, w, b, EPS) for block in blocks]
        from cupynorm.dask import _blocks

        moments = [_blocks.block_moments(a, (1,), LAYER_NORM) for a in blocks]
        stats = _blocks.statistics(moments, EPS)
        parts = [slice(lo, lo + width) for lo in range(0, w.size, width)]
        given = zip(blocks, parts, strict=True)
        how = {"axes": (1,), "op": LAYER_NORM, "order": "K"}
        return [_blocks.normalize_block(a, stats, w[p], b[p], **how) for a, p in given]
    finally:
        os.environ[THREADS] = "1"


def contenders(block: Grid, grid: Grid, clusters: dict[str, Any]) -> Calls:

    def make(block_info: Any = None) -> np.ndarray:
        seed = block_info[None]["chunk-location"]
        return np.random.default_rng(seed).standard_normal(block, np.float32)

    chunks = tuple((n,) * count for n, count in zip(block, grid, strict=True))
    x = da.map_blocks(make, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    (local,) = dask.persist(x, scheduler="sync")
    keys, graph = dask.core.flatten(local.__dask_keys__()), dict(local.__dask_graph__())
    blocks = [getattr(graph[key], "value", graph[key]) for key in keys]
    rng = np.random.default_rng(1)
    w, b = (rng.standard_normal(block[1] * grid[1], np.float32) for _ in "wb")
    whole = blocks if grid[1] > 1 else blocks[:1]
    rows, looped = (np.concatenate([a[:16] for a in y], axis=1) for y in (whole, loop(whole, w, b)))
    lazily = cd.layer_norm(local, None, w, b, EPS)[: len(rows)].compute(scheduler="sync")
    for name, y in (("Dask", lazily), ("the loop", looped)):
        demand(name, Given(np, rows, None, w, b).error_of_y(y), "float32", w.size)

    def here(**scheduler: Any) -> Callable[[], Any]:
        return lambda: dask.persist(cd.layer_norm(local, None, w, b, EPS), **scheduler)

    def there(client: Any, a: da.Array) -> da.Array:  # in the workers' memory, when it is there
        with client.as_current():
            distributed.wait(made := client.persist(a))
            return made

    calls: Calls = {"loop": lambda: loop(blocks, w, b), "dask sync": here(scheduler="sync")}
    calls |= {"loop, 2 threads": lambda: loop(blocks, w, b, 2)} if grid[1] == 1 else {}
    for n in (1, 2):
        calls[f"dask threads, {n} workers"] = here(scheduler="threads", num_workers=n)
    for name, client in clusters.items():
        placed = there(client, x)
        calls[name] = lambda c=client, a=placed: there(c, cd.layer_norm(a, None, w, b, EPS))
    return calls


def spent(with_workers: bool) -> np.ndarray:
    """Clock and processor time of this process and, if asked, of the processes it started."""
    used = time.process_time()
    for child in psutil.Process().children(recursive=True) if with_workers else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(child.cpu_times()[:2])
    return np.array([time.perf_counter(), used])


def measure(calls: Calls, rounds: int) -> dict[str, Any]:
    """Seconds by the clock and of the processor, by rounds; the first round is not kept."""
    times: dict[str, list[Any]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        order.append(order.pop(0))  # nobody always follows the same one
        for name in order:
            gone = name.startswith("cluster")
            start = spent(gone)
            result = calls[name]()
            times[name] += [spent(gone) - start] if turn else []
            del result
            time.sleep(RELEASE if gone else PAUSE)
    return {name: np.array(values) for name, values in times.items()}


def rows_of(case: str, block: Grid, grid: Grid, times: dict[str, Any]) -> Iterator[dict[str, Any]]:
    count, loops = math.prod(grid), times["loop"]
    moved = math.prod(block) * 4 * count * 2  # x read once and y written once
    for name, mine in times.items():
        (low, middle, high), cpu = np.quantile(mine[:, 0], (0.25, 0.5, 0.75)), np.median(mine[:, 1])
        over, cpu_over = np.median(mine / loops, axis=0)
        row = {"case": case, "contender": name, "block rows": block[0], "block cols": block[1]}
        row |= {"blocks": count, "bytes": moved, "ms": middle * 1e3, "ms q1": low * 1e3}
        row |= {"ms q3": high * 1e3, "ms least": mine[:, 0].min() * 1e3, "over loop": over}
        row |= {"cpu ms": cpu * 1e3, "cpu over loop": cpu_over, "GB/s": moved / middle / 1e9}
        row["cpu us per block over loop"] = np.median(mine - loops, axis=0)[1] / count * 1e6
        row |= {"rounds": len(mine), "load": os.getloadavg()[0]}
        yield {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}


def main(argv: list[str] | None = None) -> int:
    parser = command_line("dask", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mb", type=float, default=100, help="of a block, 10^6 bytes")
    parser.add_argument("--blocks", type=int, default=4)
    saved(parser)
    given = parser.parse_args(argv)
    os.environ[THREADS] = "1"
    host = describe() | {"dask": dask.__version__, "distributed": distributed.__version__}
    found, clusters = [], {}
    with contextlib.ExitStack() as stack:
        for n in (1, 2):  # worker processes of one thread each
            about = {"n_workers": n, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
            cluster = stack.enter_context(distributed.LocalCluster(**about, memory_limit=0))
            client = distributed.Client(cluster, set_as_default=False)
            clusters[f"cluster, {n} workers"] = stack.enter_context(client)
        block, count = (round(given.mb * 1e6 / 4 / COLS), COLS), given.blocks
        every = [("whole rows", block, (count, 1)), ("split rows", block, (1, count)),
                 ("tiny blocks", (1, 64), (1000, 1))]  # fmt: skip
        for case, block, grid in progress(every, "bench.dask"):
            times = measure(contenders(block, grid, clusters), given.rounds)
            found += [row | host for row in rows_of(case, block, grid, times)]
            for row in found[-len(times) :]:
                said = f"{case}, {row['contender']}: {row['ms']} ms, {row['over loop']} loops"
                print(said, flush=True)
    if given.to:
        print(dated(found, given.to, "dask-overhead"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
