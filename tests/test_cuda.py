"""`layer_norm` of CuPy arrays, end to end: simulated here, and on a GPU where there is one."""

import threading

import numpy as np
import pytest

import cupynorm as cn
from tests import gpu_backend, oracle
from tests.conftest import Backend, why_not
from tests.cuda_calls import Spent, capability_for
from tests.row_cases import device_for
from tests.row_kernels import At, normalize
from tests.simt.cupy_stand_in import simulated_cupy

RNG = np.random.default_rng(20260104)
HERE = ["simulated"] if why_not(Backend.CUPY) else ["simulated", "gpu"]
# One N per kernel: K1 to K4, and K5 with few rows; K3's and K5's are K4's where it is.
FAMILIES = {"warp": 77, "block": 3001, "shared": 9001, "cluster": 9001, "split": 36_001}


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


def numbers(*shape, dtype=np.float32):
    return (RNG.standard_normal(shape) * 2 + 3).astype(dtype)


def check(y, x, axes=None, weight=None, bias=None):
    """Compare a CuPy result with the oracle for NumPy inputs."""
    axes = (x.ndim - 1,) if axes is None else axes
    want = oracle.layer_norm(x, axes, weight, bias, 1e-5)[0]
    bound = oracle.tolerance(x.dtype.name, np.prod([x.shape[a] for a in axes]))
    np.testing.assert_allclose(y.get().astype(np.float64), want, rtol=bound, atol=bound)


# --- what a call costs --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kernel_through_the_front_door(cp, family):
    x, weight, bias = numbers(3, FAMILIES[family]), *numbers(2, FAMILIES[family])
    y, mean, rstd = cn.layer_norm(
        cp.asarray(x), None, cp.asarray(weight), cp.asarray(bias), return_stats=True
    )
    check(y, x, None, weight, bias)
    assert type(y) is type(mean) is cp.ndarray
    assert mean.shape == rstd.shape == (3, 1)
    np.testing.assert_allclose(mean.get(), x.mean(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(rstd.get(), 1 / x.std(1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "launches"),
    [("warp", 1), ("block", 1), ("shared", 1), ("cluster", 1), ("split", 2)],
)
def test_a_warm_call(sim, family, launches):
    """One launch and one allocation, y; K5 launches twice and allocates a workspace."""
    x, weight = sim.asarray(numbers(3, FAMILIES[family])), sim.asarray(numbers(FAMILIES[family]))
    with Spent(sim) as cold:
        cn.layer_norm(x, weight=weight)
    assert cold.compilations == launches
    with Spent(sim) as warm:
        cn.layer_norm(x, weight=weight)
    assert (warm.compilations, len(warm.launches), warm.allocations) == (0, launches, launches)
    assert all(name.startswith(f"layer_norm_fwd_{family}") for name in warm.names)
    out = sim.empty_like(x)
    with Spent(sim) as into:
        cn.layer_norm(x, weight=weight, out=out)
    assert (into.compilations, into.allocations) == (0, launches - 1)


def test_other_eps_rows_and_addresses_compile_nothing(sim):
    cn.layer_norm(sim.asarray(numbers(3, 100)))
    with Spent(sim) as spent:
        cn.layer_norm(sim.asarray(numbers(3, 100)), eps=1)  # an int, which must go as a double
        cn.layer_norm(sim.asarray(numbers(50, 99)), eps=np.float32(0.5))
        cn.layer_norm(sim.place(numbers(3, 100), offset=4))
    assert spent.compilations == 0
    assert len(spent.launches) == 3


def test_rows_of_other_lengths_do_not_shrink_shared_memory(sim):
    """One function serves all lengths of K4: the short row must not lower its limit."""
    long, short = (sim.asarray(numbers(2, N)) for N in (32_000, 22_000))
    for x in (long, short, long):
        y = cn.layer_norm(x)
    check(y, long.get())
    assert len(sim.simulator.compilations) == 1


def test_launch_geometry_and_arguments(sim):
    """A slice of a padded (2, 3, 120) array: pointers, rows, strides, N, eps in entry order."""
    whole = sim.asarray(numbers(2, 4, 128))
    x = whole[:, :3, 5:105]
    weight, bias = (sim.asarray(numbers(100)) for _ in range(2))
    with Spent(sim) as spent:
        y, mean, rstd = cn.layer_norm(x, 100, weight, bias, 1e-3, return_stats=True)
    (launch,) = spent.launches
    pointers = tuple(a.data.ptr for a in (x, y, weight, bias, mean, rstd))
    assert launch.args == (*pointers, 6, 3, 4 * 128, 128, 300, 100, 100, 1e-3)
    assert type(launch.args[-1]) is float
    assert launch.grid == (1, 1, 1) and launch.block == (128, 1, 1)
    assert (launch.device, launch.stream, launch.shared_bytes) == (0, 0, 0)
    x_traffic = launch.traffic[x]
    assert x_traffic.read_bytes == 6 * 100 * 4  # and none of the padding


def test_warmup_compiles_what_the_call_then_needs(sim):
    names = cn.warmup((9001,), ("float32",))
    with Spent(sim) as spent:
        weight, bias = (sim.asarray(numbers(9001)) for _ in range(2))
        cn.layer_norm(sim.asarray(numbers(2, 9001)), 9001, weight, bias)
    assert spent.compilations == 0
    assert spent.names == names


# --- streams and devices ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["split"])
def test_runs_on_the_current_stream(sim, family):
    x = sim.asarray(numbers(2, FAMILIES[family]))
    stream, foreign = sim.cuda.Stream(non_blocking=True), sim.cuda.ExternalStream(0x1234)
    with Spent(sim) as spent:
        with stream:
            cn.layer_norm(x)
        with foreign:
            cn.layer_norm(x)
        cn.layer_norm(x)
    assert [launch.stream for launch in spent.launches] == [stream.ptr] * 2 + [0x1234] * 2 + [0] * 2


def test_stream_order_on_a_device(cp):
    x = cp.asarray(numbers(64, 5000))
    cp.cuda.Device().synchronize()  # x was copied on the null stream, which the next does not await
    with cp.cuda.Stream(non_blocking=True) as stream:
        y = cn.layer_norm(x)
        z = cn.layer_norm(y, out=y)
        stream.synchronize()
    assert z is y
    np.testing.assert_allclose(z.get().mean(1), 0, atol=1e-5)


def test_the_device_of_x(cp):
    """x on another device than the current one: y, workspace and launches go there."""
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    for N in (77, 36_001):
        host = numbers(2, N)
        with cp.cuda.Device(1):
            x = cp.asarray(host)
        for _ in range(2):
            y, mean, _ = cn.layer_norm(x, return_stats=True)
            assert cp.cuda.runtime.getDevice() == 0
            assert y.device.id == mean.device.id == 1
            check(y, host)
        check(cn.layer_norm(cp.asarray(host)), host)  # device 0 has functions of its own


def test_each_device_compiles_for_itself(sim):
    host = numbers(2, 77)
    for index in (0, 1, 0, 1):
        with sim.cuda.Device(index):
            cn.layer_norm(sim.asarray(host))
    assert [device for _, device in sim.simulator.compilations] == [0, 1]
    assert [launch.device for launch in sim.simulator.launches] == [0, 1, 0, 1]


def test_weight_on_another_device_is_refused(cp):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    x = cp.asarray(numbers(2, 77))
    with cp.cuda.Device(1):
        weight = cp.asarray(numbers(77))
    with pytest.raises(ValueError, match=r"weight is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm(x, weight=weight)


def test_many_host_threads(cp):
    hosts = [numbers(4, N) for N in (77, 77, 3001, 9001)]
    results = [None] * len(hosts)

    def work(i):
        for _ in range(3):
            results[i] = cn.layer_norm(cp.asarray(hosts[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host, y in zip(hosts, results, strict=True):
        check(y, host)


# --- layouts ------------------------------------------------------------------------------------


def views(cp, host):
    """Views of a (4, 6, 90) array whose last axis has unit stride: name, view, same of NumPy."""
    x = cp.asarray(host)
    for name, cut in {
        "columns": np.s_[..., 3:80],
        "rows": np.s_[1:3, ::2],
        "backwards": np.s_[::-1, ::-1],
        "one": np.s_[2, 3],
        "transposed": None,
    }.items():
        if cut is None:
            yield name, x.transpose(1, 0, 2), host.transpose(1, 0, 2)
        else:
            yield name, x[cut], host[cut]


def test_rows_of_views_are_not_copied(cp):
    for name, view, same in views(cp, numbers(4, 6, 90)):
        y = cn.layer_norm(view)
        check(y, same)
        assert y.shape == same.shape, name
        if hasattr(cp, "simulator"):
            with Spent(cp) as spent:
                cn.layer_norm(view)
            assert (len(spent.launches), spent.allocations) == (1, 1), name
            assert spent.launches[0].traffic[view].read_bytes == same.nbytes, name


def test_broadcast_rows(cp):
    host = numbers(1, 77)
    check(cn.layer_norm(cp.broadcast_to(cp.asarray(host), (5, 77))), np.repeat(host, 5, axis=0))


@pytest.mark.parametrize(
    ("axis", "order", "allocations"),
    [
        (0, "C", 1),  # axis strided in x and in y: K6
        (0, "F", 1),
        (1, "F", 1),
        ((0, 2), "C", 3),  # folds to no one stride: a row-major copy of x and of y
        ((0, 1), "F", 3),  # weight has C order over the axes
        ((1, 2), "C", 1),
        ((0, 1, 2), "F", 3),
    ],
)
def test_axes_that_fold_to_no_stride_go_through_a_copy(cp, axis, order, allocations):
    host = np.asarray(numbers(4, 6, 90), order=order)
    axes = (axis,) if isinstance(axis, int) else axis
    weight = numbers(*(host.shape[a] for a in axes))
    x, w = cp.asarray(host, order="K"), cp.asarray(weight)
    y = cn.layer_norm(x, weight=w, axis=axis)
    check(y, host, axes, weight)
    assert y.strides == x.strides  # order K keeps x's layout
    if hasattr(cp, "simulator"):
        with Spent(cp) as spent:
            cn.layer_norm(x, weight=w, axis=axis)
        assert spent.allocations == allocations
        assert len(spent.launches) == 1
    copies = cn.explain(x, weight=w, axis=axis).copies
    assert len(copies) == (2 if allocations == 3 else 0)


def test_batch_axes_that_fold_to_no_two_strides(cp):
    host = numbers(3, 4, 5, 77)
    x = cp.asarray(host)[:2, ::2, :3]  # three batch strides
    y = cn.layer_norm(x)
    check(y, host[:2, ::2, :3])


@pytest.mark.parametrize("order", ["C", "F", "K"])
def test_order(cp, order):
    host = numbers(5, 77)
    for x in (cp.asarray(host), cp.asfortranarray(cp.asarray(host))):
        y = cn.layer_norm(x, order=order)
        check(y, host)
        f_order = x.flags.f_contiguous if order == "K" else order == "F"
        assert y.flags.f_contiguous == f_order


def test_out(cp):
    host = numbers(5, 77)
    x = cp.asarray(host)
    padded = cp.zeros((5, 80), dtype=np.float32)
    for out in (cp.empty_like(x), padded[:, 2:79], cp.asfortranarray(cp.asarray(host)), x):
        assert cn.layer_norm(x, out=out) is out
        check(out, host)
    assert (padded.get()[:, [0, 1, 79]] == 0).all()


def test_in_place_with_statistics(cp):
    for N in FAMILIES.values():
        host = numbers(3, N)
        x = cp.asarray(host)
        y, mean, _ = cn.layer_norm(x, out=x, return_stats=True)
        assert y is x
        check(x, host)
        np.testing.assert_allclose(mean.get()[:, 0], host.mean(1), rtol=1e-5)


def test_weight_of_any_layout(cp):
    """Strided, reversed, transposed, broadcast: brought to unit stride on the device."""
    host = numbers(5, 6, 14)
    x, many = cp.asarray(host), numbers(14, 12)
    w = cp.asarray(many)
    for weight, same in (
        (w[:, ::2].T, many[:, ::2].T),
        (w[:, :6].T, many[:, :6].T),
        (w[::-1, 6:].T, many[::-1, 6:].T),
        (cp.broadcast_to(w[:, 0], (6, 14)), np.broadcast_to(many[:, 0], (6, 14))),
    ):
        check(cn.layer_norm(x, (6, 14), weight, weight), host, (1, 2), same, same)


# --- refusals and nothing to do -----------------------------------------------------------------


@pytest.mark.parametrize("label", ["weight", "bias", "out"])
def test_numpy_beside_cupy_is_refused(sim, label):
    x, other = sim.asarray(numbers(2, 77)), numbers(*((2, 77) if label == "out" else (77,)))
    with (
        Spent(sim) as spent,
        pytest.raises(ValueError, match=rf"{label} is a numpy array.*cupy\.asarray\({label}\)"),
    ):
        cn.layer_norm(x, **{label: other})
    assert not spent.launches


def test_partial_overlap_is_refused(cp):
    x = cp.asarray(numbers(6, 77))
    pool = cp.zeros((6, 77), dtype=np.float32)
    with pytest.raises(ValueError, match="out shares memory with x in part"):
        cn.layer_norm(x[1:], out=x[:-1])
    with pytest.raises(ValueError, match="out shares memory with weight"):
        cn.layer_norm(x, weight=pool[0], out=pool)
    with pytest.raises(ValueError, match="two elements at one address"):
        cn.layer_norm(x, out=cp.broadcast_to(x[:1], (6, 77)))
    check(cn.layer_norm(x[::2], out=x[1::2]), x.get()[::2])  # in turn, but not in part


@pytest.mark.parametrize("shape", [(0, 77), (5, 0), (0, 0), (3, 0, 4)])
def test_empty_arrays_launch_nothing(cp, shape):
    x = cp.empty(shape, dtype=np.float32)
    before = len(cp.simulator.launches) if hasattr(cp, "simulator") else 0
    y, mean, rstd = cn.layer_norm(x, return_stats=True)
    assert y.shape == shape and y.dtype == np.float32
    assert mean.shape == rstd.shape == (*shape[:-1], 1)
    assert np.isnan(mean.get()).all() and np.isnan(rstd.get()).all()
    if hasattr(cp, "simulator"):
        assert len(cp.simulator.launches) == before


class Exporter:
    """Knows `__cuda_array_interface__` and nothing else."""

    def __init__(self, array):
        self._array = array

    @property
    def __cuda_array_interface__(self):
        return self._array.__cuda_array_interface__


def test_mere_exporters_come_back_as_cupy(cp):
    host, w = numbers(5, 77), numbers(77)
    for view in (np.s_[:], np.s_[1:4, 3:]):
        weight = w[: host[view].shape[1]]
        x = Exporter(cp.asarray(host)[view])
        y = cn.layer_norm(x, weight=Exporter(cp.asarray(weight)))
        assert type(y) is cp.ndarray
        check(y, host[view], None, weight)


# --- the way that tests/test_kernels.py takes on a GPU ------------------------------------------


def test_kernel_tests_run_through_cupy(sim):
    """What `make gpu` runs of them, here on the stand-in: layouts, limits, K5's workspace."""
    gpu_backend._raw_kernel.cache_clear()
    gpu = gpu_backend.GpuMachine()
    for family in ("warp", "shared", "cluster", "split"):
        x, device = numbers(3, FAMILIES[family]), device_for(gpu, family)
        at = {"x_at": At(1, 1), "y_at": At(3, 2)}
        expected = normalize(gpu_backend.SIMULATED, x, device=device, **at)
        result = normalize(gpu, x, device=device, **at)
        assert result.plan.family == family
        assert result.bits() == expected.bits()
    gpu_backend._raw_kernel.cache_clear()


def test_a_write_beside_its_memory_is_noticed_there(sim):
    gpu = gpu_backend.GpuMachine()
    memory = gpu.memory(100, "y", offset=8)
    assert memory.ptr % 256 == 8
    assert not gpu.written(memory).any()
    memory.whole[memory.first + 100 : memory.first + 101].fill(0)
    with pytest.raises(AssertionError, match="outside its memory"):
        gpu.get(memory)
