"""No bit and no sentence of the frozen calls has changed."""

import json

import pytest

from tests import frozen

EXPECTED = json.loads(frozen.FILE.read_text(encoding="utf-8"))
CASES = frozen.cases()


def test_the_same_calls():
    assert set(CASES) == set(EXPECTED)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_unchanged(name):
    assert frozen.outcome(CASES[name]) == EXPECTED[name]
