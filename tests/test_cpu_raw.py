"""Raw addresses: the bits of the NumPy path, its threads, its code kept on disk."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import bwd_shared as _cpu_bwd_shared
from cupynorm._cpu import crew as _cpu_crew
from cupynorm._cpu import kept as _cpu_kept
from cupynorm._cpu import raw as _cpu_raw
from cupynorm._cpu import shared as _cpu_shared
from cupynorm._cpu import threads as _threads
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def address(a):
    return 0 if a is None else a.ctypes.data


def compute(kind):
    return np.float64 if kind == "float64" else np.float32


def values(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def guarded(shape, dtype):
    """Array with a marked element before and after it, and a check that they still stand."""
    size = int(np.prod(shape))
    memory = np.full(size + 2, 77, dtype)

    def check():
        assert memory[0] == 77
        assert memory[-1] == 77

    return memory[1:-1].reshape(shape), check


def same_bits(a, b):
    return np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


def forward(kind, x, weight, bias, eps, stats=True, in_place=False):
    """y, mean and rstd through addresses; nothing beside them is written."""
    M, N = x.shape
    y, untouched = guarded(x.shape, x.dtype)
    if in_place:
        y[...] = x
    mean, mean_untouched = guarded((M,), compute(kind))
    rstd, rstd_untouched = guarded((M,), compute(kind))
    to_stats = (address(mean), address(rstd)) if stats else (0, 0)
    source = address(y if in_place else x)
    wb = address(weight), address(bias)
    _cpu_raw.layer_norm_fwd(kind, source, address(y), M, N, *wb, eps, *to_stats)
    for check in (untouched, mean_untouched, rstd_untouched):
        check()
    return y, mean, rstd


def numpy_forward(kind, x, weight, bias, eps):
    y = np.empty_like(x)
    mean, rstd = (np.empty((x.shape[0], 1), compute(kind)) for _ in range(2))
    _cpu.layer_norm_fwd(x, (1,), weight, bias, eps, y, mean, rstd)
    return y, mean[:, 0], rstd[:, 0]


def assert_same_bits(got, want):
    for name, a, b in zip(("y", "mean", "rstd"), got, want, strict=True):
        assert same_bits(a, b), name


# Below one vector, its edges, several with a rest, the edge of a chunk, several chunks.
WIDTHS = [1, 3, 15, 16, 17, 64, 100, 768, 4096, 4097, 9000]


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_numpy_path(kind):
    for N in WIDTHS:
        x = values((5, N), KINDS[kind], N)
        weight, bias = (values((N,), compute(kind), seed) for seed in (1, 2))
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            want = numpy_forward(kind, x, w, b, 1e-5)
            assert_same_bits(forward(kind, x, w, b, 1e-5), want)
            assert same_bits(forward(kind, x, w, b, 1e-5, stats=False)[0], want[0])
            assert_same_bits(forward(kind, x, w, b, 1e-5, in_place=True), want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_call_without_its_wrapping(kind):
    x = values((5, 100), KINDS[kind], 9)
    call, fixed, limit = _cpu_raw.forward_alone(kind, 1e-3)
    assert x.size < limit
    y, untouched = guarded(x.shape, x.dtype)
    call(address(x), address(y), 5, 100, 0, 0, 1e-3, *fixed[:2], 0, 0, fixed[2])
    untouched()
    assert same_bits(y, numpy_forward(kind, x, None, None, 1e-3)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind):
    x = values((7, 300), KINDS[kind], 0)
    weight, bias = (values((300,), compute(kind), seed) for seed in (1, 2))
    got = forward(kind, x, weight, bias, 1e-5)
    want = oracle.layer_norm(x, (1,), weight, bias, 1e-5)
    for name, a, b in zip(("y", "mean", "rstd"), got, want, strict=True):
        bound = oracle.tolerance(KINDS[kind] if name == "y" else compute(kind), 300)
        a = a.astype(np.float64).reshape(b.shape)
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound, err_msg=name)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 0.5, -1e-3])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_ranges_that_need_a_second_look(eps, scale):
    """float32 sums of squares overflow, or vanish beside eps: as in the NumPy path."""
    x = values((4, 100), np.float32, 3) * np.float32(scale)
    want = numpy_forward("float32", x, None, None, eps)
    assert_same_bits(forward("float32", x, None, None, eps), want)


def test_nan_and_inf_stay_in_their_row():
    x = values((6, 40), np.float32, 4)
    x[1, 3], x[4, 0] = np.nan, np.inf
    y, mean, _ = forward("float32", x, None, None, 1e-5)
    assert np.isnan(y[[1, 4]]).all()
    assert np.isfinite(y[[0, 2, 3, 5]]).all()
    assert not np.isfinite(mean[[1, 4]]).any()


SHARED = [(3000, 256), (40, 20000), (1, 1 << 20), (3, 300001)]


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_every_number_of_threads_gives_the_same_bits(kind, shape, monkeypatch):
    x = values(shape, KINDS[kind], 5)
    weight, bias = (values(shape[1:], compute(kind), seed) for seed in (1, 2))
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
    want = numpy_forward(kind, x, weight, bias, 1e-5)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
        assert_same_bits(forward(kind, x, weight, bias, 1e-5), want)
        assert_same_bits(forward(kind, x, weight, bias, 1e-5, in_place=True), want)
    absent = forward(kind, x, None, None, 1e-5, stats=False)[0]
    assert same_bits(absent, numpy_forward(kind, x, None, None, 1e-5)[0])


# --- backward -----------------------------------------------------------------------------------


def backward(kind, dy, x, mean, rstd, weight, wanted=(True, True, True), over_dy=False):
    """dx, dweight and dbias through addresses, None where not wanted; nothing beside is written."""
    M, N = x.shape
    arrays = [guarded(x.shape, x.dtype), *(guarded((N,), compute(kind)) for _ in range(2))]
    if over_dy:
        arrays[0][0][...] = dy
        dy = arrays[0][0]
    out = [array if want else None for (array, _), want in zip(arrays, wanted, strict=True)]
    inputs = (address(mean), address(rstd), address(weight))
    _cpu_raw.layer_norm_bwd(
        kind, address(dy), address(x), address(out[0]), M, N, *inputs, *map(address, out[1:])
    )
    for _, untouched in arrays:
        untouched()
    return out


def numpy_backward(kind, dy, x, mean, rstd, weight):
    N = x.shape[1]
    dx, dweight, dbias = np.empty_like(x), np.empty(N, compute(kind)), np.empty(N, compute(kind))
    stats = mean[:, None], rstd[:, None]
    _cpu.layer_norm_bwd(dy, x, (1,), *stats, weight, dx, dweight, dbias)
    return dx, dweight, dbias


def backward_case(kind, shape, seed=0):
    x, dy = (values(shape, KINDS[kind], seed + i) for i in range(2))
    weight = values(shape[1:], compute(kind), seed + 2)
    _, mean, rstd = numpy_forward(kind, x, None, None, 1e-5)
    return dy, x, mean, rstd, weight


def assert_same_gradients(got, want):
    for name, a, b in zip(("dx", "dweight", "dbias"), got, want, strict=True):
        assert a is None or same_bits(a, b), name


WANTED = [(True, True, True), (True, False, False), (False, True, True), (True, False, True)]
WANTED += [(True, True, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_bits_of_the_numpy_path(kind):
    for N in [*WIDTHS, 32768, 32769]:
        case = backward_case(kind, (6, N), N)
        want = numpy_backward(kind, *case)
        for wanted in WANTED if N < 5000 else WANTED[:3]:
            got = backward(kind, *case, wanted)
            assert [a is not None for a in got] == list(wanted)
            assert_same_gradients(got, want)
        assert_same_gradients(backward(kind, *case, over_dy=True), want)
        plain = *case[:4], None
        assert_same_gradients(backward(kind, *plain), numpy_backward(kind, *plain))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_float64(kind):
    dy, x, mean, rstd, weight = backward_case(kind, (50, 300), 3)
    got = backward(kind, dy, x, mean, rstd, weight)
    want = oracle.layer_norm_backward(dy, x, (1,), weight, 1e-5)
    for name, a, b in zip(("dx", "dweight", "dbias"), got, want, strict=True):
        size = 1.0 if name == "dx" else 50.0
        bound = 4 * oracle.tolerance(KINDS[kind] if name == "dx" else compute(kind), 300)
        a = a.astype(np.float64)
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound * size, err_msg=name)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3000, 256), (40, 20000), (1, 1 << 19), (3, 200001)], ids=str)
def test_every_number_of_threads_gives_the_same_gradients(kind, shape, monkeypatch):
    case = backward_case(kind, shape, 5)
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "1")
    want = numpy_backward(kind, *case)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
        assert_same_gradients(backward(kind, *case), want)
        assert_same_gradients(backward(kind, *case, WANTED[1]), want)
        assert_same_gradients(backward(kind, *case, WANTED[2]), want)
    assert_same_gradients(backward(kind, *case, over_dy=True), want)


# --- threads ------------------------------------------------------------------------------------


def test_threads_are_as_many_as_the_caller_says(monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(_cpu_crew, "run", lambda work, job, threads: seen.append(threads))
    x = values((3000, 256), np.float32, 8)
    stats = np.ones((2, 3000), np.float32)

    def call(M, num_threads):
        a = address(x)
        _cpu_raw.layer_norm_fwd("float32", a, a, M, 256, 0, 0, 1e-5, 0, 0, num_threads)
        pointers = a, a, a, M, 256, *map(address, stats), 0, 0, 0
        _cpu_raw.layer_norm_bwd("float32", *pointers, num_threads)

    call(3000, lambda: 5)
    assert seen == [5, 5]
    call(3000, lambda: 1)
    assert seen == [5, 5]
    call(3, lambda: asked.append(1))
    assert not asked


def test_many_threads_call_at_once():
    x = values((500, 64), np.float32, 6)
    want = numpy_forward("float32", x, None, None, 1e-5)
    wrong = []

    def calls():
        for _ in range(200):
            y = np.empty_like(x)
            _cpu_raw.layer_norm_fwd("float32", address(x), address(y), 500, 64, 0, 0, 1e-5, 0, 0)
            if not same_bits(y, want[0]):
                wrong.append(1)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_an_interrupted_call_leaves_no_helper_at_work(monkeypatch):
    """Else the helper would write to memory that the caller frees as the interrupt goes up."""
    left = threading.Event()
    begun = threading.Event()

    def work(job, ticket):
        begun.set()
        time.sleep(0.05)
        left.set()

    def interrupted(make_task, count, threads):
        threading.Thread(target=make_task(), args=(0,)).start()
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(_threads, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _cpu_crew._in_python(work, _cpu_crew.record(2), 2)
    assert left.is_set()


def test_an_interrupted_call_has_no_block_left_to_claim():
    """A helper that comes late finds the counter beyond every block, in either direction."""
    x = values((300, 64), np.float32, 7)
    y = np.zeros_like(x)
    mean, rstd = np.zeros(300, np.float32), np.ones(300, np.float32)
    numbers = address(x), 64, address(y), 64, 300, 64, 0, 0, 1e-5, -1.0, 1e30, 0, 0, 0, 9
    gradients = address(x), 64, address(x), 64, address(y), 64, 300, 64, 0, address(mean)
    jobs = {
        _cpu_shared._define_rows: _cpu_crew.record(2, *numbers),
        _cpu_bwd_shared._define_gradients: _cpu_crew.record(2, *gradients, address(rstd), 0, 0),
    }
    for define, job in jobs.items():
        job[_cpu_crew.COUNTER :: 8] = _cpu_crew._GONE
        for who in (0, 1):
            _cpu_kept.shared(define).ctypes(address(job), who)
        assert not y.any()
        job[_cpu_crew.COUNTER :: 8] = 0
        _cpu_kept.shared(define).ctypes(address(job), 0)
        assert y.any()
        y[...] = 0


def test_available():
    assert _cpu_raw.available()
    with _cpu.without_numba():
        assert not _cpu_raw.available()
    code = "from cupynorm import _cpu_raw; print(_cpu_raw.available())"
    assert run_python(code, CUPYNORM_NUMBA="0").strip() == "False"
    assert run_python("import sys; sys.modules['numba'] = None\n" + code).strip() == "False"


# --- compiled once, and again when what it is made of has changed --------------------------------


def run_python(code, root=ROOT, **env):
    """Standard output of a fresh interpreter with the package of ``root``."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(root)} | env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FIRST_CALL = """
    import numpy as np
    from cupynorm._cpu import raw as _cpu_raw
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    y = np.empty_like(x)
    pointers = x.ctypes.data, y.ctypes.data
    _cpu_raw.layer_norm_fwd("float32", *pointers, 3, 4, 0, 0, 1e-5, 0, 0)
    assert abs(y[0, 0] + 1.3416) < 1e-3, y
    from cupynorm._cpu import entries as _cpu_entries
    print(sum(_cpu_entries.forward("float32").stats.cache_hits.values()))
"""
OTHER_CALLS = """
    x, y = x.astype(np.float64), y.astype(np.float64)
    pointers = x.ctypes.data, y.ctypes.data
    _cpu_raw.layer_norm_fwd("float64", *pointers, 3, 4, 0, 0, 1e-5, 0, 0)
    assert abs(y[0, 0] + 1.3416) < 1e-3, y
    print(sum(_cpu_entries.forward("float64").stats.cache_hits.values()))
    stats = [y.ctypes.data] * 2
    _cpu_raw.layer_norm_bwd("float64", pointers[0], *pointers, 3, 4, *stats, 0, 0, 0)
    print(sum(_cpu_entries.backward("float64").stats.cache_hits.values()))
"""


def test_kept_on_disk_until_an_inner_file_changes(tmp_path):
    shutil.copytree(
        ROOT / "cupynorm", tmp_path / "cupynorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    folder = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    calls = FIRST_CALL + OTHER_CALLS
    assert run_python(calls, tmp_path, **folder).split() == ["0", "0", "0"]
    assert run_python(calls, tmp_path, **folder).split() == ["1", "1", "1"]
    inner = tmp_path / "cupynorm" / "_cpu" / "rows.py"
    inner.write_text(inner.read_text() + "\n")
    assert run_python(FIRST_CALL, tmp_path, **folder).split() == ["0"]


def test_a_full_disk_keeps_no_call_from_its_result(tmp_path):
    full = """
        import numba.core.caching as caching
        def save(self, *args):
            raise OSError(28, "No space left on device")
        caching.IndexDataCacheFile.save = save
    """
    code = textwrap.dedent(full) + textwrap.dedent(FIRST_CALL)
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["0"]
