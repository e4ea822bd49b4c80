"""The self-check of `python -m cupynorm`: each path on real data against a long-double two-pass."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from cupynorm import _problem
from cupynorm._report import backends as _backends
from cupynorm._report import probe as _probe
from cupynorm.functional import layer_norm

__all__ = ["Check", "Data", "check_backend", "datasets", "exact"]

EPS = 1e-5
_ROUNDS = (3, 200)  # of interleaved timing, least and most
_SECONDS = 0.04  # at most this long for a turn of timing, the least rounds apart


@dataclass(frozen=True, slots=True)
class Data:
    """A named table of real numbers."""

    name: str
    x: np.ndarray[Any, np.dtype[np.float64]]  # (M, N)


@dataclass(frozen=True, slots=True)
class Check:
    """One path on one table in one dtype.

    Attributes
    ----------
    path, library : str
        Which code ran, and whose arrays it was given.
    data, shape, dtype
        What was normalized.
    error, allowed : float or None
        Largest error of y, in units of epsilon(dtype) * max(1, abs(y)), and the most that passes.
    seconds : float or None
        Median time of a call; None where it failed.
    torch_ratio : float or None
        Its fastest call over the fastest of torch's layer_norm on the same machine, which has its
        own number of threads or one, whichever is faster; None without torch.
    ok : bool
        Whether y, mean and rstd are right.
    note : str
        What is wrong, if anything.
    """

    path: str
    library: str
    data: str
    shape: tuple[int, int]
    dtype: str
    error: float | None
    allowed: float | None
    seconds: float | None
    torch_ratio: float | None
    ok: bool
    note: str


def datasets() -> tuple[list[Data], str]:
    """Give scikit-learn's digits and breast-cancer tables; without it a seeded one and a remark."""
    try:
        sklearn = import_module("sklearn.datasets")
        digits, cancer = sklearn.load_digits().data, sklearn.load_breast_cancer().data
    except Exception as error:
        x = np.random.default_rng(0).gamma(2.0, 3.0, size=(1797, 64))
        remark = (
            f"scikit-learn's data are not there ({_probe.short(error)}): a seeded random table "
            "stands in; pip install 'cupynorm[demo]'"
        )
        return [Data("random", x)], remark
    return [Data("digits", digits), Data("breast-cancer", cancer)], ""


def exact(
    x: Any, weight: Any, bias: Any, eps: float = EPS
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two passes over rows of x in long double, at least as wide as float64: y, mean, rstd."""
    x, weight, bias = (np.asarray(a).astype(np.longdouble) for a in (x, weight, bias))
    mean = x.mean(axis=-1, keepdims=True)
    d = x - mean
    rstd = 1.0 / np.sqrt((d * d).mean(axis=-1, keepdims=True) + np.longdouble(eps))
    return d * rstd * weight + bias, mean, rstd


def check_backend(backend: _backends.Backend, data: list[Data]) -> Iterator[Check]:
    """Check one path on every table and dtype that it takes; an exception is a failed check."""
    for table in data:
        for dtype in backend.dtypes:
            try:
                with backend.active():
                    yield _check(backend, table, dtype)
            except Exception as error:
                yield Check(
                    backend.path,
                    backend.library,
                    table.name,
                    _shape(table),
                    dtype,
                    error=None,
                    allowed=None,
                    seconds=None,
                    torch_ratio=None,
                    ok=False,
                    note=_probe.short(error),
                )


def _shape(table: Data) -> tuple[int, int]:
    m, n = table.x.shape
    return m, n


def _check(backend: _backends.Backend, table: Data, dtype: str) -> Check:
    rng = np.random.default_rng(1)
    n = table.x.shape[1]
    host = [
        a.astype(_problem.numpy_dtype(dtype))
        for a in (table.x, 1.0 + 0.1 * rng.standard_normal(n), 0.1 * rng.standard_normal(n))
    ]
    x, weight, bias = (backend.put(a) for a in host)

    def call() -> Any:
        y = layer_norm(x, n, weight, bias, EPS)
        backend.wait(y)
        return y

    y = backend.get(call())
    stats = layer_norm(x, n, weight, bias, EPS, return_stats=True)
    error, allowed, note = _judge(y, backend.get(stats.mean), backend.get(stats.rstd), host, dtype)
    seconds, ratio = _time(call, _backends.torch_call(backend.device, host, EPS))
    return Check(
        backend.path,
        backend.library,
        table.name,
        _shape(table),
        dtype,
        error=error if math.isfinite(error) else None,
        allowed=allowed,
        seconds=seconds,
        torch_ratio=ratio,
        ok=not note,
        note=note,
    )


def _judge(
    y: Any, mean: Any, rstd: Any, host: list[np.ndarray[Any, Any]], dtype: str
) -> tuple[float, float, str]:
    """Error of y, what is allowed, and a sentence where something is wrong."""
    x, weight, bias = host
    want_y, want_mean, want_rstd = exact(x, weight, bias)
    unit = _backends.epsilon(dtype)
    stats_unit = _backends.epsilon("float64" if dtype == "float64" else "float32")
    # One rounding to y's dtype, and in the dtype of the statistics a few operations per element
    # and as many roundings as a tree of N terms is deep.
    allowed = 1.0 + (4.0 + math.log2(want_y.shape[1])) * stats_unit / unit
    error = _worst(y, want_y, unit)
    stats_allowed = 4.0 + math.log2(want_y.shape[1])
    parts = {
        "y": (y, want_y, error, allowed),
        "mean": (mean, want_mean, _worst(mean, want_mean, stats_unit), stats_allowed),
        "rstd": (rstd, want_rstd, _worst(rstd, want_rstd, stats_unit), stats_allowed),
    }
    faults = [
        f"{name} has shape {got.shape}, not {want.shape}"
        if got.shape != want.shape
        else f"{name} is off by {off:.3g} epsilon, {most:.3g} is allowed"
        for name, (got, want, off, most) in parts.items()
        if not off <= most  # so that NaN is wrong
    ]
    if str(y.dtype) != dtype:
        faults.append(f"y has dtype {y.dtype}, not {dtype}")
    return error, allowed, "; ".join(faults)


def _worst(got: Any, want: np.ndarray[Any, Any], unit: float) -> float:
    """Largest error in units of epsilon * max(1, abs(want)); NaN where the shapes differ."""
    if got.shape != want.shape:
        return math.nan
    return (
        float(np.max(np.abs(got.astype(np.longdouble) - want) / np.maximum(1, np.abs(want)))) / unit
    )


def _time(ours: Callable[[], Any], torchs: Callable[[], Any] | None) -> tuple[float, float | None]:
    """Median seconds of a call, and its fastest over torch's fastest.

    Torch has its own number of threads and then one, and the better counts: on a busy machine its
    threads wait for each other for milliseconds, and a ratio to that would be flattery.
    """
    if torchs is None:
        return statistics.median(_take_turns(ours)[0]), None
    own = _take_turns(ours, torchs)
    with _backends.torch_on_one_thread():
        alone = _take_turns(ours, torchs)
    fastest = [min(a + b) for a, b in zip(own, alone, strict=True)]
    return min(map(statistics.median, (own[0], alone[0]))), fastest[0] / fastest[1]


def _take_turns(*calls: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each call, many times over, the calls taking turns."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    least, most = _ROUNDS
    stop = time.perf_counter() + _SECONDS
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() < stop):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times
