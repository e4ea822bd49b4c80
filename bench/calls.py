"""What a small call costs in Python: time, byte codes, and machine instructions against budgets.

    python -m bench.calls [--seconds 5] [--to bench/results]      # on arrays, tensors, and a stand-in
    python -m bench.calls --instructions [--update]               # by valgrind: `make instructions`

float32 8x64 with weight and bias. For CuPy arrays there is no GPU here, and a launch only counts, so
that the Python of a call is timed. Instructions are those of CuPy calls, and of NumPy calls with
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
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

import cupynorm as cn
from bench.cases import EPS, FWD, Case
from bench.check import Given, limit
from bench.clock import spread
from bench.contender import Unavailable, refuse
from bench.data import make_inputs
from bench.device import captured
from bench.machine import ROOT, THREADS, describe, threads
from bench.peers import empty_kernel, tensors
from bench.table import Table, about, write

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
    """The calls of one library."""
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


def interleaved(calls: dict[Any, Callable[[], Any]], seconds: float) -> dict[Any, Any]:
    """Times of each call; they take turns."""
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        timeit.timeit(call, number=COUNT)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(next(iter(samples.values()))) < 5:
        for key, call in calls.items():
            samples[key].append(timeit.timeit(call, number=COUNT) / COUNT)
    return {key: spread(values) for key, values in samples.items()}


def cpu_calls() -> dict[tuple[str, str], Callable[[], Any]]:
    """By library and call; refused if any is wrong."""
    import torch

    torch.set_num_threads(threads())
    arrays = hosts()
    given = Given(np, *arrays[:1], None, *arrays[1:3])
    x, w, b, y = map(torch.from_numpy, hosts())
    found = {("NumPy", k): call for k, call in ways(*arrays).items()}
    found |= {("torch", k): call for k, call in ways(x, w, b, y).items()}
    found["torch", "torch"] = lambda: torch.nn.functional.layer_norm(x, (N,), w, b, EPS)
    for key, call in found.items():
        if (error := given.error_of_y(np.asarray(call()))) > limit("float32", N, ours=True):
            sys.exit(f"{key} is wrong: error {error:.3g}")
    return found


# -- counts that no other load moves ----------------------------------------------------------------


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
    __slots__ = ("device_id", "ptr")

    def __init__(self, ptr: int) -> None:
        self.ptr, self.device_id = ptr, 0


_ROW_MAJOR, _DEVICE = SimpleNamespace(c_contiguous=True), SimpleNamespace(id=0)
_POOL = _Memory(1 << 44)  # an allocation that costs next to nothing
_STRIDES: dict[Any, tuple[int, ...]] = {}


class _Array:
    """What a launcher reads of a row-major array, as plain attributes."""

    __slots__ = ("data", "device", "dtype", "flags", "shape", "strides")
    # Classification asks the type for it.
    __cuda_array_interface__ = property(lambda self: {})
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)

    def __init__(self, shape: tuple[int, ...], dtype: Any, data: _Memory | None = None) -> None:
        self.shape, self.dtype, self.data = shape, dtype, data or _POOL
        if (shape, dtype) not in _STRIDES:
            dims = range(len(shape))
            _STRIDES[shape, dtype] = tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in dims)
        self.strides = _STRIDES[shape, dtype]
        self.flags, self.device = _ROW_MAJOR, _DEVICE


class _Kernel:
    """`RawKernel` whose function counts its launches."""

    def __init__(self, source: str, name: str) -> None:
        self.launches = self.max_dynamic_shared_size_bytes = 0

    @property
    def kernel(self) -> Any:
        def launch(
            grid: Any, block: Any, arguments: Any, shared: int = 0, stream: Any = None
        ) -> None:
            self.launches += 1

        return launch


@contextlib.contextmanager
def counting_cupy() -> Iterator[Any]:
    """`import cupy` gives such a CuPy inside; ``from_numpy`` makes an array of one."""
    from tests.simt.cupy_stand_in import simulated_cupy

    with simulated_cupy(reload=("cupynorm._cuda.arrays",)) as cupy:
        kind = type("ndarray", (_Array,), {"__module__": "cupy", "__slots__": ()})
        from_numpy = lambda a: kind(a.shape, a.dtype, _Memory(a.ctypes.data))  # noqa: E731
        cupy.cuda.runtime.getDevice = itertools.repeat(0).__next__  # a compiled function, as CuPy's
        cupy.ndarray, cupy.RawKernel, cupy.from_numpy = kind, _Kernel, from_numpy
        cupy.empty_like = lambda x, order="K": kind(x.shape, x.dtype)
        yield cupy


def without_loops() -> None:
    """Let small NumPy calls end where the compiled loops would begin."""
    from cupynorm._cpu import at_once

    def ready_for(shape: Any, dtype: Any, axes: Any, eps: float) -> Any:
        none = np.empty(0, np.float32)
        shapes = None, None, none.dtype, shape[-1:], none, ()
        return at_once.Ready(lambda *_: 0, lambda *_: 0, np.empty, *shapes, (eps,))

    at_once.ready_for = ready_for


def counted_calls() -> None:
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


def instructions() -> dict[str, int]:
    """Machine instructions of one call, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m", "bench.calls"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "CUPYNORM_NUMBA": "0"}
        about = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run([*command, "--child"], check=False, **about)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

        def part(path: Path) -> int:  # the file without a number is what came last
            number = path.suffix.lstrip(".")
            return int(number) if number.isdigit() else sys.maxsize

        parts = []
        for path in sorted(Path(folder).glob("out*"), key=part):
            found = re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE)
            parts.append(int(found[1]) if found else 0)
        names = re.findall("^counted (.*)$", done.stdout, re.MULTILINE)
    return {name: parts[2 * i + 1] // COUNTED for i, name in enumerate(names)}


def check_instructions(update: bool) -> int:
    """Counts against budgets; 1 if one is over."""
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
    over = [
        name for name, count in counts.items() if count > HEADROOM * budgets.get(name, math.inf)
    ]
    if over:
        print(f"over budget: {', '.join(over)}; find out why, or --update with the reason")
    return int(bool(over))


# -- on a GPU: host time of warm calls on small arrays, and of a process's first call --------------

FIRST = (
    "import time, cupy, cupynorm as cn; x = cupy.ones((8, 1000), dtype='float32'); "
    "cupy.cuda.runtime.deviceSynchronize(); t = time.perf_counter(); cn.layer_norm(x); "
    "cupy.cuda.runtime.deviceSynchronize(); print('seconds', time.perf_counter() - t)"
)


def on_gpu(device: Any, table: Table) -> str:
    """Add rows for small shapes; a sentence on the result."""
    said = []
    for shape in ((8, 64), (512, 768)):
        case = Case(FWD, "python", "float32", shape)
        inputs, timed, rows = make_inputs(device, case), {}, {}
        for name, build in _gpu_calls(device, inputs).items():
            rows[name] = about(case) | {"op": "python_call", "peer": name, "method": "host"}
            try:
                call, y = build()
                device.synchronize()
                error, most = inputs.judge(0, (y,), True, EPS) if y is not None else (0.0, 0.0)
                rows[name] |= {"status": "ok" if error <= most else "wrong", "error": error}
                if error <= most:
                    timed[name] = call
            except Unavailable as reason:
                rows[name] |= {"status": "skipped", "note": str(reason)}
        times = _host_times(device, timed)
        for name, t in times.items():
            rows[name] |= {"median_us": t.median, "p10_us": t.p10, "p90_us": t.p90}
            rows[name] |= {"best_us": t.best, "rounds": t.rounds}
            rows[name]["ratio_to_peer"] = times["cupynorm"].median / t.median
        table.add(rows.values())
        said.append(f"{case.label}: " + ", ".join(f"{n} {t.median:.1f}" for n, t in times.items()))
    return "simulated" if device.simulated else "us of the host, " + "; ".join(said)


def _host_times(device: Any, timed: Calls) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in timed}
    count, rounds = (1, 1) if device.simulated else (COUNT, ROUNDS)
    for _ in range(rounds):
        for name, call in timed.items():
            device.synchronize()  # the queue is empty at the start of each sample
            samples[name].append(timeit.timeit(call, number=count) / count)
    return {name: spread(values) for name, values in samples.items()}


def _gpu_calls(device: Any, inputs: Any) -> dict[str, Callable[[], tuple[Callable[[], Any], Any]]]:
    """Each gives a function to time and the y that it leaves (None: nothing to check)."""
    x, y, w, b, n = inputs.x[0], inputs.y[0], inputs.weight, inputs.bias, inputs.case.N

    def with_out() -> Any:
        return cn.layer_norm(x, n, w, b, EPS, out=y)

    def prepared() -> Any:
        f = cn.prepare(x, n, w, b, EPS)
        return lambda: f(x, out=y), f(x, out=y)

    def replayed() -> Any:
        with_out()  # compiled before the capture
        batch = captured(device, with_out, 1)
        batch.replay()
        return batch.replay, y

    def of_torch(name: str) -> Any:
        if device.simulated:
            refuse("torch cannot see simulated memory")
        import torch

        tx, tw, tb = (tensors.as_torch(torch, a) for a in (x, w, b))
        if name == "prepared on tensors":
            f, ty = cn.prepare(tx, n, tw, tb, EPS), torch.empty_like(tx)
            call = lambda: f(tx, out=ty)  # noqa: E731
        else:
            function = tensors.FUNCTIONS["layer_norm"][name](torch, n)
            call = lambda: function(tx, tw, tb)  # noqa: E731
        made = call()
        torch.cuda.synchronize()
        return call, tensors.from_torch(device, made)

    without = lambda: cn.layer_norm(x, n, w, b, EPS)  # noqa: E731
    launch = empty_kernel(device)
    on_tensors = ("prepared on tensors", *tensors.FUNCTIONS["layer_norm"])
    return {
        "cupynorm": lambda: (without, without()),
        "cupynorm out=": lambda: (with_out, with_out()),
        "cupynorm prepared out=": prepared,
        "cupynorm graph replay": replayed,
        **{name: lambda name=name: of_torch(name) for name in on_tensors if "compile" not in name},
        "RawKernel launch": lambda: (lambda: launch(0), None),
    }


def first_call(device: Any, table: Table) -> str:
    """Time a fresh process's first call: without and with CuPy's disk cache."""
    if device.simulated:
        return "simulated"
    said = []
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
            said.append(f"{name} {seconds[:6] or 'failed'} s")
    return ", ".join(said)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    parser.add_argument("--instructions", action="store_true", help="count them, against budgets")
    parser.add_argument("--update", action="store_true", help="write the counts as new budgets")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        counted_calls()
        return 0
    if given.instructions:
        return check_instructions(given.update)
    host, calls = describe(), cpu_calls()
    with counting_cupy() as cupy:
        arrays = map(cupy.from_numpy, hosts())
        calls |= {("CuPy", k): call for k, call in ways(*arrays).items()}
        times = interleaved(calls, given.seconds)
        counts = {key: opcodes(call) for key, call in calls.items()}
    rows, torchs = [], times["torch", "torch"]
    for (library, call), t in times.items():
        row = {"library": library, "call": call, "M": M, "N": N, "ns": round(1e3 * t.median)}
        row |= {"best ns": round(1e3 * t.best), "over torch": round(t.median / torchs.median, 3)}
        rows.append(row | {"opcodes": counts[library, call]} | host)
        print(
            f"{library:6}{call:24}"
            + "".join(f"{row[k]:>9}" for k in ("ns", "best ns", "over torch"))
        )
    if given.to:
        print(write(rows, given.to, "launch-cost"))
    return 0


if __name__ == "__main__":
    os.environ.setdefault(THREADS, "2")
    sys.exit(main())
