"""`layer_norm_backward` of CuPy arrays, end to end: simulated, and on a GPU where there is one."""

import threading

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cuda.launch import choose_plan as choose_plan_bwd
from tests.row_kernels import problem_of
from tests import gpu_backend, oracle
from tests.conftest import Backend, why_not
from tests.cuda_calls import Spent, capability_for
from tests.gradient_rows import run
from tests.row_kernels import At
from tests.simt.cupy_stand_in import simulated_cupy

RNG = np.random.default_rng(20260106)
HERE = ["simulated"] if why_not(Backend.CUPY) else ["simulated", "gpu"]
# One N per kernel: K1 to K5. Long rows of float64 reach K3 to K5 with fewest columns.
FAMILIES = {
    "warp": (77, "float32"), "block": (301, "float32"),
    "shared": (2101, "float64"), "cluster": (4201, "float64"), "split": (8201, "float64"),
}  # fmt: skip


@pytest.fixture
def sim(request):
    """The stand-in, with two devices; `sim.simulator` knows what was launched and allocated."""
    with simulated_cupy(
        compute_capability=capability_for(request), devices=2, reload=("cupynorm._cuda.arrays",)
    ) as module:
        yield module


@pytest.fixture(params=[pytest.param(h, marks=[pytest.mark.gpu] * (h == "gpu")) for h in HERE])
def cp(request):
    """CuPy: the stand-in or the real one."""
    return request.getfixturevalue("sim") if request.param == "simulated" else __import__("cupy")


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 3).astype(dtype)


def backward(dy, x, weight=None):
    _, mean, rstd = cn.layer_norm(x, weight=weight, return_stats=True)
    return cn.layer_norm_backward(dy, x, None, mean, rstd, weight)


def check(grads, dy, x, axes=(-1,), weight=None):
    got = [None if a is None else a.get() for a in grads]
    oracle.assert_gradients(got, dy, x, tuple(a % x.ndim for a in axes), weight)


# --- what a call costs --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kernel_through_the_front_door(cp, family):
    N, dtype = FAMILIES[family]
    dy, x, weight = numbers(5, N, dtype=dtype), numbers(5, N, dtype=dtype), numbers(N)
    grads = backward(cp.asarray(dy), cp.asarray(x), cp.asarray(weight))
    assert all(type(a) is cp.ndarray for a in grads)
    check(grads, dy, x, (1,), weight)


@pytest.mark.parametrize(
    ("family", "launches"), [("warp", 2), ("block", 2), ("cluster", 2), ("split", 4)]
)
def test_a_warm_call(sim, family, launches):
    """One launch and column_totals (K5: three); dx, dweight, dbias and a workspace allocated."""
    N, dtype = FAMILIES[family]
    dy, x = (sim.asarray(numbers(5, N, dtype=dtype)) for _ in range(2))
    weight = sim.asarray(numbers(N))
    _, mean, rstd = cn.layer_norm(x, weight=weight, return_stats=True)
    with Spent(sim) as cold:
        cn.layer_norm_backward(dy, x, None, mean, rstd, weight)
    assert cold.compilations == launches
    with Spent(sim) as warm:
        cn.layer_norm_backward(dy, x, None, mean, rstd, weight)
    assert (warm.compilations, len(warm.launches), warm.allocations) == (0, launches, 4)
    assert warm.names[0].startswith(f"layer_norm_bwd_{family}")
    assert warm.names[-1].startswith("column_totals")


def test_dx_alone_needs_no_workspace_and_one_launch(sim):
    dy, x = (sim.asarray(numbers(5, 77)) for _ in range(2))
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    with Spent(sim) as spent:
        cn.layer_norm_backward(dy, x, None, mean, rstd, output_mask=(True, False, False))
    assert (len(spent.launches), spent.allocations) == (1, 1)
    with Spent(sim) as nothing:
        cn.layer_norm_backward(dy, x, None, mean, rstd, output_mask=(False, False, False))
    assert (len(nothing.launches), nothing.allocations) == (0, 0)


def test_other_rows_and_addresses_compile_nothing(sim):
    weight = sim.asarray(numbers(77))
    backward(sim.asarray(numbers(5, 77)), sim.asarray(numbers(5, 77)), weight)
    with Spent(sim) as spent:
        backward(sim.asarray(numbers(50, 77)), sim.asarray(numbers(50, 77)), weight)
        backward(sim.place(numbers(5, 77), offset=4), sim.asarray(numbers(5, 77)), weight)
    assert spent.compilations == 0


def test_arguments(sim):
    """Slices of padded arrays: pointers, rows, strides of dy, x and dx, N, in entry order."""
    dy = sim.asarray(numbers(2, 4, 128))[:, :3, 5:82]
    x = sim.asarray(numbers(2, 5, 100))[:, 1:4, 3:80]
    weight = sim.asarray(numbers(77))
    _, mean, rstd = cn.layer_norm(x, weight=weight, return_stats=True)
    with Spent(sim) as spent:
        dx, dweight, dbias = cn.layer_norm_backward(dy, x, 77, mean, rstd, weight)
    main, totals = spent.launches
    *pointers, workspace = main.args[:7]
    assert pointers == [a.data.ptr for a in (dy, x, mean, rstd, weight, dx)]
    assert main.args[7:] == (6, 3, 4 * 128, 128, 500, 100, 3 * 77, 77, 77)
    strides = {"dy": (4 * 128, 128), "x": (500, 100), "dx": (3 * 77, 77)}
    problem = problem_of(("float32",) * 4, (2, 3, 77), strides, backward=True)
    from cupynorm._cuda import arrays as _cuda  # as the stand-in has it

    plan = choose_plan_bwd(problem, _cuda.device_of(0))
    assert main.grid == plan.stages[0].grid
    assert totals.args == (
        workspace, plan.partials, plan.pitch, 77, dweight.data.ptr, dbias.data.ptr,
    )  # fmt: skip
    assert workspace % 16 == 0
    assert main.traffic[dy].read_bytes == main.traffic[x].read_bytes == 6 * 77 * 4


# --- streams and devices ------------------------------------------------------------------------


def test_runs_on_the_current_stream(sim):
    dy, x = (sim.asarray(numbers(2, 77)) for _ in range(2))
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    stream = sim.cuda.Stream(non_blocking=True)
    with Spent(sim) as spent:
        with stream:
            cn.layer_norm_backward(dy, x, None, mean, rstd)
        cn.layer_norm_backward(dy, x, None, mean, rstd)
    assert [launch.stream for launch in spent.launches] == [stream.ptr] * 2 + [0] * 2


def test_the_device_of_x(cp):
    """x on another device than the current one: gradients, workspace and launches go there."""
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    dy, x = numbers(3, 77), numbers(3, 77)
    with cp.cuda.Device(1):
        there = [cp.asarray(a) for a in (dy, x)]
    for _ in range(2):
        grads = backward(*there)
        assert cp.cuda.runtime.getDevice() == 0
        assert grads.dx.device.id == grads.dbias.device.id == 1
        check(grads, dy, x)
    here = [cp.asarray(a) for a in (dy, x)]
    check(backward(*here), dy, x)
    _, mean, rstd = cn.layer_norm(here[1], return_stats=True)
    with pytest.raises(ValueError, match=r"dy is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm_backward(there[0], here[1], None, mean, rstd)


def test_many_host_threads(cp):
    hosts = [(numbers(4, N), numbers(4, N)) for N in (77, 77, 301, 301)]
    results = [None] * len(hosts)

    def work(i):
        for _ in range(3):
            results[i] = backward(*(cp.asarray(a) for a in hosts[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (dy, x), grads in zip(hosts, results, strict=True):
        check(grads, dy, x)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dy_order", "x_order", "axis", "kernel"),
    [
        ("C", "C", 1, "warp"),
        ("F", "C", 1, "column"),
        ("C", "F", 1, "column"),
        ("F", "F", 0, "warp"),
        ("C", "F", 0, "column"),
        ("C", "C", 0, "column"),
    ],
)
def test_strided_axes_take_the_tile(cp, dy_order, x_order, axis, kernel):
    hosts = [np.asarray(numbers(5, 77)[:, :6], order=o) for o in (dy_order, x_order)]
    weight = numbers(hosts[0].shape[axis])
    dy, x = (cp.asarray(a, order="K") for a in hosts)
    w = cp.asarray(weight)
    _, mean, rstd = cn.layer_norm(x, weight=w, axis=axis, return_stats=True)
    call = (dy, x, None, mean, rstd, w)
    grads = cn.layer_norm_backward(*call, axis=axis)
    check(grads, *hosts, (axis,), weight)
    assert grads.dx.strides == x.strides
    if hasattr(cp, "simulator"):
        with Spent(cp) as spent:
            cn.layer_norm_backward(*call, axis=axis)
        assert (len(spent.launches), spent.allocations) == (2, 4)  # no copy
        assert spent.launches[0].name.startswith(f"layer_norm_bwd_{kernel}_")


def test_axes_that_fold_to_no_stride_go_through_copies(cp):
    hosts = numbers(4, 5, 6), numbers(4, 5, 6)[::-1]
    dy, x = (cp.asarray(a) for a in hosts)
    _, mean, rstd = cn.layer_norm(x, axis=(0, 2), return_stats=True)
    call = (dy, x, None, mean, rstd)
    check(cn.layer_norm_backward(*call, axis=(0, 2)), *hosts, (0, 2))
    if hasattr(cp, "simulator"):
        with Spent(cp) as spent:
            cn.layer_norm_backward(*call, axis=(0, 2))
        # dx, dbias and the partials; then copies of dy and x, and a row-major dx
        assert (len(spent.launches), spent.allocations) == (2, 3 + 3)


def test_views_are_read_in_place(cp):
    """Columns of wider arrays, every second row, rows backwards, a broadcast row."""
    wide, other = numbers(6, 90), numbers(6, 90)
    for cut in (np.s_[:, 3:80], np.s_[::2, :77], np.s_[::-1, 5:82]):
        dy, x = cp.asarray(wide)[cut], cp.asarray(other)[cut]
        check(backward(dy, x), wide[cut], other[cut])
    row = numbers(1, 77)
    same = np.repeat(row, 6, axis=0)
    dy = cp.broadcast_to(cp.asarray(row), (6, 77))
    check(backward(dy, cp.asarray(other[:, :77])), same, other[:, :77])


def test_statistics_and_weight_that_are_slices(cp):
    dy, x, weight = numbers(5, 77), numbers(5, 77), numbers(77)
    _, mean, rstd = cn.layer_norm(cp.asarray(x), return_stats=True)
    wide = [cp.asarray(np.repeat(a.get(), 3, axis=1))[:, :1] for a in (mean, rstd)]
    w = cp.asarray(np.repeat(weight, 2))[::2]
    grads = cn.layer_norm_backward(cp.asarray(dy), cp.asarray(x), None, *wide, w)
    check(grads, dy, x, (1,), weight)


# --- the way that tests/test_kernels_bwd.py takes on a GPU ---------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_machine_of_the_kernel_tests(sim, family):
    """What `make gpu` runs of them, here on the stand-in: layouts, K3's memory, the workspace."""
    gpu_backend._raw_kernel.cache_clear()
    gpu = gpu_backend.GpuMachine()
    N, dtype = FAMILIES[family]
    dy, x, weight = numbers(3, N, dtype=dtype), numbers(3, N, dtype=dtype), numbers(N)
    at = {"dy_at": At(1, 1), "x_at": At(3, 2), "dx_at": At(2, 1)}
    expected, result = (
        run(machine, family, dy, x, weight, **at) for machine in (gpu_backend.SIMULATED, gpu)
    )
    assert result.bits() == expected.bits()
    gpu_backend._raw_kernel.cache_clear()
