"""What small calls execute in Python, counted in byte codes: overhead must not creep in.

The machine instructions below them are counted by `make instructions`.
"""

import json
import platform
from pathlib import Path

import numpy as np
import pytest

import cupynorm as cn
from bench.calls import counting_cupy, opcodes, ways

BUDGETS = Path(__file__).parents[1] / "bench" / "budgets.json"
# The order of the arrays' addresses decides which comparisons run, 8 byte codes of 310; the rest is
# for small additions that are worth it.
HEADROOM = 1.1
VERSION = ".".join(platform.python_version_tuple()[:2])


@pytest.fixture(scope="module")
def counts():
    """By library and call."""
    hosts = [np.ones(shape, np.float32) for shape in ((8, 64), 64, 64, (8, 64))]
    found = {("NumPy", k): opcodes(call) for k, call in ways(*hosts).items()}
    with counting_cupy() as cupy:
        calls = ways(*map(cupy.from_numpy, hosts))
        found |= {("CuPy", k): opcodes(call) for k, call in calls.items()}
    return found


def test_byte_codes_are_within_their_budgets(counts):
    budgets = json.loads(BUDGETS.read_text())["opcodes"].get(VERSION)
    if budgets is None:
        pytest.skip(f"bench/budgets.json has none for Python {VERSION}")
    assert {f"{lib} {call}" for lib, call in counts} == set(budgets)
    for (library, call), count in counts.items():
        budget = budgets[f"{library} {call}"]
        assert 0 < count <= HEADROOM * budget, f"{library} {call}: {count}, budget {budget}"


@pytest.mark.parametrize("library", ["NumPy", "CuPy"])
def test_a_prepared_call_does_less(counts, library):
    assert counts[library, "prepared f(x)"] < counts[library, "layer_norm(x)"]


def test_the_count_sees_the_package_alone():
    assert opcodes(lambda: sum(range(1000))) == 0
    assert opcodes(lambda: cn.layer_norm(np.ones((2, 3, 1)), axis=1), warm=0) > 500  # not settled
