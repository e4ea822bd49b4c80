"""Threads over the blocks of one call: helpers that come if they are free, never waited for."""

import collections
import os
import queue
import threading
from collections.abc import Callable

__all__ = ["num_threads", "run"]

Task = Callable[[int], None]

_MAX_THREADS = 256  # a slip of the keyboard in the environment must not start 10^6 threads


def num_threads() -> int:
    """Count the threads of a call: ``CUPYNORM_NUM_THREADS``, else the CPUs of this process."""
    text = os.environ.get("CUPYNORM_NUM_THREADS", "").strip()
    if text:
        if not text.isdecimal() or int(text) == 0:
            msg = (
                f"CUPYNORM_NUM_THREADS={text!r} is not a positive integer; set it to the number"
                " of threads to use, or unset it to use every CPU of this process"
            )
            raise ValueError(msg)
        return min(int(text), _MAX_THREADS)
    if hasattr(os, "process_cpu_count"):  # Python 3.13: respects affinity and -X cpu_count
        return min(os.process_cpu_count() or 1, _MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)


class _Job:
    """The blocks of one call, handed out one by one to whichever thread asks."""

    def __init__(self, make_task: Callable[[], Task], count: int) -> None:
        self.make_task: Callable[[], Task] | None = make_task
        self.pending = collections.deque(range(count))
        self.unfinished = count
        self.lock = threading.Lock()
        self.done = threading.Lock()  # a lock costs a tenth of a threading.Event
        self.done.acquire()
        self.error: BaseException | None = None

    def work(self) -> None:
        """Do blocks until none is left; keep the first error and skip the blocks after it."""
        task: Task | None = None
        while True:
            try:
                index = self.pending.popleft()  # atomic, with or without the GIL
            except IndexError:
                return
            make_task = self.make_task
            try:
                if self.error is None and make_task is not None:
                    if task is None:
                        task = make_task()
                    task(index)
            except BaseException as error:
                self.error = self.error or error
            with self.lock:
                self.unfinished -= 1
                last = self.unfinished == 0
            if last:
                self.done.release()


class _Pool:
    """Daemon threads that wait for jobs; they grow on demand and are forgotten by a fork."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.workers = 0

    def offer(self, job: _Job, helpers: int) -> None:
        """Ask for ``helpers`` threads to join the job; the caller does not depend on any."""
        with self.lock:
            while self.workers < helpers:
                name = f"cupynorm-{self.workers}"
                worker = threading.Thread(target=_serve, args=(self.jobs,), name=name, daemon=True)
                try:
                    worker.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    break
                self.workers += 1
            helpers = min(helpers, self.workers)
        for _ in range(helpers):
            self.jobs.put(job)


def _serve(jobs: "queue.SimpleQueue[_Job]") -> None:
    while True:
        # No name may hold the job while waiting: it would keep the arrays of the last call alive.
        jobs.get().work()


_pool = _Pool()


def _forget_pool() -> None:
    """Start anew in a forked child: the threads are not there and the lock may be held."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(make_task: Callable[[], Task], count: int, threads: int) -> None:
    """Call ``task(i)`` for every ``i`` in ``range(count)`` on up to ``threads`` threads.

    Each thread that takes part calls ``make_task()`` once for a task (and scratch) of its own.
    The caller works too and finishes every block that no helper has begun, so a call from inside
    another pool, or from a task, cannot deadlock. The first exception is raised here after the
    blocks that had begun are through.
    """
    if count <= 1 or threads <= 1:
        task = make_task()
        for index in range(count):
            task(index)
        return
    job = _Job(make_task, count)
    _pool.offer(job, min(threads, count) - 1)
    job.work()
    job.done.acquire()
    job.make_task = None  # a helper that comes late finds no arrays to hold on to
    if job.error is not None:
        raise job.error
