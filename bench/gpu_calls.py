"""What a call costs in Python: host time of warm calls on small arrays, and of the first call."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS, largest_error, limit
from bench.gpu_clock import capture, summarize
from bench.gpu_contender import Unavailable
from bench.gpu_copy import empty_kernel
from bench.gpu_data import Inputs, make_inputs
from bench.gpu_grid import Case
from bench.gpu_machine import ROOT
from bench.gpu_session import Session
from bench.gpu_table import Table
from bench.peers import as_torch, load, torch_function

__all__ = ["calls", "first_call"]

SHAPES = ((8, 64), (512, 768))
CALLED = ("torch-eager", "liger", "quack", "flash-attn", "apex", "apex-fast",
          "transformer-engine", "cudnn")  # fmt: skip
CALLS = 300  # of one sample: few enough for the launch queue, which would make the host wait
ROUNDS = 25

FIRST = (
    "import time, cupy, cupynorm as cn; x = cupy.ones((8, {N}), dtype='float32'); "
    "cupy.cuda.runtime.deviceSynchronize(); t = time.perf_counter(); cn.layer_norm(x); "
    "cupy.cuda.runtime.deviceSynchronize(); print('seconds', time.perf_counter() - t)"
)


def calls(session: Session, table: Table) -> str:
    """Add rows for each small shape; a sentence on the result."""
    sentences = []
    for rows, N in SHAPES:
        case = Case("float32", rows, N, "python")
        inputs = make_inputs(session, case)
        timed: dict[str, Callable[[], Any]] = {}
        notes: dict[str, str] = {}
        for name, build in _callables(session, case, inputs).items():
            try:
                function, result = build()
                notes[name] = _wrong(session, case, inputs, name, result)
                if not notes[name]:
                    timed[name] = function
            except Unavailable as reason:
                notes[name] = f"skipped: {reason}"
        times = _interleave(session, timed)
        table.add([_row(case, n, notes[n], times) for n in notes])
        sentences.append(_sentence(case, times))
    return "simulated" if session.simulated else "; ".join(sentences)


def _callables(session: Session, case: Case, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Each gives a function to time and the y that it leaves (None: nothing to check)."""
    x, y, weight, bias = inputs.x[0], inputs.y[0], inputs.weight, inputs.bias

    def with_out() -> Any:
        return cn.layer_norm(x, case.N, weight, bias, EPS, out=y)

    def without_out() -> Any:
        return cn.layer_norm(x, case.N, weight, bias, EPS)

    def of_torch(name: str) -> Any:
        torch = _torch(session)
        tensors = [as_torch(torch, a) for a in (x, weight, bias)]
        function = torch_function(name, torch, case.N)
        made = function(*tensors)
        torch.cuda.synchronize()
        return lambda: function(*tensors), session.cupy.from_dlpack(made)

    def prepared() -> Any:
        f = cn.prepare(x, case.N, weight, bias, EPS)
        return lambda: f(x, out=y), f(x, out=y)

    def replayed() -> Any:
        with_out()  # compiled before the capture
        batch = capture(session, with_out, 1)
        if batch.method != "graph":
            raise Unavailable(session.notes[-1])
        batch.replay()
        return batch.replay, y

    def torch_prepared() -> Any:
        torch = _torch(session)
        tensors = [as_torch(torch, a) for a in (x, weight, bias)]
        f, to = cn.prepare(tensors[0], case.N, *tensors[1:], EPS), torch.empty_like(tensors[0])
        made = f(tensors[0], out=to)
        torch.cuda.synchronize()
        return lambda: f(tensors[0], out=to), session.cupy.from_dlpack(made)

    launch = empty_kernel(session)
    return {
        "cupynorm": lambda: (without_out, without_out()),
        "cupynorm out=": lambda: (with_out, with_out()),
        "cupynorm prepared out=": prepared,
        "cupynorm graph replay": replayed,
        "cupynorm.torch": lambda: of_torch("cupynorm.torch"),
        "cupynorm prepared on tensors out=": torch_prepared,
        **{name: lambda n=name: of_torch(n) for name in CALLED},
        "RawKernel launch": lambda: (lambda: launch.call(0), None),
    }


def _torch(session: Session) -> Any:
    if session.simulated:
        msg = "torch cannot see simulated memory"
        raise Unavailable(msg)
    return load("torch")


def _wrong(session: Session, case: Case, inputs: Inputs, name: str, y: Any) -> str:
    session.synchronize()
    if y is None:
        return ""
    arrays = (inputs.x[0], inputs.weight, inputs.bias, y)
    error = largest_error(session.xp, *(session.plain(a) for a in arrays))
    right = error <= limit(case.dtype, case.N, name.startswith("cupynorm"))
    return "" if right else f"wrong: error {error:.3g}"


def _interleave(session: Session, timed: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in timed}
    count, rounds = (1, 1) if session.simulated else (CALLS, ROUNDS)
    for _ in range(rounds):
        for name, function in timed.items():
            session.synchronize()  # the queue is empty at the start of each sample
            begin = time.perf_counter()
            for _ in range(count):
                function()
            samples[name].append(1e6 * (time.perf_counter() - begin) / count)
            session.synchronize()
    return {name: summarize(values) for name, values in samples.items()}


def _row(case: Case, name: str, note: str, times: dict[str, Any]) -> dict[str, Any]:
    status = note.partition(":")[0] or "ok"
    row = {"op": "python_call", "dtype": case.dtype, "weight_dtype": case.dtype, "peer": name}
    row |= {"rows": case.rows, "N": case.N, "layout": "C", "method": "host"}
    row |= {"status": status, "note": note.partition(": ")[2]}
    if name in times:
        t = times[name]
        row |= {"median_us": t.median, "p10_us": t.p10, "p90_us": t.p90, "rounds": t.rounds}
        row["ratio_to_peer"] = times["cupynorm"].median / t.median if "cupynorm" in times else ""
    return row


def _sentence(case: Case, times: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {t.median:.1f}" for name, t in times.items())
    said = f"{case.rows}x{case.N}: {shown} µs"
    if {"cupynorm.torch", "torch-eager"} <= set(times):
        ratio = times["cupynorm.torch"].median / times["torch-eager"].median
        said += f" (cupynorm.torch over torch-eager: {ratio:.2f})"
    return said


def first_call(session: Session, table: Table, N: int = 1000) -> str:
    """Time a fresh process's first call: without and with CuPy's disk cache."""
    if session.simulated:
        return "simulated"
    sentences = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("compiled", "from the disk cache"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST.format(N=N)],
                cwd=ROOT,
                env={**os.environ, "CUPY_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = done.stdout.split("seconds")[-1].strip()
            good = done.returncode == 0 and bool(seconds)
            row = {"op": "first_call", "dtype": "float32", "rows": 8, "N": N, "method": "host"}
            row |= {"peer": "cupynorm", "kernel": name, "status": "ok" if good else "error"}
            row |= {"median_us": 1e6 * float(seconds)} if good else {"note": done.stderr[-300:]}
            table.add([row])
            sentences.append(f"{name} {float(seconds):.3f} s" if good else f"{name}: failed")
    return ", ".join(sentences)
