"""Rows for the kernel tests, families by force, and the comparison with the oracle."""

import dataclasses
import functools

import numpy as np
import pytest

from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES
from cupynorm._problem import ITEMSIZE, stats_dtype
from tests import oracle
from tests.conftest import np_dtype
from tests.row_kernels import normalize

FAMILIES = ("warp", "block", "shared", "split")


def device_for(machine, family):
    """A device on which a few long rows take the family."""
    change = {
        "shared": {"sm_count": 1, "max_cluster": 1},  # few rows are enough; no clusters
        "cluster": {"sm_count": 1},
        "split": {"shared_bytes": 0},  # K3 and K4 hold nothing
    }.get(family, {})
    if family == "cluster" and machine.device.compute_capability < 90:
        pytest.skip("clusters need sm_90 or newer")
    return dataclasses.replace(machine.device, **change)


def need_the_memory_of_sm_90(machine):
    """Skip what looks at K4's table on a device that holds less of a row, such as sm_120."""
    if machine.device.shared_bytes < 227 * 1024:
        pytest.skip("this row of the table is for devices with 227 KiB of shared memory")


def values(rows, N, dtype="float32", scale=3.0, offset=5.0):
    """The same for the same shape, in whatever order tests run."""
    rng = np.random.default_rng((rows, N))
    return (rng.standard_normal((rows, N)) * scale + offset).astype(np_dtype(dtype))


@functools.cache
def affine(N, weight="float32", bias="float32"):
    """The same vectors for the same N: every case of a length compares bits with the others."""
    rng = np.random.default_rng(N)
    return tuple(
        None if d is None else rng.standard_normal(N).astype(np_dtype(d)) for d in (weight, bias)
    )


def length(family, dtype):
    """A row of the family whose columns fill neither its vectors nor its lanes."""
    vecs = {"warp": 40, "block": 300, "shared": 2 * CHUNK_VECS + 300, "split": 3 * CHUNK_VECS - 7}
    vecs["cluster"] = vecs["shared"]
    return vecs[family] * VEC_BYTES // ITEMSIZE[dtype] - 1


def run(machine, family, x, weight=None, bias=None, **options):
    """As `normalize`, with K3, K4 or K5 by force where `family` is one of them."""
    device = device_for(machine, family)
    result = normalize(machine, x, weight, bias, device=device, **options)
    assert result.plan.family == family
    return result


def check(result, x, weight=None, bias=None, eps=1e-5):
    """Compare y and the statistics with the oracle; a mean may cancel terms of any size."""
    N = x.shape[1]
    y, mean, rstd = oracle.layer_norm(x, (1,), weight, bias, eps)
    pairs = [(result.y, y, x.dtype.name, 1.0)]
    if result.mean is not None:
        kind = stats_dtype(x.dtype.name)
        pairs.append((result.mean, mean[:, 0], kind, float(np.abs(x).max())))
        pairs.append((result.rstd, rstd[:, 0], kind, 1.0))
    for got, want, dtype, scale in pairs:
        bound = oracle.tolerance(dtype, N)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=bound, atol=bound * scale)


def far_rows(machine, name, nbytes):
    """Two pieces of memory at least 2**31 float16 apart."""
    first = machine.memory(nbytes, f"{name} 0", itemsize=2)
    taken = [machine.hole(5 * 2**30)]
    second = machine.memory(nbytes, f"{name} 1", itemsize=2)
    while abs(second.ptr - first.ptr) < 2**32:  # in some older gap: fill it
        if len(taken) > 3000:
            pytest.skip("the allocator gave no addresses far apart")
        taken.append(machine.hole(2**26 >> min(len(taken) // 100, 12)))
        taken.append(second)
        second = machine.memory(nbytes, f"{name} 1", itemsize=2)
    return first, second
