"""What the site is made with: links within it, names of other projects, results on its pages."""

import re
from pathlib import Path

import pytest

from docs._generate import bars, links, results

sphobjinv = pytest.importorskip("sphobjinv")
inventories = pytest.importorskip("docs._generate.inventories")

ROOT = Path(__file__).resolve().parents[1]


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1><a href="https://numpy.org">n</a>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>'
        '<a href="#">4</a><a href="#here">5</a><img src="no.svg"><i id="with space"></i>'
        '<a href="#with%20space">6</a>'
    )
    faults, outside = links.broken(tmp_path)
    assert faults == [f"a.html -> {t}" for t in ("b.html#gone", "c.html", "#here", "no.svg")]
    assert outside == ["https://numpy.org"]
    assert links.main(str(tmp_path)) == 1
    assert (tmp_path / "external-links.txt").read_text() == "https://numpy.org\n"


def test_inventories_are_renewed_by_name(tmp_path):
    """What another project moved is found anew; what it dropped is told."""
    theirs = sphobjinv.Inventory()
    theirs.project, theirs.version = "NumPy", "9.9"
    theirs.objects.append(
        sphobjinv.DataObjStr(
            name="numpy.ndarray", domain="py", role="class", priority="1", uri="new.html#$",
            dispname="-",
        )
    )  # fmt: skip
    address = tmp_path / "objects.inv"
    address.write_bytes(sphobjinv.compress(theirs.data_file()))
    mine = tmp_path / "numpy.txt"
    mine.write_bytes((inventories.HERE / "numpy.txt").read_bytes())
    gone = inventories.renew(mine, address.as_uri())
    assert "numpy.ndarray" not in gone
    assert "numpy.packbits" in gone
    text = mine.read_text()
    assert "numpy.ndarray py:class 1 new.html#$ -" in text
    assert "# Version: 9.9" in text


def test_numbers_on_the_pages_are_those_of_the_files():
    text = results.parts()["performance.md"]
    for name in re.findall(r"\]\(\.\./(bench/results/[^)]+)\)", text):
        assert (ROOT / name).is_file()
    rows = results._rows("frames-2026-11-25-de2f0d3.csv")
    for row in rows:
        assert f"| {row['frame']} | {row['M']}×{row['N']} |" in text
        assert f"| {row['frame ms']} | {row['numpy ms']} |" in text


def test_a_bar_goes_to_the_least_favorable_run():
    drawing = bars.bars("t", "text", [("case", "a", [0.5, 1.0, 2.0]), ("case", "b", [0.5, 0.25])])
    ends = [
        (float(x), float(x) + float(w))
        for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing.svg())
    ]
    one = float(re.search(r'x1="([\d.]+)"[^>]*stroke-opacity="0.9"', drawing.svg())[1])
    assert ends[0][0] == pytest.approx(one, abs=0.2)  # slower: to the right of 1
    assert ends[1][1] == pytest.approx(one + 0.5, abs=0.2)  # faster: to the left of it
    assert ends[1][0] < one
