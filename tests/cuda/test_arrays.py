"""`layer_norm` and its backward of CuPy arrays, end to end: simulated, and on a GPU."""

import contextlib
import sys
import types

import numpy as np
import pytest

import cupynorm as cn
from tests import gpu_backend
from tests.cpu.in_threads import in_threads
from tests.cuda.calls import Spent
from tests.cuda.rows import EACH, Case, device_for, length, run, spread
from tests.directions import backward
from tests.directions import check as check_library

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


def check(found, dy, x, *affine, **how):
    """Compare with the definition; arrays are CuPy's or NumPy's."""
    lib = types.SimpleNamespace(to_numpy=lambda a: a.get() if hasattr(a, "get") else a)
    check_library(lib, found, dy, x, *affine, **how)


class Call:
    """A call of one direction on arrays of its own."""

    def __init__(self, cp, direction, rows, N, dtype="float32"):
        self.backward = direction == "backward"
        self.hosts = [numbers(rows, N, dtype=dtype) for _ in range(2)]
        self.weight = numbers(N)
        self.dy, self.x = (cp.asarray(a) for a in self.hosts)
        self.w = cp.asarray(self.weight)
        self.stats = cn.layer_norm(self.x, return_stats=True)[1:] if self.backward else ()

    def __call__(self, **how):
        if self.backward:
            return cn.layer_norm_backward(self.dy, self.x, None, *self.stats, self.w)
        return cn.layer_norm(self.x, weight=self.w, bias=self.w, **how)

    def check(self, result):
        check(result, *self.hosts, self.weight, self.weight)


# --- what a call costs --------------------------------------------------------------------------


@EACH
@EACH_FAMILY
def test_each_kernel_through_the_front_door(cp, direction, family):
    """With statistics, and in place; what it costs when it is warm, and compiles when it is not.

    One launch and one allocation, y; K5 launches three times and allocates a workspace. Backward
    one launch and column_totals (K5: three); dx, dweight, dbias and a workspace.
    """
    call = Call(cp, direction, 5, *LENGTHS[direction][family])
    simulated, launches = hasattr(cp, "simulator"), 3 if family == "split" else 1
    launches, allocations = launches + call.backward, 1 + (family == "split")
    allocations = 4 if call.backward else allocations
    for compiled in (launches, 0):
        with Spent(cp) if simulated else contextlib.nullcontext() as spent:
            result = call(return_stats=False)
        call.check(result)
        if simulated:
            assert (spent.compilations, len(spent.launches)) == (compiled, launches)
            assert spent.allocations == allocations
            main = [name for name in spent.names if not name.startswith("column_totals")]
            which = "bwd" if call.backward else "fwd"
            assert all(name.startswith(f"layer_norm_{which}_{family}") for name in main)
            assert len(main) == launches - call.backward
    if not call.backward:
        with Spent(cp) if simulated else contextlib.nullcontext() as spent:
            result = call(return_stats=True, out=call.x)
        assert result.y is call.x
        assert not simulated or spent.allocations == allocations + 1  # mean and rstd, but no y
        assert all(type(a) is cp.ndarray for a in result)
        call.check(result)


def test_other_eps_rows_and_addresses_compile_nothing(sim):
    cn.layer_norm(sim.asarray(numbers(3, 100)))
    with Spent(sim) as spent:
        cn.layer_norm(sim.asarray(numbers(3, 100)), eps=1)  # an int, which must go as a double
        cn.layer_norm(sim.asarray(numbers(50, 96)), eps=np.float32(0.5))
        cn.layer_norm(sim.place(numbers(3, 100), offset=16))
    assert spent.compilations == 0
    assert len(spent.launches) == 3
    weight = sim.asarray(numbers(77))
    for i, (rows, offset) in enumerate(((5, 0), (50, 0), (5, 4))):
        dy, x = sim.place(numbers(rows, 77), offset=offset), sim.asarray(numbers(rows, 77))
        with Spent(sim) as spent:
            backward(dy, x, weight=weight)
        assert bool(spent.compilations) == (i == 0)


def test_rows_of_other_lengths_do_not_shrink_shared_memory(sim):
    """One function serves all lengths of K4: the short row must not lower its limit."""
    long, short = (sim.asarray(numbers(2, N)) for N in (32_000, 22_000))
    for x in (long, short, long):
        y = cn.layer_norm(x)
    check(y, None, long)
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


def test_numbers_that_stay_are_made_once(monkeypatch):
    """As objects that the real CuPy takes as they are; where it has none, as they are."""
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
    each = 3 if family == "split" else 2
    streams = [launch.stream for launch in spent.launches]
    assert streams == [stream.ptr] * each + [0x1234] * each + [0] * each


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
            result = cn.layer_norm(there[1], return_stats=True)
            grads = cn.layer_norm_backward(*there, None, *result[1:]) if N == 77 else None
            assert cp.cuda.runtime.getDevice() == 0
            for found in (result, grads) if grads else (result,):
                assert {a.device.id for a in found if a is not None} == {1}
                check(found, dy, x)
        here = [cp.asarray(a) for a in (dy, x)]
        check(cn.layer_norm(here[1]), dy, x)  # device 0 has functions of its own
    _, mean, rstd = cn.layer_norm(here[1], return_stats=True)
    with pytest.raises(ValueError, match=r"dy is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm_backward(there[0], here[1], None, mean, rstd)
    with cp.cuda.Device(1):
        weight = cp.asarray(numbers(N))
    with pytest.raises(ValueError, match=r"weight is on .* but x is on .*cupy\.asarray"):
        cn.layer_norm(here[1], weight=weight)


@EACH
def test_many_host_threads(cp, direction):
    calls = [Call(cp, direction, 4, *FORWARD["warp"]) for _ in range(2)]
    calls += [Call(cp, direction, 4, *LENGTHS[direction][name]) for name in ("block", "cluster")]

    def work(i):
        for _ in range(3):
            calls[i].check(calls[i]())

    in_threads(len(calls), work, 600)


# --- layouts --------------------------------------------------------------------------------------


ALL = np.s_[:]
# Memory, the orders of dy and of x, the view, the axes; the backward's kernel; arrays that are
# copied, forward and backward.
LAYOUTS = {
    "columns": ((4, 6, 90), "CC", np.s_[..., 3:80], -1, "warp", (0, 0)),
    "rows": ((4, 6, 90), "CC", np.s_[1:3, ::2], -1, "warp", (0, 0)),
    "backwards": ((4, 6, 90), "CC", np.s_[::-1, ::-1], -1, "warp", (0, 0)),
    "one row": ((4, 6, 90), "CC", np.s_[2, 3], -1, "warp", (0, 0)),
    "transposed": ((4, 6, 90), "CC", "T", -1, "warp", (0, 0)),
    "F and C": ((5, 6), "FC", ALL, 1, "column", (0, 0)),
    "C and F": ((5, 6), "CF", ALL, 1, "column", (0, 0)),
    "F along rows": ((5, 6), "FF", ALL, 0, "warp", (0, 0)),
    "C and F along rows": ((5, 6), "CF", ALL, 0, "column", (0, 0)),
    "strided": ((5, 6), "CC", ALL, 0, "column", (0, 0)),
    "channels first": ((2, 5, 6, 7), "CC", ALL, 1, "column", (0, 0)),
    # Whose statistics come in another order than the rows.
    "channels first of F": ((3, 5, 7), "FF", ALL, 1, "column", (0, 0)),
    # What folds to no one stride, or weight's order over the axes does not.
    "apart": ((4, 6, 90), "CC", ALL, (0, 2), "block", (2, 3)),
    "two axes of F": ((4, 6, 90), "FF", ALL, (0, 1), "warp", (2, 3)),
    "all axes of F": ((4, 6, 90), "FF", ALL, (0, 1, 2), "block", (2, 3)),
    "three batch strides": ((3, 4, 5, 77), "CC", np.s_[:2, :3, :3], -1, "warp", (2, 3)),
}


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cp, direction, layout):
    """Rows and axes are read as they lie; what folds to no strides goes through a copy."""
    shape, orders, cut, axis, kernel, copied = LAYOUTS[layout]
    copied = copied[direction == "backward"]

    def laid(order, values):
        whole = cp.asarray(np.asarray(values, order=order), order="K")
        return whole.transpose(1, 0, 2) if isinstance(cut, str) else whole[cut]

    dy, x = (laid(order, numbers(*shape)) for order in orders)
    axes = axis if isinstance(axis, tuple) else (axis,)
    weight = cp.asarray(numbers(*(x.shape[a] for a in axes)))
    if direction == "forward":
        call, given, launches, results = cn.layer_norm, {"x": x}, 1, 1
    else:
        _, mean, rstd = cn.layer_norm(x, axis=axis, return_stats=True)
        given = {"dy": dy, "x": x, "normalized_shape": None, "mean": mean, "rstd": rstd}
        call, launches, results = cn.layer_norm_backward, 2, 4  # and a workspace
    given |= {"weight": weight, "axis": axis}
    found = call(**given)
    check(found, dy, x, weight, axis=axis)
    if x.flags.forc:
        assert (found if direction == "forward" else found.dx).strides == x.strides
    if hasattr(cp, "simulator"):
        with Spent(cp) as spent:
            call(**given)
        assert (len(spent.launches), spent.allocations) == (launches, results + copied)
        if not copied:
            assert spent.launches[0].traffic[x].read_bytes == x.nbytes
        if direction == "backward":
            assert spent.names[0].startswith(f"layer_norm_bwd_{kernel}_")
    if direction == "forward":
        assert len(cn.explain(x, weight=weight, axis=axis).copies) == copied
        out = laid(orders[1], np.zeros(shape, np.float32))
        assert cn.layer_norm(**given, out=out) is out
        check(out, None, x, weight, axis=axis)


def test_broadcast_rows(cp):
    row, other = cp.asarray(numbers(1, 77)), cp.asarray(numbers(5, 77))
    row = cp.broadcast_to(row, (5, 77))
    check(cn.layer_norm(row), None, row)
    check(backward(row, other), row, other)


def test_weight_of_any_layout(cp):
    """Strided, reversed, transposed, broadcast: brought to unit stride on the device."""
    x, w = cp.asarray(numbers(5, 6, 14)), cp.asarray(numbers(14, 12))
    for weight in (w[:, ::2].T, w[:, :6].T, w[::-1, 6:].T, cp.broadcast_to(w[:, 0], (6, 14))):
        y = cn.layer_norm(x, (6, 14), weight, weight)
        check(y, None, x, weight, weight, normalized_shape=(6, 14))


# --- refusals and nothing to do -------------------------------------------------------------------


def test_out_that_overlaps(cp):
    """In turn with x, but not in part."""
    x = cp.asarray(numbers(6, 77))
    with pytest.raises(ValueError, match="two elements at one address"):
        cn.layer_norm(x, out=cp.broadcast_to(x[:1], (6, 77)))
    check(cn.layer_norm(x[::2], out=x[1::2]), None, x[::2])


@pytest.mark.parametrize("shape", [(0, 77), (5, 0), (0, 0), (3, 0, 4)])
def test_empty_arrays_launch_nothing(sim, shape):
    with Spent(sim) as spent:
        cn.layer_norm(sim.empty(shape, dtype=np.float32), return_stats=True)
    assert not spent.launches


# --- the way that test_rows.py takes on a GPU -----------------------------------------------------


@EACH
@EACH_FAMILY
def test_kernel_tests_run_through_cupy(sim, direction, family):
    """What `make gpu` runs of them, here on the stand-in: layouts, limits, K5's workspace."""
    gpu_backend._raw_kernel.cache_clear()
    gpu = gpu_backend.GpuMachine()
    N, dtype = LENGTHS[direction][family]
    x, dy = numbers(3, N, dtype=dtype), numbers(3, N, dtype=dtype)
    more = (None, dy) if direction == "backward" else (numbers(N), None)
    data = Case(direction, x, numbers(N), *more)
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


def test_a_subclass_of_cupys_array_beside_plain_ones(sim):
    host, weight = numbers(4, 77), numbers(77)
    x = sim.asarray(host)
    x.__class__ = type("Mine", (sim.ndarray,), {})
    y = cn.layer_norm(x, 77, sim.asarray(weight))
    np.testing.assert_array_equal(
        y.get(), cn.layer_norm(sim.asarray(host), 77, sim.asarray(weight)).get()
    )
    assert len(sim.simulator.launches) == 2


# --- what a GPU would not forgive -----------------------------------------------------------------


def test_a_captured_call_keeps_the_memory_that_a_replay_writes(sim):
    call, memory = Call(sim, "backward", 3, 77), sim.simulator
    stream = sim.cuda.Stream()
    with stream:
        call()  # compiled before
        before = len(memory.buffers())
        call()
        assert len(memory.buffers()) == before  # given back
        stream.begin_capture()
        result = call()
        graph = stream.end_capture()
    assert len(memory.buffers()) == before + 1 + len(result)
    with Spent(sim) as spent:
        graph.launch()
    assert len(spent.launches) == 2
    call.check(result)


@pytest.mark.parametrize("N", [77, 3000])
@pytest.mark.parametrize("layout", ["rows", "columns", "copied"])
@pytest.mark.parametrize("name", ["x", "out", "dy", "weight"])
def test_an_address_between_items_is_an_error_before_any_launch(sim, name, layout, N):
    shape = {"rows": (4, N), "columns": (N, 4), "copied": (4, N, 2)}[layout]
    axis = {"rows": 1, "columns": 0, "copied": (0, 2)}[layout]
    affine = (4, 2) if layout == "copied" else (N,)

    def array(of, shape):
        return sim.place(numbers(*shape), offset=2 if of == name else 0)

    x, weight = array("x", shape), array("weight", affine)
    aligned = sim.asarray(numbers(*shape))
    _, mean, rstd = cn.layer_norm(aligned, axis=axis, return_stats=True)
    dy, out = array("dy", shape), array("out", shape)
    with Spent(sim) as spent, pytest.raises(ValueError, match=f"^{name} begins at"):
        if name == "dy":
            cn.layer_norm_backward(dy, x, None, mean, rstd, weight, axis=axis)
        else:
            cn.layer_norm(x, weight=weight, axis=axis, out=out)
    assert not spent.launches
