"""What a small call costs in Python: time, byte codes, and machine instructions against budgets.

    python -m bench.calls [--seconds 5] [--to bench/results]    # arrays, tensors, and a stand-in
    python -m bench.calls --instructions [--update]             # by valgrind: `make instructions`

float32 8x64 with weight and bias. For CuPy arrays there is no GPU here, and a launch only counts,
so that the Python of a call is timed. Instructions are those of CuPy calls, and of NumPy calls with
nothing in place of the compiled loops (numba under valgrind takes minutes to start). They depend on
the Python, on NumPy and on the C library: bench/budgets.json holds those of one machine.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

import cupynorm as cn
from bench import command_line, saved
from bench.cases import EPS, FWD, Case
from bench.check import Given, demand
from bench.contender import Batch, Builder, Contender, host_times
from bench.device import Device, Gpu, captured
from bench.machine import ROOT, THREADS, describe, threads
from bench.peers import contenders, empty_kernel
from bench.table import Table, dated, sweep

M, N = 8, 64
COUNT = 300  # calls of one sample: few enough for a launch queue, which would make the host wait
ROUNDS = 25
BUDGETS = Path(__file__).with_name("budgets.json")
# Other builds of one Python version differ by some percent, 3.11 to 3.13 by 15.
HEADROOM = 1.25
COUNTED = 200  # calls between two of valgrind's marks
PACKAGE = str(Path(cn.__file__).parent)
Calls = dict[str, Callable[[], Any]]


def ways(x: Any, w: Any, b: Any, y: Any) -> Calls:
    f = cn.prepare(x, N, w, b, EPS)
    return {
        "layer_norm(x)": lambda: cn.layer_norm(x, N, w, b, EPS),
        "layer_norm(x, out=y)": lambda: cn.layer_norm(x, N, w, b, EPS, out=y),
        "prepared f(x)": lambda: f(x),
        "prepared f(x, out=y)": lambda: f(x, out=y),
    }


def hosts() -> list[np.ndarray]:
    """x (M, N), weight (N,), bias (N,), y (M, N)."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s, np.float32) for s in ((M, N), N, N, (M, N))]


def cpu_calls() -> dict[tuple[str, str], Callable[[], Any]]:
    """By library and call; refused if any is wrong."""
    import torch

    torch.set_num_threads(threads())
    arrays, (x, w, b, y) = hosts(), map(torch.from_numpy, hosts())
    found = {("NumPy", k): call for k, call in ways(*arrays).items()}
    found |= {("torch", k): call for k, call in ways(x, w, b, y).items()}
    found["torch", "torch"] = lambda: torch.nn.functional.layer_norm(x, (N,), w, b, EPS)
    given = Given(np, arrays[0], None, *arrays[1:3])
    for key, call in found.items():
        demand(key, given.error_of_y(np.asarray(call())), "float32", N)
    return found


# -- counts that no other load moves --------------------------------------------------------------


def opcodes(call: Callable[[], Any], warm: int = 3) -> int:
    """Byte codes of frames from `cupynorm/` in one call, after some that are not counted."""
    for _ in range(warm):
        call()
    count = 0

    def within(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return within

    def entered(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return within

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class _Memory:
    __slots__ = ("device_id", "ptr")  # a namespace's attributes would be a tenth of a call

    def __init__(self, ptr: int) -> None:
        self.ptr, self.device_id = ptr, 0


class _Array:
    """What a launcher reads of a row-major array, as plain attributes."""

    __slots__ = ("data", "device", "dtype", "flags", "shape", "strides")
    # Classification asks the type for it.
    __cuda_array_interface__ = property(lambda self: {})
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)

    def __init__(self, shape: tuple[int, ...], dtype: Any, data: Any = None) -> None:
        self.shape, self.dtype, self.data = shape, dtype, data or _POOL
        if (shape, dtype) not in _STRIDES:
            _STRIDES[shape, dtype] = np.empty(shape, dtype).strides
        self.strides = _STRIDES[shape, dtype]
        self.flags, self.device = _ROW_MAJOR, _DEVICE


_ROW_MAJOR, _DEVICE = SimpleNamespace(c_contiguous=True), SimpleNamespace(id=0)
_POOL = _Memory(1 << 44)  # an allocation that costs next to nothing
_STRIDES: dict[Any, tuple[int, ...]] = {}


class _Kernel:
    """`RawKernel` whose function counts its launches."""

    def __init__(self, source: str, name: str) -> None:
        self.launches = self.max_dynamic_shared_size_bytes = 0
        self.kernel = self._launch

    def _launch(self, *_: Any) -> None:
        self.launches += 1


@contextlib.contextmanager
def counting_cupy() -> Iterator[Any]:
    """`import cupy` gives such a CuPy inside; ``from_numpy`` makes an array of one."""
    from tests.ptx.cupy_stand_in import simulated_cupy

    with simulated_cupy(reload=("cupynorm._cuda.arrays",)) as cupy:
        kind = type("ndarray", (_Array,), {"__module__": "cupy", "__slots__": ()})
        from_numpy = lambda a: kind(a.shape, a.dtype, _Memory(a.ctypes.data))  # noqa: E731
        cupy.cuda.runtime.getDevice = itertools.repeat(0).__next__  # a compiled function, as CuPy's
        cupy.ndarray, cupy.RawKernel, cupy.from_numpy = kind, _Kernel, from_numpy
        cupy.empty_like = lambda x, order="K": kind(x.shape, x.dtype)
        yield cupy


def without_loops() -> None:
    """Let small NumPy calls end where the compiled loops would begin."""
    from cupynorm._cpu import engine

    engine.state = lambda: (True, "")  # type: ignore[assignment]
    plan = SimpleNamespace(at=0, dense=True)
    engine.small_normalizer = lambda *_: (lambda *_: False, plan)


def counted_calls() -> int:
    """Under valgrind: each call some times between two marks, for which it asks its parent's id."""
    without_loops()
    with counting_cupy() as cupy:
        for library, take in (("NumPy", lambda a: a), ("CuPy", cupy.from_numpy)):
            for name, call in ways(*map(take, hosts())).items():
                if "out=" in name:
                    for _ in range(20):
                        call()
                    os.getppid()  # ends what came before
                    for _ in range(COUNTED):
                        call()
                    os.getppid()
                    print("counted", library, name)
    return 0


def instructions() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m", "bench.calls"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "CUPYNORM_NUMBA": "0"}
        about = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run([*command, "--child"], check=False, **about)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        names = re.findall("^counted (.*)$", done.stdout, re.MULTILINE)
        # A file for each mark, of what came before it: the calls end at every second one.
        texts = [Path(folder, f"out.{2 * k + 2}").read_text() for k in range(len(names))]
    totals = [re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE) for text in texts]
    return {n: int(t[1]) // COUNTED for n, t in zip(names, totals, strict=True) if t}


def check_instructions(update: bool) -> int:
    if not shutil.which("valgrind"):
        sys.exit("valgrind is needed to count instructions. On Debian: apt-get install valgrind")
    counts, version = instructions(), ".".join(platform.python_version_tuple()[:2])
    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if update:
        kept.setdefault("instructions", {})[version] = counts
        BUDGETS.write_text(json.dumps(kept, indent=2) + "\n")
    budgets = kept.get("instructions", {}).get(version, {})
    for name, count in counts.items():
        print(f"{name:32}{count:8} instructions, budget {budgets.get(name)} + {HEADROOM - 1:.0%}")
    if over := [n for n, count in counts.items() if count > HEADROOM * budgets.get(n, math.inf)]:
        print(f"over budget: {', '.join(over)}; find out why, or --update with the reason")
    return int(bool(over))


# -- on a GPU: host time of warm calls on small arrays, and of a process's first call --------------

FIRST = (
    "import time, cupy, cupynorm as cn; x = cupy.ones((8, 1000), dtype='float32'); "
    "cupy.cuda.runtime.deviceSynchronize(); t = time.perf_counter(); cn.layer_norm(x); "
    "cupy.cuda.runtime.deviceSynchronize(); print('seconds', time.perf_counter() - t)"
)


class HostClock(Gpu):
    """Times what the host does in a loop of calls that the launch queue holds."""

    def batch(self, contender: Contender, inputs: Any) -> Batch:
        batch, count = Device.batch(self, contender, inputs), 1 if self.simulated else COUNT

        def replay() -> None:
            with contender.scope():
                for _ in range(count):
                    contender.call(0)

        batch.replay, batch.calls, batch.method = replay, count, "host"
        return batch

    def turn(self, batch: Batch) -> float:
        self.synchronize()  # the queue is empty at the start of each sample
        begin = time.perf_counter()
        batch.replay()
        took = time.perf_counter() - begin
        self.synchronize()
        return took

    def rounds(self, once: float, share: float) -> int:
        return 1 if self.simulated else ROUNDS


def on_gpu(device: Gpu, table: Table, peers: Sequence[str]) -> str:
    """Add rows of small shapes, in the group `python`; a sentence on the result."""
    clock, before = HostClock(device.lib, device.time_left(), device.simulated), len(table.rows)
    clock.stream = device.lib.cuda.Stream.null

    def builders(inputs: Any) -> list[Builder]:
        x, n, affine = inputs.x[0], inputs.case.N, (inputs.weight, inputs.bias)
        f, empty, y = cn.prepare(x, n, *affine, EPS), empty_kernel(device), inputs.y[0]

        def replayed() -> Contender:
            batch = captured(device, lambda: f(x, out=y), 1)
            return Contender(lambda i: batch.replay() or y, ours=True)

        chosen = [p for p in peers if "compile" not in p and not p.startswith(("copy", "formula"))]
        return [
            *contenders(inputs, chosen),
            ("cupynorm prepared out=", lambda: Contender(lambda i: f(x, out=y), ours=True)),
            ("cupynorm graph replay", replayed),
            ("RawKernel launch", lambda: Contender(empty, arrived=lambda i, made: True)),
        ]

    cases = [Case(FWD, "python", "float32", shape) for shape in ((M, N), (512, 768))]
    sweep(clock, table, cases, builders)
    timed = [r for r in table.rows[before:] if r["group"] == "python" and r["median_us"] != ""]
    return ", ".join(f"{r['shape']} {r['peer']} {r['median_us']} us" for r in timed) or "simulated"


def first_call(device: Gpu, table: Table) -> str:
    """Time a fresh process's first call: without and with CuPy's disk cache."""
    if device.simulated:
        return "simulated"
    with tempfile.TemporaryDirectory() as cache:
        about = {"cwd": ROOT, "env": {**os.environ, "CUPY_CACHE_DIR": cache}, "text": True}
        for name in ("compiled", "from the disk cache"):
            command = [sys.executable, "-c", FIRST]
            done = subprocess.run(command, capture_output=True, check=False, **about)
            seconds = done.stdout.split("seconds")[-1].strip()
            row = {"op": "first_call", "dtype": "float32", "M": 8, "N": 1000, "method": "host"}
            row |= {"peer": "cupynorm", "kernel": name, "status": "ok" if seconds else "error"}
            row |= {"median_us": 1e6 * float(seconds)} if seconds else {"note": done.stderr[-300:]}
            table.add([row])
    return ", ".join(f"{r['kernel']} {r['median_us'] or 'failed'} us" for r in table.rows[-2:])


def main(argv: list[str] | None = None) -> int:
    parser = command_line("calls", __doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    saved(parser)
    parser.add_argument("--instructions", action="store_true", help="count them, against budgets")
    parser.add_argument("--update", action="store_true", help="write the counts as new budgets")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        return counted_calls()
    if given.instructions:
        return check_instructions(given.update)
    host, calls = describe(), cpu_calls()
    with counting_cupy() as cupy:
        arrays = map(cupy.from_numpy, hosts())
        calls |= {("CuPy", k): call for k, call in ways(*arrays).items()}
        times = host_times(calls, given.seconds)
        counts = {key: opcodes(call) for key, call in calls.items()}
    rows, torchs = [], times["torch", "torch"]
    for (library, call), t in times.items():
        row = {"library": library, "call": call, "M": M, "N": N, "ns": round(1e3 * t.median)}
        row |= {"best ns": round(1e3 * t.best), "over torch": round(t.median / torchs.median, 3)}
        rows.append(row | {"opcodes": counts[library, call]} | host)
        shown = "".join(f"{row[k]:>9}" for k in ("ns", "best ns", "over torch"))
        print(f"{library:6}{call:24}{shown}")
    if given.to:
        print(dated(rows, given.to, "launch-cost"))
    return 0


if __name__ == "__main__":
    os.environ.setdefault(THREADS, "2")
    sys.exit(main())
