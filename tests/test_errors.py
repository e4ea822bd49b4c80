"""What stands beside x, in both directions and every library; each sentence: test_advice.py."""

import re

import numpy as np
import pytest

import cupynorm as cn
from tests.directions import each_direction

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
CALLS = {"forward": cn.layer_norm, "backward": cn.layer_norm_backward,
         "rms forward": cn.rms_norm, "rms backward": cn.rms_norm_backward}  # fmt: skip
# What stands beside x.
COMPANIONS = [("forward", "weight"), ("forward", "bias"), ("forward", "out"), ("backward", "dy"),
              ("backward", "mean"), ("backward", "rstd"), ("backward", "weight"),
              ("rms forward", "weight"), ("rms backward", "rstd")]  # fmt: skip
SHAPES = {"weight": (4,), "bias": (4,), "mean": (2, 3, 1), "rstd": (2, 3, 1)}  # the others: x's

each_companion = pytest.mark.parametrize(("direction", "name"), COMPANIONS)


def ones(name):
    return np.ones(SHAPES.get(name, X.shape), np.float32)


def good(direction, make=np.asarray):
    """A call that is taken, by the names of its parameters."""
    call = {"x": make(X.copy())}
    if direction.endswith("backward"):
        stats = ("rstd",) if "rms" in direction else ("mean", "rstd")
        call |= {n: make(ones(n)) for n in ("dy", *stats)} | {"normalized_shape": None}
    return call


def refused(error, *words, direction="forward", make=np.asarray, **change):
    """Assert that the changed call is refused with this error, whose sentence holds the words."""
    with pytest.raises(error) as caught:
        CALLS[direction](**good(direction, make) | change)
    assert type(caught.value) is error
    text = str(caught.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "\n" not in text
    assert not re.search(r"  |[^.]\.\.[^.]|^\s|\s$", text), f"badly joined: {text}"
    return text


@each_direction
def test_x_of_another_dtype_in_every_library(lib, direction):
    cast = "x.to(torch.float32)" if lib.name.startswith("torch") else "x.astype('float32')"
    if lib.name.startswith("strict"):
        cast = "astype(x, "  # the standard has a function and no method
    for kind in ("int32", "bool"):
        x = lib.from_numpy(np.ones((2, 3), dtype=kind))
        refused(TypeError, f"dtype {kind}", cast, direction=direction, x=x)


def test_shapes_that_go_with_other_axes():
    """The commonest mistake: the backward called with other axes than the forward."""
    for name in ("weight", "bias"):
        affine = {name: np.ones((4, 2), np.float32)}
        cn.layer_norm(X, axis=(2, 0), **affine)
        refused(ValueError, f"{name} has shape (4, 2)", "(2, 4)", axis=(0, 2), **affine)
    for change in ({"axis": 1}, {"normalized_shape": (3, 4)}, {"axis": (0, 2)}):
        words = "mean has shape (2, 3, 1)", "for the same axes"
        refused(ValueError, *words, direction="backward", **change)


@pytest.mark.parametrize("name", ["mean", "rstd"])
def test_statistics_dtype(name):
    """Those of a half-precision x are float32: in x's own dtype they would be too coarse."""
    call = {"x": X.astype("f2"), "dy": X.astype("f2"), name: ones(name).astype("f2")}
    words = f"{name} has dtype float16", "float32 goes with x of dtype float16", f"cast {name}"
    refused(ValueError, *words, direction="backward", **call)


@pytest.mark.needs("not_numpy")
@each_companion
def test_another_library(lib, direction, name):
    """Beside x of this library one of NumPy, and the reverse."""
    library = {"cupy-simulated": "cupy", "torch-cuda": "torch"}.get(lib.name, lib.name)
    library = "array_api_strict" if library.startswith("strict") else library
    words = f"{name} is a numpy array", f"x is a {library} array", "in silence", "Move it first:"
    refused(ValueError, *words, direction=direction, make=lib.array, **{name: ones(name)})
    words = f"{name} is a", "x is a numpy array", "Move it first:"
    text = refused(ValueError, *words, direction=direction, **{name: lib.array(ones(name))})
    assert re.search(rf"numpy\.asarray\({name}\)|asnumpy\({name}\)|{name}.*numpy\(\)", text)


def overlapping(zeros):
    """Pairs (x, out) of one memory that are not the same elements in the same places."""
    rows, columns, square, line = (zeros(s) for s in ((3, 4), (2, 9), (4, 4), 10))
    yield from ((rows[:2], rows[1:]), (columns[:, :8], columns[:, 1:]))
    yield from ((square, square.T), (line[:5], line[4:9]))


def test_out_that_overlaps_in_part():
    torch = pytest.importorskip("torch")
    words = "out shares memory with x", "in part", "separate array"
    for zeros in (lambda s: np.zeros(s, np.float32), torch.zeros):
        for x, out in overlapping(zeros):
            out += 1
            before = np.asarray(x).copy()
            refused(ValueError, *words, x=x, out=out)
            np.testing.assert_array_equal(x, before)
    x = X.copy()
    refused(ValueError, "out shares memory with x", x=x, out=x[::-1])
    refused(ValueError, "out shares memory with x", x=np.broadcast_to(x[0], x.shape), out=x[:])
    for name in ("weight", "bias"):
        words = f"out shares memory with {name}", "separate array"
        refused(ValueError, *words, x=x, out=x, **{name: x[1, 2]})
    np.testing.assert_array_equal(x, X)


def test_refused_calls_leave_out_untouched():
    out = np.full_like(X, 7)
    for bad in ({"normalized_shape": 3}, {"eps": float("nan")}, {"weight": np.ones(3)}):
        refused(ValueError, out=out, **bad)
    np.testing.assert_array_equal(out, 7)
