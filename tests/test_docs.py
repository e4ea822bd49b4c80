"""The documentation: what it shows runs, and what it points to is there."""

import ast
import operator
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Backend, _simulated, why_not

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # notebooks have their own
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "bench").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<margin> *)```(?P<info>python[^\n]*)\n(?P<code>.*?)^(?P=margin)```$", re.M | re.S
)
LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<target>[^)\s]+)\)")
NO_GPU = why_not(Backend.CUPY) or why_not(Backend.TORCH_CUDA)

pytest.importorskip("torch")


def page_id(path):
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    info: str  # what stands behind the fence
    code: str

    @property
    def needs_gpu(self):
        return self.info == "python gpu" or bool(re.search(r"^import cupy$", self.code, re.M))

    @property
    def simulated(self):
        """Whether the stand-in for CuPy is enough: it has no torch.cuda, RMM or random numbers."""
        beyond = {"torch", "rmm", "random", "ptds"}
        return not beyond & set(re.findall(r"\w+", self.code))

    def compiled(self):
        """Code whose tracebacks name the page and the line there."""
        tree = ast.parse(self.code, page_id(self.page))
        return compile(ast.increment_lineno(tree, self.line - 1), page_id(self.page), "exec")


def blocks(page):
    text = page.read_text(encoding="utf-8")
    found = []
    for m in FENCE.finditer(text):
        indent = len(m["margin"])
        code = "".join(line[indent:] or "\n" for line in m["code"].splitlines(keepends=True))
        line = text.count("\n", 0, m.start("code")) + 1
        found.append(Block(page, line, m["info"].strip(), code))
    return found


def run(page, gpu):
    """Run a page's blocks in order; those for a GPU see the others' names, but not the reverse.

    So a page may call a NumPy array and a CuPy array x in turn, and reads the same without a GPU.
    """
    host, device = {"__name__": "__docs__"}, {}
    for block in blocks(page):
        code = block.compiled()
        if not block.needs_gpu:
            exec(code, host)
        elif gpu or block.simulated:
            names = host | device
            exec(code, names)
            device |= {k: v for k, v in names.items() if host.get(k) is not v}


@every_page
def test_blocks_are_marked(page):
    """No block of Python escapes; what cannot run where tests do is `py`, and compiles."""
    found, text = blocks(page), page.read_text(encoding="utf-8")
    assert len(found) == text.count("```python")
    for block in found:
        assert block.info in ("python", "python gpu"), f"{page.name}:{block.line}"
    for code in re.findall(r"^ *```py\n(.*?)^ *```$", text, re.M | re.S):
        compile(code, page.name, "exec")


@every_page
def test_blocks_run(page, capsys):
    with _simulated():
        run(page, gpu=False)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@every_page
def test_blocks_run_on_a_gpu(page, capsys):
    if "import rmm" in page.read_text(encoding="utf-8"):
        pytest.importorskip("rmm")
    run(page, gpu=True)


def test_faults_of_blocks_are_found(tmp_path, monkeypatch):
    """Each names its line; blocks for a GPU see the others' names, but not the reverse."""
    monkeypatch.setattr("tests.test_docs.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("text\n\n- item\n\n  ```python\n  a = 1\n\n  1 / (a - 1)\n  ```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run(page, gpu=False)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 8)
    page.write_text(
        "```python\nx = 1\n```\n```python gpu\nx = x + 1\n```\n```python\nassert x == 1\n```\n"
        "```python gpu\nassert x == 2\n```\n```python gpu\ntorch.nowhere\n```\n"
    )
    run(page, gpu=False)
    with pytest.raises(NameError, match="torch"):
        run(page, gpu=True)


@every_page
def test_names_exist(page):
    import cupynorm
    import cupynorm.dask
    import cupynorm.sklearn
    import cupynorm.torch

    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:cn|cupynorm)\.([a-zA-Z_.]*\w)", text)):
        assert operator.attrgetter(name)(cupynorm) is not None


def anchors(page):
    """Names that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        made = there.is_relative_to(ROOT / "docs" / "generated")  # by `make docs`, which checks it
        assert there.exists() or made, f"{page.name} points to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{page.name} points to {target}"
