"""Errors of dx, dweight and dbias against float64, beside torch's own on the same numbers."""

import ml_dtypes
import numpy as np
import pytest
import torch

import cupynorm as cn
from cupynorm._cpu import arrays as _cpu
from tests import oracle
from tests.conftest import _simulated
from tests.gpu_backend import SIMULATED
from tests.gradient_rows import device_for, differentiate
from tests.report import put_table

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# Errors that pass even where torch's are smaller, in roundings of the result. In both lie at random
# those of rstd (half a unit to one), and of the operations after it, half a unit each: five for dx
# (g, a product, two differences, times rstd), three for each term of dweight and one for its sum.
ALLOWED = {"dx": 3.0, "dweight": 2.0, "dbias": 1.5}

# rows, N, offset, scale: the spread of x around a common offset; dy has mean 1/5 and deviation 1.
CASES = {
    "float32": [
        (6, 64, 0.0, 1.0), (6, 64, 1e2, 1.0), (6, 64, 1e6, 1.0), (6, 64, -1e6, 1e-1),
        (6, 1000, 0.0, 1.0), (6, 1000, 1e2, 1.0), (6, 1000, 1e4, 1.0), (6, 1000, 1e6, 1.0),
        (6, 1000, 0.0, 1e-3), (6, 1000, 0.0, 1e6), (6, 1000, 0.0, 1e18), (6, 1000, 1e18, 1e14),
        (3, 5000, 0.0, 1.0), (3, 5000, 1e6, 1.0), (300, 64, 0.0, 1.0), (300, 64, 1e4, 1.0),
    ],
    "float16": [(6, 1000, 0.0, 1.0), (6, 1000, 100.0, 1.0), (6, 64, 6e4, 2e3), (300, 64, 0.0, 1.0)],
    "bfloat16": [(6, 1000, 0.0, 1.0), (6, 64, 100.0, 1.0), (300, 64, 0.0, 1.0)],
    "float64": [(6, 1000, 0.0, 1.0), (6, 1000, 1e6, 1.0), (6, 64, 1e12, 1.0), (300, 64, 0.0, 1.0)],
}  # fmt: skip

# The rows over which dweight and dbias are summed; the simulator takes the first 4,000 of them.
MANY_ROWS = [("float32", 0.0), ("float32", 1e4), ("float16", 0.0), ("bfloat16", 0.0)]
SIMULATED_ROWS = 4_000


def _np(dtype):
    return np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


def _values(dtype, rows, N, offset, scale):
    """dy, x and weight."""
    rng = np.random.default_rng((rows, N))
    x = offset + scale * rng.standard_normal((rows, N))
    if dtype == "float16":
        x = np.clip(x, -65504, 65504)
    dy, weight = rng.standard_normal((rows, N)) + 0.2, rng.standard_normal(N)
    return tuple(a.astype(_np(dtype)) for a in (dy, x, weight))


def _tensor(a):
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def _torch(dy, x, weight):
    """As torch trains: its own forward's statistics, then its own backward."""
    dy, x, weight = (_tensor(a) for a in (dy, x, weight))
    shape, bias = weight.shape, torch.zeros_like(weight)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, 1e-5)
    call = torch.ops.aten.native_layer_norm_backward
    grads = call(dy, x, shape, mean, rstd, weight, bias, [True] * 3)
    return [a.to(torch.float64).numpy() for a in grads]


def _ours(dy, x, weight):
    _, mean, rstd = cn.layer_norm(x, weight=weight, return_stats=True)
    return cn.layer_norm_backward(dy, x, None, mean, rstd, weight)


def _numpy_only(*arrays):
    with _cpu.without_numba():
        return _ours(*arrays)


def _reference(*arrays):
    from array_api_compat import torch as xp

    from cupynorm import _reference

    dy, x, weight = (_tensor(a) for a in arrays)
    _, mean, rstd = _reference.layer_norm_fwd(xp, x, (1,), weight, None, 1e-5)
    dx, *sums = _reference.layer_norm_bwd(xp, dy, x, (1,), mean, rstd, weight)
    return [a.to(torch.float64).numpy() for a in (dx, *(s.to(weight.dtype) for s in sums))]


def _kernels(*arrays):
    with _simulated():
        import cupy

        return [cupy.asnumpy(a) for a in _ours(*(cupy.asarray(a) for a in arrays))]


PATHS = {"numba": _ours, "numpy": _numpy_only, "reference": _reference, "kernels": _kernels}


def _errors(got, exact, dtype):
    """Largest errors in units of the rounding of each result."""
    errors = []
    for a, want in zip(got, exact, strict=True):
        unit = EPSILON[dtype] * float(np.max(np.abs(want)))
        errors.append(float(np.max(np.abs(np.asarray(a, np.float64) - want))) / unit)
    return errors


def _compare(dtype, case, theirs, ours):
    """A line of the table for each result, and those in which a path is worse than torch."""
    lines, worse = [], []
    for i, name in enumerate(ALLOWED):
        cells = "".join(f"{errors[i]:>11.3g}" for errors in ours.values())
        lines.append(f"{dtype:9}{case} {name:>8}{theirs[i]:>11.3g}{cells}")
        allowed = max(theirs[i], ALLOWED[name])
        worse += [(path, lines[-1]) for path, e in ours.items() if not e[i] <= allowed]
    return lines, worse


TITLE = (
    "Largest error of each gradient against float64, in units of its rounding (eps * max|exact|)"
)
HEADER = "dtype      rows      N  offset   scale   result      torch" + "".join(
    f"{path:>11}" for path in PATHS
)


def _case(rows, N, offset, scale):
    return f"{rows:>6}{N:>7}{offset:>8.0e}{scale:>8.0e}"


@pytest.mark.parametrize("dtype", EPSILON)
def test_errors_are_never_worse_than_torchs(dtype, pytestconfig):
    table, worse = [HEADER], []
    for case in CASES[dtype]:
        arrays = _values(dtype, *case)
        exact = oracle.layer_norm_backward(*arrays[:2], (1,), arrays[2], 1e-5)
        ours = {path: _errors(call(*arrays), exact, dtype) for path, call in PATHS.items()}
        theirs = _errors(_torch(*arrays), exact, dtype)
        lines, bad = _compare(dtype, _case(*case), theirs, ours)
        table, worse = table + lines, worse + bad
    put_table(pytestconfig, TITLE, table)
    assert not worse, worse


@pytest.mark.parametrize(("dtype", "offset"), MANY_ROWS)
def test_sums_over_200000_rows(dtype, offset, pytestconfig):
    """Beside torch's on one and on two threads, the better of which counts.

    The kernels run as on one multiprocessor, so that a group of lanes adds up more rows in turn
    than 200,000 give it on a GPU.
    """
    case = (200_000, 8, offset, 1.0)
    arrays = _values(dtype, *case)
    exact = oracle.layer_norm_backward(*arrays[:2], (1,), arrays[2], 1e-5)
    ours = {
        path: _errors(call(*arrays), exact, dtype)
        for path, call in PATHS.items()
        if path != "kernels"
    }
    threads, runs = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        runs.append(_errors(_torch(*arrays), exact, dtype))
    torch.set_num_threads(threads)
    theirs = [min(errors) for errors in zip(*runs, strict=True)]
    few = tuple(a[:SIMULATED_ROWS] if a.ndim == 2 else a for a in arrays)
    exact = oracle.layer_norm_backward(*few[:2], (1,), few[2], 1e-5)
    got = differentiate(SIMULATED, *few, device=device_for(SIMULATED, "warp", 1))
    assert SIMULATED_ROWS / (got.plan.partials * got.plan.rows_per_block) > 200_000 / (132 * 32)
    ours["kernels"] = _errors(got.arrays, exact, dtype)
    lines, worse = _compare(dtype, _case(*case), theirs, ours)
    put_table(pytestconfig, TITLE, [HEADER, *lines])
    assert not worse, worse
