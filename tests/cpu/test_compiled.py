"""Compiled code: kept on disk, made again when a file changes, done without where need be."""

import collections
import inspect
import shutil

import numpy as np
import pytest
from numba import types
from numba.core import caching

from cupynorm._cpu import backward, compiled, engine, forward, jobs, strips, vectors
from tests.cpu.programs import ROOT, run_python

FIRST_CALL = """
    import sys, time, numpy as np
    import cupynorm as cn
    assert "numba" not in sys.modules and "llvmlite" not in sys.modules
    from cupynorm._cpu import engine
    made, loaded = [], []
    if engine.available():
        import numba
        from numba.core.caching import FunctionCache
        from cupynorm._cpu import compiled
        load = FunctionCache.load_overload
        FunctionCache.load_overload = lambda *given: loaded.append(load(*given)) or loaded[-1]
        numba.njit(numba.int64(numba.int64))(lambda i: i)  # what numba needs for its own
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    start = time.process_time()
    y = cn.layer_norm(x)
    seconds = time.process_time() - start
    assert abs(y[0, 0] + 1.3416) < 1e-3, y
    if engine.available():
        made = list(compiled._ready.values())
    print(engine.state()[1].split()[0], len(made), len([*filter(None, loaded)]), seconds)
"""


def test_the_next_process_loads_and_a_changed_file_is_compiled_again(tmp_path):
    """In less than a third of a second of one CPU, aside from what numba takes for itself.

    numba's cache sees the file of the entries only.
    """
    for folder in ("cupynorm", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def first_call():
        cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        name, *counts, seconds = run_python(FIRST_CALL, tmp_path, **cache).split()
        return (name, *counts), float(seconds)

    assert first_call()[0] == ("numba", "1", "0")  # a small call takes one function
    times = []
    while not times or (times[-1] >= 0.3 and len(times) < 10):  # a busy machine gets further tries
        told, seconds = first_call()
        assert told == ("numba", "1", "1")
        times.append(seconds)
    assert times[-1] < 0.3, times
    with (tmp_path / "cupynorm/_cpu/forward.py").open("a") as file:
        file.write("# changed\n")
    assert first_call()[0] == ("numba", "1", "0")


COUNTED = """
    from numba.core import codegen, event
    import cupynorm as cn, numpy as np
    functions, optimized = [], []
    class Lowered(event.Listener):
        def on_start(self, _): pass
        def on_end(self, found):
            if found.data["name"].startswith("native_lowering"):
                functions.append(found.data["name"])
    event.register("numba:run_pass", Lowered())
    optimize = codegen.CPUCodeLibrary._optimize_final_module
    def counting(library):
        optimized.append(library.name)
        optimize(library)
    codegen.CPUCodeLibrary._optimize_final_module = counting
    x, stat = np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)
    assert not np.any({call}), "neither y nor dx of a constant row is anything but zero"
    print(len(functions), len(optimized))
"""


@pytest.mark.parametrize(
    ("call", "most", "folder"),
    [
        ("cn.layer_norm(x)", (24, 7), "file/cache"),  # below a file there are no folders
        ("cn.layer_norm_backward(x, x, 3, stat, stat).dx", (43, 9), "cache"),
    ],
    ids=["forward", "backward"],
)
def test_what_a_first_call_compiles(call, most, folder, tmp_path):
    """Functions, and how often LLVM optimizes: these are the seconds of a first call.

    A cache that cannot be written keeps no call from its result.

    With every layout in one function, and each inner function optimized with all that it calls, as
    numba would do, the forward took four times as long, with 42 and 43. What is optimized beside
    the job is numba's own, such as numpy.empty.
    """
    (tmp_path / "file").touch()
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / folder)}
    cache["NUMBA_CACHE_LOCATOR_CLASSES"] = "UserProvidedCacheLocator"  # not beside the package
    counts = run_python(COUNTED.format(call=call), **cache).split()
    assert all(int(count) <= limit for count, limit in zip(counts, most, strict=True)), counts


def test_a_full_disk_keeps_no_function_from_being_compiled(monkeypatch):
    asked = []

    def save(self, key, data):
        asked.append(key)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)

    @compiled.job
    def double(checksum, kind):
        return types.int64(types.int64), lambda i: 2 * i

    assert double("float32")(21) == 42
    assert len(asked) == 1


DEFINES = [f.__wrapped__ for f in vars(jobs).values() if hasattr(f, "__wrapped__")]
DEFINES = [f for f in DEFINES if [*inspect.signature(f).parameters][:2] == ["checksum", "kind"]]


def function_of(define, checksum):
    made = define(checksum, "float32")
    return made[1] if isinstance(made, tuple) else made


@pytest.mark.parametrize("define", DEFINES, ids=lambda f: f.__name__)
def test_every_entry_closes_over_the_checksum(define):
    """Or a change of a file would go unseen by the code that is kept on disk."""
    function = function_of(define, 8191)
    assert 8191 in [cell.cell_contents for cell in function.__closure__]


def test_no_two_closures_have_one_name():
    """Or the code of one is run for the other, where processes have compiled in another order."""
    found, waiting = {}, []
    for module in (forward, backward, strips, vectors, jobs):
        waiting += vars(module).values()
    while waiting:
        value = waiting.pop()
        ours = inspect.isfunction(value) and value.__module__.startswith("cupynorm._cpu")
        if ours and id(value) not in found:
            found[id(value)] = value
            waiting += [cell.cell_contents for cell in value.__closure__ or ()]
    closures = [f for f in found.values() if f.__closure__ and not hasattr(f, "__wrapped__")]
    names = collections.Counter(f.__qualname__ for f in closures)
    assert len(names) > 5 and names.most_common(1)[0][1] == 1, names.most_common(3)


def test_the_checksum_is_of_every_file_with_compiled_code(tmp_path, monkeypatch):
    names = {file.name for file in (ROOT / "cupynorm/_cpu").glob("*.py")}
    names -= {"__init__.py", "arrays.py", "blocks.py", "compiled.py", "engine.py", "threads.py"}
    assert {"vectors.py", "forward.py", "backward.py", "strips.py", "jobs.py"} == names
    copy = tmp_path / "_cpu"
    shutil.copytree(ROOT / "cupynorm/_cpu", copy)
    monkeypatch.setattr(compiled, "__file__", str(copy / "compiled.py"))
    seen = {compiled.checksum.__wrapped__()}
    for name in names:
        with (copy / name).open("a") as file:
            file.write("#")
        seen.add(compiled.checksum.__wrapped__())
    assert len(seen) == len(names) + 1


def test_each_job_is_said_to_be_called_as_it_is():
    """The docstring of each names its arguments."""
    for define in DEFINES:
        function = function_of(define, 1)
        assert f"``{function.__name__}{inspect.signature(function)}``" in define.__doc__


def test_numba_that_is_absent_or_refused():
    assert run_python(FIRST_CALL, CUPYNORM_NUMBA="0").split()[0] == "plain"
    assert run_python(FIRST_CALL, NUMBA_DISABLE_JIT="1").split()[0] == "plain"
    code = FIRST_CALL.replace('"numba" not in sys.modules and ', "").replace("\n    ", "\n")
    said = run_python(f"import sys; sys.modules['numba'] = None\n{code}print(engine.state()[1])")
    assert said.split()[0] == "plain" and "numba cannot be imported" in said


def test_float16_without_the_instruction(monkeypatch):
    """The blocks take it: LLVM's conversion would be a call per element."""
    import cupynorm as cn
    from cupynorm._cpu import vectors

    x = np.arange(12, dtype=np.float16).reshape(3, 4)
    want = cn.layer_norm(x.astype(np.float32))
    monkeypatch.setattr(vectors, "F16C", False)
    assert not engine.available("float16") and engine.available("bfloat16")
    monkeypatch.setattr(engine, "normalizer", None)
    np.testing.assert_allclose(cn.layer_norm(x + np.float16(1)), want, atol=2e-3)


def test_each_dtype_has_a_cache_of_its_own(tmp_path):
    """Two processes that compile for two dtypes at once write to no common index."""
    program = """
    from cupynorm._cpu import jobs
    jobs.finish("float32"), jobs.finish("float64")
    """
    run_python(program, NUMBA_CACHE_DIR=str(tmp_path))
    names = sorted(path.name for path in tmp_path.rglob("*.nbi"))
    assert len(names) == 2
    assert "float32" in names[0] and "float64" in names[1]
    assert len([*tmp_path.rglob("*.nbc")]) == 2
