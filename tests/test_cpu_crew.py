"""Helpers that sleep in compiled code: every block once, whoever comes, and nothing of it after."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu import crew as _cpu_crew
from cupynorm._cpu import kept as _cpu_kept
from cupynorm._cpu import signals as _cpu_signals
from cupynorm._cpu.crew import COUNTER, THREADS
from cupynorm._cpu.kept import seen
from cupynorm._cpu.loops import take_block
from cupynorm._cpu.pointers import at, claim
from cupynorm._cpu.shared import counters_of
from cupynorm._cpu.signals import add_to, and_with, cpu, invoke, pause, read, swap, system
from tests.in_threads import in_threads

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # after which a call is held to be stuck: far more than any takes on a busy machine
futex = pytest.mark.skipif(not _cpu_signals.FUTEX, reason="no futex on this system")
MOST = 12  # threads, more than a call here has


def _define_count(sources, jit, stored, computed):
    @jit
    def count(job, who):
        """Record: where to count per block, where to note who, where to count per who, blocks."""
        a, counters = at(job, np.int64), counters_of(job)
        cells, names, blocks = a[0], a[1], a[3] * (sources != 0)
        claim(seen(a[2] + 8 * who, 1, np.int64))
        block = take_block(counters, who, blocks)
        while block >= 0:
            claim(seen(cells + 8 * block, 1, np.int64))
            at(names, np.int64)[block] = who
            for _ in range(20):  # so that others come before all is done
                pause()
            block = take_block(counters, who, blocks)

    return count


def _define_meet(sources, jit, stored, computed):
    @jit
    def meet(job, who):
        """Record: where to count who is here, where it is told to go, how many to wait for."""
        a = at(job, np.int64)
        add_to(a[0], 1)
        while read(a[0]) < a[2] * (sources != 0) and read(a[1]) == 0:
            pause()

    return meet


class Count:
    """A job whose blocks leave a trace."""

    def __init__(self, threads, blocks):
        self.threads = threads
        self.cells, self.names = np.zeros(blocks, np.int64), np.full(blocks, -1)
        self.comers = np.zeros(MOST, np.int64)
        traces = (a.ctypes.data for a in (self.cells, self.names, self.comers))
        self.record = _cpu_crew.record(threads, *traces, blocks)

    def run(self):
        _cpu_crew.run(_cpu_kept.shared(_define_count), self.record, self.threads)
        return self

    def check(self, caller=0):
        assert (self.cells == 1).all()
        assert (self.names >= 0).all()
        assert self.comers[caller] == 1
        assert self.comers[self.names].all()
        assert self.comers.sum() <= self.threads  # one that was late for another call comes twice


class Meeting:
    """A job that is over when so many threads are at it, or when it is told to be."""

    def __init__(self, wanted, threads=None):
        self.threads = threads or wanted
        self.here, self.over = np.zeros((2, 16), np.int32)
        addresses = self.here.ctypes.data, self.over.ctypes.data
        self.record = _cpu_crew.record(self.threads, *addresses, wanted)

    def run(self):
        watchdog = threading.Timer(SECONDS, self.end)
        watchdog.daemon = True
        watchdog.start()
        _cpu_crew.run(_cpu_kept.shared(_define_meet), self.record, self.threads)
        watchdog.cancel()
        return int(self.here[0])

    def end(self):
        self.over[0] = 1


def until(true):
    """Wait for what another thread does."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


CREW = _cpu_crew._Crew()


@pytest.fixture(autouse=True)
def crew_of_this_file(monkeypatch):
    """Its helpers are as many as the tests here ask for: how many others would have is unknown."""
    monkeypatch.setattr(_cpu_crew, "_crew", CREW)


@pytest.fixture
def crew(monkeypatch):
    """A crew of one test's own, without helpers so far."""
    own = _cpu_crew._Crew()
    monkeypatch.setattr(_cpu_crew, "_crew", own)
    return own


@pytest.fixture
def in_python(monkeypatch):
    """How often a job was left to Python's threads."""
    calls, run = [], _cpu_crew._in_python
    monkeypatch.setattr(_cpu_crew, "_in_python", lambda *a: (calls.append(a[2]), run(*a)))
    return calls


def values(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Calls:
    """Public calls that several threads share, and what they give on one."""

    def __init__(self, monkeypatch, threads):
        self.cases = []
        for shape, dtype in (((3000, 256), "float32"), ((900, 700), ml_dtypes.bfloat16)):
            x, dy = (values(shape, dtype, seed) for seed in (1, 2))
            weight = values(shape[1:], np.float32, 3)
            for layout in (np.ascontiguousarray, np.asfortranarray):
                self.cases.append((layout(x), layout(dy), weight))
        x = values((3, 200_000), "float32", 4)
        self.cases.append((x, -x, x[0]))
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
        self.want = [self.call(i) for i in range(len(self.cases))]
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", str(threads))

    def call(self, i):
        x, dy, weight = self.cases[i]
        y, mean, rstd = cn.layer_norm(x, x.shape[1], weight, return_stats=True)
        alone = cn.layer_norm(x, x.shape[1], weight)
        return y, alone, *cn.layer_norm_backward(dy, x, x.shape[1], mean, rstd, weight)

    def check(self, number=None):
        """One of them, or all."""
        for i in range(len(self.cases)) if number is None else [number % len(self.cases)]:
            for got, want in zip(self.call(i), self.want[i], strict=True):
                assert got.dtype == want.dtype
                assert got.tobytes() == want.tobytes(), i


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch, 3)


# --- blocks ---------------------------------------------------------------------------------------

COUNTS = [1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100, 255, 300]


@pytest.mark.parametrize("parts", range(1, 13))
def test_each_block_is_handed_out_once(parts):
    """In whatever order threads ask, of which there may be more than parts, or than blocks."""
    rng = np.random.default_rng(parts)
    for count in range(41):
        counters = np.zeros(8 * parts, np.int64)
        asking = rng.integers(0, 2 * parts, 4 * count + 60)
        blocks = [take_block(counters, who, count) for who in asking]
        assert sorted(b for b in blocks if b >= 0) == list(range(count))
        last = max((i for i, b in enumerate(blocks) if b >= 0), default=-1)
        assert all(take_block(counters, who, count) == -1 for who in range(2 * parts))
        assert last < len(blocks) - 1
        assert not counters.reshape(parts, 8)[:, 1:].any()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_each_thread_begins_with_a_part_of_its_own(parts):
    """Whose rows its caches may hold from the last call; then it helps the one after it."""
    for count in (parts, 17, 40):
        for who in range(parts):
            counters = np.zeros(8 * parts, np.int64)
            blocks = [take_block(counters, who, count) for _ in range(count)]
            first = count * who // parts
            assert blocks == [*range(first, count), *range(first)]


def test_a_single_counter_is_one_part():
    counters = np.zeros(1, np.int64)
    assert [take_block(counters, who, 3) for who in (0, 5, 1, 0)] == [0, 1, 2, -1]


def test_no_block_is_left_of_a_job_that_is_gone():
    for parts in (1, 3, 256):
        counters = np.full(8 * parts, _cpu_crew._GONE)
        for count in (1, 300, 1 << 31):
            assert {take_block(counters, who, count) for who in range(parts)} == {-1}


@pytest.mark.parametrize("threads", range(1, 9))
def test_every_block_is_done_once(threads):
    for count in COUNTS:
        for _ in range(3):
            Count(threads, count).run().check()


@futex
@pytest.mark.parametrize("threads", range(1, 9))
def test_every_block_is_done_once_by_a_crew_that_is_new(threads, crew, in_python):
    """Helpers have the numbers from 1 on, and are as many as the call wanted at most."""
    jobs = [Count(threads, count).run() for count in COUNTS * 3]
    for job in jobs:
        job.check()
        assert job.names.max() < threads
    assert crew._helpers == threads - 1
    assert not in_python


@pytest.mark.parametrize("threads", range(2, 9))
def test_every_block_is_done_once_by_pythons_threads(threads):
    for count in COUNTS:
        job = Count(threads, count)
        _cpu_crew._in_python(_cpu_kept.shared(_define_count).ctypes, job.record, threads)
        job.check()


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7, 256])
def test_a_record_holds_every_number_as_it_is(threads):
    floats = [1e-5, 0.1, -0.0, 5e-324, 1.7e308, float("inf"), np.float64(1 / 3), np.float64(-7)]
    integers = [0, 1, -1, 2**63 - 1, -(2**63), np.int64(2**62 + 1), np.intp(5), True]
    numbers = [n for pair in zip(floats, integers, strict=True) for n in pair]
    words = _cpu_crew.record(threads, *numbers)
    assert words.dtype == np.int64
    assert words.size == COUNTER + 8 * threads
    assert words[THREADS] == threads
    assert not words[COUNTER:].any()
    assert words[1 : len(numbers) : 2].tolist() == [int(n) for n in integers]
    assert words.view(np.float64)[: len(numbers) : 2].tobytes() == np.array(floats).tobytes()
    assert not words[len(numbers) : THREADS].any()


def test_a_nan_is_a_number_too():
    assert np.isnan(_cpu_crew.record(1, 3, float("nan")).view(np.float64)[1])


# --- signals --------------------------------------------------------------------------------------


@numba.njit(nogil=True)
def _signals(word):
    start = read(word)
    added, after = add_to(word, -5), read(word)
    masked, rest = and_with(word, 0x7F), read(word)
    kept, wrong = read(word), swap(word, rest + 1, 9)
    unchanged, right = read(word) == kept, swap(word, rest, 1 << 30)
    return start, added, after, masked, rest, wrong, unchanged, right, read(word)


def test_words_of_memory():
    """What each gives is what was there; none reaches beyond its four bytes."""
    words = np.array([11, 3, 22], np.int32)
    got = _signals(words.ctypes.data + 4)
    assert got == (3, 3, -2, -2, 126, False, True, True, 1 << 30)
    assert words.tolist() == [11, 1 << 30, 22]


@numba.njit(nogil=True)
def _add_many(word, times):
    for _ in range(times):
        add_to(word, 1)
        old = read(word)
        while not swap(word, old, old + 1):
            old = read(word)


def test_no_change_of_a_word_is_lost():
    words = np.zeros(16, np.int32)
    _add_many(words.ctypes.data, 1)
    in_threads(4, lambda _: _add_many(words.ctypes.data, 200_000))
    assert words[0] == 2 * (1 + 4 * 200_000)


@numba.njit(nogil=True)
def _here(number):
    return cpu(), system(number, 0, 0, 0)


@futex
def test_what_the_system_says():
    allowed = os.sched_getaffinity(0)
    where, process = _here(_cpu_signals.PROCESS)
    assert where in allowed
    assert process == os.getpid()


@numba.njit(nogil=True)
def _invoke(function, record, who):
    invoke(function, record, who)


def test_a_function_is_called_by_its_address():
    job = Count(1, 4)
    _invoke(_cpu_kept.shared(_define_count).address, job.record.ctypes.data, 3)
    assert (job.cells == 1).all()
    assert set(job.names) == {3}


# --- helpers come, or not -------------------------------------------------------------------------


@futex
@pytest.mark.parametrize("threads", range(2, 9))
def test_all_helpers_come_if_they_are_free(threads, crew, in_python):
    """Each wakes others; nobody goes before all are here."""
    for _ in range(3):
        assert Meeting(threads).run() == threads
    assert crew._helpers == threads - 1
    assert not in_python
    Count(threads, 100).run().check()


@futex
def test_no_more_helpers_come_than_are_wanted(crew):
    assert Meeting(7).run() == 7
    for _ in range(200):
        job = Count(3, 60).run()
        job.check()
        assert (job.comers > 0).sum() <= 3


@futex
def test_helpers_that_sleep_are_woken(crew, in_python):
    """A call after a pause finds none of them awake."""
    assert Meeting(5).run() == 5
    for _ in range(4):
        until(lambda: crew._words[_cpu_crew._SLEEPERS] == 4)
        time.sleep(0.05)
        assert Meeting(5).run() == 5
        Count(5, 64).run().check()
    assert not in_python


@futex
def test_a_crew_that_grows(crew):
    for threads in (2, 5, 3, 8):
        assert Meeting(threads).run() == threads
        Count(threads, 50).run().check()
    assert crew._helpers == 7
    assert crew._words[_cpu_crew._HELPERS] == 7


@futex
def test_no_helper_can_start(crew, in_python, calls, monkeypatch):
    """At the limit of threads, or when the interpreter ends: the caller does all."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    def alone(_):
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", refuse)
            for count in COUNTS:
                job = Count(4, count).run()
                job.check()
                assert set(job.names) == {0}
            calls.check()

    in_threads(1, alone)
    assert crew._helpers == 0
    assert not in_python
    assert Meeting(4).run() == 4  # once they can, they do


@futex
def test_some_helpers_can_start(crew, monkeypatch):
    start, left = threading.Thread.start, [2]

    def start_some(self):
        if not self.name.startswith("cupynorm-compiled"):
            return start(self)
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        return start(self)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    assert Meeting(3, threads=8).run() == 3
    for count in COUNTS:
        Count(8, count).run().check()
    assert crew._helpers == 2


@futex
def test_a_second_caller_does_not_wait_for_the_first(crew, in_python, calls):
    """The crew is held until this test lets go of it."""
    first = Meeting(99, threads=3)
    holder = threading.Thread(target=first.run, daemon=True)
    holder.start()
    until(lambda: first.here[0] == 3)

    def second(number):
        for count in COUNTS:
            Count(3, count).run().check()
        calls.check(number)

    try:
        in_threads(5, second)
        assert len(in_python) >= 5 * len(COUNTS)
        assert set(in_python) <= {2, 3}
        assert first.here[0] == 3
    finally:
        first.end()
    holder.join(SECONDS)
    assert not holder.is_alive()
    in_python.clear()
    assert Meeting(3).run() == 3
    calls.check()
    assert not in_python


@futex
def test_a_caller_sleeps_until_its_helpers_are_through(crew):
    """It has done its part long before: the last helper wakes it."""
    job = Meeting(99, threads=4)
    returned = []
    names = {t.ident for t in threading.enumerate()}

    def call():
        job.run()
        returned.append(int(job.here[0]))

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    until(lambda: job.here[0] == 4)
    assert len({t.ident for t in threading.enumerate()} - names) >= 4
    time.sleep(0.05)
    assert not returned
    job.end()
    caller.join(SECONDS)
    assert returned == [4]


def _define_late(sources, jit, stored, computed):
    @jit
    def late(job, who):
        """Record: where to count who is here, and who is through, and where they are told to go."""
        a = at(job, np.int64)
        add_to(a[0], 1)
        while (who if sources else 0) and read(a[2]) == 0:
            pause()
        while who == 0 and read(a[0]) < 3 and read(a[2]) == 0:
            pause()
        add_to(a[1], 1)

    return late


@futex
def test_a_caller_that_is_through_first_waits_for_the_others(crew):
    words = np.zeros((3, 16), np.int32)
    here, through, over = words
    job = _cpu_crew.record(3, *(a.ctypes.data for a in words))
    work = _cpu_kept.shared(_define_late)
    caller = threading.Thread(target=_cpu_crew.run, args=(work, job, 3), daemon=True)
    caller.start()
    until(lambda: here[0] == 3 and through[0] == 1)
    until(lambda: crew._words[_cpu_crew._STATE] & _cpu_crew._ASLEEP)
    assert caller.is_alive()
    assert crew._words[_cpu_crew._HELD] == 1
    over[0] = 1
    caller.join(SECONDS)
    assert not caller.is_alive()
    assert through[0] == 3
    assert not crew._words[[_cpu_crew._HELD, _cpu_crew._STATE]].any()


def test_many_callers_at_once(calls):
    """Sixteen of them, one has the crew at a time: all get the bits of one thread."""
    start = threading.Barrier(16)

    def call(number):
        start.wait(SECONDS)
        for repeat in range(3):
            calls.check(number + repeat)
            Count(4, 64).run().check()

    in_threads(16, call)


def test_nothing_of_a_job_is_touched_after_it():
    """Its memory is the caller's again: a helper that came late would leave a trace here."""
    trap = np.zeros(64, np.int64)
    work = _cpu_kept.shared(_define_count)
    jobs = []
    for i in range(6000):
        job = Count(3, i % 5 + 1)
        _cpu_crew.run(work, job.record, 3)
        job.check()
        job.record[:3] = trap.ctypes.data
        job.record[COUNTER:] = 0  # there is a block to claim again
        job.poison = job.record.copy()
        jobs.append(job)
        if len(jobs) > 100:
            old = jobs.pop(0)
            assert np.array_equal(old.record, old.poison)
    time.sleep(0.05)
    assert not trap.any()
    for job in jobs:
        assert np.array_equal(job.record, job.poison)
        job.check()


# --- without a futex ------------------------------------------------------------------------------


def test_without_a_futex_pythons_threads_help(crew, in_python, calls, monkeypatch):
    monkeypatch.setattr(_cpu_crew, "FUTEX", 0)
    assert _cpu_crew.control(3) == 0
    for count in COUNTS:
        Count(3, count).run().check()
    assert in_python == [3] * len(COUNTS)
    calls.check()
    assert crew._helpers == 0


def run_python(code, **env):
    """Standard output of a fresh interpreter, which says nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


OTHER_MACHINE = """
    import platform
    platform.machine = lambda: "another"
    import re
    import numpy as np
    from cupynorm._cpu import crew as _cpu_crew
    from cupynorm._cpu import kept as _cpu_kept
    assert not _cpu_crew.FUTEX and not _cpu_crew.control(3)
    for define, letters in (_cpu_crew._define_run, "iiiii"), (_cpu_crew._define_serve, "vii"):
        made = _cpu_kept.built(define, letters)
        (text,) = made.inspect_llvm().values()
        print(sorted(set(re.findall("syscall|sched_getcpu|llvm.x86.sse2.pause|llvm.aarch", text))))
"""


def test_another_machine_needs_no_function_that_it_may_lack(tmp_path):
    """Where Linux' calls are not known nothing of them is compiled, or it would not link."""
    out = run_python(OTHER_MACHINE, NUMBA_CACHE_DIR=str(tmp_path))
    assert out.split() == ["[]", "[]"]


# --- processes ------------------------------------------------------------------------------------

# Public calls in a process of their own: `check()` compares their bits with those of one thread.
PREPARE = """
    import os, signal, sys, threading, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads, which is the point
    import numpy as np
    import cupynorm as cn
    from cupynorm._cpu import crew as _cpu_crew
    def call(x, n=None):
        y, mean, rstd = cn.layer_norm(x, x.shape[1], x[0].copy(), return_stats=True)
        alone = cn.layer_norm(x, x.shape[1])
        return y, alone, *cn.layer_norm_backward(y, x, x.shape[1], mean, rstd, None)
    shapes = (3000, 256), (700, 900), (3, 200000)
    x = [np.random.default_rng(1).standard_normal(s).astype(np.float32) for s in shapes]
    x[1] = np.asfortranarray(x[1])
    threads = os.environ["CUPYNORM_NUM_THREADS"]
    os.environ["CUPYNORM_NUM_THREADS"] = "1"
    want = [call(a) for a in x]
    os.environ["CUPYNORM_NUM_THREADS"] = threads
    def check():
        for a, w in zip(x, want):
            for got, wanted in zip(call(a), w):
                assert (got is None and wanted is None) or np.array_equal(got, wanted)
"""
FORK = """
    check()
    helpers = _cpu_crew._crew._helpers
    assert helpers in (0, 2)
    stop = False
    def busy():
        while not stop:
            check()
    callers = [threading.Thread(target=busy) for _ in range(2)]
    for t in callers: t.start()
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(100)  # rather than be stuck when nobody waits any more
            try:
                assert _cpu_crew._crew._helpers == 0
                assert not _cpu_crew._crew._words.any()
                check()
                names = [t.name for t in threading.enumerate()]
                own = sum(n.startswith("cupynorm-compiled") for n in names)
                os._exit(0 if own == helpers else 5)
            except BaseException:
                os._exit(4)
        assert os.waitpid(child, 0)[1] == 0
    stop = True
    for t in callers: t.join()
    _cpu_crew._crew._words[_cpu_crew._HELD] = 1  # as if a call had the crew
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        _cpu_crew._in_python = None  # which is not needed here
        try:
            check()
            os._exit(0)
        except BaseException:
            os._exit(4)
    assert os.waitpid(child, 0)[1] == 0
    print("same")
"""


@futex
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_helpers_of_its_own():
    """Those of its parent are not there, whatever they and their callers were at."""
    assert run_python(PREPARE + FORK, CUPYNORM_NUM_THREADS="3").strip() == "same"


ONE_CPU = """
    for _ in range(3):
        check()
    (only,) = os.sched_getaffinity(0)
    for thread in threading.enumerate():
        assert os.sched_getaffinity(thread.native_id) == {only}, thread
    print(_cpu_crew._crew._helpers)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no masks of CPUs on this system")
def test_a_process_with_one_cpu():
    """Helpers take turns with their caller; there is no CPU to leave it to."""
    pin = "\n    import os\n    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
    out = run_python(pin + PREPARE + ONE_CPU, CUPYNORM_NUM_THREADS="3")
    assert out.strip() == ("2" if _cpu_signals.FUTEX else "0")


FREED = """
    columns = list(x[0].T.copy()[:200])
    of_rows = cn.layer_norm(np.stack(columns, axis=1), 200)
    for _ in range(5):
        check()
        assert np.allclose(cn.layer_norm_columns(columns), of_rows, rtol=1e-5, atol=1e-5)
    print("same")
"""


def test_no_call_reads_memory_that_it_has_freed():
    """glibc writes over it at once; numba frees an array after its last use, address or not."""
    tunables = "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0"
    out = run_python(PREPARE + FREED, CUPYNORM_NUM_THREADS="3", GLIBC_TUNABLES=tunables)
    assert out.strip() == "same"


def test_the_end_with_helpers_awake():
    """They spin for a while after a call, and read words that must still be there."""
    code = PREPARE + "    print('end', flush=True)\n    check()\n"
    assert run_python(code, CUPYNORM_NUM_THREADS="4").strip() == "end"


@futex
def test_helpers_keep_what_they_read():
    """Or at exit they would read memory that is another's by then."""
    crew = _cpu_crew._Crew()
    alive = weakref.ref(crew._memory)
    crew.control(1)
    until(lambda crew=crew: crew._words[_cpu_crew._SLEEPERS] == 1)
    del crew
    gc.collect()
    assert alive() is not None


# --- CPUs -----------------------------------------------------------------------------------------


@futex
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="one CPU: none to leave the caller's for",
)
def test_a_helper_leaves_its_callers_cpu(crew):
    """It may use every other one that the process may, also when callers change."""
    process = os.sched_getaffinity(os.getpid())
    before = set(threading.enumerate())
    crew.control(1)
    (helper,) = (t for t in set(threading.enumerate()) - before if t.name == "cupynorm-compiled-0")

    def call(_):
        for here in sorted(process)[:2] * 2:
            os.sched_setaffinity(0, {here})  # of this thread
            os.sched_setaffinity(helper.native_id, {here})
            assert Meeting(2).run() == 2
            assert os.sched_getaffinity(helper.native_id) == process - {here}
            Count(2, 300).run().check()
            mask = os.sched_getaffinity(helper.native_id)
            assert mask == process - {here}

    in_threads(1, call)
    assert os.sched_getaffinity(os.getpid()) == process


@futex
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no masks of CPUs on this system")
def test_a_helper_always_has_a_cpu(crew, calls):
    """Whoever calls: one of the process's, and at most the caller's is left out."""
    process = os.sched_getaffinity(os.getpid())
    before = set(threading.enumerate())
    for _ in range(5):
        calls.check()
        assert Meeting(4).run() == 4
        helpers = {
            t for t in set(threading.enumerate()) - before if t.name.startswith("cupynorm-comp")
        }
        assert len(helpers) == 3
        for helper in helpers:
            mask = os.sched_getaffinity(helper.native_id)
            assert mask
            assert mask <= process
            assert len(process - mask) <= 1
