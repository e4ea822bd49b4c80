"""Calls by address: nothing is written beside the targets, threads are as many as is said.

That forward by address, which tensors take, has the bits of arrays is held in `tests/frozen.json`.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

from cupynorm import _calls
from cupynorm._cpu import engine, threads
from cupynorm._layout import problem_of
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import stats_dtype
from tests.cpu import door
from tests.cpu.layouts import guarded, same_bits, values

KINDS = ["float16", np.dtype(ml_dtypes.bfloat16), "float32", "float64"]
WIDTHS = [1, 3, 15, 16, 17, 64, 100, 768, 4096, 4097, 9000, 33000]


def address(a):
    return 0 if a is None else a.ctypes.data


def gradient_facts(dy, x, mean, rstd, weight=None, mask=(True, True, True)):
    arrays = dy, x, mean, rstd, weight
    return _calls._check_backward(LAYER_NORM, arrays, (None, (1,), mask)).facts


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_backward_has_the_bits_of_the_door(dtype):
    for N, order in itertools.product(WIDTHS, "CF"):
        if order == "F" and N > 9000:
            continue
        x, dy = values((9, N), dtype, N), values((9, N), dtype, N + 1)
        weight = values((N,), stats_dtype(x.dtype.name), 1)
        _, mean, rstd = door.forward(x, (1,))
        want = door.backward(dy, x, (1,), mean, rstd, weight)
        for mask in itertools.product((True, False), repeat=3):
            facts = gradient_facts(dy, x, mean, rstd, weight, mask)
            dx, unharmed = guarded(x.shape, x.dtype, order)
            if mask[0]:
                dx[...] = dy
                facts.strides["dx"] = facts.strides["dy"] = tuple(
                    s // x.itemsize for s in dx.strides
                )
            source = dx if mask[0] else dy  # dx may be dy
            sums = [guarded((N,), mean.dtype) for _ in range(2)]
            given = [a if wanted else None for (a, _), wanted in zip(sums, mask[1:], strict=True)]
            call = engine.differentiator(problem_of(facts))
            call(*map(address, (source, x, mean, rstd, weight, dx if mask[0] else None, *given)))
            for check in (unharmed, *(check for _, check in sums)):
                check()
            for got, exact, wanted in zip((dx, *given), want, mask, strict=True):
                assert not wanted or same_bits(got, exact), (N, order, mask)


def test_threads_are_as_many_as_the_caller_says(monkeypatch):
    asked, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *a: (asked.append(a[2]), run(*a)))
    for shape, most in (((600, 1000), 2), ((3000, 1000), 5), ((2, 1500000), 5)):
        x = values(shape, "float32")
        y = np.empty_like(x)
        _, mean, rstd = door.forward(x, (1,))
        asked.clear()
        how = None, (1,), 1e-5, "K", True
        problem = problem_of(_calls.check(LAYER_NORM, x, None, None, y, how).facts)
        engine.normalizer(problem, 1e-5, lambda: 5)(x.ctypes.data, y.ctypes.data, *6 * (0,))
        problem = problem_of(gradient_facts(x, x, mean, rstd))
        call = engine.differentiator(problem, lambda: 5)
        call(*map(address, (x, x, mean, rstd, None, y, None, None)))
        assert set(asked) == {most}, shape
