"""K6's backward through `layer_norm_backward` on CuPy arrays: values, bits, bytes and banks."""

import numpy as np
import pytest

import cupynorm as cn
from cupynorm import _memo
from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device
from cupynorm._cuda.tiles import bytes_beyond_floor
from tests import oracle
from tests.conftest import ALL_DTYPES, Backend, np_dtype
from tests.cuda.rows import problem_of

LAYOUTS = ("FF", "FC", "CF")  # of x and dy; F has neighbouring rows next to each other


def pair(shape, dtype):
    rng = np.random.default_rng(shape)
    x = (rng.standard_normal(shape) * 3 + 5).astype(np_dtype(dtype))
    return rng.standard_normal(shape).astype(np_dtype(dtype)), x


def along_the_rows(M, N, dtypes):
    """A backward whose arrays all have neighbouring rows next to each other."""
    strides = dict.fromkeys(("x", "dy", "dx"), (0, 1, M))
    return problem_of(dtypes, (1, M, N), strides, backward=True)


def laid(array, letter):
    return np.asarray(array, order=letter)


def gradients(lib, dy, x, axis, weight=None, **options):
    """dx, dweight, dbias, and the names of what was launched (in the simulator)."""
    import cupy

    x, dy = lib.from_numpy(x), lib.from_numpy(dy)
    w = None if weight is None else lib.from_numpy(weight)
    _, mean, rstd = cn.layer_norm(x, weight=w, axis=axis, return_stats=True)
    before = len(cupy.simulator.launches) if lib.backend is Backend.CUPY_SIMULATED else 0
    got = cn.layer_norm_backward(dy, x, None, mean, rstd, w, axis=axis, **options)
    launches = []
    if lib.backend is Backend.CUPY_SIMULATED:
        launches = cupy.simulator.launches[before:]
        assert launches[0].name.startswith("layer_norm_bwd_column")
    return [None if g is None else lib.to_numpy(g) for g in got], launches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_matrices(cupy_lib, dtype, layout):
    """Few columns and many, rows past the tile, more tiles than blocks."""
    for M, N in ((3, 2), (70, 8), (300, 13), (65, 40), (130, 300)):
        dy, x = pair((M, N), dtype)
        weight = np.linspace(0.5, 2, N).astype(np.float32)
        lies = [laid(a, letter) for a, letter in zip((x, dy), layout, strict=True)]
        got, _ = gradients(cupy_lib, lies[1], lies[0], 1, weight)
        oracle.assert_gradients(got, dy, x, (1,), weight)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 5, 6, 7), 1), ((6, 40), 0), ((3, 5, 7), 1), ((4, 3, 9), (0,))]
)
def test_axes_in_the_middle(cupy_lib, shape, axis):
    """Channels first among them; F-ordered ones bring the statistics in another order than rows."""
    axes = (axis,) if isinstance(axis, int) else axis
    dy, x = pair(shape, "float32")
    for order in ("C", "F"):
        if order == "F" and (axes == (0,) or len(shape) == 4):
            continue  # unit stride: the row kernels'; or batch axes that do not fold
        got, _ = gradients(cupy_lib, laid(dy, order), laid(x, order), axis)
        oracle.assert_gradients((got[0], None, got[2]), dy, x, axes)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, True), (True, True, False)])
def test_what_is_wanted(cupy_lib, mask):
    dy, x = pair((90, 20), "float16")
    weight = np.linspace(0.5, 2, 20).astype(np.float32)
    whole, _ = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1, weight)
    some, _ = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1, weight, output_mask=mask)
    for wanted, part, all_of_it in zip(mask, some, whole, strict=True):
        assert (part is not None) == wanted
        if wanted:
            assert (part == all_of_it).all()


def test_dx_of_a_row_is_its_own_and_layouts_agree(cupy_lib):
    dy, x = pair((200, 30), "float32")
    whole = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)[0][0]
    for layout in ("FF", "FC"):  # of a C-ordered x another kernel takes the statistics
        lies = [laid(a[57:80], letter) for a, letter in zip((x, dy), layout, strict=True)]
        part = gradients(cupy_lib, lies[1], lies[0], 1)[0][0]
        assert (part == whole[57:80]).all()


def test_large_offset_and_nan(cupy_lib):
    dy, x = pair((70, 40), "float32")
    x = (x * np.float32(0.1) + np.float32(1e6)).astype(np.float32)
    got, _ = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)
    oracle.assert_gradients((got[0], None, got[2]), dy, x, (1,))
    x[11, 3] = np.nan
    spoilt = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)[0][0]
    assert np.isnan(spoilt[11]).all()
    others = np.delete(np.arange(70), 11)
    assert (spoilt[others] == got[0][others]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_three_passes_and_banks(cupy_lib, dtype, layout):
    if cupy_lib.backend is not Backend.CUPY_SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    for N in (8, 40, 300):
        dy, x = pair((256, N), dtype)
        lies = [laid(a, letter) for a, letter in zip((x, dy), layout, strict=True)]
        _, (main, totals) = gradients(cupy_lib, lies[1], lies[0], 1)
        read = sum(b.read_bytes for b in main.traffic.buffers)
        written = sum(b.written_bytes for b in main.traffic.buffers)
        statistics, partials = 2 * 4 * 256, 4 * N * main.grid[0]
        assert read == 2 * x.nbytes + statistics
        assert written == x.nbytes + partials
        assert main.traffic.shared.max_ways <= 2
        assert totals.name.startswith("column_totals")


# --- more columns than two tiles hold -------------------------------------------------------------

SMALL = Device(compute_capability=75, sm_count=1, shared_bytes=64 * 1024)


@pytest.fixture
def small_device(cupy_lib, monkeypatch):
    """Plan for little shared memory and few blocks, so that few columns make several panels."""
    if cupy_lib.backend is not Backend.CUPY_SIMULATED:
        pytest.skip("the simulated device's size can be chosen")
    from cupynorm._cuda import arrays

    _memo.settled.clear()
    monkeypatch.setattr(arrays, "device_of", lambda index: SMALL)
    yield
    _memo.settled.clear()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*(("float32", w) for w in LAYOUTS), ("float16", "FC"), ("bfloat16", "CF"), ("float64", "FF")],
)
def test_panels(cupy_lib, small_device, dtype, layout):
    """Whole panels and a last one in part; several tiles a block."""
    dy, x = pair((150, 283), dtype)
    weight = np.linspace(0.5, 2, 283).astype(np.float32)
    lies = [laid(a, letter) for a, letter in zip((x, dy), layout, strict=True)]
    got, (main, _) = gradients(cupy_lib, lies[1], lies[0], 1, weight)
    assert main.name.startswith("layer_norm_bwd_column_panels")
    assert main.grid[0] <= 2  # so one of them has two tiles, but for the 128 rows of 16-bit ones
    oracle.assert_gradients(got, dy, x, (1,), weight)
    assert main.traffic.shared.max_ways <= 2


def test_panels_move_no_bit_of_dx(cupy_lib, small_device, monkeypatch):
    from cupynorm._cuda import arrays

    dy, x = pair((70, 300), "float32")
    narrow, (main, _) = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)
    assert "panels" in main.name
    _memo.settled.clear()
    monkeypatch.setattr(arrays, "device_of", lambda index: Device(90, 132, 227 * 1024))
    whole, (main, _) = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)
    assert "panels" not in main.name
    assert (narrow[0] == whole[0]).all()


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, True), (False, False, True)])
def test_panels_of_what_is_wanted(cupy_lib, small_device, mask):
    dy, x = pair((70, 290), "float16")
    weight = np.linspace(0.5, 2, 290).astype(np.float32)
    some, _ = gradients(cupy_lib, laid(dy, "F"), laid(x, "C"), 1, weight, output_mask=mask)
    assert [g is not None for g in some] == list(mask)
    oracle.assert_gradients(some, dy, x, (1,), weight)


def test_panels_read_twice_but_for_the_last(cupy_lib, small_device):
    """Counted; and what `explain` says of it, partial sums included."""
    dy, x = pair((256, 300), "float32")
    _, (main, totals) = gradients(cupy_lib, laid(dy, "F"), laid(x, "F"), 1)
    problem = along_the_rows(256, 300, {"x": "float32", "dbias": "float32"})
    plan = choose_plan(problem, SMALL)
    panel = plan.panel
    last = 300 - 300 // panel * panel
    tiles, blocks = 256 // plan.rows_per_block, main.grid[0]
    assert 0 < last < panel < 300 and blocks < tiles
    read = sum(b.read_bytes for b in main.traffic.buffers)
    written = sum(b.written_bytes for b in main.traffic.buffers)
    statistics, partial = 2 * 4 * 256, 4 * 300
    assert (
        read == 2 * x.nbytes + 2 * 4 * 256 * (300 - last) + statistics + (tiles - blocks) * partial
    )
    assert written == x.nbytes + tiles * partial
    summed = sum(b.read_bytes for b in totals.traffic.buffers)
    floor = 3 * x.nbytes + statistics
    assert read + written + summed == floor + bytes_beyond_floor(problem, plan)


def test_only_what_does_not_fold_is_copied(cupy_lib):
    """Rows of any length are taken as they lie; `explain` tells the passes."""
    long = cn.explain(np.empty((4000, 2000), np.float32, order="F"), device="sm_90", backward=True)
    assert "panels" in long.kernel and not long.copies
    assert 1.5 < long.bytes_moved / long.bytes_floor < 5 / 3 + 0.05
    short = cn.explain(np.empty((4000, 300), np.float32, order="F"), device="sm_90", backward=True)
    assert "K6" in short.kernel and "3 passes" in short.kernel and not short.copies
    assert short.bytes_moved / short.bytes_floor < 1.3
    apart = cn.explain(
        np.empty((4, 5, 6, 7), np.float32), axis=(0, 2), device="sm_90", backward=True
    )
    assert [c.split(":")[0] for c in apart.copies] == ["of x", "of dy", "of dx"]


def test_the_plan_stays_within_the_device(cupy_lib):
    for dtype in ALL_DTYPES:
        for N in (9, 64, 300, 900, 30000):
            for shared in (64, 99, 163, 227):
                device = Device(90, 132, shared * 1024)
                names = dict.fromkeys(("x", "weight", "dweight", "dbias"), dtype)
                plan = choose_plan(along_the_rows(5000, N, names), device)
                assert plan.stages[0].shared_bytes <= device.shared_bytes
                assert plan.workspace_bytes >= 2 * plan.partials * N * 4
                held = N
                if plan.family == "panels":
                    assert N > 64
                    held = plan.panel
                    assert plan.stages[0].constants[2] == held
                    assert held % 8 == 0 and held >= 32
                assert plan.slots >= held
