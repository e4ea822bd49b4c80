"""Any call of a public function against the oracle, none left out; the frozen ones; a soak."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupynorm as cn
from tests import frozen
from tests.cpu.programs import run_python
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


FROZEN = frozen.cases()
EXPECTED = json.loads(frozen.FILE.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", {**FROZEN, **EXPECTED})
def test_no_bit_and_no_sentence_has_changed(name):
    assert frozen.outcome(FROZEN[name]) == EXPECTED[name]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and tells memory, as Linux does")
@pytest.mark.parametrize(
    "how", [("--seconds", "60", "--dtypes", "float32"), ("--small", "20000")], ids=["soak", "small"]
)
def test_a_soak_finds_nothing(how):
    """A minute of what `make soak` does for as long as one likes, and small calls."""
    run_python(f"import sys; from tests import soak; sys.argv[1:] = {how}; soak.main()")
