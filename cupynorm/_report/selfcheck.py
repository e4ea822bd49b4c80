"""The self-check of `python -m cupynorm`: each path on real data against a long-double two-pass."""

import contextlib
import math
import os
import statistics
import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from cupynorm import _rules
from cupynorm._cpu.engine import without_numba
from cupynorm._libraries import to_host
from cupynorm._report.config import Config, import_fault, short
from cupynorm.functional import layer_norm, rms_norm

EPS = 1e-5
_REPEATS = 50  # calls that are timed
_MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}  # explicit bits
_PATHS = (
    ("cuda", "cupy"),
    ("cpu-numba", "numpy"),
    ("cpu-numpy", "numpy"),
    ("torch", "torch"),
    ("reference", "jax"),
    ("reference", "array-api-strict"),
)

Array = np.ndarray[Any, Any]


class Data(NamedTuple):
    """A named table of real numbers."""

    name: str
    x: np.ndarray[Any, np.dtype[np.float64]]  # (M, N)


class Unavailable(NamedTuple):
    """A path that cannot be checked here, and why."""

    path: str
    library: str
    why: str


class Backend(NamedTuple):
    """One path with the arrays of one library."""

    path: str
    library: str
    dtypes: tuple[str, ...]

    def put(self, a: Array) -> Any:
        """Array of this library with a's values."""
        if self.library == "cupy":
            there = import_module("cupy").empty(a.shape, a.dtype)
            there.set(a)  # by bytes: bfloat16 is foreign to CuPy
            return there
        if self.library == "torch":
            return _to_torch(a)
        name = "jax.numpy" if self.library == "jax" else self.library.replace("-", "_")
        return import_module(name).asarray(a)

    def wait(self, y: Any) -> None:
        """Return when y is computed."""
        if self.library == "cupy":
            import_module("cupy").cuda.get_current_stream().synchronize()
        elif self.library == "jax":
            y.block_until_ready()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Within this context calls take this path."""
        return without_numba() if self.path == "cpu-numpy" else contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Check:
    """One path on one table in one dtype; numbers are None where it failed."""

    op: str
    path: str
    library: str  # whose arrays it was given
    data: str
    shape: tuple[int, ...]
    dtype: str
    error: float | None = None  # largest of y, in units of epsilon(dtype) * max(1, abs(y))
    allowed: float | None = None
    seconds: float | None = None  # median of a call
    torch_ratio: float | None = None  # fastest call over torch's fastest; None without torch
    ok: bool = False  # y, mean and rstd are right
    note: str = ""  # what is wrong


def datasets() -> tuple[list[Data], str]:
    """Give scikit-learn's digits and breast-cancer tables; without it a seeded one and a remark."""
    try:
        sklearn = import_module("sklearn.datasets")
        digits, cancer = sklearn.load_digits().data, sklearn.load_breast_cancer().data
    except Exception as error:
        x = np.random.default_rng(0).gamma(2.0, 3.0, size=(1797, 64))
        remark = (
            f"scikit-learn's data are not there ({short(error)}): a seeded random table "
            "stands in; pip install 'cupynorm[demo]'"
        )
        return [Data("random", x)], remark
    return [Data("digits", digits), Data("breast-cancer", cancer)], ""


def find(config: Config) -> tuple[list[Backend], list[Unavailable]]:
    """List every path that can be checked here, and every other with the reason."""
    narrow = ("float16", "bfloat16")[: 1 if import_fault("ml_dtypes", None, "") else 2]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the GPU to the others
    there, absent = [], []
    for path, library in _PATHS:
        if path.startswith(("cpu", "cuda")):
            status = config.path(path)
            fault = None if status.available else (status.detail, status.way_out)
        else:
            fault = import_fault(library, config.versions[library], f"pip install {library}")
        if fault:
            absent.append(Unavailable(path, library, " -> ".join(fault)))
            continue
        dtypes = (*narrow, "float32", "float64")
        if library == "array-api-strict":
            dtypes = dtypes[-2:]
        elif library == "jax" and not import_module("jax").config.jax_enable_x64:
            dtypes = dtypes[:-1]
        there.append(Backend(path, library, dtypes))
    return there, absent


def _to_torch(a: Array) -> Any:
    torch = import_module("torch")
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def check_backend(backend: Backend, data: list[Data]) -> Iterator[Check]:
    """Check one path on every table and dtype that it takes, and RMS norm on the first in float32.

    An exception is a failed check.
    """
    cases = [("layer_norm", table, dtype) for table in data for dtype in backend.dtypes]
    for op, table, dtype in (*cases, ("rms_norm", data[0], "float32")):
        facts = op, backend.path, backend.library, table.name, table.x.shape, dtype
        try:
            with backend.active():
                yield Check(*facts, **_check(backend, op, table.x, dtype))
        except Exception as error:
            yield Check(*facts, note=short(error))


def _check(backend: Backend, op: str, table: Array, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    n = table.shape[1]
    function: Any = layer_norm if op == "layer_norm" else rms_norm
    bias = [0.1 * rng.standard_normal(n)] if op == "layer_norm" else []
    given = table, 1.0 + 0.1 * rng.standard_normal(n), *bias
    host = [a.astype(_rules.numpy_dtype(dtype)) for a in given]
    x, *affine = map(backend.put, host)

    def call() -> Any:
        y = function(x, n, *affine, EPS)
        backend.wait(y)
        return y

    got = [to_host(a) for a in (call(), *function(x, n, *affine, EPS, return_stats=True)[1:])]
    error, allowed, note = _judge(got, exact(*host), dtype)
    times = timeit.repeat(call, number=1, repeat=_REPEATS)
    beside = _torch_seconds("cuda" if backend.path == "cuda" else "cpu", op, host)
    return {
        "error": error if math.isfinite(error) else None,
        "allowed": allowed,
        "seconds": statistics.median(times),
        "torch_ratio": beside and min(times) / beside,
        "ok": not note,
        "note": note,
    }


def exact(*given: Any, eps: float = EPS) -> list[Array]:
    """Two passes over x in long double: y, mean, rstd; without a bias RMS norm's y and rstd."""
    x, weight, *bias = (np.asarray(a).astype(np.longdouble) for a in given)
    mean = [x.mean(axis=-1, keepdims=True) for _ in bias]
    d = sum((-m for m in mean), x)
    rstd = 1.0 / np.sqrt((d * d).mean(axis=-1, keepdims=True) + np.longdouble(eps))
    return [sum(bias, d * rstd * weight), *mean, rstd]


def _judge(got: list[Array], want: list[Array], dtype: str) -> tuple[float, float, str]:
    """Error of y, what is allowed, and a sentence where something is wrong."""
    unit = 2.0 ** -_MANTISSA[dtype]  # from 1 to the next number; NumPy's finfo lacks bfloat16
    stats_unit = 2.0 ** -_MANTISSA["float64" if dtype == "float64" else "float32"]
    # One rounding to y's dtype, and in the dtype of the statistics a few operations per element
    # and as many roundings as a tree of N terms is deep.
    stats_allowed = 4.0 + math.log2(want[0].shape[1])
    allowed = 1.0 + stats_allowed * stats_unit / unit
    faults, errors = [], []
    names = ("y", "mean", "rstd") if len(want) == 3 else ("y", "rstd")
    for name, mine, its in zip(names, got, want, strict=True):
        one, most = (unit, allowed) if name == "y" else (stats_unit, stats_allowed)
        if mine.shape != its.shape:
            errors.append(math.nan)
            faults.append(f"{name} has shape {mine.shape}, not {its.shape}")
            continue
        worst = np.max(np.abs(mine.astype(np.longdouble) - its) / np.maximum(1, np.abs(its)))
        errors.append(float(worst) / one)
        if not errors[-1] <= most:  # so that NaN is wrong
            faults.append(f"{name} is off by {errors[-1]:.3g} epsilon, {most:.3g} is allowed")
    if str(got[0].dtype) != dtype:
        faults.append(f"y has dtype {got[0].dtype}, not {dtype}")
    return errors[0], allowed, "; ".join(faults)


def _torch_seconds(device: str, op: str, host: list[Array]) -> float | None:
    """Fastest call of torch's own function on the same numbers; None without torch.

    Torch has its own number of threads and then one: on a busy machine its threads wait for each
    other for milliseconds, and a ratio to that would be flattery.
    """
    try:
        torch = import_module("torch")
        x, *affine = (_to_torch(a).to(device) for a in host)
    except Exception:
        return None

    def call() -> None:
        getattr(torch.nn.functional, op)(x, x.shape[1:], *affine, EPS)
        if device == "cuda":
            torch.cuda.synchronize()

    threads = torch.get_num_threads()
    call()
    try:
        times = timeit.repeat(call, number=1, repeat=_REPEATS)
        torch.set_num_threads(1)
        return min(times + timeit.repeat(call, number=1, repeat=_REPEATS))
    finally:
        torch.set_num_threads(threads)


def as_text(checks: list[Check], absent: list[Unavailable], remark: str) -> str:
    """Checks as an aligned table, then what could not be checked."""
    words, numbers = ("path", "arrays", "data", "shape", "dtype"), ("error", "allowed", "time")
    columns = "norm", *words, *numbers, "x torch", ""
    rows: list[tuple[str, ...]] = [columns]
    for c in checks:
        time = "-" if c.seconds is None else f"{c.seconds * 1e3:.3f} ms"
        error, allowed, ratio = (
            "-" if value is None else f"{value:.2f}"
            for value in (c.error, c.allowed, c.torch_ratio)
        )
        what = c.op, c.path, c.library, c.data, f"{c.shape[0]}x{c.shape[1]}", c.dtype
        verdict = "ok" if c.ok else f"WRONG: {c.note}"
        rows.append((*what, error, allowed, time, ratio, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["self-check against float64 or wider, two passes", *([remark] if remark else [])]
    for row in rows:
        # Words to the left, numbers to the right.
        named, counted = map(str.ljust, row[:6], widths), map(str.rjust, row[6:10], widths[6:])
        lines.append("  " + "  ".join([*named, *counted, row[10]]).rstrip())
    lines.append("  error: largest |y - exact| in units of epsilon(dtype) * max(1, |exact|)")
    lines.append("  time: median of a call; x torch: fastest call over that of torch's function")
    lines += [f"not checked: {a.path} with {a.library}: {a.why}" for a in absent]
    lines.append(f"{sum(c.ok for c in checks)} of {len(checks)} checks right")
    return "\n".join(lines)
