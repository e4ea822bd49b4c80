"""Memory of NumPy results: reused once nobody holds it, never before, and no more than allowed."""

import ctypes
import gc
import itertools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu import pages as _pages
from cupynorm._cpu import results as _results
from tests import oracle
from tests.in_threads import in_threads
from tests.test_pages import SMAPS, flags_at

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("float16"), BF16, np.dtype("float32"), np.dtype("float64")]
ROOT = Path(__file__).resolve().parents[1]
# Bytes: the least that is kept, some of malloc's memory, the least that is mapped, and more.
SIZES = [_results.LEAST, 700_000, 1 << 22, (5 << 20) + 192]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """No block of an earlier test is found, nor comes back from its garbage; none of this stays."""
    monkeypatch.delenv("CUPYNORM_KEPT_MIB", raising=False)
    gc.disable()
    _results._free.clear()
    yield
    gc.enable()
    _results._free.clear()


def address(a):
    return a.ctypes.data


def kept():
    """Where the blocks begin that nobody uses."""
    return [block.address for block in _results._free]


def is_plain(a):
    """Whether NumPy alone has to do with an array's memory."""
    while a.base is not None:
        a = a.base
        if isinstance(a, _results._Loan):
            return False
    return True


def of_bytes(size, dtype="float32"):
    dtype = np.dtype(dtype)
    return _results.empty((size // dtype.itemsize,), dtype)


def values(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- which result gets which memory ---------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_dead_results_memory_serves_the_next(size):
    a = of_bytes(size)
    at = address(a)
    assert not kept()
    del a
    assert kept() == [at]
    for dtype in DTYPES:
        b = of_bytes(size, dtype)
        assert address(b) == at
        assert not kept()
        del b
    assert kept() == [at]


@pytest.mark.parametrize("size", [1 << 20, 10 << 20])
def test_a_block_serves_results_a_little_smaller(size):
    """Not much smaller, or the rest lay idle, and not larger."""
    a = of_bytes(size)
    at = address(a)
    del a
    least = -(-4 * size // 5 // 4) * 4  # a quarter more is too much
    for fits in (size, size - 4, least):
        assert address(of_bytes(fits)) == at
    for other in (least - 4, size // 2, size + 4):
        b = of_bytes(other)
        assert address(b) != at
        assert at in kept()
        del b
        _results._free.remove(next(f for f in _results._free if f.address != at))


def test_the_oldest_block_that_fits_is_taken():
    a, b = (of_bytes(1 << 20) for _ in range(2))
    first, second = address(a), address(b)
    del b
    del a
    assert kept() == [second, first]
    c = of_bytes(1 << 20)
    assert address(c) == second
    assert kept() == [first]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_begin_on_a_cache_line(dtype):
    """And large ones on a huge page; their whole memory is theirs to write."""
    for size in [*SIZES, _results.LEAST + 2 * dtype.itemsize]:
        a = of_bytes(size, dtype)
        assert not is_plain(a)
        assert address(a) % (1 << 21 if size >= 1 << 22 else 64) == 0
        a[...] = 1
        assert (a == 1).all()


def test_live_results_have_memory_of_their_own():
    """Made and dropped in any order: none lies in another's, none loses its values."""
    rng = np.random.default_rng(1)
    live = []
    for number in range(400):
        if live and rng.random() < 0.5:
            a, value = live.pop(rng.integers(len(live)))
            assert (a == value).all()
            del a
        a = of_bytes(int(rng.choice(SIZES[:3])) - 4 * int(rng.integers(100)))
        a[...] = number
        spans = sorted((address(b), address(b) + b.nbytes) for b, _ in [*live, (a, 0)])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        live.append((a, number))
        del a
    assert all((a == value).all() for a, value in live)


def torch_view(a):
    return pytest.importorskip("torch").from_numpy(a)


HOLDERS = {
    "view": lambda a: a.view(),
    "slice": lambda a: a[7:-5:3],
    "one element": lambda a: a[-1:],
    "other shape": lambda a: a.reshape(2, -1).T,
    "other dtype": lambda a: a.view(np.uint8),
    "real part": lambda a: a.real,
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "memoryview": memoryview,
    "slice of a memoryview": lambda a: memoryview(a)[3:9],
    "array of a memoryview": lambda a: np.frombuffer(memoryview(a), a.dtype),
    "DLPack": np.from_dlpack,
    "torch": torch_view,
    "torch by DLPack": lambda a: pytest.importorskip("torch").from_dlpack(a),
    "ctypes": lambda a: a.ctypes.data_as(ctypes.c_void_p),
    "array interface": lambda a: np.asarray(Wrapped(a)),
}


class Wrapped:
    """Another's object that shows its array's memory."""

    def __init__(self, a):
        self.a = a
        self.__array_interface__ = a.__array_interface__


@pytest.mark.parametrize("size", [1 << 18, 1 << 22])
@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_shows_the_memory_keeps_it(holder, size):
    HOLDERS[holder](np.ones(20, np.float32))  # an import leaves garbage that holds its callers
    a = of_bytes(size)
    at = address(a)
    a[...] = 7
    held = HOLDERS[holder](a)
    del a
    assert not kept()
    b = of_bytes(size)
    assert address(b) != at
    b[...] = 1
    assert (np.frombuffer((ctypes.c_char * size).from_address(at), np.float32) == 7).all()
    del held
    assert kept() == [at]


@pytest.mark.parametrize("holder", ["view", "slice", "other shape", "other dtype", "broadcast"])
def test_views_of_bfloat16_keep_the_memory(holder):
    """It is a view itself, of bytes."""
    a = of_bytes(1 << 18, BF16)
    at = address(a)
    held = HOLDERS[holder](a)
    del a
    assert not kept()
    assert address(of_bytes(1 << 18, BF16)) != at
    del held
    assert at in kept()


# --- as NumPy's -----------------------------------------------------------------------------------


SHAPES = [(300_000,), (500, 601), (1, 270_000), (270_000, 1), (7, 1, 40, 1000), (2, 3, 5, 7, 1300)]
LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "stepped": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[::-1],
    "swapped": lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
    "read-only": lambda x: np.broadcast_to(x, x.shape),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_x_as_numpy_has_it(dtype, layout):
    for shape in SHAPES:
        x = LAYOUTS[layout](np.zeros(shape, dtype))
        for order in "KACF":
            want, got = np.empty_like(x, order=order), _results.empty_like(x, order)
            assert (type(got), got.dtype, got.shape) == (type(want), want.dtype, want.shape)
            assert got.strides == want.strides, (shape, order)
            for flag in ("C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE", "ALIGNED"):
                assert got.flags[flag] == want.flags[flag], (shape, order, flag)
            if layout in "CF" and order in ("K", "A", layout):
                assert not is_plain(got), (shape, order)
        assert _results.empty_like(x).strides == np.empty_like(x).strides


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("int64"), np.dtype(">f4")], ids=str)
def test_of_a_shape_as_numpy_has_it(dtype):
    for shape in [*SHAPES, (), (0, 5), (3, 4)]:
        want, got = np.empty(shape, dtype), _results.empty(shape, dtype)
        assert (type(got), got.dtype, got.shape) == (np.ndarray, want.dtype, want.shape)
        assert got.strides == want.strides
        assert got.flags.carray == want.flags.carray
        assert is_plain(got) == (got.nbytes < _results.LEAST)


def test_small_results_are_plain():
    """For these malloc does it, and faster."""
    n = _results.LEAST // 4
    for a in (_results.empty((n - 1,), "f4"), _results.empty_like(np.ones(n - 1, "f4"))):
        assert a.base is None
        del a
    assert not kept()
    for a in (_results.empty((n,), "f4"), _results.empty_like(np.ones(n, "f4"))):
        assert not is_plain(a)


class Marked(np.ndarray):
    """Somebody's own kind of array."""


def test_other_arrays_are_numpys_own():
    x = values((300, 300))
    for other in (x.view(Marked), np.ma.masked_array(x), x.astype(x.dtype.newbyteorder())):
        got = _results.empty_like(other)
        assert type(got) is type(other)
        assert got.dtype == other.dtype
        assert got.dtype.isnative == other.dtype.isnative
        assert is_plain(got.data if isinstance(got, np.ma.MaskedArray) else got)
    del got
    assert not kept()


# --- how much is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_kept_where_nothing_may_be(size, monkeypatch):
    monkeypatch.setenv("CUPYNORM_KEPT_MIB", "0")
    for a in (of_bytes(size), of_bytes(size, BF16), _results.empty_like(np.ones(size, np.uint8))):
        assert is_plain(a)
    del a
    assert not kept()


@pytest.mark.parametrize("mib", [1, 3, 20])
def test_no_more_is_kept_than_may_be(mib, monkeypatch):
    """The last that died stay: their pages are the likeliest to be in a cache."""
    monkeypatch.setenv("CUPYNORM_KEPT_MIB", str(mib))
    most, rng = mib << 20, np.random.default_rng(mib)
    live = [of_bytes(int(rng.integers(_results.LEAST, most))) for _ in range(30)]
    dead = []
    while live:
        a = live.pop()
        assert not is_plain(a)
        dead.append((address(a), a.nbytes))
        del a
        size, count = sum(block.size for block in _results._free), len(_results._free)
        assert size <= most
        assert kept() == [at for at, _ in dead[-count:]]
        assert count == len(dead) or size + dead[-count - 1][1] > most


def test_results_larger_than_the_limit_are_plain(monkeypatch):
    monkeypatch.setenv("CUPYNORM_KEPT_MIB", "2")
    at_most, more = of_bytes(2 << 20), of_bytes((2 << 20) + 4)
    assert not is_plain(at_most)
    assert is_plain(more)
    del at_most, more
    assert [block.size for block in _results._free] == [2 << 20]


def test_the_limit_in_the_environment(monkeypatch):
    default = _results.limit()
    assert default > 0
    for text, size in (
        ("0", 0),
        ("1", 1 << 20),
        (" 300 ", 300 << 20),
        ("", default),
        (" ", default),
    ):
        monkeypatch.setenv("CUPYNORM_KEPT_MIB", text)
        assert _results.limit() == size
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert default == min(256 << 20, memory // 16)


@pytest.mark.parametrize("text", ["many", "-1", "2.5", "1e3", "1 GiB"])
def test_a_limit_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv("CUPYNORM_KEPT_MIB", text)
    said = f"CUPYNORM_KEPT_MIB='{re.escape(text)}' is not a number of MiB; set it to .* 0 for none"
    for call in (_results.limit, lambda: cn.layer_norm(values((700, 300)), 300)):
        with pytest.raises(ValueError, match=said):
            call()
    cn.layer_norm(values((7, 30)), 30)  # which keeps nothing


def test_without_the_size_of_the_memory(monkeypatch):
    """Not every system tells how much it has."""
    if hasattr(os, "sysconf"):
        monkeypatch.delattr(os, "sysconf")
    assert _results._default.__wrapped__() == 256 << 20


# --- memory as the system sees it -----------------------------------------------------------------


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("size", [1, 100, 4097, (1 << 22) - 1, 1 << 22, (9 << 20) + 5])
def test_fresh_memory_is_as_large_as_it_must_be(size, alignment):
    memory, at = _pages.fresh(size, alignment)
    assert at % alignment == 0
    first = memory.ctypes.data
    assert first <= at
    assert at + size <= first + memory.nbytes
    ctypes.memset(at, 5, size)
    assert (memory[at - first : at - first + size] == 5).all()


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells how memory is mapped")
def test_large_memory_is_mapped_in_huge_pages_and_for_this_process_alone():
    _memory, at = _pages.fresh(1 << 23, 64)
    flags = flags_at(at + (1 << 22))
    if flags is None:
        pytest.skip("this kernel tells no flags")
    assert "sh" not in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags


# --- threads, garbage, forks, the end -------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("mib", [1, 64])
def test_no_thread_sees_anothers_values(mib, hasty, monkeypatch):
    """Many make and drop results of like sizes, some that others have just dropped."""
    monkeypatch.setenv("CUPYNORM_KEPT_MIB", str(mib))

    def call(number):
        rng = np.random.default_rng(number)
        live = []
        for i in range(150):
            a = of_bytes(int(rng.choice([1 << 17, (1 << 17) + 64, 200_000, 900_000])))
            a[...] = value = number * 1000 + i
            live.append((a, value))
            if len(live) > 3:
                a, value = live.pop(rng.integers(4))
                assert (a == value).all()

    in_threads(8, call)
    assert sum(block.size for block in _results._free) <= mib << 20


class Cycle:
    """Garbage that only the collector finds, with a result in it."""

    def __init__(self, a):
        self.me, self.a = self, a


def test_results_in_garbage_that_is_collected_in_the_midst():
    """Blocks come back at any allocation, that of a copy of the list of blocks for one."""
    sizes = [_results.LEAST + (k << 16) for k in range(40)]
    live = [of_bytes(size) for size in sizes]
    live.clear()
    assert len(kept()) == 40  # a tuple of so many is no spare one of Python's
    before = gc.get_threshold()
    gc.freeze()
    gc.enable()
    gc.set_threshold(1, 1 << 20, 1 << 20)
    try:
        for i in range(20_000):
            Cycle(of_bytes(sizes[i % 40]))
            of_bytes(sizes[7 * i % 40])
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    gc.collect()
    assert len(set(kept())) == len(kept())


def run_python(code, *arguments, **env):
    """Standard output of a fresh interpreter, which says nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


AT_EXIT = """
    import builtins, sys, threading
    import numpy as np
    import cupynorm as cn
    from cupynorm._cpu import pages as _pages
    from cupynorm._cpu import results as _results
    def new():
        return cn.layer_norm(np.ones((int(sys.argv[1]), 1024), np.float32), 1024)
    y = new()
    class Holder:
        def __init__(self, y):
            self.y = y
        def __del__(self):
            self.y = None
    holder, cycle = Holder(new()), Holder(new())
    cycle.me = cycle
    for module in (builtins, sys, threading, np, cn, _pages, _results):
        module.live = new()
    def call(y=new()):
        return y
    local = threading.local()
    local.y = new()
    views = memoryview(new()), np.from_dlpack(new()), new().T[3:]
    threading.Thread(target=lambda y: threading.Event().wait(), args=(new(),), daemon=True).start()
    print("end")
"""


@pytest.mark.parametrize("rows", ["64", "2048"])
def test_results_that_live_until_the_end_leave_no_message(rows):
    """Modules are taken apart before the last of them die."""
    assert run_python(AT_EXIT, rows).strip() == "end"


FORK = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads
    import numpy as np
    import cupynorm as cn
    x = np.random.default_rng(0).standard_normal((int(sys.argv[1]), 1024)).astype(np.float32)
    want = cn.layer_norm(x, 1024).copy()
    live = cn.layer_norm(x, 1024)
    dead = cn.layer_norm(x, 1024)
    del dead
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # rather than be stuck when nobody waits any more
        try:
            good = np.array_equal(live, want)
            y = cn.layer_norm(x, 1024)  # where the dead one was, in either process
            good &= np.array_equal(y, want)
            y[...] = live[...] = 2
            os.write(to_parent, b"1")
            os.read(from_parent, 1)
            good &= bool((y == 2).all() and (live == 2).all())
            os._exit(0 if good else 3)
        except BaseException:
            os._exit(4)
    y = cn.layer_norm(x, 1024)
    os.read(from_child, 1)
    assert np.array_equal(y, want)
    assert np.array_equal(live, want)
    y[...] = live[...] = 5
    os.write(to_child, b"1")
    assert os.waitpid(child, 0)[1] == 0
    assert (y == 5).all() and (live == 5).all()
    print("good")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("rows", ["64", "2048"])
def test_a_forked_child_has_results_of_its_own(rows):
    assert run_python(FORK, rows).strip() == "good"


NO_MEMORY = """
    import resource
    import numpy as np
    from cupynorm._cpu import results as _results
    MIB = 1 << 20
    dead = _results.empty((64 * MIB // 4,), np.float32)
    del dead
    assert [b.size for b in _results._free] == [64 * MIB]
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 24 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    y = _results.empty((70 * MIB // 4,), np.float32)
    y[::1024] = 1
    assert y.base is None and not _results._free
    try:
        _results.empty((200 * MIB // 4,), np.float32)
    except MemoryError:
        print("MemoryError")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is mapped")
def test_where_memory_lacks_what_is_kept_goes_first():
    """And then NumPy says how much it was."""
    assert run_python(NO_MEMORY, CUPYNORM_KEPT_MIB="1000").strip() == "MemoryError"


# --- public calls ---------------------------------------------------------------------------------

CALLS = {
    "rows": lambda x: cn.layer_norm(x, x.shape[-1]),
    "rows and statistics": lambda x: cn.layer_norm(x, x.shape[-1], return_stats=True).y,
    "column order": lambda x: cn.layer_norm(np.asfortranarray(x), x.shape[-1]),
    "other axis": lambda x: cn.layer_norm(x, axis=0),
}


@pytest.mark.parametrize("shape", [(700, 300), (3000, 700)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_layer_norm_reuses_the_memory_of_a_dropped_result(call, dtype, shape, assert_close):
    x, other = values(shape, dtype, 1), values(shape, dtype, 2)
    axes = (0,) if call == "other axis" else (1,)
    CALLS[call](x)
    (at,) = kept()
    for source in (x, other):
        y = CALLS[call](source)
        assert address(y) == at
        assert y.strides == CALLS[call](source).strides
        want = oracle.layer_norm(source, axes, None, None, 1e-5)[0]
        assert_close(y, want, str(dtype), shape[axes[0]])
        del y
        _results._free.popleft()  # of the call that was compared with
        assert kept() == [at]


@pytest.mark.parametrize("shape", [(700, 300), (3000, 700)], ids=str)
def test_a_result_that_is_held_stays_as_it_is(shape):
    x = values(shape)
    first = cn.layer_norm(x, shape[1])
    copy = first.copy()
    row = cn.layer_norm(x + 1, shape[1])[5]  # of which a view lives on
    row_copy = row.copy()
    for seed in range(4):
        y = cn.layer_norm(values(shape, seed=seed), shape[1])
        assert not np.shares_memory(y, first)
        assert not np.shares_memory(y, row)
        y[...] = seed
    assert np.array_equal(first, copy)
    assert np.array_equal(row, row_copy)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dx_likewise(dtype, layout):
    shape = 900, 300
    x, dy = (layout(values(shape, dtype, seed)) for seed in (1, 2))
    weight = values(shape[1:], np.float64 if dtype == np.float64 else np.float32, 3)
    mean, rstd = cn.layer_norm(x, 300, return_stats=True)[1:]
    _results._free.clear()

    def backward(dy):
        return cn.layer_norm_backward(dy, x, 300, mean, rstd, weight)

    held = backward(dy)
    copy = held.dx.copy()
    at = address(backward(dy).dx)
    assert kept() == [at]
    for sign in (1, -1):
        grads = backward(sign * dy)
        assert address(grads.dx) == at
        oracle.assert_gradients(grads, sign * dy, x, (1,), weight)
        del grads
    assert address(held.dx) != at
    assert np.array_equal(held.dx, copy)


def test_out_is_the_callers():
    """Nothing is kept where the caller brings the memory."""
    x = values((700, 300))
    out = np.empty_like(x)
    assert cn.layer_norm(x, 300, out=out) is out
    del out
    assert not kept()
