"""A minute of the soak, which `make soak` runs for as long as one likes, and small calls."""

import sys

import pytest

from tests.cpu.programs import run_python


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and tells memory, as Linux does")
@pytest.mark.parametrize(
    "how", [("--seconds", "60", "--dtypes", "float32"), ("--small", "20000")], ids=["soak", "small"]
)
def test_it_finds_nothing(how):
    run_python(f"import sys; from tests import soak; sys.argv[1:] = {how}; soak.main()")
