"""Memory that is not there, or not ours to write: refused, or right.

Run as a program it tries every entry with every kind of tensor that is not memory, a line for each.
"""

import contextlib
import functools
import subprocess
import sys

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu.engine import without_numba
from tests.conftest import Exporter

torch = pytest.importorskip("torch")
ct = pytest.importorskip("cupynorm.torch")

N = 64
AFFINE = "weight", "bias"


def tensors():
    """By argument, with storage of their own."""
    make = torch.Generator().manual_seed(0)
    tables = "x", "residual", "dy", "dsum", "out", "sum_out"
    found = {name: torch.randn(8, N, generator=make) for name in tables}
    found |= {name: torch.randn(N, generator=make) for name in AFFINE}
    _, found["mean"], found["rstd"] = cn.layer_norm(found["x"], N, return_stats=True)
    return found


def view(t):
    """The same values behind others in one storage, as of a parameter that FSDP has made flat."""
    return torch.cat([torch.zeros(1000, dtype=t.dtype), t.flatten()])[1000:].view(t.shape)


def cut(t, nbytes):
    t.untyped_storage().resize_(nbytes)
    return t


FLAWS = {
    "released": lambda t: cut(t.clone(), 0),
    "cut": lambda t: cut(t.clone(), t.nbytes - 4),
    "view released": lambda t: cut(view(t), 0),
    "view cut": lambda t: cut(view(t), t.nbytes),
    "elsewhere": lambda t: t.to("meta"),
    # Not memory, but right:
    "zeros": lambda t: torch._efficientzerotensor(t.shape),
    "functional": torch._to_functional_tensor,
}


def prepared(t):
    f = cn.prepare(torch.empty(8, N), N, t["weight"], t["bias"])
    return f(t["x"], out=t["out"])


def gradient(t):
    x = torch.ones(8, N, requires_grad=True)
    y = ct.layer_norm(x, (N,), t["weight"])
    return torch.autograd.grad(y, x, t["dy"])


def module(kind, t):
    norm = kind(N)
    norm.weight, norm.bias = (torch.nn.Parameter(t[name], requires_grad=False) for name in AFFINE)
    return norm


def loaded(t):
    layer = cn.LayerNorm(N)
    layer.load_state_dict({name: t[name] for name in AFFINE})
    return layer.weight + layer.bias


def taken(t):
    layer = cn.LayerNorm.from_torch(module(torch.nn.LayerNorm, t))
    return layer.weight + layer.bias


def in_a_pipeline(t):
    from cupynorm.sklearn import LayerNormalizer

    return LayerNormalizer().fit_transform(t["x"])


def row(t):
    return t["weight"], t["bias"]


X = ("x", *AFFINE)
SUMMED = (*X, "residual", "out", "sum_out")
BACK, ROWS = ("dy", "x", "mean", "rstd", "weight", "dsum"), {"normalized_shape": N}
ENTRIES = {
    "layer_norm": (lambda t: cn.layer_norm(t["x"], N, *row(t)), X),
    "out": (lambda t: cn.layer_norm(t["x"], N, *row(t), out=t["out"]), (*X, "out")),
    "statistics": (lambda t: cn.layer_norm(t["x"], N, *row(t), return_stats=True), X),
    "columns": (lambda t: cn.layer_norm(t["x"], axis=0), ("x",)),
    "column-major": (lambda t: cn.layer_norm(t["x"], N, *row(t), order="F"), X),
    "1 + weight": (lambda t: cn.rms_norm(t["x"], N, t["weight"], zero_centered_weight=True), X[:2]),
    "add": (lambda t: cn.add_layer_norm(**{k: t[k] for k in SUMMED}), SUMMED),
    "backward": (lambda t: cn.layer_norm_backward(**ROWS, **{k: t[k] for k in BACK}), BACK),
    "prepared": (prepared, (*X, "out")),
    "torch": (lambda t: ct.layer_norm(t["x"], (N,), *row(t)), X),
    "torch rms": (lambda t: ct.rms_norm(t["x"], (N,), t["weight"]), X[:2]),
    "torch add": (lambda t: ct.add_layer_norm(t["x"], t["residual"], (N,), *row(t)), SUMMED[:4]),
    "autograd": (lambda t: ct.layer_norm(t["x"].detach().requires_grad_(), (N,), *row(t)), X),
    "gradient": (gradient, ("dy", "weight")),
    "vmap": (lambda t: torch.func.vmap(lambda x: ct.layer_norm(x, (N,), *row(t)))(t["x"]), X),
    "operator": (lambda t: torch.ops.cupynorm.layer_norm_fwd(t["x"], [1], *row(t), 1e-5, True), X),
    "module": (lambda t: module(ct.LayerNorm, t)(t["x"]), X),
    "load_state_dict": (loaded, AFFINE),
    "from_torch": (taken, AFFINE),
    "sklearn": (in_a_pipeline, ("x",)),
}
ENGINES = {"loops": contextlib.nullcontext, "functions": without_numba}
CASES = [(e, name, flaw) for e, (_, names) in ENTRIES.items() for name in names for flaw in FLAWS]


def first(result):
    y = result[0] if isinstance(result, tuple) else result
    return torch.as_tensor(y).detach()


@functools.cache
def expected(entry, zeros=None):
    """The result of a call, one of whose arguments may be zero."""
    values = tensors()
    if zeros is not None:
        values[zeros].zero_()
    return first(ENTRIES[entry][0](values))


def outcome(entry, name, flaw):
    """What becomes of a call: 'right', 'refused', or what else."""
    call, given = ENTRIES[entry][0], tensors()
    given[name] = FLAWS[flaw](given[name])
    try:
        y = first(call(given))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        label = f"{'X' if entry == 'sklearn' else name} takes "
        if isinstance(error, ValueError) and "of them: it was released" in str(error):
            return "refused" if label in str(error) else f"told of another: {error}"
        # What torch says itself.
        known = "meta", "immutable", "functional", "ZeroTensor", "requires_grad", "for storage of"
        return "refused" if any(word in str(error) for word in known) else repr(error)
    if flaw in ("zeros", "functional") and not y.is_meta:
        want = expected(entry, name if flaw == "zeros" else None)
        return "right" if torch.allclose(y, want, atol=1e-5) else "wrong values"
    return "no memory wanted" if y.is_meta else "not refused"


@pytest.fixture(scope="module")
def outcomes():
    """Of each case: tried in another process, where a fault of the machine ends no test run."""
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_tensors_that_are_not_memory(outcomes, entry, engine):
    fine, cases = ("right", "refused", "no memory wanted"), [c for c in CASES if c[0] == entry]
    told = {c: outcomes.get(", ".join((engine, *c)), "the process ended") for c in cases}
    assert told and not {case: how for case, how in told.items() if how not in fine}


def test_a_view_in_a_larger_storage_and_an_expanded_weight():
    t = tensors()
    expected = cn.layer_norm(t["x"], N, t["weight"])
    torch.testing.assert_close(cn.layer_norm(view(t["x"]), N, view(t["weight"])), expected)
    two = torch.tensor([2.0]).expand(N)
    torch.testing.assert_close(cn.layer_norm(t["x"], N, two), 2 * cn.layer_norm(t["x"], N))
    cut(t["weight"], 0)  # and back, as FSDP does at the next forward
    cut(t["weight"], 4 * N).untyped_storage().fill_(0)
    assert not cn.layer_norm(t["x"], N, t["weight"]).any()


# --- memory that others may not write -------------------------------------------------------------

HOST = np.linspace(1, 2, N, dtype=np.float32)


def mapped(folder):
    np.save(folder / "weight.npy", HOST)
    return np.load(folder / "weight.npy", mmap_mode="r")


def locked(_):
    array = HOST.copy()
    array.setflags(write=False)
    return array


READ_ONLY = {
    "mapped": mapped,
    "bytes": lambda _: np.frombuffer(HOST.tobytes(), np.float32),
    "jax": lambda _: np.asarray(pytest.importorskip("jax.numpy").asarray(HOST)),
    "locked": locked,
    "a view of it": lambda _: locked(_)[:],
    "broadcast": lambda _: np.broadcast_to(np.float32(2), N),
}


def layer_with(**parameters):
    layer = cn.LayerNorm(N)
    for name, value in parameters.items():
        setattr(layer, name, value)
    return layer


STATE = {"weight": np.full(N, 3, np.float32), "bias": np.full(N, 4, np.float32)}
WRITING = {
    "to_torch": lambda a: layer_with(weight=a).to_torch(),
    "to_torch, bias": lambda a: layer_with(bias=a).to_torch(),
    "to_torch, bfloat16": lambda a: layer_with(
        weight=np.broadcast_to(a.astype("bfloat16"), N)
    ).to_torch(),
    "load_state_dict": lambda a: layer_with(weight=a).load_state_dict(STATE),
    "out": lambda a: cn.layer_norm(np.ones(N, np.float32), out=a),
    "out, exported": lambda a: cn.layer_norm(np.ones(N, np.float32), out=Exporter(a)),
    "sum_out": lambda a: cn.add_rms_norm(HOST, HOST, sum_out=a),
}


@pytest.mark.parametrize("kind", READ_ONLY)
@pytest.mark.parametrize("way", WRITING)
def test_what_is_read_only_stays_so(tmp_path, kind, way):
    array = READ_ONLY[kind](tmp_path)
    before = array.copy()
    with pytest.raises(ValueError, match=r"is read-only; (pass a writable|assign a copy)"):
        WRITING[way](array)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_read_only_weight_is_read_and_the_way_out_works(tmp_path, kind):
    layer = layer_with(weight=READ_ONLY[kind](tmp_path))
    x = np.ones((2, N), np.float32)
    layer.backward(layer(x))
    layer.weight = layer.weight.copy()
    linear = layer.to_torch()
    linear.weight.data.fill_(5.0)
    assert (layer.weight == 5).all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for engine, context in ENGINES.items():
        expected.cache_clear()
        with contextlib.suppress(BrokenPipeError), context():
            for case in CASES:
                print(f"{', '.join((engine, *case))}: {outcome(*case)}", flush=True)
