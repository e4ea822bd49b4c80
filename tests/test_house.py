"""How the package is built: what it imports and when, which module may know which."""

import ast
import re
import statistics
import sys
from pathlib import Path

import pytest

import cupynorm as cn
from tests.cpu.programs import run_python

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms: folders and files of the package itself. Imports point to a floor below only; within a
# folder they are its own affair. A new room gets a place here first.
FLOORS = (
    {"__init__", "__main__"},
    {"_report"},
    {"modules", "plot", "sklearn", "torch"},  # adapters: none imports another
    {"functional", "prepared"},
    {"dask"},  # containers, which `functional` hands over
    {"frames"},
    {"_calls"},  # the one memo
    {"_torch"},  # tensors: who watches, then addresses
    {"_cpu", "_cuda"},  # do
    {"_reference"},
    {"_layout"},
    {"_rules"},
    {"_display", "_libraries", "_memo", "_ops"},
)
# The files of a folder that others may name; of the rest its `__init__`, which is public.
DOORS = {
    "_cpu": {"arrays", "engine", "threads"},
    "_cuda": {"arrays", "launch"},
    "_torch": {"doors", "tensors"},
    "frames": {"columns", "tables"},
}
# Files behind a door that one room alone may name.
BY_NAME = {
    ("_report", "_cuda.plan"),
    ("_report", "_cuda.tiles"),
    ("torch", "_torch.conversion"),
    ("torch", "_torch.machines"),
    ("torch", "_torch.watch"),
    *((top, f"_report.{p.stem}") for top in FLOORS[0] for p in (PACKAGE / "_report").glob("*.py")),
}
# Beyond the standard library, numpy and array_api_compat, at import time.
MAY_IMPORT = {
    "_cuda": {"cupy"},
    "_cpu": {"llvmlite", "numba"},
    "dask": {"dask"},
    "sklearn": {"sklearn"},
    "_torch": {"torch"},
    "torch": {"torch"},
}
# By folder: files and lines, and what counts. They come down, never up: the aim is 60 files and
# 9,500 lines of the package, 3,500 of bench, 17,000 of tests.
CEILINGS = {
    "cupynorm": (58, 13_411, {".py"}),
    "bench": (20, 3_861, {".py"}),
    "tests": (None, 23_142, {".py", ".hpp", ".cpp"}),
    "kernels": (16, 3_610, {".cuh"}),
}
MAX_LINES = 500  # of a file of the package, which is one idea
MAX_POSITIONAL = 6  # of a function; who needs more takes a `Facts`, a `Problem` or a dataclass
# Compiled functions, and the engine that calls them, take addresses and numbers one by one; public
# functions what users call them with.
COMPILED = {
    f"_cpu.{name}" for name in ("backward", "engine", "forward", "jobs", "strips", "vectors")
}
MOST_WITH_MORE = 36


def room_of(path):
    """The folder that a file is in, or the file itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


ROOMS = {room_of(path) for path in FILES}


def named(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def imports(path, *, at_import_time=False):
    """Dotted names that a file imports, outside `if TYPE_CHECKING`."""
    found, waiting = set(), [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "cupynorm." * (node.level > 0) + (node.module or "")
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def rooms_met(path):
    """Rooms that a file imports from, by any spelling, but for its own."""
    parts = [name.split(".") for name in imports(path) if name.split(".")[0] == "cupynorm"]
    return {p[1] for p in parts if len(p) > 1 and p[1] in ROOMS} - {room_of(path)}


def test_every_room_has_one_floor():
    placed = [name for floor in FLOORS for name in floor]
    assert len(placed) == len(set(placed))
    assert set(placed) == ROOMS


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return  # it names what users call, and is what the rest must not reach up to
    floor = next(i for i, floor in enumerate(FLOORS) if room in floor)
    upward = rooms_met(path) - set().union(*FLOORS[floor + 1 :])
    assert not upward, f"{named(path)} imports {sorted(upward)}, not below it"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_folder_is_entered_by_its_door(path):
    room, behind = room_of(path), set()
    for name in imports(path):
        package, folder, file, *_ = [*name.split("."), "", ""]
        foreign = package == "cupynorm" and folder != room
        if not foreign or not (PACKAGE / folder / f"{file}.py").is_file():
            continue  # a name that the folder's `__init__` gives
        if file not in DOORS.get(folder, ()) and (room, f"{folder}.{file}") not in BY_NAME:
            behind.add(f"{folder}.{file}")
    assert not behind, f"{named(path)} reaches behind the door, to {sorted(behind)}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_optional_libraries_are_imported_where_they_are_meant_to_be(path):
    known = {"cupynorm", "numpy", "array_api_compat"} | set(sys.stdlib_module_names)
    met = {name.split(".")[0] for name in imports(path, at_import_time=True)} - known
    assert met <= MAY_IMPORT.get(room_of(path), set())
    every = [name.split(".") for name in imports(path)]
    assert named(path) == "_cuda.arrays" or ["cupy"] not in [name[:1] for name in every]
    # Of the package itself nothing but its version.
    ours = {name[1] for name in every if name[0] == "cupynorm" and name[1:]}
    assert ours <= {*ROOMS, "__version__"}


def test_public_names_can_be_had():
    for name in cn.__all__:
        assert getattr(cn, name) is not None
    assert set(cn.__all__) <= set(dir(cn))
    with pytest.raises(AttributeError, match="no attribute 'layernorm'"):
        cn.layernorm  # noqa: B018


@pytest.mark.parametrize("folder", CEILINGS)
def test_ceilings(folder):
    most_files, most_lines, suffixes = CEILINGS[folder]
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert sum(lines.values()) <= most_lines
    assert most_files is None or len(files) <= most_files


def is_private(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return any(part.startswith("_") for part in parts if part not in FLOORS[0])


def with_many_parameters(path):
    """Names of functions that take more than six by position, but for self, cls and torch's ctx."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            if len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) > MAX_POSITIONAL:
                yield getattr(node, "name", "lambda")


def test_functions_take_six_parameters_by_position():
    many = [(path, name) for path in FILES for name in with_many_parameters(path)]
    allowed = [
        (path, name)
        for path, name in many
        if named(path) in COMPILED or not (is_private(path) or name.startswith("_"))
    ]
    found = {f"{named(path)}.{name}" for path, name in many if (path, name) not in allowed}
    assert not found, "let these take a Facts, a Problem or a dataclass"
    assert len(allowed) <= MOST_WITH_MORE


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_is_one_idea_and_says_which(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "split it by idea"
    assert ast.get_docstring(tree(path))
    assert not is_private(path) or not re.search(r"^__all__ *=", text, re.M)
    assert path.stem.strip("_") not in ("util", "utils", "helper", "helpers", "misc", "common")
    found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not found, f"{path.name}: python -O drops the asserts of lines {found}"


def test_optional_libraries_come_when_they_are_called_for():
    """None by import, by a call of NumPy arrays numba alone; those that show_config looks into."""
    optional = "cupy torch numba dask sklearn pandas matplotlib tqdm IPython jax scipy polars"
    program = (
        "import sys, numpy, cupynorm as cn\n"
        f"def come(): print(*[m for m in {optional.split()} if m in sys.modules], end=';')\n"
        "come(), cn.layer_norm(numpy.ones((2, 3)), return_stats=True), come()\n"
        "cn.plot.moments, cn.explain, cn.LayerNorm(3), str(cn.show_config()), come()"
    )
    imported, called, named = (set(found.split()) for found in run_python(program).split(";")[:3])
    assert not imported
    assert called <= {"numba", "scipy"}  # numba looks for scipy's BLAS
    assert named <= called | {"cupy", "numba", "scipy"}


def test_import_adds_less_than_a_tenth_of_a_second_to_numpys():
    program = (
        "import numpy, time\n"
        "start = time.perf_counter()\n"
        "import cupynorm\n"
        "print(time.perf_counter() - start)"
    )
    run_python(program)  # fills the caches of byte code and of the disk
    times = []
    for _ in range(3):  # a busy machine gets further tries
        times += [float(run_python(program)) for _ in range(5)]
        if statistics.median(times[-5:]) < 0.1:
            return
    pytest.fail(f"import cupynorm took {sorted(times)} s on top of numpy")
