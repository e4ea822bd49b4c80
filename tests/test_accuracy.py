"""Error against float64 on hard inputs, beside torch's own on the same numbers."""

import array_api_compat.torch as array_api
import ml_dtypes
import numpy as np
import pytest
import torch

import cupynorm as cn
from cupynorm import _reference as _reference_path
from tests import oracle
from tests.conftest import _simulated
from tests.report import put_table

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

# offset, scale, N: the spread of the values around a common offset. 64 columns stay in one warp,
# 1000 are odd in vectors, 5000 take a block, 20000 are merged from chunks.
FLOAT32 = [
    (offset, scale, N)
    for N in (64, 1000, 5000, 20000)
    for offset, scale in (
        (0.0, 1.0),
        (1e2, 1.0),
        (1e4, 1.0),
        (1e6, 1.0),
        (-1e6, 1e-1),
        (0.0, 1e-20),
        (0.0, 1e-3),
        (0.0, 1e6),
        (0.0, 1e18),
        (1e18, 1e14),
    )
]
HALF = [(0.0, 1.0, 1000), (100.0, 1.0, 1000), (6e4, 2e3, 1000), (6e4, 2e3, 5000), (0.0, 1e-3, 64)]
CASES = (
    [("float32", *case) for case in FLOAT32]
    + [("float16", *case) for case in HALF]
    + [("bfloat16", *case) for case in HALF]
    + [("float64", 1e6, 1.0, 1000), ("float64", 1e12, 1.0, 20000), ("float64", 0.0, 1e150, 1000)]
)


def _values(dtype: str, offset: float, scale: float, N: int) -> np.ndarray:
    rng = np.random.default_rng(N)
    x = offset + scale * rng.standard_normal((6, N))
    if dtype == "float16":
        x = np.clip(x, -65504, 65504)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _numpy(t: torch.Tensor) -> np.ndarray:
    return t.to(torch.float64).numpy()


def _numba(x: np.ndarray) -> np.ndarray:
    return cn.layer_norm(x)


def _numpy_only(x: np.ndarray) -> np.ndarray:
    from cupynorm._cpu import arrays as _cpu

    with _cpu.without_numba():
        return cn.layer_norm(x)


def _reference(x: np.ndarray) -> np.ndarray:
    y, _, _ = _reference_path.layer_norm_fwd(array_api, _tensor(x), (1,), None, None, 1e-5)
    return _numpy(y)


def _kernels(x: np.ndarray) -> np.ndarray:
    with _simulated():
        import cupy

        return cupy.asnumpy(cn.layer_norm(cupy.asarray(x)))


PATHS = {"numba": _numba, "numpy": _numpy_only, "reference": _reference, "kernels": _kernels}


def _error(y: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(y, np.float64) - exact)))


@pytest.mark.parametrize("dtype", EPSILON)
def test_error_is_never_worse_than_torchs(dtype: str, pytestconfig: pytest.Config) -> None:
    """Not worse beyond the rounding of y itself, in which both lie at random."""
    lines, worse = [], []
    for name, offset, scale, N in CASES:
        if name != dtype:
            continue
        x = _values(dtype, offset, scale, N)
        exact = oracle.layer_norm(x, (1,), None, None, 1e-5)[0]
        unit = EPSILON[dtype] * max(float(np.max(np.abs(exact))), 1e-30)
        theirs = _error(_numpy(torch.nn.functional.layer_norm(_tensor(x), (N,))), exact) / unit
        ours = {path: _error(call(x), exact) / unit for path, call in PATHS.items()}
        cells = "".join(f"{ours[path]:>11.3g}" for path in PATHS)
        lines.append(f"{dtype:9}{offset:>8.0e}{scale:>8.0e}{N:>7}{theirs:>11.3g}{cells}")
        worse += [(path, lines[-1]) for path, e in ours.items() if not e <= max(theirs, 1.5)]
    header = "dtype      offset   scale      N      torch" + "".join(f"{p:>11}" for p in PATHS)
    title = "Largest error of y against float64, in units of y's rounding (eps * max|y|)"
    put_table(pytestconfig, title, [header, *lines])
    assert not worse, worse


@pytest.mark.parametrize("path", PATHS)
def test_constant_rows_give_zero(path: str) -> None:
    """The mean of equal values is that value, whatever its size: y is exactly zero."""
    for value in (0.0, 1.0, 0.1, 1e6, 12345.678, -1e18):
        for N in (7, 1000, 5001, 20000):
            y = PATHS[path](np.full((2, N), value, np.float32))
            assert np.all(np.asarray(y) == 0), (path, value, N)
