"""Threads over the items of one call, and how many of them."""

import collections
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

_MOST = 256  # a slip of the keyboard in the environment must not start 10^6 threads
# Shares of a call per thread: more even out threads of unequal speed, but each is a hand-over
# between threads, which wait for the interpreter's lock.
_SHARES = 4
_pool: ThreadPoolExecutor


def num_threads() -> int:
    """``CUPYNORM_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the CPUs this process may use."""
    for name in ("CUPYNORM_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").strip()
        if text:
            first = text.partition(",")[0].strip() if name.startswith("OMP") else text
            if not first.isdecimal() or int(first) == 0:
                msg = (
                    f"{name}={text!r} is not a positive integer; set it to the number"
                    " of threads to use, or unset it to use every CPU of this process"
                )
                raise ValueError(msg)
            return min(int(first), _MOST)
    if hasattr(os, "process_cpu_count"):  # Python 3.13: respects affinity and -X cpu_count
        cpus = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return min(cpus, quota(Path("/sys/fs/cgroup")), _MOST)


@functools.cache
def quota(group: Path) -> int:
    """CPUs that a container may use, by its control group; many where it does not say."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            most, period = " ".join((group / name).read_text() for name in files).split()
            if most.isdecimal() and int(most) > 0:  # not "max", not -1
                return max(1, math.ceil(int(most) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return _MOST


def run(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Call ``work(lo, hi)`` for shares of ``range(count)`` on up to so many threads.

    The caller works too, and waits for no thread that has not begun: a call from inside another
    pool, or from ``work``, cannot deadlock. The first exception is raised here, after what had
    begun is through; other shares are not begun.
    """
    if min(count, threads) <= 1:
        work(0, count)
        return
    shares = min(count, _SHARES * threads)
    edges = [count * i // shares for i in range(shares + 1)]
    waiting = collections.deque(itertools.pairwise(edges))  # popleft() is atomic
    begun: list[Future[None]] = []
    errors: list[BaseException] = []

    def take_shares() -> None:
        while waiting:
            try:
                lo, hi = waiting.popleft()
            except IndexError:
                return
            work(lo, hi)

    def help_out() -> None:
        mine: Future[None] = Future()
        begun.append(mine)  # before it takes a share: it finds none, or the caller finds it
        try:
            take_shares()
        except BaseException as error:
            waiting.clear()
            errors.append(error)
        mine.set_result(None)

    def settle() -> None:
        waiting.clear()
        wait(begun)

    try:
        with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter ends
            for _ in range(min(threads, shares) - 1):
                _pool.submit(help_out)
        take_shares()
        settle()
    except BaseException:  # an interrupt, wherever: no helper may write to memory that it frees
        settle()
        raise
    if errors:
        raise errors.pop(0)  # else it would keep itself, and the arrays of the call


def _start_anew() -> None:
    """At first, and in a forked child, where the threads are not."""
    global _pool
    _pool = ThreadPoolExecutor(_MOST, thread_name_prefix="cupynorm")


_start_anew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
