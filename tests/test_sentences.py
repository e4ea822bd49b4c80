"""The page of error messages: no `raise` escapes it, and no sentence lacks a way out."""

import functools
import re
import tokenize

import pytest

from docs._generate import errors, sentences

read_modules = sentences._modules.__wrapped__


def parsed(monkeypatch, tmp_path, text):
    """The sentences of a package that is one module of this text; those of ours stay as read."""
    (tmp_path / "module.py").write_text(text)
    monkeypatch.setattr(sentences, "PACKAGE", tmp_path)
    monkeypatch.setattr(sentences, "_modules", functools.cache(read_modules))
    return sentences.sentences.__wrapped__()


def test_every_raise_is_a_sentence_or_internal():
    told = {(s.module, s.line) for s in sentences.sentences()}
    inside = {(module, name.partition(":")[0]) for module, name in sentences.INTERNAL}
    wrappers, missing = set(), []
    for module, function, line in sentences.all_raises():
        if (module, line) in told or (module, function) in inside:
            continue
        if function.startswith(("_refuse", "refuse")):
            wrappers.add((module, function))  # its callers' sentences stand for it
        else:
            missing.append((module, function, line))
    # `raise` alone passes on what was caught, which said its sentence elsewhere.
    paths = {name: module.path for name, module in sentences._modules().items()}
    lines = {m: paths[m].read_text().splitlines() for m, _, _ in missing}
    assert not [at for at in missing if lines[at[0]][at[2] - 1].strip() != "raise"]
    assert wrappers  # or the branch above looks at nothing


def test_internal_raises_are_there():
    functions = {(module, function) for module, function, _ in sentences.all_raises()}
    for module, name in sentences.INTERNAL:
        assert (module, name.partition(":")[0]) in functions


def test_the_count_is_that_of_the_words():
    """Another way to count: the word, outside of texts and comments, is what the trees hold."""
    found = 0
    for path in sentences.PACKAGE.rglob("*.py"):
        with path.open("rb") as file:
            found += sum(token.string == "raise" for token in tokenize.tokenize(file.readline))
    assert len(sentences.all_raises()) == found


@pytest.mark.parametrize(
    "sentence", sentences.sentences(), ids=lambda s: f"{s.module}.{s.function}:{s.line}"
)
def test_a_sentence_says_what_to_do(sentence):
    fault, way_out = sentence.parts
    assert fault.strip()
    assert way_out, f"no way out in: {sentence.text}"
    badly_joined = r"  |(?<!\.)\.\.(?!\.)|\s$|‹msg›|‹fault›|‹way_out›"
    assert not re.search(badly_joined, sentence.text), sentence.text


def test_the_page_has_them_all():
    text = errors.page()
    assert text.count(":::{admonition}") == len(sentences.sentences()) > 50
    assert text.count("**Way out:** ") == len(sentences.sentences())
    named = {module for modules in errors.TOPICS.values() for module in modules}
    rooms = {s.module.partition(".")[0] for s in sentences.sentences()}
    assert named <= rooms, "a topic of a room that is gone"


MODULE = """\
from typing import NoReturn
WHAT = 'pass {what}'
def f(x, n):
    hint = 'a list' if n else 'an int'
    if n > 3:
        msg = f'x is {x!r}; pass {hint}'
        msg += ', or less'
        raise ValueError(msg)
    _refuse(f'{n} is odd', WHAT.format(what=n))
def _refuse(fault, way_out) -> NoReturn:
    raise TypeError(f'{fault}; {way_out}')
"""


def test_messages_are_read_as_they_are_built(monkeypatch, tmp_path):
    found = parsed(monkeypatch, tmp_path, MODULE)
    assert [(s.function, s.error, s.text, s.when) for s in found] == [
        ("f", "ValueError", "x is ‹x›; pass a list or an int, or less", "n > 3"),
        ("f", "TypeError", "‹n› is odd; pass ‹what›", ""),
    ]
    assert found[0].parts == ("x is ‹x›; ", "pass a list or an int, or less")
    with pytest.raises(ValueError, match=r"module\.py:2 raises without a sentence"):
        parsed(monkeypatch, tmp_path, "def f():\n    raise KeyError\n")
