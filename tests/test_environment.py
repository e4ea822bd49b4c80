"""Environments that are not kind: each case is a program in a process of its own."""

import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from tests.cpu.programs import ROOT

RIGHT = """
import numpy as np, cupynorm as cn
def right(x=None):
    y = cn.layer_norm(np.arange(12, dtype=np.float32).reshape(3, 4))
    assert abs(float(y[2, 3]) - 1.3416) < 1e-3, y
"""
SAID = 'told = repr(cn.show_config().path("cpu-numba")); assert {!r} in told, told'
EVERY = """
import pickle
right()
x, w = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2, np.ones(4, np.float32)
y, mean, rstd = cn.layer_norm(x, 4, w, w, return_stats=True)
cn.layer_norm_backward(y, x, 4, mean, rstd, w)
cn.rms_norm_backward(y, x, 4, cn.rms_norm(x, return_stats=True).rstd)
cn.add_layer_norm(x, y), cn.add_rms_norm(x, y), cn.layer_norm_columns(list(x)), cn.prepare(x)(x)
layer = cn.LayerNorm(4, device="cpu")
layer(x), layer.backward(y), cn.explain(x), pickle.loads(pickle.dumps(layer))
try:
    cn.layer_norm(x, 5)
except ValueError as error:  # a check, not an assertion
    assert "(5,)" in str(error), error
else:
    raise SystemExit("a wrong shape was taken")
"""
WORKERS = """
import multiprocessing
if __name__ == "__main__":
    right()
    for way in ("spawn", "forkserver"):
        with multiprocessing.get_context(way).Pool(1) as pool:
            pool.map(right, range(2))
"""
# Root may write anywhere, so the one folder that numba may take is below a file.
UNWRITABLE = {
    "HOME": "{tmp}/file/home",
    "XDG_CACHE_HOME": "{tmp}/file/home",
    "NUMBA_CACHE_DIR": "{tmp}/file/cache",
    "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
ZIPPED = """
from cupynorm._cuda import source
assert ".zip" in cn.__file__ and "rstd" in source._text("rows")
"""
SHOWN = "print(cn.show_config(), cn.explain(np.ones((3, 4))), cn.LayerNorm(4, device='cpu'))"
NO_SHM = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro,size=1 no /dev/shm && exec "$@"', "-")

# Program, flags of the interpreter, its environment; the first compiles, others load.
CASES = {
    "zip, nothing can be written": (ZIPPED + "right()\n" + SAID.format("anew"), [], UNWRITABLE),
    "optimized, warnings": (EVERY, ["-O", "-W", "error"], {}),
    "debugging allocator, no shared memory": (EVERY, ["-OO"], {"PYTHONMALLOC": "debug"}),
    "ascii": (SHOWN, [], ASCII),
    "help in ascii": (None, ["-m", "cupynorm", "--help"], ASCII),
    "workers": (WORKERS, [], {}),
}


def start(tmp_path, code, flags=(), env=None, before=(), path=ROOT):
    """A fresh interpreter that runs a file in an empty folder."""
    (tmp_path / "program.py").write_text(RIGHT + (code or ""), encoding="utf-8")
    given = {k: v.format(tmp=tmp_path) for k, v in (env or {}).items()}
    command = [*before, sys.executable, *flags, *(["program.py"] if code is not None else [])]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(path)} | given,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode(errors="replace")
    return out


@pytest.mark.parametrize("case", CASES)
def test_right_in(case, tmp_path):
    code, flags, env = CASES[case]
    (tmp_path / "file").touch()
    path, before = ROOT, ()
    if "zip" in case:
        path = tmp_path / "wheel.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for folder, place in (("cupynorm", "cupynorm"), ("kernels", "cupynorm/kernels")):
                for file in (ROOT / folder).rglob("*.*"):
                    if file.suffix in (".py", ".cuh"):
                        archive.write(file, f"{place}/{file.relative_to(ROOT / folder)}")
    if "no shared memory" in case:
        before = NO_SHM
        if not shutil.which("unshare") or subprocess.run([*before, "true"], check=False).returncode:
            pytest.skip("no file system can be mounted here")
    finish(start(tmp_path, code, flags, env, before, path))


JOB = "from cupynorm._cpu import jobs\njobs.finish('float32')\nprint('made')"


def test_a_cache_that_is_killed_shared_or_cut(tmp_path):
    """A process that dies while it compiles or writes leaves nothing that the next one believes."""
    cache = tmp_path / "cache"
    env = {"NUMBA_CACHE_DIR": str(cache)}

    def kept():
        return sorted(cache.rglob("*.nb?"))

    first = start(tmp_path, JOB, env=env)
    while not kept() and first.poll() is None:  # the index is written, the code not
        time.sleep(0.0005)
    first.kill()
    others = [start(tmp_path, JOB, env=env) for _ in range(5)]
    for process in (first, *others):
        process.kill()
        process.communicate()
        time.sleep(0.7)  # each somewhere else
    for process in [start(tmp_path, JOB, env=env) for _ in range(2)]:
        finish(process)
    sizes = [file.stat().st_size for file in kept()]
    assert len(sizes) == 2
    for k, left in enumerate((0, 0.5)):
        file = kept()[k]
        with file.open("r+b") as cut:
            cut.truncate(int(sizes[k] * left))
        finish(start(tmp_path, JOB, env=env))
        assert [file.stat().st_size for file in kept()] == sizes
