"""`layer_norm` and its backward of CuPy arrays, end to end: simulated, and on a GPU."""

import sys
import threading

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cuda.launch import choose_plan
from tests import gpu_backend, oracle
from tests.cuda.calls import Spent
from tests.cuda.rows import EACH, Case, device_for, length, problem_of, run, spread

RNG = np.random.default_rng(20260104)
# One N per kernel, whose entries other tests compile, too; K5 runs where rows are few. Long rows of
# float64 reach the backward's K3 to K5 with fewest columns.
FORWARD = {name: (length(name, "float32"), "float32") for name in ("warp", "block", "shared")}
FORWARD |= {"cluster": FORWARD["shared"], "split": (36_001, "float32")}
BACKWARD = {name: (length(name, "float32", "backward"), "float32") for name in ("warp", "block")}
BACKWARD |= {
    name: (length(name, "float64", "backward"), "float64") for name in ("shared", "cluster")
}
BACKWARD |= {"split": (8201, "float64")}
LENGTHS = {"forward": FORWARD, "backward": BACKWARD}
EACH_FAMILY = pytest.mark.parametrize("family", FORWARD)


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 3).astype(dtype)


def check(y, x, axes=(-1,), weight=None, bias=None):
    """Compare a CuPy result with the oracle for NumPy inputs."""
    axes = tuple(a % x.ndim for a in axes)
    want = oracle.layer_norm(x, axes, weight, bias, 1e-5)[0]
    bound = oracle.tolerance(x.dtype.name, np.prod([x.shape[a] for a in axes]))
    np.testing.assert_allclose(y.get().astype(np.float64), want, rtol=bound, atol=bound)


def check_gradients(grads, dy, x, axes=(-1,), weight=None):
    got = [None if a is None else a.get() for a in grads]
    oracle.assert_gradients(got, dy, x, tuple(a % x.ndim for a in axes), weight)


def backward(dy, x, weight=None):
    _, mean, rstd = cn.layer_norm(x, weight=weight, return_stats=True)
    return cn.layer_norm_backward(dy, x, None, mean, rstd, weight)


class Call:
    """A call of one direction on arrays of its own."""

    def __init__(self, cp, direction, rows, N, dtype="float32"):
        self.backward = direction == "backward"
        self.hosts = [numbers(rows, N, dtype=dtype) for _ in range(2)]
        self.weight = numbers(N)
        self.dy, self.x = (cp.asarray(a) for a in self.hosts)
        self.w = cp.asarray(self.weight)
        self.stats = cn.layer_norm(self.x, return_stats=True)[1:] if self.backward else ()

    def __call__(self):
        if self.backward:
            return cn.layer_norm_backward(self.dy, self.x, None, *self.stats, self.w)
        return cn.layer_norm(self.x, weight=self.w, bias=self.w)

    def check(self, result):
        dy, x = self.hosts
        if self.backward:
            check_gradients(result, dy, x, (1,), self.weight)
        else:
            check(result, x, (1,), self.weight, self.weight)


# --- what a call costs --------------------------------------------------------------------------


@EACH
@EACH_FAMILY
def test_each_kernel_through_the_front_door(cp, direction, family):
    call = Call(cp, direction, 3, *LENGTHS[direction][family])
    result = call()
    assert all(type(a) is cp.ndarray for a in (result if call.backward else (result,)))
    call.check(result)


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_through_the_front_door(cp, in_place):
    for N, _ in FORWARD.values():
        host = numbers(3, N)
        x = cp.asarray(host)
        y, mean, rstd = cn.layer_norm(x, out=x if in_place else None, return_stats=True)
        assert type(y) is type(mean) is cp.ndarray and (y is x) == in_place
        check(y, host)
        assert mean.shape == rstd.shape == (3, 1)
        np.testing.assert_allclose(mean.get(), host.mean(1, keepdims=True), rtol=1e-5)
        np.testing.assert_allclose(rstd.get(), 1 / host.std(1, keepdims=True), rtol=1e-4)


@EACH
@EACH_FAMILY
def test_a_warm_call(sim, direction, family):
    """One launch and one allocation, y; K5 launches twice and allocates a workspace.

    Backward one launch and column_totals (K5: three); dx, dweight, dbias and a workspace.
    """
    call = Call(sim, direction, 5, *LENGTHS[direction][family])
    launches = 2 if family == "split" else 1
    allocations = launches
    if call.backward:
        launches, allocations = (4 if family == "split" else 2), 4
    with Spent(sim) as cold:
        call()
    assert cold.compilations == launches
    with Spent(sim) as warm:
        call()
    assert (warm.compilations, len(warm.launches), warm.allocations) == (0, launches, allocations)
    if call.backward:
        assert warm.names[0].startswith(f"layer_norm_bwd_{family}")
        assert warm.names[-1].startswith("column_totals")
    else:
        assert all(name.startswith(f"layer_norm_fwd_{family}") for name in warm.names)
        with Spent(sim) as into:
            cn.layer_norm(call.x, weight=call.w, bias=call.w, out=call.dy)
        assert (into.compilations, into.allocations) == (0, launches - 1)


def test_other_eps_rows_and_addresses_compile_nothing(sim):
    cn.layer_norm(sim.asarray(numbers(3, 100)))
    with Spent(sim) as spent:
        cn.layer_norm(sim.asarray(numbers(3, 100)), eps=1)  # an int, which must go as a double
        cn.layer_norm(sim.asarray(numbers(50, 99)), eps=np.float32(0.5))
        cn.layer_norm(sim.place(numbers(3, 100), offset=4))
    assert spent.compilations == 0
    assert len(spent.launches) == 3
    weight = sim.asarray(numbers(77))
    for i, (rows, offset) in enumerate(((5, 0), (50, 0), (5, 4))):
        dy, x = sim.place(numbers(rows, 77), offset=offset), sim.asarray(numbers(rows, 77))
        with Spent(sim) as spent:
            backward(dy, x, weight)
        assert bool(spent.compilations) == (i == 0)


def test_rows_of_other_lengths_do_not_shrink_shared_memory(sim):
    """One function serves all lengths of K4: the short row must not lower its limit."""
    long, short = (sim.asarray(numbers(2, N)) for N in (32_000, 22_000))
    for x in (long, short, long):
        y = cn.layer_norm(x)
    check(y, long.get())
    assert len(sim.simulator.compilations) == 1


def test_dx_alone_needs_no_workspace_and_one_launch(sim):
    dy, x = (sim.asarray(numbers(5, 77)) for _ in range(2))
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    with Spent(sim) as spent:
        cn.layer_norm_backward(dy, x, None, mean, rstd, output_mask=(True, False, False))
    assert (len(spent.launches), spent.allocations) == (1, 1)
    with Spent(sim) as nothing:
        cn.layer_norm_backward(dy, x, None, mean, rstd, output_mask=(False, False, False))
    assert (len(nothing.launches), nothing.allocations) == (0, 0)


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


def test_arguments_of_the_backward(sim):
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
    dtypes = dict.fromkeys(("x", "weight", "dweight", "dbias"), "float32")
    problem = problem_of(dtypes, (2, 3, 77), strides, backward=True)
    from cupynorm._cuda import arrays as _cuda  # as the stand-in has it

    plan = choose_plan(problem, _cuda.device_of(0))
    assert main.grid == plan.stages[0].grid
    assert totals.args == (
        workspace, plan.partials, plan.pitch, 77, dweight.data.ptr, dbias.data.ptr,
    )  # fmt: skip
    assert workspace % 16 == 0
    assert main.traffic[dy].read_bytes == main.traffic[x].read_bytes == 6 * 77 * 4


def test_warmup_compiles_what_the_call_then_needs(sim):
    names = cn.warmup((9001,), ("float32",))
    with Spent(sim) as spent:
        weight, bias = (sim.asarray(numbers(9001)) for _ in range(2))
        cn.layer_norm(sim.asarray(numbers(2, 9001)), 9001, weight, bias)
    assert spent.compilations == 0
    assert spent.names == names


def test_numbers_that_stay_are_made_once(monkeypatch):
    """As objects that the real CuPy takes as they are; where it has none, as they are."""
    pytest.importorskip("cupy")
    from cupynorm._cuda import arrays

    given = (5, 2**40, 1e-5)
    made = arrays.packed(given)
    assert tuple(n if type(n) in (int, float) else n.value for n in made) == given
    monkeypatch.setitem(sys.modules, "cupy._core._scalar", None)  # a CuPy that has moved it
    assert arrays.packed(given) == given


# --- streams and devices --------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "family"), [("forward", "split"), ("backward", "warp")])
def test_runs_on_the_current_stream(sim, direction, family):
    call = Call(sim, direction, 2, *LENGTHS[direction][family])
    stream, foreign = sim.cuda.Stream(non_blocking=True), sim.cuda.ExternalStream(0x1234)
    with Spent(sim) as spent:
        with stream:
            call()
        with foreign:
            call()
        call()
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
    """x on another device than the current one: results, workspace and launches go there."""
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    for N in (77, 36_001):
        dy, x = numbers(2, N), numbers(2, N)
        with cp.cuda.Device(1):
            there = [cp.asarray(a) for a in (dy, x)]
        for _ in range(2):
            y, mean, rstd = cn.layer_norm(there[1], return_stats=True)
            grads = cn.layer_norm_backward(*there, None, mean, rstd) if N == 77 else ()
            assert cp.cuda.runtime.getDevice() == 0
            assert {a.device.id for a in (y, mean, *grads) if a is not None} == {1}
            check(y, x)
            if grads:
                check_gradients(grads, dy, x)
        here = [cp.asarray(a) for a in (dy, x)]
        check(cn.layer_norm(here[1]), x)  # device 0 has functions of its own
    _, mean, rstd = cn.layer_norm(here[1], return_stats=True)
    with pytest.raises(ValueError, match=r"dy is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm_backward(there[0], here[1], None, mean, rstd)
    with cp.cuda.Device(1):
        weight = cp.asarray(numbers(N))
    with pytest.raises(ValueError, match=r"weight is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm(here[1], weight=weight)


def test_each_device_compiles_for_itself(sim):
    host = numbers(2, 77)
    for index in (0, 1, 0, 1):
        with sim.cuda.Device(index):
            cn.layer_norm(sim.asarray(host))
    assert [device for _, device in sim.simulator.compilations] == [0, 1]
    assert [launch.device for launch in sim.simulator.launches] == [0, 1, 0, 1]


@EACH
def test_many_host_threads(cp, direction):
    calls = [Call(cp, direction, 4, *FORWARD["warp"]) for _ in range(2)]
    calls += [Call(cp, direction, 4, *LENGTHS[direction][name]) for name in ("block", "cluster")]
    results = [None] * len(calls)

    def work(i):
        for _ in range(3):
            results[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call, result in zip(calls, results, strict=True):
        call.check(result)


# --- layouts --------------------------------------------------------------------------------------


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
    check_gradients(grads, *hosts, (axis,), weight)
    assert grads.dx.strides == x.strides
    if hasattr(cp, "simulator"):
        with Spent(cp) as spent:
            cn.layer_norm_backward(*call, axis=axis)
        assert (len(spent.launches), spent.allocations) == (2, 4)  # no copy
        assert spent.launches[0].name.startswith(f"layer_norm_bwd_{kernel}_")


@pytest.mark.parametrize(
    ("shape", "axis", "orders"),
    [((2, 5, 6, 7), 1, "C"), ((6, 40), 0, "CF"), ((3, 5, 7), 1, "CF"), ((4, 3, 9), (0,), "C")],
)
def test_axes_in_the_middle(cp, shape, axis, orders):
    """Channels first among them; F-ordered ones bring the statistics in another order than rows."""
    axes = (axis,) if isinstance(axis, int) else axis
    for order in orders:
        dy, x = (np.asarray(numbers(*shape), order=order) for _ in range(2))
        given = cp.asarray(dy), cp.asarray(x)
        y, mean, rstd = cn.layer_norm(given[1], axis=axis, return_stats=True)
        check(y, x, axes)
        check_gradients(cn.layer_norm_backward(*given, None, mean, rstd, axis=axis), dy, x, axes)


def test_axes_that_fold_to_no_stride_go_through_copies(cp):
    hosts = numbers(4, 5, 6), numbers(4, 5, 6)[::-1]
    dy, x = (cp.asarray(a) for a in hosts)
    _, mean, rstd = cn.layer_norm(x, axis=(0, 2), return_stats=True)
    call = (dy, x, None, mean, rstd)
    check_gradients(cn.layer_norm_backward(*call, axis=(0, 2)), *hosts, (0, 2))
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
        check_gradients(backward(dy, x), wide[cut], other[cut])
    row = numbers(1, 77)
    same = np.repeat(row, 6, axis=0)
    dy = cp.broadcast_to(cp.asarray(row), (6, 77))
    check_gradients(backward(dy, cp.asarray(other[:, :77])), same, other[:, :77])


def test_statistics_and_weight_that_are_slices(cp):
    dy, x, weight = numbers(5, 77), numbers(5, 77), numbers(77)
    _, mean, rstd = cn.layer_norm(cp.asarray(x), return_stats=True)
    wide = [cp.asarray(np.repeat(a.get(), 3, axis=1))[:, :1] for a in (mean, rstd)]
    w = cp.asarray(np.repeat(weight, 2))[::2]
    grads = cn.layer_norm_backward(cp.asarray(dy), cp.asarray(x), None, *wide, w)
    check_gradients(grads, dy, x, (1,), weight)


# --- refusals and nothing to do -------------------------------------------------------------------


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
        check(y, host[view], weight=weight)


# --- the way that test_rows.py takes on a GPU -----------------------------------------------------


@EACH
@EACH_FAMILY
def test_kernel_tests_run_through_cupy(sim, direction, family):
    """What `make gpu` runs of them, here on the stand-in: layouts, limits, K5's workspace."""
    gpu_backend._raw_kernel.cache_clear()
    gpu = gpu_backend.GpuMachine()
    N, dtype = LENGTHS[direction][family]
    x, dy = numbers(3, N, dtype=dtype), numbers(3, N, dtype=dtype)
    data = Case(direction, x, numbers(N), None, dy if direction == "backward" else None)
    at, device = spread(data, 1), device_for(gpu, family, direction)
    expected, result = (
        run(machine, data, at=at, device=device) for machine in (gpu_backend.SIMULATED, gpu)
    )
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
