"""The notebooks run, show what is stored, and are what their text says."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Backend, why_not
from tests.cpu.programs import module_of

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?|\bnan\b|\binf\b")
MOST_BYTES = 250_000
MOST_LINES = 30

for needed in ("jupytext", "nbmake", "ipykernel", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

every_notebook = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def runner():
    """The script docs/run_notebooks.py as a module."""
    return module_of(FOLDER.parent / "run_notebooks.py")


def stored(name):
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def shown(cell):
    """Text that a cell shows, the tables' HTML, and the kinds of what it shows besides."""
    text, markup, kinds = "", "", []
    for output in cell.outputs:
        if output.output_type == "stream":
            text += output.text
            continue
        if "image/png" not in output.data:  # the text of a picture is its size in memory
            text += output.data["text/plain"] + "\n"
        markup += output.data.get("text/html", "")
        kinds.append(sorted(output.data))
    return text, markup, kinds


def numbers(text):
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def assert_same(new, old):
    """Words to the letter; numbers within 5 %, as training and rounding differ between CPUs."""
    (text, markup, kinds), (old_text, old_markup, old_kinds) = shown(new), shown(old)
    assert kinds == old_kinds
    assert NUMBER.sub("0", markup) == NUMBER.sub("0", old_markup)
    assert NUMBER.sub("0", text).split() == NUMBER.sub("0", old_text).split()
    assert numbers(text) == pytest.approx(numbers(old_text), rel=0.05, abs=0.011, nan_ok=True)


def test_every_notebook_has_its_text():
    assert len(NAMES) >= 4
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@every_notebook
def test_text_and_notebook_are_in_step(runner, name):
    told, kept = runner.from_text(FOLDER / f"{name}.py"), stored(name)
    one, other = (
        [(c.id, c.cell_type, c.source, tags(c)) for c in notebook.cells]
        for notebook in (told, kept)
    )
    assert one == other, "run `make notebooks`"
    assert kept.metadata.jupytext == {"formats": "ipynb,py:percent"}


@every_notebook
def test_it_begins_with_what_one_learns_in_three_lines(name):
    first = stored(name).cells[0].source
    assert first.startswith("# ")
    assert re.findall(r"^(\d)\. .+", first.partition("What you learn here:")[2], re.M) == [*"123"]
    assert "pip install" in first


@every_notebook
def test_stored_outputs_are_small_and_whole(name):
    notebook = stored(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert all(o.output_type != "error" and o.get("name") != "stderr" for o in cell.outputs)
        text, _, _ = shown(cell)
        assert len(text.splitlines()) <= MOST_LINES
        assert " at 0x" not in text
        assert "<script" not in json.dumps(cell.outputs)
    assert any(cell.outputs for cell in cells)


@every_notebook
def test_it_runs_and_shows_what_is_stored(runner, name, tmp_path):
    if name == "parquet_to_torch":
        for needed in ("torch", "pandas", "pyarrow"):
            pytest.importorskip(needed)
    done, kept = runner.executed(runner.from_text(FOLDER / f"{name}.py"), tmp_path), stored(name)
    if why_not(Backend.CUPY) is None:
        return  # with a GPU other paths run and other lines are shown
    for new, old in zip(code_cells(done), code_cells(kept), strict=True):
        if "varies" not in tags(old):
            assert_same(new, old)


def test_a_cell_that_fails_fails_the_run(runner, tmp_path):
    path = tmp_path / "text.py"
    path.write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        runner.executed(runner.from_text(path), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["text.py"]


def test_another_output_is_seen():
    import nbformat.v4 as v4

    def cell(text):
        output = v4.new_output("stream", name="stdout", text=text)
        return v4.new_code_cell("", outputs=[output])

    assert_same(cell("error 1.00 of 2"), cell("error 1.01 of 2"))
    for other in ("error 1.20 of 2", "fault 1.00 of 2", "error 1.00 of 2 3"):
        with pytest.raises(AssertionError):
            assert_same(cell("error 1.00 of 2"), cell(other))
