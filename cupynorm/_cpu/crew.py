"""Threads that sleep inside compiled code, so that no call waits for the interpreter's lock."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm._cpu import threads as _threads
from cupynorm._cpu.kept import built
from cupynorm._cpu.loops import compiled
from cupynorm._cpu.pointers import at
from cupynorm._cpu.signals import (
    FUTEX,
    GET_CPUS,
    PROCESS,
    SET_CPUS,
    SLEEP,
    THREAD,
    WAKE,
    add_to,
    and_with,
    cpu,
    invoke,
    pause,
    read,
    swap,
    system,
)

__all__ = ["COUNTER", "THREADS", "control", "lead", "record", "run"]

# A thread of Python's that is asked to help wakes twice, for the request and for the lock: 40 to
# 70 us, as long as the loops take for 300000 elements. These wait for a word of memory to change
# (Linux' futex) and run compiled code when it does: 15 to 40 us, and the caller works meanwhile.
# They come if they are free and are never waited for, as those of ``_threads``.

Array = np.ndarray[Any, Any]

# A job's record: up to so many numbers of 8 bytes, the count of threads, and for each of them, on a
# cache line of its own, a counter from which blocks are claimed.
THREADS = 23
COUNTER = 32
_GONE = 1 << 40  # more than any count of blocks; times the rows of one it is no overflow

# The words (int32) of the memory by which threads speak, on a cache line each.
_HELD = 0  # 1 while a call has the crew
_STATE = 16  # how many help (15 bits), how many more may come (15 bits), whether the caller sleeps
_CALLS = 32  # calls so far; helpers sleep until it changes
_SLEEPERS, _HELPERS = 33, 34  # how many helpers sleep or are about to, and how many there are
_JOB = 48  # three int64: the address of the function, that of its record, the caller's CPU
# Of the first helpers, on a line each: the CPU where it was last, and its number as a thread.
_WHERE, _WATCHED = 64, 8
_WORDS = _WHERE + 16 * _WATCHED
_MORE, _ASLEEP, _HELPING = 1 << 15, 1 << 30, (1 << 15) - 1
# A scheduler that packs threads on few CPUs, or wakes them where the waker runs, would have a
# helper take turns with the caller: 4096x768 took 1036 us, not 750. So it leaves the caller's CPU;
# and where the caller has come to its CPU, as it may not run before it is told to, he sends it off.
_CPUS = 1024  # as many as the C library's mask of them has
_WOKEN = 2  # helpers that each wakes: their number doubles, so that many come soon
# Looks at a word before a thread sleeps: some 50 us, in which the next call of a loop finds its
# helpers awake. OpenMP's threads spin for 10 ms, on cores that others may want.
_LOOKS = 2000


@compiled()
def _wake(control, wanted):  # type: ignore[no-untyped-def]
    """Wake helpers if fewer are awake than are wanted; those will wake more."""
    awake = read(control + 4 * _HELPERS) - read(control + 4 * _SLEEPERS)
    if awake < wanted:
        system(FUTEX, control + 4 * _CALLS, WAKE, min(wanted - awake, _WOKEN))


@compiled()
def _next(control, seen):  # type: ignore[no-untyped-def]
    """Wait for another call than the one seen, for a while awake; give its number."""
    calls, sleepers = control + 4 * _CALLS, control + 4 * _SLEEPERS
    for _ in range(_LOOKS):
        if read(calls) != seen:
            break
        pause()
    while read(calls) == seen:
        # A caller who does not see this sleeper has changed the word, so that it will not sleep.
        add_to(sleepers, 1)
        system(FUTEX, calls, SLEEP, seen)
        add_to(sleepers, -1)
    return read(calls)


@compiled()
def _keep_off(thread, taken):  # type: ignore[no-untyped-def]
    """Let a thread (0: this one) run on any CPU of the process but one, if there is another."""
    mask = np.zeros(_CPUS // 64, np.int64)
    at_mask = mask.ctypes.data
    process = system(PROCESS, 0, 0, 0)
    if system(GET_CPUS, process, _CPUS // 8, at_mask) > 0 and 0 <= taken < _CPUS:
        mask[taken // 64] &= ~(np.int64(1) << np.int64(taken % 64))
        if mask.any():
            system(SET_CPUS, thread, _CPUS // 8, at_mask)
    mask[0] = 0  # its last use: numba frees an array after that, address or not


@compiled()
def _serve(control, who):  # type: ignore[no-untyped-def]
    """What a helper does for as long as the process lives."""
    state, job = control + 4 * _STATE, at(control + 4 * _JOB, np.int64)
    where = at(control + 4 * (_WHERE + 16 * (who - 1)), np.int32)
    if who <= _WATCHED:
        where[0], where[1] = cpu(), system(THREAD, 0, 0, 0)
    seen = 0
    while True:
        seen = _next(control, seen)
        old = read(state)
        while old // _MORE % _MORE:
            if not swap(state, old, old + 1 - _MORE):
                old = read(state)
                continue
            # From here to the subtraction the caller keeps the job, and all it points to, alive.
            more = old // _MORE % _MORE - 1
            if more:
                _wake(control, (old & _HELPING) + 1 + more)
            if cpu() == job[2]:
                _keep_off(0, job[2])
            if who <= _WATCHED:
                where[0] = cpu()
            invoke(job[0], job[1], who)
            if add_to(state, -1) == _ASLEEP + 1:
                system(FUTEX, state, WAKE, 1)
            break


@compiled()
def lead(control, function, record, helpers):  # type: ignore[no-untyped-def]
    """Do a job with up to so many helpers; False, and nothing is done, if another call has them."""
    held, state = control + 4 * _HELD, control + 4 * _STATE
    if not swap(held, 0, 1):
        return False
    job = at(control + 4 * _JOB, np.int64)
    here = cpu()
    job[0], job[1], job[2] = function, record, here
    for who in range(min(helpers, _WATCHED)):
        where = at(control + 4 * (_WHERE + 16 * who), np.int32)
        if where[1] and where[0] == here:
            where[0] = -1
            _keep_off(where[1], here)
    add_to(state, helpers * _MORE)
    add_to(control + 4 * _CALLS, 1)
    _wake(control, helpers)
    invoke(function, record, 0)
    and_with(state, _HELPING)  # nobody comes any more
    looks = 0
    while read(state) & _HELPING:
        looks += 1
        old = read(state)
        if looks < _LOOKS:
            pause()
        elif old & _ASLEEP:
            system(FUTEX, state, SLEEP, old)
        elif old & _HELPING:
            swap(state, old, old + _ASLEEP)
    and_with(state, 0)
    add_to(held, -1)
    return True


def _define_run(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., int]:
    @jit
    def run(control, function, record, helpers):  # type: ignore[no-untyped-def]
        return int(lead(control, function, record, helpers * (sources != 0)))

    return run  # type: ignore[no-any-return]


def _define_serve(sources: int, jit: Any, stored: Any, computed: Any) -> Callable[..., None]:
    @jit
    def serve(control, who):  # type: ignore[no-untyped-def]
        if sources:
            _serve(control, who)

    return serve  # type: ignore[no-any-return]


class _Crew:
    """The helpers of this process; a fork forgets them."""

    def __init__(self) -> None:
        self._memory = np.zeros(_WORDS + 16, np.int32)
        first = -(self._memory.ctypes.data // 4) % 16
        self._words = self._memory[first : first + _WORDS]
        self._control = self._words.ctypes.data
        self._lock = threading.Lock()
        self._helpers = 0

    def control(self, helpers: int) -> int:
        """Address by which to speak to so many helpers."""
        if self._helpers < helpers:
            self._grow(helpers)
        return self._control

    def _grow(self, helpers: int) -> None:
        serve = built(_define_serve, "vii")
        with self._lock:
            while self._helpers < helpers:
                name = f"cupynorm-compiled-{self._helpers}"
                thread = threading.Thread(
                    target=self._help, args=(serve, self._helpers + 1), name=name, daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    break
                self._helpers += 1
                self._words[_HELPERS] = self._helpers

    def _help(self, serve: Callable[[int, int], None], who: int) -> None:
        # A method, so that the thread keeps the words: at exit the module lets go of them.
        serve(self._control, who)


_crew = _Crew()


def control(threads: int) -> int:
    """What lead() needs for a call on so many threads; 0 where this system knows no futex."""
    return _crew.control(threads - 1) if FUTEX else 0


def record(threads: int, *numbers: int | float) -> Array:
    """Lay out the numbers of a job as compiled code reads them; its counters are 0."""
    words = np.zeros(COUNTER + 8 * threads, np.int64)
    words[THREADS] = threads
    wide = words.view(np.float64)
    for i, number in enumerate(numbers):
        if isinstance(number, (float, np.floating)):
            wide[i] = number
        else:
            words[i] = number
    return words


def run(work: Any, job: Array, threads: int) -> None:
    """Call ``work``, of ``_cpu_kept.shared``, with this record on up to so many threads at once.

    Each call does the blocks that it claims; all are done when this returns. Where another call has
    the crew, or where there is none, the threads are those of ``_threads``.
    """
    at = job.ctypes.data
    if threads == 1:
        work.ctypes(at, 0)
        return
    crew = control(threads)
    if not (crew and built(_define_run, "iiiii")(crew, work.address, at, threads - 1)):
        _in_python(work.ctypes, job, threads)


def _in_python(work: Callable[[int, int], None], job: Array, threads: int) -> None:
    busy: list[int] = []

    def task(ticket: int) -> None:
        busy.append(ticket)
        try:
            work(job.ctypes.data, ticket)
        finally:
            busy.pop()

    try:
        _threads.run(lambda: task, threads, threads)
    except BaseException:
        # An interrupt must not return while a helper still writes to memory that the caller,
        # whose arrays nobody here holds, is about to free.
        job[COUNTER::8] = _GONE
        while busy:
            time.sleep(1e-4)
        raise


def _forget_crew() -> None:
    """Start anew in a forked child: the threads are not there, and a call may have had them."""
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_crew)
