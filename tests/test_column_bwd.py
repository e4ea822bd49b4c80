"""K6's backward through `layer_norm_backward` on CuPy arrays: values, bits, bytes and banks."""

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._layout import column_gradient_problem_of
from cupynorm._plan import Device
from cupynorm._plan_column_bwd import choose_plan_column_bwd
from tests import oracle
from tests.conftest import ALL_DTYPES, Backend, np_dtype

LAYOUTS = ("FF", "FC", "CF")  # of x and dy; F has neighbouring rows next to each other


def pair(shape, dtype):
    rng = np.random.default_rng(shape)
    x = (rng.standard_normal(shape) * 3 + 5).astype(np_dtype(dtype))
    return rng.standard_normal(shape).astype(np_dtype(dtype)), x


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


def test_rows_too_long_for_two_tiles_are_copied(cupy_lib):
    """The fallback, which `explain` states."""
    _, x = pair((40, 2000), "float32")
    told = cn.explain(laid(x, "F"), device="sm_90", backward=True)
    assert [c.split(":")[0] for c in told.copies] == ["of x", "of dy", "of dx"]
    short = cn.explain(laid(x[:, :300], "F"), device="sm_90", backward=True)
    assert "K6" in short.kernel and not short.copies


def test_the_plan_stays_within_the_device(cupy_lib):
    for dtype in ALL_DTYPES:
        for N in (1, 9, 64, 300, 900):
            for shared in (64, 99, 163, 227):
                device = Device(90, 132, shared * 1024)
                strides = (1, 5000)
                names = (dtype, dtype, dtype, dtype)
                problem = column_gradient_problem_of(
                    (5000, N), (1,), strides, strides, strides, names
                )
                if N == 1:
                    assert problem is None
                    continue
                chosen = choose_plan_column_bwd(problem, device)
                assert chosen or N > 64
                if chosen:
                    plan, slots = chosen
                    assert plan.stages[0].shared_bytes <= device.shared_bytes
                    assert slots >= N and plan.workspace_bytes >= 2 * plan.partials * N * 4
