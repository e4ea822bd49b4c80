"""What is shown at a prompt and in a notebook: the same facts, well-formed, escaped, still."""

import functools
from html.parser import HTMLParser

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._display import Table

EVIL = "<script>alert('x')</script> & \"more\""
VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Cells of a table, row by row; a tag left open, or closed out of turn, is a fault."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert self.open[-1] in ("td", "th"), f"text outside a cell: {data!r}"
        self.rows[-1][-1] += data


class Evil(Table):
    def _sections(self):
        return [(EVIL, [(EVIL, EVIL), ("", "goes on")]), ("", [("plain", "1")])]


@functools.cache
def shown():
    layer = cn.LayerNorm(3)
    layer(np.ones((2, 3), np.float32))
    x = np.ones((64, 1000), np.float32)
    return {
        "explain-cpu": cn.explain(x),
        "explain-gpu": cn.explain(x, device="sm_90"),
        "explain-copies": cn.explain(x[:, ::-1], device="sm_90"),
        "layer": layer,
        "layer-bare": cn.LayerNorm(3, elementwise_affine=False),
        "config": cn.show_config(),
        "evil": Evil(),
    }


NAMES = ("explain-cpu", "explain-gpu", "explain-copies", "layer", "layer-bare", "config", "evil")
every_name = pytest.mark.parametrize("name", NAMES)


@every_name
def test_a_notebook_and_a_terminal_show_the_same(name):
    text = shown()[name]._repr_html_()
    assert "color" not in text and "background" not in text  # which are the theme's
    page = Page(text)
    assert page.tags == {"table", "tbody", "tr", "th", "td"}
    lines = str(shown()[name]).splitlines()
    assert tuple(shown()) == NAMES
    assert len(page.rows) == len(lines)
    for cells, line in zip(page.rows, lines, strict=True):
        assert line.split() == " ".join(cells).split()
    assert name.startswith("layer") or repr(shown()[name]) == str(shown()[name])


def test_what_comes_from_outside_is_escaped():
    text = Evil()._repr_html_()
    assert "<script" not in text
    assert Page(text).rows[:2] == [[EVIL], [EVIL, EVIL]]


def test_a_layer_tells_of_its_parameters_and_what_it_keeps():
    layer = cn.LayerNorm((2, 3), eps=1e-3, bias=False)
    assert repr(layer) == "LayerNorm((2, 3), eps=0.001, elementwise_affine=True, bias=False)"
    assert rows(layer) == {
        "normalized_shape": "(2, 3)",
        "eps": "0.001",
        "weight": "float32 (2, 3), numpy, no gradient",
        "bias": "none",
        "kept for backward": "nothing",
    }
    y = layer(np.ones((5, 2, 3), np.float64))
    assert rows(layer)["kept for backward"] == "x: float64 (5, 2, 3), numpy"
    layer.backward(y)
    assert rows(layer)["weight"] == "float32 (2, 3), numpy, with a gradient"
    assert rows(layer)["kept for backward"] == "nothing"


def test_a_layer_on_a_gpu_names_it(cupy_lib):
    device = str(cn.LayerNorm(3, device="cuda").weight.device)
    assert rows(cn.LayerNorm(3, device="cuda"))["bias"] == (
        f"float32 (3,), cupy on {device}, no gradient"
    )


def rows(value):
    return dict(tuple(cells) for cells in Page(value._repr_html_()).rows if len(cells) == 2)
