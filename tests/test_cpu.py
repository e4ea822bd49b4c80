"""The NumPy path: with numba's loops and with plain NumPy, every layout, threads, forks, caches."""

import itertools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import crew as _cpu_crew
from cupynorm._cpu import half as _cpu_half
from cupynorm._cpu import threads as _threads
from tests import oracle

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", BF16, "float32", "float64"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["numba", "numpy"])
def engine(request):
    """Both ways that a NumPy array can be normalized."""
    if request.param == "numba":
        assert _cpu.describe().startswith("numba"), _cpu.describe()
        yield "numba"
    else:
        with _cpu.without_numba():
            yield "numpy"


def normalize(x, axes, weight=None, bias=None, eps=1e-5, y=None):
    """y, mean, rstd of the path itself."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    dtype = np.float64 if x.dtype.char == "d" else np.float32
    mean, rstd = np.full(kept, np.nan, dtype), np.full(kept, np.nan, dtype)
    y = np.empty_like(x) if y is None else y
    _cpu.layer_norm_fwd(x, axes, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def values(shape, dtype, seed=0, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (offset + scale * rng.standard_normal(shape)).astype(dtype)


def bits(a):
    return np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")


def same_bits(a, b):
    return np.array_equal(bits(a.astype(a.dtype.newbyteorder("="))), bits(b))


def assert_exact(result, x, axes, weight, bias, eps, slack=1.0):
    want = oracle.layer_norm(x, axes, weight, bias, eps)
    N = x.size // result[1].size
    bound = slack * oracle.tolerance(x.dtype.newbyteorder("="), N)
    np.testing.assert_allclose(result[0].astype(np.float64), want[0], rtol=bound, atol=bound)
    stats = slack * oracle.tolerance("float64" if x.dtype.char == "d" else "float32", N)
    size = np.max(np.abs(x.astype(np.float64)))
    np.testing.assert_allclose(result[1], want[1], rtol=stats, atol=stats * size)
    np.testing.assert_allclose(result[2], want[2], rtol=stats)


# Every branch by N: below one vector, its edges, several vectors with a rest, the edge of numba's
# chunk and of NumPy's, rows of several chunks.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 768, 1000, 1025, 4095, 4096, 4097]
WIDTHS += [9000, 262144, 262145, 600000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(engine, dtype):
    for N in WIDTHS:
        x = values((3, N), dtype, seed=N, offset=0.5)
        weight, bias = values((N,), dtype, seed=1), values((N,), dtype, seed=2)
        result = normalize(x, (1,), weight, bias)
        # One or two values: y hangs on their difference, which float32 sums round like any other.
        assert_exact(result, x, (1,), weight, bias, 1e-5, slack=4)


LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "reversed": lambda x: x[::-1, ..., ::-1].copy()[::-1, ..., ::-1],
    "sliced rows": lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
    "stepped": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "swapped axes": lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
    "unaligned": lambda x: unaligned(x),
    "read-only": lambda x: read_only(x),
    "memmap": lambda x: as_memmap(x),
}


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)[1:]
    view = np.ndarray(x.shape, x.dtype, memory)
    view[...] = x
    assert x.itemsize == 1 or not view.flags.aligned
    return view


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def as_memmap(x):
    path = Path(os.environ["PYTEST_MEMMAP"])
    x.tofile(path)
    return np.memmap(path, x.dtype, "r", shape=x.shape)


@pytest.fixture(autouse=True)
def memmap_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MEMMAP", str(tmp_path / "x"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_bits_of_the_contiguous_array(engine, dtype, layout):
    """Rows are found where they are, and neither address nor stride reaches their bits."""
    if layout == "big-endian" and dtype is BF16:
        pytest.skip("ml_dtypes has no big-endian bfloat16")
    for shape in [(70, 33), (4, 6, 40), (3, 5, 4, 18), (2, 9000)]:
        x = values(shape, dtype)
        all_axes = range(len(shape))
        subsets = [c for k in (1, 2) for c in itertools.combinations(all_axes, k)]
        for axes in [*subsets, tuple(all_axes)]:
            N_shape = tuple(shape[a] for a in axes)
            weight, bias = values(N_shape, "float32", seed=1), values(N_shape, dtype, seed=2)
            plain = normalize(x, axes, weight, bias)
            assert_exact(plain, x, axes, weight, bias, 1e-5, slack=2)
            other = normalize(LAYOUTS[layout](x), axes, weight, bias)
            for a, b in zip(other, plain, strict=True):
                assert same_bits(a, b), (shape, axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_input_and_scattered_output(engine, dtype):
    row = values((50,), dtype)
    x = np.broadcast_to(row, (40, 50))
    target = np.full((40, 100), 7, dtype)
    result = normalize(x, (1,), y=target[:, ::-2])
    assert_exact(result, x, (1,), None, None, 1e-5)
    assert np.all(target[:, ::2] == 7)
    result = normalize(x, (0,), y=np.empty_like(target)[:, :50])
    np.testing.assert_allclose(result[0].astype(np.float64), 0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["C", "F", "reversed", "stepped", "unaligned"])
def test_in_place_gives_the_same_bits(engine, dtype, layout):
    for shape, axes in [((40, 77), (1,)), ((40, 77), (0,)), ((3, 9001), (1,)), ((3, 9001), (0,))]:
        x = LAYOUTS[layout](values(shape, dtype))
        bias = values(tuple(shape[a] for a in axes), dtype)
        want = normalize(x.copy(), axes, bias, bias)[0]
        y, _, _ = normalize(x, axes, bias, bias, y=x)
        assert y is x
        assert same_bits(y, want)
        x = LAYOUTS[layout](values(shape, dtype))
        normalize(x, axes, bias, bias, y=x[...])  # the same memory in another object
        assert same_bits(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_bias_of_any_dtype_and_layout(engine, dtype):
    x = values((9, 200), dtype)
    for w_dtype, b_dtype in itertools.product([None, *DTYPES], repeat=2):
        weight = None if w_dtype is None else values((200,), w_dtype, seed=3)[::-1]
        bias = None if b_dtype is None else np.repeat(values((200,), b_dtype, seed=4), 2)[::2]
        assert_exact(normalize(x, (1,), weight, bias), x, (1,), weight, bias, 1e-5, slack=2)
    weight = values((200,), ">f4")
    assert_exact(normalize(x, (1,), weight), x, (1,), weight, None, 1e-5, slack=2)
    huge = np.full(200, 1e300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalize(x, (1,), huge)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_offsets_and_scales(engine, dtype):
    for N, (offset, scale), eps in itertools.product(
        (30, 1000, 20000),
        [(1e3, 1), (1e6, 1), (-1e6, 0.5), (0, 1e-20), (0, 1e-3), (0, 1e6), (0, 1e18), (1e18, 1e15)],
        (1e-5, 0.0, 1.0, 1e6),
    ):
        x = values((4, N), dtype, offset=offset, scale=scale)
        # The mean of N sums of size `offset` is good to an ulp of s + m', y to far better.
        assert_exact(normalize(x, (1,), eps=eps), x, (1,), None, None, eps, slack=4)


def test_values_whose_squares_or_sums_leave_float32(engine):
    """Where float32 sums overflow or vanish, the row is taken again in float64."""
    for N in (30, 1000, 20000):
        for scale in (1e19, 1e30, 3e36, 1e-25, 1e-30):
            x = values((5, N), "float32", scale=scale)
            y, _, _ = normalize(x, (1,), eps=0.0)
            want = oracle.layer_norm(x, (1,), None, None, 0.0)[0]
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        x = np.full((3, N), 3e38, np.float32)
        y, mean, _ = normalize(x, (1,))
        assert np.all(y == 0)
        assert np.all(mean == np.float32(3e38))


def test_a_row_whose_beginning_is_far_from_its_mean(engine):
    """Its first values, near which deviations are taken, may tell nothing of the rest."""
    for N in (300, 1000, 4096, 20000):
        ramp = np.linspace(0, 1000, N)
        step = np.where(np.arange(N) < 256, -1000.0, 1000.0)
        outlier = values(N, "float64")
        outlier[3] = 1e6
        spread = values(N, "float64")
        late = np.where(np.arange(N) < 256, 0.0, spread)
        x = np.stack([ramp, ramp[::-1], step, step + spread, outlier, late, late + 1e4])
        for dtype in ("float32", "float64"):
            assert_exact(normalize(x.astype(dtype), (1,)), x.astype(dtype), (1,), None, None, 1e-5)


def test_float16_near_its_maximum(engine):
    for N in (64, 5000):
        x = values((4, N), "float64", offset=6e4, scale=2e3).clip(-65504, 65504).astype("float16")
        assert_exact(normalize(x, (1,)), x, (1,), None, None, 1e-5)
        weight = np.full(N, 65504, np.float16)
        y = normalize(x, (1,), weight)[0]
        with np.errstate(over="ignore"):
            want = oracle.layer_norm(x, (1,), weight, None, 1e-5)[0].astype(np.float16)
        np.testing.assert_array_equal(np.isinf(y), np.isinf(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_are_zero(engine, dtype):
    for N, value in itertools.product((1, 5, 64, 1000, 5000, 20000), (0.0, 1.0, 0.1, -12345.0)):
        y = normalize(np.full((3, N), value, dtype), (1,))[0]
        assert np.all(y == 0), (N, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_spoil_their_row_alone(engine, dtype):
    for N in (5, 64, 100, 5000, 20000):
        x = values((8, N), dtype)
        good = normalize(x, (1,))[0]
        for row, (col, value) in {1: (0, np.nan), 4: (N - 1, np.inf), 6: (N // 2, -np.inf)}.items():
            x[row, col] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = normalize(x, (1,))[0]
            transposed = normalize(np.asfortranarray(x), (1,))[0]
        clean = [0, 2, 3, 5, 7]
        assert same_bits(y[clean], good[clean])
        assert np.isnan(y[[1, 4, 6]].astype(np.float32)).all()
        assert same_bits(transposed[clean], good[clean])


def test_eps_follows_ieee(engine):
    x = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    y, _, rstd = normalize(x, (1,), eps=0.0)
    assert np.isnan(y[0]).all() and rstd[0, 0] == np.inf
    assert np.isfinite(y[1]).all()
    y, _, rstd = normalize(x, (1,), eps=-1.0)
    assert np.isnan(y[0]).all() and np.isnan(rstd[0, 0])
    assert_exact((y[1:], x[1:].mean(1, keepdims=True), rstd[1:]), x[1:], (1,), None, None, -1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_are_the_same_in_every_batch(engine, dtype, monkeypatch):
    """Alone, among others, at any alignment, on any number of threads, in pieces or whole."""
    for N in (5, 64, 100, 1000, 5000, 300000, 1100000):
        M = max(2, 1100000 // N)
        x = values((M, N), dtype, seed=N, offset=3.0)
        weight = values((N,), "float32")
        results = []
        for threads in ("1", "2", "5"):
            monkeypatch.setenv("CUPYNORM_NUM_THREADS", threads)
            results.append(normalize(x, (1,), weight, weight))
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True)), N
        y = results[0][0]
        for row in (0, M // 2, M - 1):
            for shift in (0, 1, 3):
                memory = np.empty(N + 8, dtype)[shift : shift + N]
                memory[:] = x[row]
                assert same_bits(normalize(memory, (0,), weight, weight)[0], y[row]), (N, row)
        assert same_bits(normalize(x[1:], (1,), weight, weight)[0], y[1:])


def threads_asked_for(monkeypatch):
    """How many threads each job of several blocks that is handed out from now on may have."""
    asked, run, run_compiled = [], _threads.run, _cpu_crew.run
    monkeypatch.setattr(_threads, "run", lambda *a: (asked.extend([a[2]] * (a[1] > 1)), run(*a)))
    monkeypatch.setattr(_cpu_crew, "run", lambda *a: (asked.append(a[2]), run_compiled(*a)))
    return asked


def test_threads_share_rows_and_pieces_of_rows(engine, monkeypatch):
    """Large arrays are handed out; results and statistics land where they belong."""
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
    handed_out = threads_asked_for(monkeypatch)
    for shape, axes in [((4000, 300), (1,)), ((2, 1100000), (1,)), ((300, 4000), (0,))]:
        x = values(shape, "float32", offset=1.0)
        N_shape = tuple(shape[a] for a in axes)
        weight, bias = values(N_shape, "float32", seed=1), values(N_shape, "float32", seed=2)
        handed_out.clear()
        assert_exact(normalize(x, axes, weight, bias), x, axes, weight, bias, 1e-5, slack=2)
        assert 3 in handed_out


def test_no_warning_from_helper_threads(engine, monkeypatch):
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in [(4000, 300), (2, 1100000)]:
            y = normalize(np.full(shape, np.inf, np.float32), (1,))[0]
            assert np.isnan(y).all()
            normalize(np.full(shape, 3e38, np.float32), (1,), np.full(shape[1], 3e38), eps=0.0)


def test_many_callers_at_once(monkeypatch):
    """Sixteen threads call, with and without numba, more threads each than there are CPUs."""
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "4")
    cases = [
        values(s, "float32", seed=i) for i, s in enumerate([(4000, 300), (2, 1100000), (9, 50)])
    ]
    want = {}
    for plain in (False, True):
        for i, x in enumerate(cases):
            with _cpu.without_numba() if plain else warnings.catch_warnings():
                want[plain, i] = normalize(x, (1,))[0]
    gate = threading.Barrier(16)

    def caller(number):
        gate.wait()
        for repeat in range(6):
            i = (number + repeat) % len(cases)
            if number % 2:
                with _cpu.without_numba():
                    y = normalize(cases[i], (1,))[0]
            else:
                y = normalize(cases[i], (1,))[0]
            assert same_bits(y, want[bool(number % 2), i])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(caller, range(16), timeout=60))


def test_a_task_may_call_run_itself():
    """Nested calls on more threads than the pool has must not wait for each other."""
    counts = []

    def inner(index):
        counts.append(index)

    def outer(index):
        _threads.run(lambda: inner, 5, 4)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: _threads.run(lambda: outer, 20, 4), range(8), timeout=60))
    assert len(counts) == 8 * 20 * 5


def test_an_exception_in_any_thread_reaches_the_caller():
    class Odd(Exception):
        pass

    begun = []

    def task(index):
        begun.append(index)
        if index == 3:
            raise Odd(index)
        time.sleep(0.001)

    with pytest.raises(Odd):
        _threads.run(lambda: task, 100, 3)
    assert len(begun) < 100  # the rest is not begun
    done = []
    _threads.run(lambda: done.append, 10, 3)
    assert sorted(done) == list(range(10))


def test_each_thread_has_a_task_of_its_own():
    made, busy = [], threading.local()

    def make_task():
        made.append(threading.get_ident())

        def task(index):
            assert getattr(busy, "owner", made_by) == made_by
            busy.owner = made_by
            time.sleep(0.002)

        made_by = object()
        return task

    _threads.run(make_task, 30, 3)
    assert 1 <= len(made) <= 3
    assert len(set(made)) == len(made)


def test_finished_calls_keep_no_array_alive():
    import gc
    import weakref

    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)

    def make_task(owner=owner):
        return lambda index: time.sleep(0.001)

    _threads.run(make_task, 8, 3)
    del make_task
    del owner
    for _ in range(100):
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.01)
    assert alive() is None


def test_number_of_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
    assert _threads.num_threads() == 3
    for text in ("0", "-1", "many", "2.5"):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", text)
        with pytest.raises(ValueError, match=f"CUPYNORM_NUM_THREADS='{text}' is not a positive"):
            _threads.num_threads()
    for text in ("", " "):
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", text)
        assert 1 <= _threads.num_threads() <= os.cpu_count()
    monkeypatch.delenv("CUPYNORM_NUM_THREADS")
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert _threads.num_threads() == 1
        finally:
            os.sched_setaffinity(0, allowed)


def run_python(code, **env):
    """Standard output of a fresh interpreter at the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads, which is the point
    import numpy as np
    from cupynorm._cpu import arrays as _cpu
    def call(shape):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        y = np.empty_like(x)
        _cpu.layer_norm_fwd(x, (1,), None, None, 1e-5, y, None, None)
        return y
    shapes = [(3000, 400), (2, 1100000)]
    want = [call(s) for s in shapes]  # the pool has its threads now
    stop = False
    def busy():
        while not stop:
            call(shapes[0])
    callers = [threading.Thread(target=busy) for _ in range(2)]
    for t in callers: t.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            good = all(np.array_equal(call(s), w) for s, w in zip(shapes, want))
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if np.array_equal(call(shapes[1]), want[1]) else 3)
            os._exit(0 if good and os.waitpid(grandchild, 0)[1] == 0 else 3)
        assert os.waitpid(child, 0)[1] == 0
    stop = True
    for t in callers: t.join()
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for s, w, got in zip(shapes, want, pool.map(call, shapes)):
            assert np.array_equal(got, w)
    print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("numba", ["0", "1"])
def test_after_fork(numba):
    """Children of a process with busy helpers compute the same, and so do theirs."""
    out = run_python(FORK, CUPYNORM_NUMBA=numba, CUPYNORM_NUM_THREADS="3")
    assert out.strip() == "same"


FIRST_CALL = """
    import sys, time, numpy as np
    import cupynorm
    assert "numba" not in sys.modules and "llvmlite" not in sys.modules
    from cupynorm._cpu import arrays as _cpu
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    y = np.empty_like(x)
    start = time.perf_counter()
    _cpu.layer_norm_fwd(x, (1,), None, None, 1e-5, y, None, None)
    assert abs(y[0, 0] + 1.3416) < 1e-3, y
    seconds = time.perf_counter() - start
    hits = -1
    if "numba" in sys.modules:
        from cupynorm._cpu import kept as _cpu_kept
        from cupynorm._cpu import shared as _cpu_shared
        hits = _cpu_kept.shared(_cpu_shared._define_rows).cache_hits
    print(_cpu.describe().split()[0], hits, seconds)
"""


def test_a_second_process_pays_no_compile(tmp_path):
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    name, hits, first = run_python(FIRST_CALL, **folder).split()
    assert (name, hits) == ("numba", "0")
    name, hits, second = run_python(FIRST_CALL, **folder).split()
    assert (name, hits) == ("numba", "1")
    assert float(second) < float(first), (first, second)


def test_cache_directory_that_cannot_be_used(tmp_path):
    """Neither a path that is a file nor a full disk keeps a call from its result."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_python(FIRST_CALL, NUMBA_CACHE_DIR=str(blocked / "cache")).startswith("numba")
    full = """
        import numba.core.caching as caching
        def save(self, *args):
            raise OSError(28, "No space left on device")
        caching.IndexDataCacheFile.save = save
    """
    out = run_python(
        textwrap.dedent(full) + textwrap.dedent(FIRST_CALL).replace("assert", "if 0: assert", 1),
        NUMBA_CACHE_DIR=str(tmp_path / "full"),
    )
    assert out.startswith("numba")


def test_a_changed_source_is_compiled_again(monkeypatch):
    """numba's cache sees the entry's file only; the checksum of the others is part of the key."""
    from cupynorm._cpu import kept as _cpu_kept

    before = _cpu_kept.sources()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"\n")
    assert _cpu_kept.sources() != before


DEFINING = (
    "bwd_shared",
    "bwd_strided_loops",
    "columns_loops",
    "crew",
    "entries",
    "shared",
    "strided_loops",
)


@pytest.mark.parametrize("module", DEFINING)
def test_every_entry_closes_over_the_checksum(module):
    """Or an edit of an inner file would go unseen by the code that is kept on disk."""
    found = vars(import_module(f"cupynorm.{module}"))
    defines = [f for name, f in found.items() if name.startswith("_define_")]
    assert defines
    for define in defines:
        kept = define(8191, lambda f: f, np.float32, np.float32)
        assert 8191 in [cell.cell_contents for cell in kept.__closure__], define.__name__


def test_the_checksum_is_of_all_files_that_entries_are_made_of():
    from cupynorm._cpu import kept as _cpu_kept

    names = {p.stem for p in ROOT.glob("cupynorm/_cpu_*.py")}
    counted = set(_cpu_kept.INNER)
    assert counted <= names
    for module in (*DEFINING, *counted):
        text = (ROOT / "cupynorm" / f"{module}.py").read_text()
        inner = {m for m in re.findall(r"^from cupynorm\.(_cpu_\w+) import", text, re.M)}
        assert inner - counted <= {"blocks"}, module  # of which Python alone calls functions


def test_numba_that_is_absent_or_refused():
    name = run_python(FIRST_CALL, CUPYNORM_NUMBA="0").split()[0]
    assert name == "plain"
    block = "import sys; sys.modules['numba'] = None\n"
    code = textwrap.dedent(FIRST_CALL).replace('"numba" not in sys.modules and ', "")
    code = code.replace('if "numba" in sys.modules:', "if False:")
    assert run_python(block + code).split()[0] == "plain"
    assert run_python(code, NUMBA_DISABLE_JIT="1").split()[0] == "plain"
    said = block + "from cupynorm import _cpu; print(_cpu.describe())"
    assert "numba cannot be imported" in run_python(said)


def test_sixteen_bit_conversions_on_every_bit_pattern():
    every = np.arange(65536, dtype=np.uint16)
    for kind, dtype in (("float16", np.dtype(np.float16)), ("bfloat16", BF16)):
        with np.errstate(all="ignore"):
            want = every.view(dtype).astype(np.float32)
            got = _cpu_half.widen(kind, every)
            np.testing.assert_array_equal(got, want)
            assert np.array_equal(np.signbit(got), np.signbit(want))
            edges = [want, np.nextafter(want, np.float32(np.inf)), want[:-1] / 2 + want[1:] / 2]
            edges.append(np.random.default_rng(0).integers(0, 2**32, 1 << 18, "u4").view("f4"))
            single = np.concatenate([*edges, np.nextafter(want, np.float32(-np.inf))])
            narrowed = np.empty(single.size, np.uint16)
            _cpu_half.narrow(kind, single.copy(), narrowed)
            rounded = single.astype(dtype)
        np.testing.assert_array_equal(
            narrowed.view(dtype).astype(np.float32), rounded.astype(np.float32)
        )


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_sixteen_bit_rounding_in_the_loops(engine, dtype):
    """x = (-1, 1) gives x_hat = (-1, 1) exactly with eps 0: y is bias + weight, rounded once."""
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    for target in (every, np.nextafter(every, np.float32(9e9)), every[:-1] / 2 + every[1:] / 2):
        half = np.array([-1.0, 1.0], dtype)
        N = 2 * target.size
        x = np.resize(half, N)
        bias = np.repeat(target, 2)
        y = normalize(x, (0,), np.zeros(N, np.float32), bias, eps=0.0)[0]
        with np.errstate(over="ignore"):
            want = bias.astype(dtype)
        np.testing.assert_array_equal(y.astype(np.float32), want.astype(np.float32))


def test_warmup_and_describe():
    ready = cn.warmup((7,), ["float32", "bfloat16"], device="cpu")
    assert [name.rsplit(" ", 1)[1] for name in ready] == ["float32", "bfloat16"]
    with _cpu.without_numba():
        assert _cpu.describe() == "plain NumPy blocks"
