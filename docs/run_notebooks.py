"""Run the notebooks and store what they show: `make notebooks`.

The text of a notebook is the .py file, which is what to edit; the .ipynb beside it is made from it
by jupytext and holds the outputs, so that it can be read without being run. What differs from run
to run without telling anything (times of execution, random names of cells, versions) is left out.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbmake.nb_run import NotebookRun

FOLDER = Path(__file__).parent / "notebooks"
# What a renderer needs to color the code.
LANGUAGE = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}


def from_text(path):
    """Notebook without outputs, as the text has it."""
    notebook = jupytext.read(path)
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata["language_info"] = dict(LANGUAGE)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02}"
    return notebook


def executed(notebook, folder):
    """Run a notebook in a folder; the result, or the error as an exception."""
    path = Path(folder) / "running.ipynb"
    nbformat.write(notebook, path)
    try:
        result = NotebookRun(path, default_timeout=120).execute()
    finally:
        path.unlink()
    if result.error is not None:
        raise RuntimeError(result.error.trace)
    done = result.nb
    done.metadata["language_info"] = dict(LANGUAGE)
    for cell in done.cells:
        cell.metadata.pop("execution", None)
    return done


def main():
    """Write each notebook anew; those named on the command line, or all."""
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py"))
    for name in names:
        notebook = executed(from_text(FOLDER / f"{name}.py"), FOLDER)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb")


if __name__ == "__main__":
    main()
