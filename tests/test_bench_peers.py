"""The adapters of the GPU benchmark's peers, on stand-ins for their libraries; no GPU."""

import functools
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bench import peers, peers_arrays, peers_backward, peers_functions  # noqa: E402
from bench.gpu_check import largest_error, limit  # noqa: E402
from bench.gpu_clock import Batch  # noqa: E402
from bench.gpu_contender import Contender, measure  # noqa: E402
from bench.gpu_data import make_inputs  # noqa: E402
from bench.gpu_data_backward import make_gradient_inputs  # noqa: E402
from bench.gpu_grid import BIG, BOTH, BWD, FWD, LAYOUT, Case  # noqa: E402
from tests import peer_stand_ins  # noqa: E402

FORWARD = ("flash-attn", "apex", "apex-fast", "transformer-engine", "cudnn", "cupy", "cupy-fuse")
GRADIENTS = ("flash-attn", "apex", "apex-fast")


def on_the_host(session, name, make):
    """`torch_contender` without CUDA: no stream of torch's, and a batch that runs the calls."""
    with torch.no_grad():
        call = make(torch)

    def quiet(i):
        with torch.no_grad():
            return call(i)

    to_cupy = functools.partial(peers._from_torch, session)
    return Contender(name, quiet, to_cupy=to_cupy)


def captured(session, body, calls):
    """As a capture does, run the calls once to see what they launch; a replay runs them again."""
    body()
    return Batch(body, calls, "host")


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(peers, "torch_contender", on_the_host)
    monkeypatch.setattr(peers_backward, "torch_contender", on_the_host)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr("bench.gpu_contender.passes_for", lambda *_: 1)
    return peer_stand_ins.host_session()


def results(session, case, names):
    """What becomes of the peers: checked and timed as on a GPU."""
    if case.op in (BWD, BOTH):
        inputs, build = make_gradient_inputs(session, case), peers_backward.backward_peers
    else:
        inputs, build = make_inputs(session, case), peers.peers
    builders = build(session, case, inputs, names)
    made = measure(session, case, inputs, _host_capture(builders), 3)
    return {r.name: r for r in made}


def _host_capture(builders):
    def build(make):
        contender = make()
        if contender.capture is not peers_arrays._blocking:
            contender.capture = captured
        return contender

    return [(name, functools.partial(build, make)) for name, make in builders]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_peers_are_timed(session, monkeypatch, dtype):
    peer_stand_ins.install(monkeypatch)
    found = results(session, Case(dtype, 9, 256, BIG), FORWARD)
    assert {name: (r.status, r.note) for name, r in found.items()} == dict.fromkeys(
        FORWARD, ("ok", "")
    )
    assert all(r.times.median > 0 for r in found.values())


def test_wrong_peers_get_no_number(session, monkeypatch):
    peer_stand_ins.install(monkeypatch, scale_error=1.001)
    found = results(session, Case("float32", 9, 256, BIG), FORWARD[:5])
    assert {r.status for r in found.values()} == {"wrong"}
    assert not any(r.times for r in found.values())
    for op in (BWD, BOTH):
        found = results(session, Case("float32", 9, 256, BIG, op=op), GRADIENTS)
        assert {r.status for r in found.values()} == {"wrong"}
    assert results(session, Case("float32", 9, 256, BIG, op=BWD), ("cudnn",))["cudnn"].status == (
        "wrong"
    )


def test_missing_libraries_are_named(session):
    found = results(session, Case("float32", 9, 256, BIG), FORWARD[:5])
    libraries = ("flash_attn", "apex", "apex", "transformer_engine", "cudnn")
    for result, library in zip(list(found.values())[:5], libraries, strict=True):
        assert result.status == "skipped"
        assert result.note.startswith(library)
        assert "cannot be imported" in result.note


def test_gradients(session, monkeypatch):
    peer_stand_ins.install(monkeypatch)
    names = (*GRADIENTS, "transformer-engine", "cudnn")
    together = results(session, Case("float32", 9, 256, BIG, op=BOTH), names)
    alone = results(session, Case("float32", 9, 256, BIG, op=BWD), names)
    assert [together[n].status for n in names] == ["ok"] * 4 + ["skipped"]
    assert [alone[n].status for n in names] == ["ok"] * 3 + ["skipped", "ok"]
    assert "cannot be repeated" in alone["transformer-engine"].note
    assert "one by one" in together["cudnn"].note


@pytest.mark.parametrize(
    ("name", "case", "note"),
    [
        ("flash-attn", Case("float32", 3, 64, BIG, None), "needs a weight"),
        ("flash-attn", Case("float32", 2, 16385, BIG), "at most 65536 bytes"),
        ("apex-fast", Case("float32", 3, 64, BIG, None), "always has a weight"),
        ("apex-fast", Case("bfloat16", 3, 64, BIG, "float32"), "parameters' dtype torch.float32"),
        ("transformer-engine", Case("float32", 3, 64, BIG, None), "always has a weight"),
        ("cudnn", Case("float32", 3, 64, BIG, None), "needs scale and bias"),
        ("cuml", Case("float32", 3, 64, BIG), "neither weight nor bias"),
        ("cuml", Case("float32", 3, 64, BIG, None, op=BWD), "no gradients"),
        ("cupy-fuse", Case("float32", 1, 64, "few rows"), "one block"),
    ],
)
def test_refusals_say_why(session, monkeypatch, name, case, note):
    peer_stand_ins.install(monkeypatch)
    monkeypatch.setattr(peers_backward, "BACKWARD_PEERS", (*peers_backward.BACKWARD_PEERS, "cuml"))
    result = results(session, case, (name,))[name]
    assert (result.status, result.times) == ("skipped", None)
    assert note in result.note


def test_apex_takes_the_function_that_fits_the_weight(session, monkeypatch):
    peer_stand_ins.install(monkeypatch)  # which asserts that the dtypes are its own
    for weight in (None, "same", "float32"):
        found = results(session, Case("bfloat16", 5, 64, BIG, weight), ("apex",))
        assert found["apex"].status == "ok", found["apex"].note


@pytest.mark.parametrize("name", ["apex-fast", "transformer-engine"])
def test_modules_share_the_parameters(monkeypatch, name):
    peer_stand_ins.install(monkeypatch)
    run = peers_functions.torch_function(name, torch, 64)
    x = torch.randn(4, 64)
    for _ in range(2):
        weight, bias = (torch.randn(64, requires_grad=True) for _ in "wb")
        y = run(x, weight, bias)
        grads = torch.autograd.grad(y.sum(), (weight, bias))
        assert torch.allclose(grads[1], torch.full((64,), 4.0))
        want = torch.nn.functional.layer_norm(x, (64,), weight, bias)
        assert torch.allclose(y, want, atol=1e-6)


def test_cuml_is_judged_without_eps(session, monkeypatch):
    case = Case("float32", 9, 64, BIG, None)
    peer_stand_ins.install(monkeypatch)
    right = results(session, case, ("cuml",))["cuml"]
    assert (right.status, right.method) == ("ok", peers_arrays.BLOCKING)
    assert right.error < 8
    peer_stand_ins.install(monkeypatch, scale_error=1 + 1e-5)
    wrong = results(session, case, ("cuml",))["cuml"]
    assert (wrong.status, wrong.times) == ("wrong", None)


def test_cudnn_without_a_plan_says_so(session, monkeypatch):
    peer_stand_ins.install(monkeypatch)
    import cudnn

    def none(self, modes):
        raise cudnn.cudnnGraphNotSupportedError("no engine")

    monkeypatch.setattr(cudnn.pygraph, "create_execution_plans", none)
    found = results(session, Case("float64", 3, 64, BIG), ("cudnn",))["cudnn"]
    assert found.note == "cuDNN has no plan: no engine"


# --- JAX ------------------------------------------------------------------------------------------


def test_jax_without_a_gpu_is_refused(session):
    pytest.importorskip("jax")
    found = results(session, Case("float32", 3, 64, BIG), ("jax",))["jax"]
    assert found.status == "skipped"
    assert "JAX has no GPU" in found.note


@pytest.mark.parametrize("weight", ["same", None])
def test_jax_gives_results_and_gradients(session, monkeypatch, weight):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(peers_arrays, "_jax_on_gpu", lambda: jax)
    monkeypatch.setattr("bench.gpu_contender.poison", lambda arrays: None)  # they are read-only
    for op in (FWD, BWD, BOTH):
        found = results(session, Case("bfloat16", 5, 64, BIG, weight, op=op), ("jax",))["jax"]
        assert (found.status, found.note) == ("ok", ""), op
        assert found.method == peers_arrays.BLOCKING
    odd = results(session, Case("float32", 5, 64, LAYOUT, layout="pitch"), ("jax",))["jax"]
    assert "no gaps" in odd.note


def test_wrong_jax_gets_no_number(session, monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(peers_arrays, "_jax_on_gpu", lambda: jax)
    wrong = functools.partial(peers_arrays.formula, eps=1e-3)
    monkeypatch.setattr(peers_arrays, "formula", wrong)
    found = results(session, Case("float32", 5, 64, BIG), ("jax",))["jax"]
    assert (found.status, found.times) == ("wrong", None)


# --- the formulas by themselves -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_compositions_agree_with_float64(dtype):
    rng = np.random.default_rng(2)
    x, weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((9, 200), 200, 200))
    for w, b in ((weight, bias), (None, None)):
        for run in (
            functools.partial(peers_arrays.composition, np),
            peers_arrays._fused(peer_stand_ins.HostCupy()),
        ):
            y = run(x, w, b)
            assert y.dtype == x.dtype
            allowed = limit(str(x.dtype), 200, ours=True)
            assert largest_error(np, x, w, b, y) <= allowed


def test_peers_that_are_asked_for_are_known():
    known = set(peers_functions.FUNCTIONS) | set(peers_arrays.ARRAY_PEERS)
    assert set(peers.PEERS) <= known
    assert set(peers_backward.BACKWARD_PEERS) <= known
