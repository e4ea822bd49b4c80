"""Every argument rule of `layer_norm_backward`: the error, the offending values, the way out."""

import re

import numpy as np
import pytest

import cupynorm as cn

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
NAMES = ("dy", "mean", "rstd")


def arguments(lib=None, dtype="float32"):
    """A good call, by the names of its parameters."""
    x = X.astype(dtype)
    made = {"x": x, "dy": x[::-1].copy()} if lib is None else {
        "x": lib.array(x, dtype), "dy": lib.array(x[::-1], dtype)
    }  # fmt: skip
    _, mean, rstd = cn.layer_norm(made["x"], return_stats=True)
    return {**made, "normalized_shape": None, "mean": mean, "rstd": rstd}


def refused(error, *words, lib=None, **change):
    """Assert that the changed call is refused with this error, whose sentence holds the words."""
    call = {**arguments(lib), **change}
    with pytest.raises(error) as caught:
        cn.layer_norm_backward(**call)
    assert type(caught.value) is error
    text = str(caught.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "\n" not in text
    assert not re.search(r"  |[^.]\.\.[^.]|^\s|\s$", text), f"badly joined: {text}"
    return text


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2, 3), (2, 3, 5), (1, 2, 3, 4), (24,), (2, 1, 4)])
def test_dy_shape(lib, shape):
    refused(
        ValueError,
        f"dy has shape {shape}",
        "(2, 3, 4)",
        "gradient of layer_norm(x)",
        lib=lib,
        dy=lib.array(np.ones(shape)),
    )


@pytest.mark.parametrize("name", ["mean", "rstd"])
@pytest.mark.parametrize("shape", [(), (2, 3), (6,), (1, 3, 1), (2, 3, 4), (2, 1, 1)])
def test_statistics_shape(lib, name, shape):
    refused(
        ValueError,
        f"{name} has shape {shape}",
        "(2, 3, 1) goes with x of shape (2, 3, 4)",
        "return_stats=True",
        lib=lib,
        **{name: lib.array(np.ones(shape))},
    )


def test_statistics_of_other_axes():
    """The commonest mistake: the backward called with other axes than the forward."""
    for change in ({"axis": 1}, {"normalized_shape": (3, 4)}, {"axis": (0, 2)}):
        refused(ValueError, "mean has shape (2, 3, 1)", "for the same axes", **change)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1), (2, 3, 4)])
def test_weight_shape(lib, shape):
    weight = lib.array(np.ones(shape))
    refused(ValueError, f"weight has shape {shape}", "(4,)", "reshape", lib=lib, weight=weight)


def test_normalized_shape_and_axis():
    refused(TypeError, "normalized_shape=4", "axis=-1", "one of them", normalized_shape=4, axis=-1)
    refused(ValueError, "=(3,)", "(2, 3, 4)", "normalized_shape=(4,)", normalized_shape=3)
    refused(ValueError, "axis=3 ", "(2, 3, 4)", "-3 to 2", axis=3)
    refused(ValueError, "axis=(1, 1)", "twice", axis=(1, 1))


def test_both_sides_are_needed():
    call = arguments()
    for name in ("dy", "x", "normalized_shape", "mean", "rstd"):
        short = {k: v for k, v in call.items() if k != name}
        with pytest.raises(TypeError, match=name):
            cn.layer_norm_backward(**short)


# --- dtypes -------------------------------------------------------------------------------------


def test_dy_dtype(lib):
    dy = lib.array(X, "float64") if "float64" in lib.backend.dtypes else lib.array(X, "float16")
    name = lib.dtype(dy)
    refused(
        ValueError, f"dy has dtype {name}", "float32 goes with x of dtype float32", "cast dy",
        lib=lib, dy=dy,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mean", "rstd"])
@pytest.mark.parametrize(("dtype", "wanted"), [("float16", "float32"), ("float64", "float64")])
def test_statistics_dtype(name, dtype, wanted):
    """Those of a half-precision x are float32: in x's own dtype they would be too coarse."""
    call = arguments(dtype=dtype)
    other = {"float64": "float32", "float32": "float16"}[wanted]
    change = {name: call[name].astype(other)}
    refused(
        ValueError,
        f"{name} has dtype {other}",
        f"{wanted} goes with x of dtype {dtype}",
        f"cast {name}",
        **{**call, **change},
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["int32", "bool", "complex64", "object"])
def test_dtypes_that_are_not_floating(name, kind):
    call = arguments()
    refused(ValueError, f"{name} has dtype {kind}", "float32", **{name: call[name].astype(kind)})


def test_x_and_weight_dtype():
    refused(TypeError, "dtype int32", "x.astype(", x=X.astype("int32"))
    weight = np.ones(4, "int64")
    refused(TypeError, "weight has dtype int64", "weight.astype('float32')", weight=weight)


# --- libraries and devices ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [None, 1.0, [1.0], "dy"], ids=repr)
def test_what_is_no_array(name, bad):
    kind = type(bad).__name__
    refused(TypeError, f"{name} is a", kind, "no array", "pass an array", **{name: bad})


@pytest.mark.needs("not_numpy")
@pytest.mark.parametrize("name", [*NAMES, "weight"])
def test_a_numpy_array_beside_x_of_another_library(lib, name):
    other = np.ones(4, np.float32) if name == "weight" else np.asarray(arguments()[name])
    refused(
        ValueError, f"{name} is a numpy array", "in silence", "Move it first:",
        lib=lib, **{name: other},
    )  # fmt: skip


@pytest.mark.needs("not_numpy")
@pytest.mark.parametrize("name", [*NAMES, "weight"])
def test_an_array_of_another_library_beside_numpy_x(lib, name):
    value = np.ones(4) if name == "weight" else arguments()[name]
    text = refused(ValueError, f"{name} is a", "x is a numpy array", **{name: lib.array(value)})
    assert re.search(rf"numpy\.asarray\({name}\)|asnumpy\({name}\)", text)


@pytest.mark.parametrize("name", [*NAMES, "weight"])
def test_another_device_of_the_same_library(name):
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    call = {k: v if v is None else strict.asarray(v, device=device) for k, v in arguments().items()}
    other = strict.ones(4, dtype=strict.float32) if name == "weight" else call[name].to_device(
        strict.Device("CPU_DEVICE")
    )  # fmt: skip
    text = refused(ValueError, f"{name} is on", "CPU_DEVICE", "device1", **{**call, name: other})
    assert f"{name}.to_device(x.device)" in text
    other.to_device(device)


@pytest.mark.parametrize("name", NAMES)
def test_another_torch_device(name):
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 4, device="meta")
    stats = torch.ones(2, 1, device="meta")
    call = {"x": x, "dy": x, "normalized_shape": None, "mean": stats, "rstd": stats}
    call[name] = torch.ones(call[name].shape)
    refused(ValueError, f"{name} is on cpu", "x is on meta", f"{name}.to(x.device)", **call)


# --- output_mask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [(), (True,), (True, True), (True,) * 4, (1, 0, 1), (True, None, True), "yes", True, 7],
    ids=repr,
)
def test_output_mask(bad):
    refused(
        TypeError, f"output_mask={bad!r}", "three bools", "output_mask=(True, True, True)",
        output_mask=bad,
    )  # fmt: skip
