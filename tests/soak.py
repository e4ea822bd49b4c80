"""Random calls for as long as one likes, from threads, forks, under interrupts and little memory.

    python -m tests.soak --seconds 600 [--seed 1]    or    --small 1000000

A call is drawn from one number, which a failure prints with what to run to see it again.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import math
import os
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
from cupynorm._ops import OPS, RMS_NORM, ZERO_CENTERED
from tests import oracle
from tests.conftest import _CONTEXTS, ALL_DTYPES, Backend, library, np_dtype, why_not
from tests.directions import stats_dtype
from tests.strategies import spread
from tests.test_columns import DTYPES as COLUMN_DTYPES
from tests.test_columns import expected, table

DOORS = [*[Backend.NUMPY] * 6, *[Backend.NUMPY_PLAIN] * 2, *[Backend.TORCH] * 4]
DOORS = [door for door in (*DOORS, Backend.JAX, Backend.STRICT) if not why_not(door)]
NUMPYS = [door for door in DOORS if door.numpy]  # torch's threads do not live on in a fork
PUBLIC = [name for name, op in OPS.items() if not op.unit_weight or op is ZERO_CENTERED[RMS_NORM]]


class Call:
    """A call of one public function, drawn, run and compared."""

    def __init__(self, seed, numpy=False, shape=None, kinds=ALL_DTYPES):
        self.rng = rng = np.random.default_rng(seed)
        self.door = self.pick(*(NUMPYS if numpy else DOORS))
        self.text = f"{self.door.value} "
        few = self.door is Backend.JAX  # which compiles each shape
        self.shape = shape or (self.pick((3, 4), (2, 3, 4)) if few else self.some_shape())
        self.op = OPS[self.pick(*PUBLIC)]
        self.kind = self.pick(*(kind for kind in self.door.dtypes if kind in kinds))
        ndim = len(self.shape)
        self.axes = tuple(int(a) for a in rng.permutation(ndim)[: rng.integers(1, ndim + 1)])
        if few or self.maybe(0.4):
            self.axes = (ndim - 1,)
        self.N = math.prod(self.shape[a] for a in self.axes)
        self.eps = self.pick(1e-5, 1e-5, 1e-12, 0.1)

    def pick(self, *of):
        return of[self.rng.integers(len(of))]

    def maybe(self, share=0.5):
        return self.rng.random() < share

    def some_shape(self):
        if self.maybe(0.02):  # work for several threads; long rows
            return self.pick((1500, 700), (3, 400_000), (64, 9000), (40, 40, 400))
        sides = self.rng.integers(0 if self.maybe(0.05) else 1, 10, self.rng.integers(1, 5))
        if self.maybe(0.3):
            sides[-1] = self.rng.integers(1, 1200)
        return tuple(map(int, sides))

    def array(self, shape=None, kind=None):
        """Drawn values in memory of a drawn layout, as NumPy has them."""
        kind, shape = kind or self.kind, self.shape if shape is None else shape
        steps, turned = [1] * len(shape), range(len(shape))
        if self.door.strided and self.maybe():
            ways = (1, 1, 2, 3, -1, -2) if self.door.numpy else (1, 1, 2, 3)
            small = math.prod(shape) < 20_000
            steps = [self.pick(*ways) if small else 1 for _ in shape]
            turned = [int(a) for a in self.rng.permutation(len(shape))]
        self.text += f"{kind}{list(shape)} steps {steps} turned {list(turned)}, "

        def fill(whole):
            scale, offset = self.pick(1.0, 1e-3, 30.0), self.pick(0.0, 2.0)
            return (self.rng.standard_normal(whole) * scale + offset).astype(np_dtype(kind))

        return spread(fill, shape, steps, turned)

    def run(self):
        if self.door.numpy and self.maybe(0.1):
            return self.columns()
        with _CONTEXTS.get(self.door, contextlib.nullcontext)():
            self.lib = library(self.door)
            return self.backward() if not self.op.residual and self.maybe(0.4) else self.forward()

    def given(self, a):
        return None if a is None else self.lib.from_numpy(a)

    def affine(self, optional=True):
        if optional and self.maybe(0.3):
            return None
        shape, kinds = [self.shape[a] for a in self.axes], self.door.dtypes
        a = self.array(shape, self.pick(self.kind, self.pick(*kinds)))
        return a.copy() if self.door is Backend.STRICT else a

    def wide(self, a, more=0):
        """Weight or bias as the oracle takes it: of ascending axes."""
        return None if a is None else a.astype(np.float64).transpose(np.argsort(self.axes)) + more

    def forward(self):
        op, x = self.op, self.array()
        weight = self.affine(optional=not op.unit_weight)
        bias = self.affine() if op.center else None
        wider = "float32" if self.kind.endswith("16") else self.kind
        residual = self.array(kind=self.pick(self.kind, wider)) if op.residual else None
        before = [None if a is None else a.copy() for a in (x, residual)]
        args = [self.given(a) for a in (x, residual) if a is not None]
        how = {"axis": self.axes, "eps": self.eps, "weight": self.given(weight)}
        how |= {"bias": self.given(bias)} if op.center else {}
        how |= {"return_stats": stats} if (stats := self.maybe()) else {}
        how |= {"zero_centered_weight": True} if op.unit_weight else {}
        written = []
        if self.door.writable and self.maybe(0.3):
            written, how["out"] = [0], args[0]
        elif self.door.numpy and not op.residual and self.maybe(0.2):
            how["order"] = self.pick(*"KCF")
        if op.residual and self.door.writable and self.maybe(0.3):
            written, how["sum_out"] = [*written, 1], args[1]
        self.text += f"{op.name}, {self.kind}, axes {self.axes}, eps {self.eps}, into {written}"
        found = getattr(cn, op.function)(*args, **how)
        if 0 in written:
            assert (found if not isinstance(found, tuple) else found.y) is args[0]
        for i, (a, was) in enumerate(zip(args, before, strict=False)):
            if i not in written:
                np.testing.assert_array_equal(self.lib.to_numpy(a), was, "an input changed")
        got = [self.lib.to_numpy(a) for a in (found if isinstance(found, tuple) else (found,))]
        source = before[0]
        if op.residual:
            total = got.pop(1)
            exact = sum(a.astype(np.float64) for a in before)
            bound = oracle._EPS[total.dtype.name] * np.abs(exact) + oracle._LEAST[total.dtype.name]
            assert (np.abs(total.astype(np.float64) - exact) <= bound).all(), "the sum"
            source = total
        if not source.size:
            assert got[0].shape == self.shape
            return
        affine = self.wide(weight, op.unit_weight), self.wide(bias)
        want = oracle.layer_norm(source, sorted(self.axes), *affine, self.eps, op.center)
        want = want if op.center else want[::2]
        kinds = self.kind, *[stats_dtype(self.kind)] * 2
        for a, value, kind in zip(got, want, kinds, strict=False):
            assert a.dtype.name == kind and a.shape == value.shape, (a.dtype, a.shape)
            bound = oracle.tolerance(kind, self.N)
            atol = bound * max(1, np.abs(value).max())
            np.testing.assert_allclose(a.astype(np.float64), value, rtol=bound, atol=atol)
        assert len(got) == 1 + stats * (1 + op.center)

    def backward(self):
        op = self.op
        if 0 in self.shape:
            return
        x, dy = self.array(), self.array()
        weight = self.affine(optional=not op.unit_weight)
        gx, gdy, gw = map(self.given, (x, dy, weight))
        how = {"axis": self.axes, "weight": gw}
        how |= {"zero_centered_weight": True} if op.unit_weight else {}
        self.text += f"{op.name} backward, {self.kind}, axes {self.axes}, eps {self.eps}"
        stats = getattr(cn, op.function)(gx, eps=self.eps, return_stats=True, **how)[1:]
        mask = (True, True, True)[: 2 + op.center]
        back = getattr(cn, f"{op.function}_backward")
        named = dict(zip(("mean", "rstd")[not op.center :], stats, strict=True))
        found = back(gdy, gx, None, **named, output_mask=mask, **how)
        got = [np.asarray(self.lib.to_numpy(a)) for a in found]
        turn = np.argsort(self.axes)
        got = [got[0], *(a.transpose(turn) for a in got[1:]), *[None] * (not op.center)]
        w = self.wide(weight, op.unit_weight)
        oracle.assert_gradients(got, dy, x, sorted(self.axes), w, self.eps, op.center)

    def columns(self):
        M, N = (int(n) for n in self.rng.integers(1, 40, 2))
        kinds = [self.pick(*COLUMN_DTYPES[:-1]) for _ in range(N)]
        kinds = ["float32", "float64"][: 1 + self.maybe()] * N if self.maybe() else kinds
        self.text += f"columns {M} x {kinds}"
        found = table(self.rng, kinds[:N], M)
        weight = self.rng.standard_normal(N)
        y = cn.layer_norm_columns(found, weight, dtype="float64")
        bound = oracle.tolerance("float64", N)
        want = expected(found, weight, dtype="float64")
        np.testing.assert_allclose(y, want, rtol=bound, atol=bound * np.abs(want).max())
        if "pandas" in sys.modules and "bfloat16" not in kinds:
            frame = sys.modules["pandas"].DataFrame({str(i): c for i, c in enumerate(found)})
            np.testing.assert_array_equal(cn.layer_norm(frame, weight=weight).index, range(M))


def one(seed, **how):
    """Run the call of a number; a failure says how to see it again."""
    call = None
    try:
        call = Call(seed, **how)
        call.run()
    except Exception:
        again = ", ".join([str(seed), *(f"{name}={value}" for name, value in how.items())])
        print(f"\nseed {seed}: {call and call.text}")
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
                call = Call(seed, True, shape, self.kinds)
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
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def soak(seconds, seed, kinds):
    """Whether all was well, and memory has not grown since a third of the time was over."""
    print(f"seed {seed}")
    start, run, first, round_ = time.monotonic(), Soak(seed, kinds), None, 0
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
        x, y = (
            rng.standard_normal(shape).astype(kind) * rng.choice([1e-2, 1, 50]),
            np.empty(shape, kind),
        )
        x = (x + rng.choice([0, 3])).astype(kind)
        w, b = (
            None if rng.random() < 0.5 else rng.standard_normal(shape[-1]).astype(kind)
            for _ in "wb"
        )
        begin = time.perf_counter()
        for row, to in zip(x, y, strict=True):
            cn.layer_norm(row, None, w, b, out=to)
        spent += time.perf_counter() - begin
        (want, *_), bound = (
            oracle.layer_norm(x, (2,), w, b, 1e-5),
            oracle.tolerance(kind, shape[-1]),
        )
        np.testing.assert_allclose(y, want, rtol=bound, atol=bound * max(1, np.abs(want).max()))
        done += 1000
    each = 1e6 * spent / done
    print(
        f"{done} small calls, {each:.1f} us each, none wrong, in {time.monotonic() - start:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--dtypes", nargs="+", default=ALL_DTYPES)  # each compiles for minutes
    parser.add_argument("--small", type=int, metavar="CALLS")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's: the child uses NumPy
    with contextlib.suppress(ImportError):
        import pandas  # noqa: F401
    if given.small:
        small(given.small, given.seed)
    else:
        soak(given.seconds, given.seed, tuple(given.dtypes))


if __name__ == "__main__":
    main()
