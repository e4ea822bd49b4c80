"""Strided NumPy arrays: the same bits as contiguous rows, whichever loops bring them together."""

import itertools

import numpy as np
import pytest

import cupynorm as cn
from cupynorm._cpu import arrays as _cpu
from cupynorm._cpu import blocks
from tests import oracle
from tests.conftest import ALL_DTYPES
from tests.cpu.layouts import same_bits, values

pytest.importorskip("numba")

# Shorter than a side of a square, past it, one strip and several, one chunk and several.
SHAPES = ((3, 2), (33, 7), (70, 64), (530, 130), (40, 1030), (37, 4097), (2, 9001))


@pytest.fixture
def no_copies(monkeypatch):
    """Refuse the ways that gather rows into copies."""

    def refuse(*arguments):
        raise AssertionError("gathered")

    monkeypatch.setattr(_cpu, "_copied", refuse)
    monkeypatch.setattr(blocks, "forward", refuse)


def affine(N):
    return np.linspace(0.5, 2, N, dtype=np.float32), np.linspace(-1, 1, N, dtype=np.float32)


def same(got, want):
    return all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def laid(x):
    """Copies of a matrix x in other layouts, by name."""
    M, N = x.shape
    apart = np.zeros((2 * M, 3 * N + 1), x.dtype)
    apart[::2, 1::3] = x
    wide = np.zeros((N, M + 5), x.dtype)
    wide[:, 3:-2] = x.T
    return {
        "F": np.asfortranarray(x),
        "every third column": apart[::2, 1::3],
        "columns at an odd pitch": wide[:, 3:-2].T,
        "backwards": np.asfortranarray(x[::-1, ::-1])[::-1, ::-1],
    }


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_a_layout_moves_no_bit(no_copies, dtype):
    for shape in SHAPES:
        x, (weight, bias) = values(shape, dtype), affine(shape[1])
        want = cn.layer_norm(x, shape[1], weight, bias, return_stats=True)
        for name, other in laid(x).items():
            for order in "KC":
                got = cn.layer_norm(other, shape[1], weight, bias, order=order, return_stats=True)
                assert same(got, want), (shape, name, order)
        got = cn.layer_norm(x, shape[1], weight, bias, order="F", return_stats=True)
        assert same(got, want) and got.y.flags.f_contiguous


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_of_a_layout_are_the_same_bits(no_copies, dtype):
    for shape in SHAPES:
        x, dy, (weight, _) = values(shape, dtype), values(shape, dtype, 1), affine(shape[1])
        _, mean, rstd = cn.layer_norm(x, shape[1], weight, return_stats=True)
        want = cn.layer_norm_backward(dy, x, shape[1], mean, rstd, weight)
        oracle.assert_gradients(want, dy, x, (1,), weight)
        pairs = itertools.chain(
            zip(laid(x).values(), laid(dy).values(), strict=True),
            ((np.asfortranarray(x), dy), (x, np.asfortranarray(dy))),
        )
        for x_, dy_ in pairs:
            got = cn.layer_norm_backward(dy_, x_, shape[1], mean, rstd, weight)
            assert same(got, want)


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 20, 5, 7), 1), ((4, 6, 9), 0), ((5, 3, 4, 6), (1, 2)), ((9, 4, 5), 1)]
)
def test_axes_in_the_middle(no_copies, shape, axis):
    """Channels first; of a Fortran-ordered x the first batch axis has the neighbours."""
    axes = (axis,) if isinstance(axis, int) else axis
    x, dy = values(shape, "float32"), values(shape, "float32", 1)
    weight = values(tuple(shape[a] for a in axes), "float32", 2)
    for order in "CF" if len(shape) == 3 else "C":
        x_, dy_ = np.asarray(x, order=order), np.asarray(dy, order=order)
        y, mean, rstd = cn.layer_norm(x_, axis=axis, weight=weight, return_stats=True)
        exact = oracle.layer_norm(x, axes, weight, None, 1e-5)
        for got, want in zip((y, mean, rstd), exact, strict=True):
            bound = oracle.tolerance("float32", x.size)
            np.testing.assert_allclose(got, want, rtol=bound, atol=bound * 10)
        got = cn.layer_norm_backward(dy_, x_, None, mean, rstd, weight, axis=axis)
        oracle.assert_gradients(got, dy, x, axes, weight)


def test_rows_of_one_element_and_rows_that_are_one(no_copies):
    x = values((5, 1, 7), "float32")
    assert (cn.layer_norm(x, axis=1) == 0).all()
    same_row = np.broadcast_to(values((1, 40), "float32"), (90, 40))
    assert same([cn.layer_norm(same_row, order="F")], [cn.layer_norm(same_row.copy())])


@pytest.mark.parametrize("N", [60, 5000])
def test_in_place_and_into_another_layout(no_copies, N):
    x = values((50, N), "float32")
    want, column_major = cn.layer_norm(x), np.asfortranarray(x)
    assert same([cn.layer_norm(column_major, out=column_major)], [want])
    assert same([cn.layer_norm(x, out=np.zeros_like(x, order="F"))], [want])


def test_what_loops_cannot_read_is_gathered():
    x = values((30, 20), "float32")
    want = cn.layer_norm(x)
    packed = np.zeros(30, [("flag", "i1"), ("x", "f4", 20)])
    packed["x"] = x
    swapped = np.asfortranarray(x.astype(">f4"))
    many = np.zeros((2, 3, 5, 20, 2), np.float32)[:, ::-1, :, :, 0]
    many[:] = x.reshape(2, 3, 5, 20)
    many = many.transpose(0, 2, 1, 3)[:, :, ::2]
    for y in (cn.layer_norm(packed["x"]), cn.layer_norm(swapped).astype(np.float32)):
        assert same([y], [want])
    assert same([cn.layer_norm(many)], [cn.layer_norm(many.copy())])
