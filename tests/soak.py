"""Random calls for as long as one likes, from threads, forks, under interrupts and little memory.

    python -m tests.soak --seconds 600 [--seed 1]    or    --small 1000000

A call is drawn from one number, which a failure prints with what to run to see it again.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import cupynorm as cn
from cupynorm import _memo
from tests import oracle
from tests.conftest import _CONTEXTS, ALL_DTYPES, Backend, library, np_dtype, why_not
from tests.strategies import Call

DOORS = [*[Backend.NUMPY] * 6, *[Backend.NUMPY_PLAIN] * 2, *[Backend.TORCH] * 4]
DOORS = [door for door in (*DOORS, Backend.JAX, Backend.STRICT) if not why_not(door)]
NUMPYS = [door for door in DOORS if door.numpy]  # torch's threads do not live on in a fork
_ARENA_MAX = -8  # of glibc's malloc.h
LARGE = (1500, 700), (3, 400_000), (64, 9000), (40, 40, 400)  # for several threads; long rows


def drawn(seed, numpy=False, shape=None, kinds=ALL_DTYPES):
    """The call of a number, within what its library needs; `numpy`: by our own code alone."""
    rnd = random.Random(seed)
    door = rnd.choice(NUMPYS if numpy else DOORS)
    shape = shape or (rnd.choice(LARGE) if rnd.random() < 0.02 else None)
    call = Call(rnd, library(door), kinds, shape, ours=numpy)
    return call, _CONTEXTS.get(door, contextlib.nullcontext)()


def one(seed, **how):
    """Run the call of a number; a failure says how to see it again."""
    call, context = drawn(seed, **how)
    try:
        with context:
            call.run()
    except Exception:
        again = ", ".join([str(seed), *(f"{name}={value}" for name, value in how.items())])
        print(f"\nseed {seed}: {call.text}")
        print(f'  python -c "from tests import soak; soak.one({again})"', flush=True)
        raise


class Soak:
    """Rounds of calls, each in one of the ways below."""

    def __init__(self, seed, kinds):
        self.rng, self.counts = np.random.default_rng(seed), {}
        self.kinds, self.one = kinds, functools.partial(one, kinds=kinds)

    def seeds(self, way, count):
        self.counts[way] = self.counts.get(way, 0) + count
        return [int(n) for n in self.rng.integers(0, 2**62, count)]

    def alone(self):
        for seed in self.seeds("alone", 60):
            self.one(seed)

    def in_threads(self):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.one, self.seeds("in threads", 80)))

    def interrupted(self):
        """The same calls again and again: the interrupt comes anywhere in them."""
        seeds = self.seeds("interrupted", 40)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for seed in seeds:
            shape = (1500, 700) if seed % 5 == 0 else None
            self.one(seed, numpy=True, shape=shape)  # compiled before: numba takes no interrupt
            with contextlib.suppress(KeyboardInterrupt):
                call, context = drawn(seed, True, shape, self.kinds)
                with context:
                    signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-5, 4e-3))
                    call.run()
                    signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.one(seed, numpy=True, shape=shape)

    def forked(self, before=lambda: None, way="forked"):
        seeds = self.seeds(way, 20)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = 1
            try:
                before()
                for seed in seeds:
                    self.one(seed, numpy=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        if status := os.waitpid(child, 0)[1]:
            raise SystemExit(f"a child that was {way} ended with {status}")

    def short_of_memory(self):
        """Calls until there is no room left; with as much as there was they are right again."""
        rooms = self.rng.integers(0, 60 << 20, 3)

        def calls(x, axis):
            y, mean, rstd = cn.layer_norm(x, axis=axis, return_stats=True)
            return y, cn.layer_norm_backward(y, x, None, mean, rstd, axis=axis)

        def squeeze():
            arrays = [np.ones((900, 2000), np_dtype(kind)) for kind in self.kinds]
            ways = [(x, axis) for x in arrays for axis in (0, 1)]
            for way in ways:
                calls(*way)  # LLVM ends the process where it finds no memory: compile before
            limits = resource.getrlimit(resource.RLIMIT_AS)
            for room, way in itertools.product(rooms, ways):
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + int(room), limits[1]))
                kept = []
                with contextlib.suppress(MemoryError):
                    while True:
                        kept.append(calls(*way))
                resource.setrlimit(resource.RLIMIT_AS, limits)

        self.forked(squeeze, "short of memory")


def memory():
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()  # of programs, one for each axis, shape and dtype
    _memo.settled().clear()  # which is cleared when it is full, too
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, each thread has kept
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def soak(seconds, seed, kinds):
    """Whether all was well, and memory has not grown since a third of the time was over."""
    print(f"seed {seed}")
    start, run, first, round_ = time.monotonic(), Soak(seed, kinds), None, 0
    for _ in range(4):  # what is loaded once and what libraries keep of threads, before the look
        run.alone()
        run.in_threads()
    ways = run.alone, run.in_threads, run.interrupted, run.forked, run.short_of_memory
    while (passed := time.monotonic() - start) < seconds or first is None:
        ways[round_ % len(ways)]()
        round_ += 1
        if first is None and passed > seconds / 3 and round_ >= len(ways):
            first = memory()
    last = memory()
    told = ", ".join(f"{count} {way}" for way, count in run.counts.items())
    print(f"{sum(run.counts.values())} calls in {time.monotonic() - start:.0f} s: {told}")
    print(f"resident {first:.0f} MiB after a third of the time, {last:.0f} MiB at the end")
    if last > first * 1.05 + 16:
        raise SystemExit("memory grows")


def small(count, seed):
    """Small calls, a thousand of each shape, whose values are compared at once."""
    rng, start, spent, done = np.random.default_rng(seed), time.monotonic(), 0.0, 0
    while done < count:
        kind, shape = rng.choice(["float32", "float64"]), (1000, *rng.integers(1, (9, 65)))
        x = rng.standard_normal(shape) * rng.choice([1e-2, 1, 50]) + rng.choice([0, 3])
        x, y = x.astype(kind), np.empty(shape, kind)
        w, b = (rng.standard_normal(shape[-1]).astype(kind) for _ in "wb")
        w, b = (a if rng.random() < 0.5 else None for a in (w, b))
        begin = time.perf_counter()
        for row, to in zip(x, y, strict=True):
            cn.layer_norm(row, None, w, b, out=to)
        spent += time.perf_counter() - begin
        want, bound = oracle.layer_norm(x, (2,), w, b, 1e-5)[0], oracle.tolerance(kind, shape[-1])
        np.testing.assert_allclose(y, want, rtol=bound, atol=bound * max(1, np.abs(want).max()))
        done += 1000
    each, took = 1e6 * spent / done, time.monotonic() - start
    print(f"{done} small calls, {each:.1f} us each, none wrong, in {took:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--dtypes", nargs="+", default=ALL_DTYPES)  # each compiles for minutes
    parser.add_argument("--small", type=int, metavar="CALLS")
    given = parser.parse_args()
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)  # what is free in arenas of threads is not given back
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's: the child uses NumPy
    if given.small:
        small(given.small, given.seed)
    else:
        soak(given.seconds, given.seed, tuple(given.dtypes))


if __name__ == "__main__":
    main()
