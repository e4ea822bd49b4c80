"""Every argument rule: the type of the error, the offending values, and the way out."""

import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import cupynorm as cn
from tests.conftest import Backend

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def refused(error, *words, **call):
    """Assert that the call is refused with this error and that its sentence holds the words."""
    x = call.pop("x", X)
    with pytest.raises(error) as caught:
        cn.layer_norm(x, **call)
    assert type(caught.value) is error
    text = str(caught.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert "\n" not in text
    assert not re.search(r"  |\.\.|^\s|\s$", text), f"badly joined: {text}"
    return text


# --- normalized_shape and axis ------------------------------------------------------------------


def test_normalized_shape_and_axis_together():
    refused(TypeError, "normalized_shape=4", "axis=-1", "one of them", normalized_shape=4, axis=-1)
    refused(TypeError, "normalized_shape=(9,)", "axis=7", normalized_shape=(9,), axis=7)


@pytest.mark.parametrize(
    ("given", "shown", "way_out"),
    [
        (3, "(3,)", "normalized_shape=(4,)"),
        ((2, 3), "(2, 3)", "normalized_shape=(3, 4)"),
        ([4, 3], "(4, 3)", "normalized_shape=(3, 4)"),
        ((4, 1), "(4, 1)", "normalized_shape=(3, 4)"),
        ((5, 2, 3, 4), "(5, 2, 3, 4)", "normalized_shape=(2, 3, 4)"),
        (-1, "(-1,)", "axis="),
    ],
)
def test_normalized_shape_that_does_not_fit(given, shown, way_out):
    refused(ValueError, f"={shown}", "(2, 3, 4)", way_out, normalized_shape=given)


def test_empty_normalized_shape_and_axis():
    refused(ValueError, "normalized_shape=()", "normalized_shape=(4,)", normalized_shape=())
    refused(ValueError, "axis=()", "axis=-1", axis=())


@pytest.mark.parametrize("axis", [3, -4, (0, 3), (-1, -4), 10**20])
def test_axis_out_of_range(axis):
    bad = axis[1] if isinstance(axis, tuple) else axis
    refused(ValueError, f"axis={bad} ", "(2, 3, 4)", "-3 to 2", axis=axis)


@pytest.mark.parametrize("axis", [(1, 1), (0, -3), (2, 0, -1)])
def test_axis_named_twice(axis):
    refused(ValueError, f"axis={axis}", "twice", "(2, 3, 4)", "once", axis=axis)


@pytest.mark.parametrize("bad", [1.0, "1", (1, "2"), (0, 1.5), True, (True,), {"a": 1}, 2j])
@pytest.mark.parametrize("name", ["normalized_shape", "axis"])
def test_axes_that_are_no_integers(name, bad):
    refused(TypeError, name, repr(bad), "int or a tuple of ints", **{name: bad})


def test_a_scalar_has_no_axis(lib):
    refused(ValueError, "shape ()", "reshape", x=lib.array(3.0))
    refused(ValueError, "shape ()", x=lib.array(3.0), axis=0)


# --- weight and bias ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (4, 1), (1, 4), (2, 3, 4)])
def test_affine_shape(lib, name, shape):
    refused(
        ValueError,
        f"{name} has shape {shape}",
        "(4,)",
        "reshape",
        x=lib.array(X),
        **{name: lib.array(np.ones(shape))},
    )


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_affine_shape_follows_axis(name):
    good = np.ones((4, 2), np.float32)
    cn.layer_norm(X, axis=(2, 0), **{name: good})
    refused(ValueError, f"{name} has shape (4, 2)", "(2, 4)", axis=(0, 2), **{name: good})


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["int64", "bool", "complex64", "object"])
def test_affine_dtype(name, kind):
    affine = {name: np.ones(4).astype(kind)}
    refused(TypeError, f"{name} has dtype {kind}", f"{name}.astype('float32')", **affine)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_torch_affine_dtype_names_torchs_cast(name):
    torch = pytest.importorskip("torch")
    x, affine = torch.ones(2, 4), torch.ones(4, dtype=torch.int64)
    refused(
        TypeError, f"{name} has dtype int64", f"{name}.to(torch.float32)", x=x, **{name: affine}
    )


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("bad", [1.0, 2, [1.0, 1.0, 1.0, 1.0], "ones"], ids=repr)
def test_affine_that_is_no_array(name, bad):
    refused(
        TypeError, f"{name} is a", type(bad).__name__, "no array", "pass an array", **{name: bad}
    )


@pytest.mark.needs("not_numpy")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_affine_of_numpy_with_x_of_another_library(lib, name):
    library = {"cupy-simulated": "cupy", "torch-cuda": "torch"}.get(lib.name, lib.name)
    library = "array_api_strict" if library.startswith("strict") else library
    refused(
        ValueError,
        f"{name} is a numpy array",
        f"x is a {library} array",
        "in silence",
        "Move it first:",
        name,
        x=lib.array(X),
        **{name: np.ones(4, np.float32)},
    )


@pytest.mark.needs("not_numpy")
@pytest.mark.parametrize("name", ["weight", "bias", "out"])
def test_affine_of_another_library_with_numpy_x(lib, name):
    other = lib.array(np.ones(X.shape if name == "out" else 4))
    text = refused(
        ValueError, f"{name} is a", "x is a numpy array", "Move it first:", **{name: other}
    )
    assert re.search(rf"numpy\.asarray\({name}\)|asnumpy\({name}\)", text)


def test_the_way_out_is_spelled_in_the_words_of_the_library():
    torch = pytest.importorskip("torch")
    weight = np.ones(4, np.float32)
    text = refused(ValueError, x=torch.from_numpy(X), weight=weight)
    way_out = text.partition("Move it first: ")[2]
    x = torch.from_numpy(X)
    moved = eval(way_out, {"torch": torch, "weight": weight, "x": x})
    cn.layer_norm(x, weight=moved)


@pytest.mark.parametrize("name", ["weight", "bias", "out"])
def test_another_device_of_the_same_library(name):
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(X, device=strict.Device("device1"))
    other = strict.ones(X.shape if name == "out" else 4, dtype=strict.float32)
    text = refused(
        ValueError, f"{name} is on", "CPU_DEVICE", "device1", "Move it first:", x=x, **{name: other}
    )
    assert f"{name}.to_device(x.device)" in text
    other.to_device(x.device)


@pytest.mark.parametrize("name", ["weight", "bias", "out"])
def test_another_torch_device(name):
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 4, device="meta")
    other = torch.ones((2, 4) if name == "out" else 4)
    refused(
        ValueError,
        f"{name} is on cpu",
        "x is on meta",
        f"{name}.to(x.device)",
        x=x,
        **{name: other},
    )


# --- x ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int64", "uint16", "bool", "complex64", "complex128"])
def test_numpy_x_of_another_dtype(kind):
    refused(TypeError, f"dtype {kind}", "float16", "float64", "x.astype(", x=X.astype(kind))


@pytest.mark.parametrize("kind", ["object", "datetime64[s]", "S3", "U3"])
def test_numpy_x_that_is_no_number(kind):
    refused(TypeError, "x has dtype", "float32", x=np.zeros((2, 3), dtype=kind))


@pytest.mark.parametrize("kind", ["int32", "bool", "complex64"])
def test_x_of_another_dtype_in_every_library(lib, kind):
    if lib.backend is Backend.CUPY_SIMULATED and kind == "complex64":
        pytest.skip("the stand-in holds no complex arrays")
    x = lib.from_numpy(np.ones((2, 3), dtype=kind))
    cast = "x.to(torch.float32)" if lib.name.startswith("torch") else "x.astype('float32')"
    if lib.name.startswith("strict"):
        cast = "astype(x, "  # the standard has a function and no method
    refused(TypeError, f"dtype {kind}", cast, x=x)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3.0,
        5,
        "text",
        [1.0, 2.0],
        (1.0, 2.0),
        [[1.0], [2.0]],
        {"a": 1},
        object(),
        np.float32(2),
    ],
    ids=lambda b: type(b).__name__,
)
def test_x_that_is_no_array(bad):
    refused(TypeError, type(bad).__name__, "no array", "numpy.asarray(x, dtype='float32')", x=bad)


def test_masked_arrays_are_refused():
    masked = np.ma.masked_array(X, mask=X > 3)
    refused(TypeError, "x is a masked array", "x.filled(", x=masked)
    refused(TypeError, "weight is a masked array", "weight.filled(", weight=np.ma.ones(4))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_are_refused():
    refused(TypeError, "numpy.matrix", "numpy.asarray(x)", x=np.matrix([[1.0, 2.0]]))


def test_pandas_series_are_refused_with_the_way_out():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 5.0]})
    refused(TypeError, "pandas Series", "x.to_numpy()", x=table["a"])
    refused(TypeError, "pandas Series", "weight.to_numpy()", x=table.to_numpy(), weight=table["a"])
    np.testing.assert_allclose(cn.layer_norm(table.to_numpy())[:, 1], 1, rtol=1e-4)


# --- eps, order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -float("inf"), np.float32("inf")])
def test_eps_that_is_not_finite(eps):
    refused(ValueError, f"eps={float(eps)}", "finite", "1e-5", eps=eps)


@pytest.mark.parametrize("eps", [None, "1e-5", 1j, [1e-5], True, np.ones(1), np.ones(())], ids=repr)
def test_eps_that_is_no_number(eps):
    refused(TypeError, "eps must be a real number", type(eps).__name__, "1e-5", eps=eps)


def test_eps_too_large_for_a_float():
    refused(ValueError, "eps", "finite", eps=10**400)


@pytest.mark.parametrize("order", ["A", "c", "", None, 0, ["K"]], ids=repr)
def test_order(order):
    refused(ValueError, f"order={order!r}", "'K'", "'C'", "'F'", order=order)


@pytest.mark.needs("unstrided")
def test_order_where_there_is_no_layout_to_choose(lib):
    refused(ValueError, "order='F'", "order='K'", x=lib.array(X), order="F")


# --- out ----------------------------------------------------------------------------------------


@pytest.mark.needs("writable")
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (1, 2, 3, 4), (24,)])
def test_out_shape(lib, shape):
    x = lib.array(X.copy())
    refused(ValueError, f"out has shape {shape}", "(2, 3, 4)", x=x, out=lib.array(np.ones(shape)))


@pytest.mark.needs("writable")
def test_out_dtype(lib):
    x = lib.array(X.copy())
    out = lib.array(X, "float64")
    refused(ValueError, "out has dtype", "float64", "float32", x=x, out=out)
    refused(ValueError, "out has dtype", "int32", x=x, out=lib.from_numpy(X.astype("int32")))


@pytest.mark.needs("writable")
def test_out_with_order(lib):
    x = lib.array(X.copy())
    refused(ValueError, "out=", "order='C'", "drop order=", x=x, out=lib.array(X), order="C")


@pytest.mark.parametrize("bad", [3.0, [1.0], "y"], ids=repr)
def test_out_that_is_no_array(bad):
    refused(TypeError, "out is a", type(bad).__name__, out=bad)


def test_read_only_out():
    out = np.empty_like(X)
    out.flags.writeable = False
    refused(ValueError, "read-only", "numpy.empty_like(x)", out=out)


def test_out_whose_elements_share_memory():
    line = np.zeros(4, np.float32)
    out = np.lib.stride_tricks.as_strided(line, (2, 3, 4), (0, 0, 4), writeable=True)
    refused(ValueError, "out with shape (2, 3, 4)", "(0, 0, 4)", "empty_like(x)", out=out)


def overlapping(library_zeros):
    """Pairs (x, out) of one memory that are not the same elements in the same places."""
    rows = library_zeros((3, 4))
    yield rows[:2], rows[1:]
    columns = library_zeros((2, 9))
    yield columns[:, :8], columns[:, 1:]
    square = library_zeros((4, 4))
    yield square, square.T
    line = library_zeros(10)
    yield line[:5], line[4:9]


def test_out_that_overlaps_x_in_part():
    for x, out in overlapping(lambda s: np.zeros(s, np.float32)):
        before = x.copy()
        refused(ValueError, "out shares memory with x", "in part", "separate array", x=x, out=out)
        np.testing.assert_array_equal(x, before)
    x = X.copy()
    refused(ValueError, "out shares memory with x", x=x, out=x[::-1])
    refused(ValueError, "out shares memory with x", x=np.broadcast_to(X[0], X.shape), out=X[:])


def test_torch_out_that_overlaps_x_in_part():
    torch = pytest.importorskip("torch")
    for x, out in overlapping(torch.zeros):
        refused(ValueError, "out shares memory with x", "separate array", x=x, out=out)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_out_that_overlaps_weight_or_bias(name):
    x = X.copy()
    affine = {name: x[1, 2]}
    refused(ValueError, f"out shares memory with {name}", "separate array", x=x, out=x, **affine)
    np.testing.assert_array_equal(x, X)


def test_torch_out_with_autograd():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 4)
    weight = torch.ones(4, requires_grad=True)
    refused(ValueError, "out=", "requires grad", "no_grad", x=x, weight=weight, out=x.clone())
    with torch.no_grad():
        out = torch.empty(2, 4)
        assert cn.layer_norm(x, weight=weight, out=out) is out


def test_refused_calls_leave_out_untouched():
    out = np.full_like(X, 7)
    for bad in ({"normalized_shape": 3}, {"eps": float("nan")}, {"weight": np.ones(3)}):
        with pytest.raises(ValueError):
            cn.layer_norm(X, out=out, **bad)
    np.testing.assert_array_equal(out, 7)


# --- without assert statements ------------------------------------------------------------------


def test_python_without_asserts_keeps_the_errors():
    program = """
        import numpy as np, cupynorm as cn
        x = np.ones((2, 4), np.float32)
        calls = [
            dict(normalized_shape=4, axis=0), dict(normalized_shape=3), dict(axis=2),
            dict(axis=(0, 0)), dict(weight=np.ones(3)), dict(weight=np.ones(4, int)),
            dict(eps=float("nan")), dict(eps="1"), dict(order="A"), dict(out=np.ones(3)),
            dict(out=x[::-1]), dict(x=x.astype(int)), dict(x=[1.0]), dict(x=np.ma.ones((2, 4))),
        ]
        for call in calls:
            try:
                cn.layer_norm(call.pop("x", x), **call)
            except (TypeError, ValueError) as error:
                print(type(error).__name__)
            else:
                print("taken", call)
    """
    done = subprocess.run(
        [sys.executable, "-O", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    t, v = "TypeError", "ValueError"
    assert done.stdout.split() == [t, v, v, v, v, t, v, t, v, v, v, t, t, t]
