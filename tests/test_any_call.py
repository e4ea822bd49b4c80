"""Any call of a public function against the oracle, and no public function left out."""

import importlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupynorm as cn
from tests.strategies import NEEDS, WAY, Call, public

RESULTS = {"Explanation", "LayerNormGradients", "LayerNormResult", "PreparedLayerNorm"}
# They run no norm on what a user gives them, or draw it; each has tests of its own.
OTHERS = {"__version__", "show_config", "warmup", "torch.convert", "torch.revert"}
OTHERS |= {"plot", "plot.affine", "plot.distributions", "plot.moments"}

drawn = given(rnd=st.randoms(use_true_random=False))


@pytest.mark.needs("numpy")
@drawn
@settings(max_examples=150)
def test_any_call_on_numpy_arrays(lib, rnd):
    Call(rnd, lib).run()


@pytest.mark.needs("not_numpy")
@drawn
@settings(max_examples=40)
def test_any_call(lib, rnd):
    Call(rnd, lib).run()


def test_every_public_name_is_drawn_but_for_these():
    for library in NEEDS.values():
        pytest.importorskip(library)
    known, left, package = {public(name) for name in WAY}, set(), Path(cn.__file__).parent
    for path in sorted(package.rglob("*.py")):  # __init__ first
        parts = path.relative_to(package).with_suffix("").parts
        room = [part for part in parts if part != "__init__"]
        if not any(part.startswith("_") for part in room):
            module = importlib.import_module(".".join(["cupynorm", *room]))
            for name in getattr(module, "__all__", ()):
                if (value := getattr(module, name)) not in known:
                    known.add(value)
                    left.add(".".join([*room, name]))
    assert left == RESULTS | OTHERS
