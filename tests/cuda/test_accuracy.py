"""Errors against float64 on hard inputs, beside torch's own on the same numbers, on every path."""

import array_api_compat.torch as xp
import ml_dtypes
import numpy as np
import pytest
import torch

import cupynorm as cn
from cupynorm import _reference
from cupynorm._cpu.engine import without_numba
from tests import oracle
from tests.conftest import _simulated, np_dtype
from tests.cuda.rows import Case, run
from tests.gpu_backend import SIMULATED
from tests.report import put_table

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

# rows, N, offset and scale of x, by direction; dy has mean 1/5 and deviation 1. 64 columns stay in
# one warp, 1000 are odd in vectors, 5000 take a block, 20000 are merged from chunks.
HALF = [
    (6, 1000, 0.0, 1.0), (6, 1000, 100.0, 1.0), (6, 1000, 6e4, 2e3), (6, 5000, 6e4, 2e3),
    (6, 64, 0.0, 1e-3),
]  # fmt: skip
SPREADS = (
    *((0.0, 1.0), (1e2, 1.0), (1e4, 1.0), (1e6, 1.0), (-1e6, 1e-1)),
    *((0.0, 1e-20), (0.0, 1e-3), (0.0, 1e6), (0.0, 1e18), (1e18, 1e14)),
)
CASES = {
    ("forward", "float32"): [(6, N, *s) for N in (64, 1000, 5000, 20000) for s in SPREADS],
    ("forward", "float16"): HALF,
    ("forward", "bfloat16"): HALF,
    ("forward", "float64"): [(6, 1000, 1e6, 1.0), (6, 20000, 1e12, 1.0), (6, 1000, 0.0, 1e150)],
    ("backward", "float32"): [
        (6, 64, 0.0, 1.0), (6, 64, 1e2, 1.0), (6, 64, 1e6, 1.0), (6, 64, -1e6, 1e-1),
        (6, 1000, 0.0, 1.0), (6, 1000, 1e2, 1.0), (6, 1000, 1e4, 1.0), (6, 1000, 1e6, 1.0),
        (6, 1000, 0.0, 1e-3), (6, 1000, 0.0, 1e6), (6, 1000, 0.0, 1e18), (6, 1000, 1e18, 1e14),
        (3, 5000, 0.0, 1.0), (3, 5000, 1e6, 1.0), (300, 64, 0.0, 1.0), (300, 64, 1e4, 1.0),
    ],
    ("backward", "float16"): [
        (6, 1000, 0.0, 1.0), (6, 1000, 100.0, 1.0), (6, 64, 6e4, 2e3), (300, 64, 0.0, 1.0),
    ],
    ("backward", "bfloat16"): [(6, 1000, 0.0, 1.0), (6, 64, 100.0, 1.0), (300, 64, 0.0, 1.0)],
    ("backward", "float64"): [
        (6, 1000, 0.0, 1.0), (6, 1000, 1e6, 1.0), (6, 64, 1e12, 1.0), (300, 64, 0.0, 1.0),
    ],
}  # fmt: skip
# Errors that pass even where torch's are smaller, in roundings of the result, in which both lie at
# random: of y its own; of the gradients those of rstd (half a unit to one), and of the operations
# after it, half a unit each: five for dx (g, a product, two differences, times rstd), three for
# each term of dweight and one for its sum.
ALLOWED = {"forward": {"y": 1.5}, "backward": {"dx": 3.0, "dweight": 2.0, "dbias": 1.5}}

# The rows over which dweight and dbias are summed; the simulator takes the first 4,000 of them.
MANY_ROWS = [("float32", 0.0), ("float32", 1e4), ("float16", 0.0), ("bfloat16", 0.0)]
SIMULATED_ROWS = 4_000


def values(dtype, rows, N, offset, scale):
    """dy, x and weight."""
    rng = np.random.default_rng((rows, N))
    x = offset + scale * rng.standard_normal((rows, N))
    if dtype == "float16":
        x = np.clip(x, -65504, 65504)
    dy, weight = rng.standard_normal((rows, N)) + 0.2, rng.standard_normal(N)
    return tuple(a.astype(np_dtype(dtype)) for a in (dy, x, weight))


def tensor(a):
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def wide(tensors):
    return [a.to(torch.float64).numpy() for a in tensors]


# --- paths: y of x, or the gradients of dy, x and weight ------------------------------------------


def _ours(*given):
    if len(given) == 1:
        return [cn.layer_norm(*given)]
    dy, x, weight = given
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    return cn.layer_norm_backward(dy, x, None, mean, rstd, weight)


def _numpy_only(*given):
    with without_numba():
        return _ours(*given)


def _formula(*given):
    *slope, x, weight = map(tensor, given if len(given) > 1 else (*given, np.ones(1)))
    rows = _reference.Rows(xp, x, (1,))
    y, mean, rstd = _reference.normalize(rows, weight if slope else None, None, 1e-5)
    if not slope:
        return wide([y])
    hat = rows.restored(mean, rstd), rstd
    dx, *sums = _reference.gradients(rows, (*slope, None, None), weight, hat)
    return wide((dx, *(s.to(weight.dtype) for s in sums)))


def _kernels(*given):
    import cupy  # the stand-in for it

    return [cupy.asnumpy(a) for a in _ours(*(cupy.asarray(a) for a in given))]


PATHS = {"numba": _ours, "numpy": _numpy_only, "reference": _formula, "kernels": _kernels}


def of_torch(*given):
    """As torch trains: its own forward's statistics, then its own backward."""
    if len(given) == 1:
        x = tensor(*given)
        return wide([torch.nn.functional.layer_norm(x, x.shape[1:])])
    dy, x, weight = map(tensor, given)
    shape, bias = weight.shape, torch.zeros_like(weight)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, 1e-5)
    call = torch.ops.aten.native_layer_norm_backward
    return wide(call(dy, x, shape, mean, rstd, weight, bias, [True] * 3))


# --- the comparison -------------------------------------------------------------------------------


def definition(*given):
    if len(given) == 1:
        return oracle.layer_norm(*given, (1,), None, None, 1e-5)[:1]
    dy, x, weight = given
    return oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5)


def errors(got, exact, dtype):
    """Largest errors in units of the rounding of each result."""
    found = []
    for a, want in zip(got, exact, strict=True):
        unit = EPSILON[dtype] * max(float(np.max(np.abs(want))), 1e-30)
        found.append(float(np.max(np.abs(np.asarray(a, np.float64) - want))) / unit)
    return found


TITLE = "Largest error of each result against float64, in units of its rounding (eps * max|exact|)"
OF_PATHS = "".join(f"{path:>11}" for path in PATHS)
HEADER = f"dtype      rows      N  offset   scale   result      torch{OF_PATHS}"


def compare(direction, dtype, case, theirs, ours):
    """A line of the table for each result, and those in which a path is worse than torch."""
    rows, N, offset, scale = case
    lines, worse = [], []
    for i, (name, least) in enumerate(ALLOWED[direction].items()):
        cells = "".join(f"{found[i]:>11.3g}" for found in ours.values())
        told = f"{dtype:9}{rows:>6}{N:>7}{offset:>8.0e}{scale:>8.0e} {name:>8}"
        lines.append(f"{told}{theirs[i]:>11.3g}{cells}")
        most = max(theirs[i], least)
        worse += [(path, lines[-1]) for path, e in ours.items() if not e[i] <= most]
    return lines, worse


@pytest.mark.parametrize(("direction", "dtype"), CASES)
def test_errors_are_never_worse_than_torchs(direction, dtype, pytestconfig):
    """Not worse beyond the rounding of the result itself, in which both lie at random."""
    table, worse = [HEADER], []
    for case in CASES[direction, dtype]:
        dy, x, weight = values(dtype, *case)
        given = (x,) if direction == "forward" else (dy, x, weight)
        exact = definition(*given)
        with _simulated():
            ours = {path: errors(call(*given), exact, dtype) for path, call in PATHS.items()}
        theirs = errors(of_torch(*given), exact, dtype)
        lines, bad = compare(direction, dtype, case, theirs, ours)
        table, worse = table + lines, worse + bad
    put_table(pytestconfig, f"{TITLE}, {direction}", table)
    assert not worse, worse


@pytest.mark.parametrize(("dtype", "offset"), MANY_ROWS)
def test_sums_over_200000_rows(dtype, offset, pytestconfig):
    """Beside torch's on one and on two threads, the better of which counts.

    The kernels run as on one multiprocessor, so that a group of lanes adds up more rows in turn
    than 200,000 give it on a GPU.
    """
    case = (200_000, 8, offset, 1.0)
    given = values(dtype, *case)
    exact = definition(*given)
    on_cpu = {path: call for path, call in PATHS.items() if path != "kernels"}
    ours = {path: errors(call(*given), exact, dtype) for path, call in on_cpu.items()}
    threads, runs = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        runs.append(errors(of_torch(*given), exact, dtype))
    torch.set_num_threads(threads)
    theirs = [min(found) for found in zip(*runs, strict=True)]
    dy, x = (a[:SIMULATED_ROWS] for a in given[:2])
    exact = definition(dy, x, given[2])
    got = run(SIMULATED, Case("backward", x, given[2], None, dy), "warp", sm_count=1)
    assert SIMULATED_ROWS / (got.plan.partials * got.plan.rows_per_block) > 200_000 / (132 * 32)
    ours["kernels"] = errors(got.arrays, exact, dtype)
    lines, worse = compare("backward", dtype, case, theirs, ours)
    put_table(pytestconfig, f"{TITLE}, backward", [HEADER, *lines])
    assert not worse, worse
