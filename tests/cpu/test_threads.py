"""Threads over one call: they come, are not waited for, and are as many as somebody says."""

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu import threads
from tests import oracle
from tests.cpu import door
from tests.cpu.in_threads import in_threads
from tests.cpu.layouts import same_bits, values
from tests.cpu.programs import run_python


def threads_asked_for(monkeypatch):
    """How many threads each call may have from now on."""
    asked, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *a: (asked.append(a[2]), run(*a)))
    return asked


@pytest.fixture
def pool(monkeypatch):
    """Threads of one test's own."""
    with ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(threads, "_pool", pool)
        yield pool


# --- sharing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_item_is_done_once(count, workers):
    done = []
    threads.run(lambda lo, hi: done.extend(range(lo, hi)), count, workers)
    assert sorted(done) == list(range(count))


def test_helpers_come(pool):
    """Nobody goes on before all are here."""
    gate = threading.Barrier(3)
    threads.run(lambda lo, hi: gate.wait(30) if lo < 3 else None, 12, 3)
    names = {t.name for t in threading.enumerate()}
    assert len([name for name in names if name.startswith("ThreadPoolExecutor")]) >= 2


def test_no_thread_is_waited_for_that_has_not_come(pool):
    """All are busy elsewhere: the caller does everything, and nothing is left of the call."""
    gate = threading.Event()
    busy = [pool.submit(gate.wait, 60) for _ in range(8)]
    done = []
    in_threads(1, lambda _: threads.run(lambda lo, hi: done.append(lo), 8, 4))
    gate.set()
    assert len(done) == 8
    assert all(future.result(60) for future in busy)
    assert len(done) == 8


def test_no_thread_can_start(monkeypatch):
    """At the limit of threads, or when the interpreter ends."""

    class Full(ThreadPoolExecutor):
        def submit(self, *arguments):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", Full(1))
    done = []
    threads.run(lambda lo, hi: done.extend(range(lo, hi)), 20, 4)
    assert done == list(range(20))


def test_a_share_may_call_run_itself():
    """Nested calls on more threads than there are must not wait for each other."""
    counts = []

    def outer(lo, hi):
        for _ in range(lo, hi):
            threads.run(lambda lo, hi: counts.extend(range(lo, hi)), 5, 4)

    in_threads(8, lambda _: threads.run(outer, 20, 4))
    assert len(counts) == 8 * 20 * 5


class Odd(Exception):
    pass


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_exception_in_any_thread_reaches_the_caller(pool, where):
    begun, caller, gate = [], threading.get_ident(), threading.Barrier(2)

    def work(lo, hi):
        begun.append(lo)
        if len(begun) <= 2:
            gate.wait(30)  # one share each
        if (threading.get_ident() == caller) == (where == "caller"):
            raise Odd(lo)
        time.sleep(0.05)

    with pytest.raises(Odd):
        threads.run(work, 100, 2)
    assert len(begun) < 8  # the rest is not begun


def test_an_interrupted_call_leaves_no_helper_at_work(pool):
    """Else it would write to memory that the caller frees as the interrupt goes up."""
    gate, busy, caller = threading.Barrier(2), [], threading.get_ident()

    def work(lo, hi):
        if threading.get_ident() == caller:
            gate.wait(30)
            raise KeyboardInterrupt
        busy.append(lo)
        gate.wait(30)
        time.sleep(0.2)
        busy.pop()

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, 2, 2)
    assert not busy


def test_an_interrupt_while_the_caller_waits(pool):
    caller, gate, done = threading.get_ident(), threading.Barrier(2), []

    def work(lo, hi):
        gate.wait(30)
        if threading.get_ident() == caller:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            time.sleep(0.3)
            done.append(1)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(work, 2, 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert done == [1]


def test_finished_calls_keep_no_array_alive():
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    threads.run(lambda lo, hi, owner=owner: time.sleep(0.001), 8, 3)
    del owner
    for _ in range(100):
        gc.collect()
        if alive() is None:
            return
        time.sleep(0.01)
    pytest.fail("an array is held")


# --- calls --------------------------------------------------------------------------------------

CASES = [((4000, 300), (1,)), ((2, 1100000), (1,)), ((300, 4000), (0,)), ((40, 33000), (1,)),
         ((5000, 120), (0,)), ((70_000, 8), (0,))]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case, monkeypatch):
    (shape, axes), asked = case, threads_asked_for(monkeypatch)
    x, dy = values(shape, "float32", offset=3.0), values(shape, "float32", seed=1)
    weight = values(tuple(shape[a] for a in axes), "float32")
    results = []
    for count in ("1", "2", "5", "5"):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", count)
        asked.clear()
        y, mean, rstd = door.forward(x, axes, weight, weight)
        results.append((y, mean, rstd, *door.backward(dy, x, axes, mean, rstd, weight)))
        most = min(int(count), x.size >> 18)
        assert max(asked) == most
    want = oracle.layer_norm(x, axes, weight, weight, 1e-5)
    np.testing.assert_allclose(results[0][0], want[0], rtol=1e-5, atol=1e-5)
    oracle.assert_gradients(results[0][3:], dy, x, axes, weight)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_small_calls_take_one_thread(monkeypatch):
    asked = threads_asked_for(monkeypatch)
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "nonsense")  # which is not even looked at
    x = np.ones((1 << 9, 1 << 9), np.float32)
    door.forward(x, (1,))
    door.forward(np.asfortranarray(x), (1,))
    assert set(asked) <= {1}
    with pytest.raises(ValueError, match="CUPYNORM_NUM_THREADS"):
        door.forward(np.ones((1 << 9, 1 << 10), np.float32), (1,))


def test_other_threads_run_meanwhile():
    """The interpreter's lock is not held: a thread counts while one call goes on."""
    x, count, done = np.ones((1, 1 << 25), np.float32), 0, threading.Event()
    out = np.empty_like(x)
    cn.layer_norm(x, out=out)
    caller = threading.Thread(target=lambda: (cn.layer_norm(x, out=out), done.set()))
    caller.start()
    while not done.is_set():
        count += 1
        time.sleep(0.001)
    caller.join()
    assert count >= 3


FORK = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads, which is the point
    import numpy as np
    import cupynorm as cn
    def call(shape):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        return cn.layer_norm(x)
    shapes = [(3000, 400), (2, 1100000)]
    want = [call(s) for s in shapes]  # the pool has its threads now
    stop = False
    def busy():
        while not stop:
            call(shapes[0])
    callers = [threading.Thread(target=busy) for _ in range(2)]
    for t in callers: t.start()
    for _ in range(5):
        child = os.fork()
        if child == 0:
            good = all(np.array_equal(call(s), w) for s, w in zip(shapes, want))
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if np.array_equal(call(shapes[1]), want[1]) else 3)
            os._exit(0 if good and os.waitpid(grandchild, 0)[1] == 0 else 3)
        assert os.waitpid(child, 0)[1] == 0
    stop = True
    for t in callers: t.join()
    print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    """Children of a process with busy threads compute the same, and so do theirs."""
    assert run_python(FORK, CUPYNORM_NUM_THREADS="3").strip() == "same"


AT_EXIT = """
    import atexit, numpy as np, cupynorm as cn
    x = np.ones((4000, 400), np.float32)
    cn.layer_norm(x)
    atexit.register(lambda: print(cn.layer_norm(x).sum()))
"""


def test_a_call_when_the_interpreter_ends():
    assert run_python(AT_EXIT, CUPYNORM_NUM_THREADS="3").strip() == "0.0"


# --- how many -----------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """Nothing is said in the environment or by a control group; sixteen CPUs."""
    for name in ("CUPYNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "quota", lambda group: 256)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 16, raising=False)
    return monkeypatch


COUNTS = [(None, None, 16), ("3", None, 3), ("3", "5", 3), (None, "5", 5), (None, " 4,2 ", 4)]
COUNTS += [("", "2", 2), (" ", " ", 16), ("1000000", None, 256)]


@pytest.mark.parametrize(("own", "omp", "count"), COUNTS)
def test_number_of_threads(free, own, omp, count):
    for name, text in (("CUPYNORM_NUM_THREADS", own), ("OMP_NUM_THREADS", omp)):
        if text is not None:
            free.setenv(name, text)
    assert threads.num_threads() == count


@pytest.mark.parametrize("name", ["CUPYNORM_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("text", ["0", "-1", "many", "2.5"])
def test_a_number_that_is_none(free, name, text):
    free.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}='{text}' is not a positive integer; set it"):
        threads.num_threads()


NEW = {None: 256, "max 100000": 256, "200000 100000": 2, "250000 100000": 3, "5000 100000": 1}
NEW |= {"nonsense": 256}
OLD = [("-1", "100000", 256), ("400000\n", "100000\n", 4)]
OLD += [("400000", None, 256), ("400000", "0", 256)]
QUOTAS = [({"cpu.max": text}, count) for text, count in NEW.items()]
QUOTAS += [({"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": period}, count)
           for quota, period, count in OLD]  # fmt: skip


@pytest.mark.parametrize(("files", "count"), QUOTAS)
def test_a_containers_quota(tmp_path, files, count):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == count


def test_the_quota_and_the_affinity_count(free):
    free.setattr(threads, "quota", lambda group: 3)
    assert threads.num_threads() == 3
    free.setattr(os, "process_cpu_count", lambda: 2)
    assert threads.num_threads() == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_one_cpu(monkeypatch):
    monkeypatch.delenv("CUPYNORM_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 60, 4000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_results_own_their_data(rows, order):
    """At every size: they can be resized, and belong to nobody else."""
    x = np.asarray(values((rows, 300), "float32"), order=order)
    y, mean, rstd = cn.layer_norm(x, return_stats=True)
    gradients = cn.layer_norm_backward(x, x, None, mean, rstd, np.ones(300, np.float32))
    for result in (y, mean, rstd, *gradients):
        assert result.flags.owndata and result.flags.writeable and result.base is None
    y.resize(10, refcheck=False)
