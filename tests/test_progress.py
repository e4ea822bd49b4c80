"""Bars show where someone looks on, and nothing needs tqdm."""

import sys
from types import SimpleNamespace

import pytest

import cupynorm as cn
from cupynorm import _progress


@pytest.fixture
def drawn(monkeypatch):
    """What a stand-in for tqdm was asked to draw."""
    calls = []

    def tqdm(items, **options):
        calls.append((list(items), options["desc"]))
        return items

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=tqdm))
    return calls


def look_on(monkeypatch, yes):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: yes))


@pytest.mark.parametrize(
    ("items", "terminal", "progress", "bar"),
    [
        ([1, 2], True, None, True),
        ([1, 2], False, None, False),
        ([1], True, None, False),
        ([1], False, True, True),
        ([1, 2], True, False, False),
    ],
)
def test_when_a_bar_is_drawn(monkeypatch, drawn, items, terminal, progress, bar):
    look_on(monkeypatch, terminal)
    assert list(_progress.steps(iter(items), "doing", progress)) == items
    assert drawn == ([(items, "doing")] if bar else [])


@pytest.mark.parametrize(
    ("shell", "terminal", "bar"),
    [
        (SimpleNamespace(kernel=None), False, True),  # a notebook
        (SimpleNamespace(), True, True),  # IPython in a terminal
        (SimpleNamespace(), False, False),
        (None, False, False),  # a script that imports IPython
    ],
)
def test_a_notebook_looks_on(monkeypatch, drawn, shell, terminal, bar):
    look_on(monkeypatch, terminal)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert list(_progress.steps([1, 2], "doing", None)) == [1, 2]
    assert bool(drawn) is bar


def test_without_tqdm_silence_unless_a_bar_is_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(_progress, "_someone_looks_on", lambda: True)
    assert list(_progress.steps([1, 2], "doing", None)) == [1, 2]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ImportError, match=r"progress=True .* pip install 'cupynorm\[notebook\]'"):
        _progress.steps([1, 2], "doing", True)


def test_warmup_counts_dtypes(drawn):
    names = cn.warmup(16, ["float32", "float64"], device="cpu", progress=True)
    assert drawn == [(["float32", "float64"], "compiling loops")]
    assert len(names) == 2


def test_tqdm_itself_draws(capsys):
    pytest.importorskip("tqdm")
    assert list(_progress.steps(range(3), "doing", True)) == [0, 1, 2]
    assert "doing: " in capsys.readouterr().err
