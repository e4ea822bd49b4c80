"""How the package is built: what it imports and when, which module may know which."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import cupynorm as cn

PACKAGE = Path(cn.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
MAX_LINES = 300

# A module imports from the lines below its own only. A new module gets a place here first.
TIERS = (
    {"__main__", "dask", "sklearn", "torch"},  # adapters: none imports another
    {"_picture"},
    {"_selfcheck"},
    {"_backends"},
    {"modules", "plot"},
    {"_plot_data"},
    {"_state"},
    {"_checkpoint", "_parameters"},
    {"_warmup"},
    {"_explain", "gradient", "prepared"},  # what users call, besides
    {"_prepared_arrays", "_prepared_torch"},
    {"_prepared"},
    {"functional"},
    {"frames"},  # tables: what functional.layer_norm hands them to
    {"_estimator_data", "columns"},
    {"_column_arguments", "_tables"},
    {"_frames_cudf", "_frames_pandas", "_frames_polars"},
    {"_frames_arrow"},
    {"_dask_blocks"},
    {"_dask_frames", "_dask_moments"},
    {"_explanation"},
    {"_cpu_at_once", "_cpu_bwd_at_once", "_cuda_small"},
    {"_drawing"},
    {"_torch_autograd"},
    {"_torch_functions"},
    {"_torch_ops"},
    {"_torch_launch"},
    {"_torch_at_once"},
    {"_torch_watch"},
    {"_torch_cpu", "_torch_cuda"},
    {"_torch_formula"},
    {"_arguments"},
    {"_config"},
    {"_cpu_raw"},
    {"_cpu_columns"},
    {"_cpu_columns_blocks", "_cpu_columns_loaders", "_cpu_columns_loops"},
    {"_cpu_columns_write"},
    {"_cpu_columns_lanes"},
    {"_cuda_columns"},
    {"_cpu", "_cuda", "_namespace"},  # do
    {"_cpu_bwd_numba", "_cpu_bwd_strided"},
    {"_cpu_bwd_gather", "_cpu_bwd_strided_loops", "_cpu_numba", "_cpu_strided"},
    {"_cpu_bwd_shared", "_cpu_gather", "_cpu_strided_loops"},
    {"_cpu_shared"},
    {"_reference"},
    {"_cpu_crew", "_cpu_entries"},
    {"_cpu_kept"},
    {"_cpu_bwd_blocks", "_cpu_bwd_rows", "_cpu_rows"},
    {"_cpu_bits", "_cpu_bwd_loops", "_cpu_squares"},
    {"_cpu_blocks", "_cpu_loops"},
    {"_results"},
    {"_cpu_half", "_cpu_lanes", "_cpu_pointers", "_cpu_signals", "_pages", "_probe", "_threads"},
    {"_cpu_narrow"},
    {"_cuda_launch"},
    {"_launches"},
    {"_layout"},
    {"_source"},  # text
    {"_plan_column_bwd"},
    {"_plan_bwd", "_plan_column"},
    {"_plan_lanes"},
    {"_gradient_plan"},
    {"_plan"},  # decide
    {"_plan_cluster"},
    {"_staging"},
    {"_chunk", "_device"},
    {"_arrays"},
    {"_display", "_problem", "_progress"},  # rules
)
# Beyond the standard library, numpy and array_api_compat, at import time.
MAY_IMPORT = {
    "_cuda": {"cupy"},
    "_cpu_bits": {"llvmlite", "numba"},
    "_cpu_columns_lanes": {"llvmlite", "numba"},
    "_cpu_columns_loaders": {"numba"},
    "_cpu_kept": {"numba"},
    "_cpu_lanes": {"llvmlite", "numba"},
    "_cpu_loops": {"numba"},
    "_cpu_narrow": {"llvmlite", "numba"},
    "_cpu_pointers": {"llvmlite", "numba"},
    "_cpu_rows": {"numba"},
    "_cpu_signals": {"llvmlite", "numba"},
    "_cpu_squares": {"llvmlite", "numba"},
    "dask": {"dask"},
    "sklearn": {"sklearn"},
    "_prepared_torch": {"torch"},
    "_torch_at_once": {"torch"},
    "_torch_cpu": {"torch"},
    "_torch_cuda": {"torch"},
    "_torch_formula": {"torch"},
    "_torch_functions": {"torch"},
    "_torch_launch": {"torch"},
    "_torch_ops": {"torch"},
    "_torch_watch": {"torch"},
    "torch": {"torch"},
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path, *, at_import_time=False):
    """Dotted names that a file imports, outside `if TYPE_CHECKING`."""
    found, waiting = set(), [tree(path)]
    while waiting:
        node = waiting.pop()
        if is_type_checking(node):
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


def own_modules(path):
    """Modules of the package that a file imports, by any spelling."""
    names = {p.stem for p in FILES}
    parts = [name.split(".") for name in imports(path) if name.split(".")[0] == "cupynorm"]
    return {p[1] for p in parts if len(p) > 1 and p[1] in names}


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout


# --- arrows -------------------------------------------------------------------------------------


def test_every_module_has_one_place():
    placed = [name for tier in TIERS for name in tier]
    assert len(placed) == len(set(placed))
    missing = {p.stem for p in FILES} - set(placed) - {"__init__"}
    assert not missing, f"give {sorted(missing)} a place in TIERS"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    if path.stem == "__init__":
        return  # it names what users call, and is what the rest must not reach up to
    below, seen = set(), False
    for tier in TIERS:
        below |= tier if seen else set()
        seen = seen or path.stem in tier
    upward = own_modules(path) - below
    assert not upward, f"{path.name} imports {sorted(upward)}, not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_reaches_up_to_the_package_but_for_its_version(path):
    names = {p.stem for p in FILES}
    reached = {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("cupynorm.") and name.split(".")[1] not in names
    }
    assert reached <= {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_optional_libraries_are_imported_where_they_are_meant_to_be(path):
    known = {"cupynorm", "numpy", "array_api_compat"} | set(sys.stdlib_module_names)
    met = {name.split(".")[0] for name in imports(path, at_import_time=True)} - known
    assert met <= MAY_IMPORT.get(path.stem, set())


def test_cupy_is_touched_by_one_file():
    touching = {p.stem for p in FILES if any(n.split(".")[0] == "cupy" for n in imports(p))}
    assert touching <= {"_cuda"}


# --- shape of a module --------------------------------------------------------------------------


def sort_key(name):
    """Constants, classes, the rest, as ruff's RUF022 has it."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_all_exists_is_sorted_and_names_what_is_there(path):
    lists, defined = [], set()
    for node in tree(path).body:
        if isinstance(node, ast.Assign):
            targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
            defined |= set(targets)
            if "__all__" in targets:
                lists.append(ast.literal_eval(node.value))
        elif isinstance(node, ast.AnnAssign):
            defined.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.ImportFrom, ast.If, ast.Try)):
            defined |= {
                alias.asname or alias.name
                for part in ast.walk(node)
                if isinstance(part, (ast.Import, ast.ImportFrom))
                for alias in part.names
            }
            defined |= {
                part.name
                for part in ast.walk(node)
                if isinstance(part, (ast.FunctionDef, ast.ClassDef))
            }
    assert len(lists) == 1, f"{path.name} needs one __all__"
    names = lists[0]
    assert names == sorted(names, key=sort_key)
    assert len(names) == len(set(names))
    assert set(names) <= defined


def test_public_names_can_be_had():
    for name in cn.__all__:
        assert getattr(cn, name) is not None
    assert set(cn.__all__) <= set(dir(cn))
    with pytest.raises(AttributeError, match="no attribute 'layernorm'"):
        cn.layernorm  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_module_budget(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES, f"{path.name} has {len(lines)} lines: split it by idea"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_module_docstring_is_one_line(path):
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert "\n" not in docstring


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_assert_in_the_package(path):
    found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not found, f"{path.name}: python -O drops the asserts of lines {found}"


def test_no_drawer_for_everything():
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert not {p.stem.strip("_") for p in PACKAGE.rglob("*.py")} & drawers


def test_typed():
    assert (PACKAGE / "py.typed").is_file()


# --- the cost of import -------------------------------------------------------------------------

OPTIONAL = (
    *("cupy", "torch", "numba", "dask", "sklearn", "pandas"),
    *("matplotlib", "tqdm", "IPython", "jax", "scipy"),
)


def test_import_brings_no_optional_library():
    program = f"import cupynorm, sys; print(*[m for m in {OPTIONAL} if m in sys.modules])"
    assert run(program).split() == []


def test_a_numpy_call_brings_no_library_but_numba():
    program = (
        "import numpy, cupynorm, sys\n"
        "cupynorm.layer_norm(numpy.ones((2, 3)), return_stats=True)\n"
        f"print(*[m for m in {OPTIONAL} if m in sys.modules])"
    )
    assert set(run(program).split()) <= {"numba", "scipy"}  # numba looks for scipy's BLAS


def test_import_adds_less_than_a_tenth_of_a_second_to_numpys():
    program = (
        "import numpy, time\n"
        "start = time.perf_counter()\n"
        "import cupynorm\n"
        "print(time.perf_counter() - start)"
    )
    run(program)  # fills the caches of byte code and of the disk
    times = []
    for _ in range(3):  # a busy machine gets further tries
        times += [float(run(program)) for _ in range(5)]
        if statistics.median(times[-5:]) < 0.1:
            return
    pytest.fail(f"import cupynorm took {sorted(times)} s on top of numpy")
