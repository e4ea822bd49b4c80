"""The one memo: a warm call gives, refuses and writes what a cold one does, and applies no rule."""

import contextlib
import itertools

import numpy as np
import pytest

import cupynorm as cn
from cupynorm import _memo as memo
from cupynorm import _rules
from tests import oracle
from tests.conftest import Backend, np_dtype
from tests.directions import axes_of, check

# Those whose calls are settled.
BACKENDS = [backend for backend in Backend if backend.strided]
RNG = np.random.default_rng(20261130)

# Memory, the view of it that is x, how it is normalized.
LAYOUTS = {
    "one row": ((77,), np.s_[:], {}),
    "rows": ((5, 77), np.s_[:], {"normalized_shape": 77}),
    "two axes": ((2, 5, 7), np.s_[:], {"normalized_shape": (5, 7)}),
    "axes turned": ((2, 5, 7), np.s_[:], {"axis": (2, 1)}),
    "strided axis": ((6, 5), np.s_[:], {"axis": 0}),
    "order F": ((6, 77), np.s_[:], {"order": "F", "eps": 0.0}),
    "column-major": ((77, 6), "turned", {}),
    "every other row": ((6, 90), np.s_[::2], {}),
    "padded": ((6, 90), np.s_[:, 3:80], {}),
    "backwards": ((6, 30), np.s_[::-1], {}),
    "no rows": ((0, 7), np.s_[:], {}),
    "empty rows": ((4, 0), np.s_[:], {}),
    "long rows": ((3, 36_001), np.s_[:], {}),
    "shared rows": ((700, 768), np.s_[:], {}),
    "shared chunks": ((2, 300_001), np.s_[:], {}),
}


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 1).astype(np_dtype(dtype))


def laid_out(lib, dtype, layout):
    """An array of the layout, never seen before, and how it is normalized."""
    shape, cut, how = LAYOUTS[layout]
    if lib.name.startswith("torch") and layout == "backwards":
        pytest.skip("torch has no negative strides")
    if lib.backend.compiles:
        again = dtype != "float32" and layout != "padded"
        if layout.startswith("shared") or again:
            pytest.skip("simulated in minutes, or compiled once more for nothing")
        shape = (1, 9_001) if layout == "long rows" else shape  # of a cluster, the smallest
    memory = lib.from_numpy(numbers(*shape, dtype=dtype))
    return memory.T if cut == "turned" else memory[cut], how


def affine(lib, dtype, x, how, kind):
    where = {k: v for k, v in how.items() if k in ("axis", "normalized_shape")}
    shape = [x.shape[a] for a in axes_of(x.ndim, **where)]
    return {
        name: lib.from_numpy(RNG.standard_normal(shape).astype(np_dtype(dtype)))
        for name in ("weight", "bias")
        if name in kind
    }


def told(lib, found):
    """All that can be told of a result: type, strides and bits of each array."""
    arrays = found if isinstance(found, tuple) else (found,)
    said = []
    for a in arrays:
        host = None if a is None else np.ascontiguousarray(lib.to_numpy(a))
        said.append(a if a is None else (type(a), str(a.dtype), lib.strides(a), host.tobytes()))
    return type(found).__name__ if isinstance(found, tuple) else "", *said


@contextlib.contextmanager
def no_rule():
    """Whatever is called in here is settled already."""

    def applied(*_):
        pytest.fail("a settled call applied its rules again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rules, "resolve_axes", applied)
        yield


def cold(call, *arguments, **named):
    memo.settled().clear()
    return call(*arguments, **named)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(lib, dtype, layout):
    """Settled with arrays that are gone by then; and prepared, and into `out`."""
    every = layout == "rows" and not lib.backend.compiles
    for kind in ("", "weight", "bias", "weight bias") if every else ("weight bias",):
        first, how = laid_out(lib, dtype, layout)
        for stats in (False, True):
            named = how | {"return_stats": stats}
            cn.layer_norm(first, **named, **affine(lib, dtype, first, how, kind))
            x, _ = laid_out(lib, dtype, layout)
            given = named | affine(lib, dtype, x, how, kind)
            f = cn.prepare(first, **given)
            with no_rule():
                warm, prepared = cn.layer_norm(x, **given), f(x)
            want = cold(cn.layer_norm, x, **given)
            assert told(lib, warm) == told(lib, prepared) == told(lib, want)
        if 0 in x.shape:
            assert np.isnan(lib.to_numpy(want.mean)).all()
        elif not layout.startswith("shared"):
            given = {k: v for k, v in given.items() if k not in ("order", "return_stats")}
            check(lib, want, None, x, **given)
        if "order" not in how:
            into(lib, first, x, given | {"return_stats": False}, want.y)


def into(lib, first, x, given, want):
    """`out=`: settled with another out, then of the same layout, of another, and x itself."""
    bits = told(lib, want)[1][3]
    outs = [lib.from_numpy(np.empty_like(lib.to_numpy(want))) for _ in range(3)]
    cn.layer_norm(first, **given, out=outs[0])
    f = cn.prepare(first, **given)
    with no_rule():
        assert cn.layer_norm(x, **given, out=outs[1]) is outs[1]
    assert f(x, out=outs[2]) is outs[2]
    assert cn.layer_norm(first, **given, out=first) is first
    assert cn.layer_norm(x, **given, out=x) is x
    assert [told(lib, out)[1][3] for out in (*outs[1:], x)] == [bits] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(lib, dtype, layout):
    kinds, masks = ["weight", ""], [None, (True, False, False), (False, True, True), (False,) * 3]
    if lib.backend.compiles:
        kinds, masks = ["weight"], [None, (False,) * 3]
    elif layout == "rows":
        masks = [None, *itertools.product((False, True), repeat=3)]
    elif layout.startswith("shared"):  # which are large
        kinds, masks = ["weight"], [None, (False, True, True)]

    def arrays(kind):
        (x, how), (dy, _) = laid_out(lib, dtype, layout), laid_out(lib, dtype, layout)
        where = {"normalized_shape": None, **how}
        where = {k: v for k, v in where.items() if k not in ("eps", "order")}
        weight = affine(lib, dtype, x, how, kind).get("weight")
        _, mean, rstd = cn.layer_norm(x, **where, return_stats=True)
        return {"dy": dy, "x": x, "weight": weight, **where}, {"mean": mean, "rstd": rstd}

    for kind, mask in itertools.product(kinds, masks):
        given, stats = arrays(kind)
        cn.layer_norm_backward(**given, **stats, output_mask=mask)
        given, stats = arrays(kind)
        with no_rule():
            warm = cn.layer_norm_backward(**given, **stats, output_mask=mask)
        want = cold(cn.layer_norm_backward, **given, **stats, output_mask=mask)
        assert told(lib, warm) == told(lib, want)
        assert [a is not None for a in want] == list(mask or (True, kind == "weight", True))
        whole = cn.layer_norm_backward(**given, **stats, output_mask=(True, True, True))
        pairs = zip(told(lib, want)[1:], told(lib, whole)[1:], strict=True)
        assert all(a in (None, b) for a, b in pairs)  # whatever else is asked for
        if mask is None and 0 not in given["x"].shape and not layout.startswith("shared"):
            check(lib, want, **given)  # of the large ones: tests/cpu/test_rows.py, frozen.py


def outcome(lib, call, given):
    """What a call gives, or what it raises."""
    try:
        return told(lib, call(**given))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def hold(lib, call, good, changes):
    """Each change after the good call has the outcome that it has alone, twice; refused: a str."""
    for refused, change in changes:
        memo.settled().clear()
        want = outcome(lib, call, good | change)
        assert isinstance(want, str) == refused, (change, want)
        memo.settled().clear()
        before = outcome(lib, call, good)
        kept = len(memo.settled())
        for _ in range(2):
            assert outcome(lib, call, good | change) == want, change
        # Of a call that the rules refuse nothing is kept; overlap is looked for at each call.
        assert not refused or "memory" in want or len(memo.settled()) == kept, want
        assert outcome(lib, call, good) == before


def new_in(lib):
    return lambda *shape, dtype="float32": lib.from_numpy(numbers(*shape, dtype=dtype))


def changes(refused, **values):
    """One change for each of an argument's values, of which the whole call is refused or not."""
    return [(refused, {name: value}) for name, found in values.items() for value in found]


def test_near_forward_calls(lib):
    new = new_in(lib)
    memory = new(9, 12)
    whole = lib.from_numpy(np.ones((4, 12), np.int32))
    good = {"x": memory[:4], "normalized_shape": 12, "weight": memory[5], "bias": new(12)}
    halves = [] if lib.backend.compiles else ["float16", "bfloat16"]
    bad = changes(
        True, normalized_shape=(12.0, (12.0,), 13, (4, 13), "12"), x=[whole],
        eps=(True, "1", None, float("nan")), weight=[new(13), new(1, 12), [1.0] * 12, whole[0]],
        bias=[new(13), new(1, 12), [1.0] * 12], order=["A"],
        out=[new(4, 12, dtype="float64"), new(12, 4)],
    )  # fmt: skip
    fine = changes(
        False, normalized_shape=([12], (12,), np.int64(12), None), eps=(1, 1e-5, np.float32(1)),
        x=[new(4, 12, dtype="float64"), new(5, 12), new(12, 4).T], bias=[None], order=["F"],
        weight=[None, new(24)[::2], *(new(12, dtype=d) for d in (*halves, "float64"))],
        return_stats=[True, 1],
    )  # fmt: skip
    hold(lib, cn.layer_norm, good | {"eps": 1.0}, bad + fine)
    axes = changes(True, axis=(True, 1.0, (True,), (1.0,), 2, (1, 1)), normalized_shape=[12])
    axes += changes(False, axis=(-1, [1], (1,), np.int8(1)))
    hold(lib, cn.layer_norm, good | {"normalized_shape": None, "axis": 1}, axes)
    one = changes(True, normalized_shape=(True, 1.0, (True,)), eps=[False])
    one += changes(False, eps=[0])
    hold(lib, cn.layer_norm, {"x": new(4, 1), "normalized_shape": 1, "eps": 0.0}, one)


def test_near_calls_into_out(lib):
    memory = lib.from_numpy(numbers(9, 12))
    before = lib.to_numpy(memory).copy()
    good = {"x": memory[:4], "weight": memory[5], "out": lib.from_numpy(numbers(4, 12))}
    outs = [memory[1:5], memory[4:8], memory[2:6]]
    if lib.backend.numpy:
        outs.append(np.broadcast_to(np.float32(0), (4, 12)))
    hold(lib, cn.layer_norm, good, changes(True, out=outs))
    np.testing.assert_array_equal(lib.to_numpy(memory), before)


def test_near_backward_calls(lib):
    new, x = new_in(lib), lib.from_numpy(numbers(5, 12))
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    good = {"dy": new(5, 12), "x": x, "normalized_shape": 12, "mean": mean, "rstd": rstd}
    bad = changes(
        True, normalized_shape=(12.0, (12.0,), 13), mean=[new(5)], weight=[new(13)],
        rstd=[new(5), new(5, 1, dtype="float64")], dy=[new(5, 12, dtype="float64"), new(12, 5)],
        output_mask=((True, True), (1, 1, 1), (1.0, True, True), True),
    )  # fmt: skip
    fine = changes(
        False, normalized_shape=[[12]], output_mask=([True, True, True], None),
        weight=[new(12), new(12, dtype="float64")], dy=[new(12, 5).T],
    )  # fmt: skip
    hold(lib, cn.layer_norm_backward, good | {"output_mask": (True, True, True)}, bad + fine)


@pytest.mark.parametrize("rows", [4, 3000])
def test_a_warm_call_sees_that_out_overlaps(lib, dtype, rows):
    """Whatever thread or copy of a weight reads what; nothing is written."""
    if lib.backend.compiles and (rows > 4 or dtype != "float32"):
        pytest.skip("simulated in minutes, or compiled once more for nothing")
    N = 256
    memory = lib.from_numpy(numbers((rows + 2) * N, dtype=dtype))
    before = lib.to_numpy(memory).copy()
    table, beside = memory[: rows * N].reshape(rows, N), memory[rows * N : (rows + 1) * N]
    x, weight = (lib.from_numpy(numbers(*s, dtype=dtype)) for s in ((rows, N), (N,)))
    apart = lib.from_numpy(numbers(rows, N, dtype=dtype))
    cn.layer_norm(x, N, weight, weight, out=apart)
    parts = memory[:N], memory[(rows - 1) * N + 5 : rows * N + 5]
    faults = [({"weight": p}, "weight") for p in parts]
    faults += [({"weight": weight, "bias": p}, "bias") for p in parts]
    faults += [({"x": memory[N : (rows + 1) * N].reshape(rows, N), "weight": weight}, "x")]
    for change, label in faults:
        with pytest.raises(ValueError, match=f"out shares memory with {label}"):
            cn.layer_norm(**{"x": x, "normalized_shape": N, "out": table} | change)
    np.testing.assert_array_equal(lib.to_numpy(memory), before)
    cn.layer_norm(x, N, weight, beside, out=table)  # which begins where out ends
    want = cn.layer_norm(x, N, weight, lib.from_numpy(lib.to_numpy(beside).copy()))
    np.testing.assert_array_equal(lib.to_numpy(table), lib.to_numpy(want))


def test_rules_are_applied_once_for_a_signature(lib, monkeypatch):
    applied, real = [], _rules.resolve_axes
    monkeypatch.setattr(_rules, "resolve_axes", lambda *a: applied.append(a) or real(*a))
    memo.settled().clear()
    xs = [lib.from_numpy(numbers(4, 12)) for _ in range(3)]
    for i in range(100):
        y, mean, rstd = cn.layer_norm(xs[i % 3], 12, return_stats=True)
        cn.layer_norm_backward(y, xs[i % 3], 12, mean, rstd)
    assert len(applied) == 2


def test_a_full_memo_is_cleared(monkeypatch):
    monkeypatch.setattr(memo, "_MOST", 8)
    memo.settled().clear()
    for n in range(1, 30):
        x = numbers(2, n)
        y = cn.layer_norm(x)
        assert 0 < len(memo.settled()) <= 8
        np.testing.assert_allclose(y, oracle.layer_norm(x, (1,), None, None, 1e-5)[0], atol=1e-5)


def test_a_call_settled_with_numba_is_not_taken_without_it():
    pytest.importorskip("numba")
    from cupynorm._cpu.engine import without_numba

    x = numbers(5, 4097)
    before = cn.layer_norm(x)
    with without_numba():
        warm = cn.layer_norm(x)
        assert warm.tobytes() == cold(cn.layer_norm, x).tobytes()
    assert cn.layer_norm(x).tobytes() == before.tobytes()
    np.testing.assert_allclose(warm, oracle.layer_norm(x, (1,), None, None, 1e-5)[0], atol=1e-5)
