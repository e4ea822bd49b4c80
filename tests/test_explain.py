"""What `explain` says is what a call does; `warmup` compiles what a later call takes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._report.explain import _DEVICES
from tests.cpu.programs import run_python
from tests.ptx.limits import DeviceLimits

IMAGES = np.ones((2, 64, 14, 14), np.float32)
LONG = [(2, 9001), (12, 20_000), (1, 70_000), (1, 262_200)]
SHAPES = [((5, 100), {}), ((6, 40), {"axis": 0}), ((2, 3, 4), {"order": "F"})]
SHAPES += [((300, 64), {"axis": -1, "return_stats": True}), ((2, 3, 4, 5), {"axis": (1, 3)})]
SHAPES += [((3, 4, 500), {"normalized_shape": (4, 500)}), *((shape, {}) for shape in LONG)]


@pytest.mark.parametrize(("shape", "kw"), SHAPES, ids=str)
def test_launches_and_bytes_are_those_of_the_call(sim, shape, kw):
    x = sim.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    told = cn.explain(x, **kw)
    before = len(sim.simulator.launches)
    cn.layer_norm(x, **kw)
    done = sim.simulator.launches[before:]
    assert told.path == "cuda"
    assert [text.split(",")[0] for text in told.launches] == [one.name for one in done]
    for text, one in zip(told.launches, done, strict=True):
        clusters = f" in clusters of {one.cluster}" if one.cluster > 1 else ""
        assert f"grid {one.grid[0]}{clusters}, block {one.block[0]}, " in text
    by_kernels = told.bytes_moved - 2 * x.nbytes * len(told.copies)
    # In distinct bytes per block: K5's workspace is read by many threads of a block.
    counted = sum(
        b.distinct_read_bytes + b.distinct_written_bytes
        for one in done
        for b in one.traffic.buffers
    )
    # K5's parts each read the whole row's moments, which explain counts once.
    assert by_kernels <= counted <= 1.02 * by_kernels


def test_copies_and_their_reasons():
    told = cn.explain(IMAGES, axis=(0, 2), device="sm_90")
    assert [text.partition(":")[0] for text in told.copies] == ["of x", "of y"]
    assert "do not fold into one stride" in told.copies[0]
    assert told.bytes_moved == 3 * told.bytes_floor
    assert cn.explain(IMAGES, axis=(1, 2, 3), device="sm_90").copies == ()
    sliced = np.ones((10, 100), np.float32)[:, :64]
    assert cn.explain(sliced, device="sm_90").copies == ()
    backwards = np.ones((10, 100), np.float32)[:, ::-1]
    assert "stride -1, not 1" in cn.explain(backwards, device="sm_90").copies[0]


def test_strided_columns_take_a_tile():
    """Channels first and column-major: no copy, and the floor up to one tile."""
    image = cn.explain(IMAGES, axis=1, device="sm_90")
    assert "K6" in image.kernel and "one sweep" in image.kernel
    assert image.copies == () and image.bytes_moved == image.bytes_floor
    table = np.ones((5000, 3), np.float32, order="F")
    assert "_FC" in cn.explain(table, order="C", device="sm_90").launches[0]
    few = cn.explain(np.empty((10**6, 9), np.float32, order="F"), device="sm_90")
    assert "registers" in few.kernel and few.bytes_moved == few.bytes_floor
    assert "K5 split row" in str(cn.explain(np.ones((2, 3_000_000), np.float16), device="sm_90"))
    long = cn.explain(np.ones((100, 8000), np.float32, order="F"), device="sm_90")
    assert "two sweeps" in long.kernel
    assert 1.4 < long.bytes_moved / long.bytes_floor < 1.5
    for N, words, most in ((2000, ("panels",), 5 / 3 + 0.05), (300, ("K6", "3 passes"), 1.3)):
        x = np.empty((4000, N), np.float32, order="F")
        back = cn.explain(x, device="sm_90", backward=True)
        assert all(word in back.kernel for word in words) and not back.copies
        assert (1.5 if N == 2000 else 1) < back.bytes_moved / back.bytes_floor < most


def test_each_path_says_what_runs():
    torch = pytest.importorskip("torch")
    on_cpu = cn.explain(np.ones((4, 8)))
    assert on_cpu.path == "cpu"
    assert "thread" in on_cpu.kernel
    assert on_cpu.launches == ()
    assert cn.explain(torch.ones(4, 8)).path == "cpu"
    planned = cn.explain(torch.ones(8, 4).T, device="sm_90")
    assert planned.path == "cuda" and "K6" in planned.kernel
    elsewhere = cn.explain(torch.ones(4, 8, device="meta"))
    assert elsewhere.path == "reference"
    assert "torch" in elsewhere.kernel
    assert elsewhere.bytes_moved is None


def test_devices_are_those_that_the_harness_knows():
    for cc, device in _DEVICES.items():
        assert device.compute_capability == cc
        assert device.shared_bytes == DeviceLimits.of(str(cc)).opt_in_shared


@pytest.mark.parametrize(
    ("N", "kernel", "passes"),
    [(100, "K1", 3), (3000, "K2", 3), (8000, "K3", 3), (40_000, "K4", 3), (200_000, "K5", 5)],
)
def test_backward_states_its_passes(N, kernel, passes):
    """x and dy are read and dx is written once each; the fallback says that it needs five."""
    M, weight = 2048, np.ones(N, np.float32)
    e = cn.explain(np.empty((M, N), np.float32), weight=weight, device="sm_90", backward=True)
    assert kernel in e.kernel and f"{passes} passes" in e.kernel
    assert e.bytes_floor == 3 * 4 * M * N + 3 * 4 * N + 2 * 4 * M
    extra = (e.bytes_moved - e.bytes_floor) / (4 * M * N)
    assert passes - 3 <= extra < passes - 3 + 0.5
    assert any("column_totals" in launch for launch in e.launches)


def test_backward_without_weight_on_the_cpu_of_nothing_and_with_copies():
    e = cn.explain(np.ones((64, 100), np.float32), device="sm_90", backward=True)
    assert "_dx_db" in e.launches[0] and "_dw" not in e.launches[0]
    assert e.bytes_floor == 3 * 4 * 6400 + 4 * 100 + 2 * 4 * 64
    assert cn.explain(np.ones((3, 4)), backward=True).path == "cpu"
    for backward in (False, True):
        empty = cn.explain(np.ones((0, 4), np.float32), device="sm_90", backward=backward)
        assert empty.bytes_moved == 0 and not empty.launches and "empty" in str(empty)
    x = np.ones((4, 5, 6), np.float32)
    e = cn.explain(x, axis=(0, 2), device="sm_90", backward=True)
    assert [copy.split(":")[0] for copy in e.copies] == ["of x", "of dy", "of dx"]


def test_a_wider_residual_costs_copies_that_are_named():
    x, wide = np.ones((64, 1000), np.float16), np.ones((64, 1000), np.float32)
    how = {"eps": 1e-5, "device": "sm_90", "op": "add_rms_norm"}
    alike, copied = (cn.explain(x, residual=r, **how) for r in (x, wide))
    assert not alike.copies and alike.bytes_moved == alike.bytes_floor
    assert [text.split(":")[0] for text in copied.copies] == ["of x", "of y"]
    assert "f32" in copied.launches[0] and copied.bytes_moved > copied.bytes_floor


def test_warmup_compiles_what_a_call_takes(sim):
    names = cn.warmup(100, ["float32", "float16"])
    assert len(names) == 2
    compiled = len(sim.simulator.compilations)
    assert compiled == 3  # rows of float32 are whole vectors, which have two kernels
    w = sim.asarray(np.ones(100, np.float32))
    cn.layer_norm(sim.asarray(np.ones((7, 100), np.float32)), weight=w, bias=w)
    assert len(sim.simulator.compilations) == compiled
    assert sim.simulator.launches[-1].name in names


def test_warmup_of_long_rows_covers_few_and_many(sim):
    names = cn.warmup((2, 200_000), ["float32"], affine=False)
    assert [name.split("_f32")[0] for name in names] == [
        "layer_norm_fwd_split_stats",
        "layer_norm_fwd_split_merge",
        "layer_norm_fwd_split_normalize",
        "layer_norm_fwd_cluster",
    ]


def test_warmup_on_the_cpu_leaves_nothing_to_compile():
    """Small and large calls, with statistics and gradients, in a process of its own.

    What compiles, and what loads compiled code, holds numba's lock for that.
    """
    code = """
        import numpy as np, cupynorm as cn
        from numba.core import event

        def taken(call):
            with event.install_recorder("numba:compiler_lock") as record:
                call()
            return len(record.buffer)

        def calls():
            w = np.ones(64, np.float32)
            for rows in (1, 50, 9000):
                x = np.ones((rows, 64), np.float32)
                y, mean, rstd = cn.layer_norm(x, 64, w, w, return_stats=True)
                cn.layer_norm(x, 64, w, w, out=y)
                cn.layer_norm_backward(x, x, 64, mean, rstd, w)

        assert taken(lambda: cn.warmup(64, ["float32"], device="cpu"))
        # The gradient, which nobody asked for before:
        assert taken(lambda: cn.warmup(64, ["float32"], backward=True, device="cpu"))
        assert not taken(calls)
    """
    run_python(code)


TWO = ["float32", "float64"]


@pytest.mark.parametrize(
    ("dtypes", "progress", "hidden"),
    [(TWO, None, None), (TWO[:1], None, True), (TWO[:1], True, False), (TWO, False, "no bar")],
)
def test_when_warmup_draws_a_bar(monkeypatch, capsys, dtypes, progress, hidden):
    """`disable=None` leaves it to tqdm: in a notebook and a terminal, but not into a file."""
    asked = []

    def tqdm(items, *, desc, leave, disable):
        asked.append((list(items), desc, disable))
        return items

    for there in (SimpleNamespace(tqdm=tqdm), None):
        monkeypatch.setitem(sys.modules, "tqdm.auto", there)
        if there or not progress:  # which is refused without tqdm: test_advice
            names = cn.warmup(16, dtypes, device="cpu", progress=progress)
            assert [name.rsplit(" ", 1)[1] for name in names] == dtypes
    assert asked == ([] if progress is False else [(dtypes, "compiling loops", hidden)])
    assert capsys.readouterr() == ("", "")
