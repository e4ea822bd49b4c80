"""Short ways to run a kernel in the tests of the harness, and to demand that it be caught."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import KINDS, Buffer, SimtFault, launch

VECTOR = "typedef float vec4 __attribute__((vector_size(16)));\n"


LOAD4 = (
    VECTOR
    + """
extern "C" __global__ void k(const float* x, float* y, long long shift) {
  vec4 v = *(const vec4*)(x + 4 * threadIdx.x + shift);
  *(vec4*)(y + 4 * threadIdx.x) = v;
}
"""
)


def line_of(source: str, text: str) -> int:
    """Number of the one line that holds `text`."""
    found = [i for i, row in enumerate(source.splitlines(), 1) if text in row]
    assert len(found) == 1, f"{text!r} stands in {len(found)} lines"
    return found[0]


def floats(n: int, name: str = "x", **options) -> Buffer:
    """n float32: 0, 1, 2, ..."""
    return Buffer.from_array(np.arange(n, dtype=np.float32), name=name, **options)


def unwritten(n: int, name: str = "y", **options) -> Buffer:
    """Room for n float32."""
    return Buffer.empty(4 * n, name=name, granule=4, **options)


def run(source, block, args, *, entry="k", grid=(1,), shared=0, **options):
    """Launch with the buffers among `args` registered."""
    buffers = [a for a in args if isinstance(a, Buffer)]
    return launch(source, entry, grid, block, shared, args, buffers=buffers, **options)


def caught(kind, source, block, args, text=None, **options):
    """The fault of a bad launch, for several orders of the threads; a good launch must follow."""
    for seed in (None, 0, 1, 2):
        with pytest.raises(SimtFault) as info:
            run(source, block, args, seed=seed, **options)
        assert kind in KINDS
        assert info.value.kind == kind, str(info.value)
        if text is not None:
            assert info.value.line == line_of(source, text), str(info.value)
            assert text in str(info.value)
    y = unwritten(64)
    run(COPY, (64,), (floats(64), y))
    assert (y.to_numpy(np.float32) == np.arange(64)).all()
    return str(info.value)


COPY = """
extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""
