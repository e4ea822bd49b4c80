"""Dask arrays on worker processes: one killed, memory spilled, the same bits."""

import importlib
import os
import signal
import time

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

import cupynorm.dask as cd  # noqa: E402

SHAPE = (400, 8000)
CHUNKS = {"whole rows": (25, 8000), "split rows": (100, 2000)}
# A worker spills what is over this part of its memory: 2 MB, below its share of x (6 MB).
SETTINGS = {
    "distributed.worker.memory.target": 0.002,
    "distributed.worker.memory.spill": False,  # by managed memory alone, not by the process's
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.comm.timeouts.connect": "60s",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with dask.config.set(SETTINGS):
        cluster = distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            memory_limit="1GB",
            dashboard_address="127.0.0.1:0",  # None would take port 8787, which may be taken
            local_directory=str(tmp_path_factory.mktemp("spill")),
            env={"CUPYNORM_NUM_THREADS": "1"},
        )
        with cluster, distributed.Client(cluster) as client:
            yield client


def formula(rows, cols):
    """Values that a worker makes where it needs them: no graph carries megabytes."""
    return (np.sin(rows[:, None] * 0.7 + cols**2 * 1e-3) * 3 + 100).astype(np.float32)


@pytest.fixture(scope="module")
def memory():
    return formula(*map(np.arange, SHAPE))


def made_there(chunks, shape=SHAPE, pause=0.0):
    def block(block_info=None):
        time.sleep(pause)
        return formula(*(np.arange(*edges) for edges in block_info[None]["array-location"]))

    chunks = da.core.normalize_chunks(chunks, shape)
    return da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_bits_are_those_of_one_process(client, memory, chunks):
    weight = np.linspace(0.5, 1.5, SHAPE[1])
    result = cd.layer_norm(made_there(chunks), weight=weight, return_stats=True)
    got = dask.compute(*result)
    same(got, dask.compute(*result, scheduler="sync"))
    whole = cn.layer_norm(memory, weight=weight, return_stats=True)
    if chunks[1] == SHAPE[1]:
        same(got, whole)
    bound = 2 * oracle.tolerance("float32", SHAPE[1])
    np.testing.assert_allclose(got[0], whole.y, rtol=bound, atol=4 * bound)


def test_spilling(client):
    spilled = "disk-write"

    def written(dask_worker):
        total = dask_worker.data.cumulative_metrics
        return sum(n for (kind, unit), n in total.items() if kind == spilled and unit == "bytes")

    before = sum(client.run(written).values())
    y = cd.layer_norm(made_there(CHUNKS["split rows"]))
    got = y.compute()
    assert sum(client.run(written).values()) - before > 4e6
    np.testing.assert_array_equal(got, y.compute(scheduler="sync"))


def test_a_worker_is_killed_in_the_middle(client):
    """The last of these tests, as no other then has to wait for a worker in its place."""
    y = cd.layer_norm(made_there(CHUNKS["split rows"], pause=0.2), eps=1e-3)
    # Or a new worker would get no tasks yet.
    client.run(importlib.import_module, "cupynorm.dask._blocks")
    pids = client.run(os.getpid)
    assert len(pids) == 2
    future = client.compute(y)
    held = dict.fromkeys(pids, 0)
    deadline = time.monotonic() + 60
    while min(held.values()) < 1:
        assert time.monotonic() < deadline, f"nothing was computed: {held}"
        time.sleep(0.02)
        held = client.run_on_scheduler(
            lambda dask_scheduler: {
                address: len(worker.has_what) for address, worker in dask_scheduler.workers.items()
            }
        )
    assert sum(held.values()) < y.npartitions
    assert not future.done()
    victim = max(held, key=held.get)
    os.kill(pids[victim], signal.SIGKILL)
    got = future.result(timeout=120)
    np.testing.assert_array_equal(got, y.compute(scheduler="sync"))
