"""Dask arrays and DataFrames against the definition, in this process: chunks, laziness, errors."""

import collections
import math

import numpy as np
import pytest

import cupynorm as cn
from cupynorm.dask import _blocks
from tests import oracle
from tests.conftest import np_dtype
from tests.directions import EVERY, backward

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
strict = pytest.importorskip("array_api_strict")

import cupynorm.dask as cd  # noqa: E402

ROWS, COLS = 23, 60
CHUNKS = {"whole": (23, 60), "rows": (5, 60), "columns": (23, 7), "both": (4, 13), "ones": (11, 1)}


def values(shape=(ROWS, COLS), dtype="float32", offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2 + offset).astype(np_dtype(dtype))


def lazy(x, chunks):
    return da.from_array(x, chunks=chunks)


def check(y, x, axes=(1,), weight=None, bias=None, eps=1e-5):
    """Hold y to the definition, whose values of several units the bound is not made for."""
    exact = oracle.layer_norm(x, axes, weight, bias, eps)[0]
    oracle.assert_close(y, exact, math.prod(x.shape[a] for a in axes), scale=8)


TASKS = ("whole_rows", "block_moments", "statistics", "normalize_block")


def counted(calls, name, task):
    def run(*args, **kwargs):
        calls[name] += 1
        return task(*args, **kwargs)

    return run


def test_split_rows_have_the_same_bits_on_every_scheduler_and_in_every_layout():
    x = values((40, 999), offset=1e4)
    chunks = (7, 100)
    results = []
    for source in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        for scheduler in ("sync", "threads", "threads"):
            blocks = lazy(source, chunks).map_blocks(np.asarray)
            strided = blocks.map_blocks(np.asfortranarray) if scheduler == "sync" else blocks
            y = cd.layer_norm(strided, return_stats=True)
            results.append(dask.compute(*y, scheduler=scheduler))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


HARD = {  # shape, offset, scale; the first three are more than a slab holds
    "long rows": ((3, 300_000), 1e3, 1.0),
    "many rows": ((70_000, 3), 1e3, 1.0),
    "three axes": ((2, 5, 40_000), 1e3, 1.0),
    "float32 offset": ((9, 1000), 1e6, 1.0),
    "float64 offset": ((9, 1000), 1e12, 1.0),
    "float32 large": ((9, 1000), 0.0, 1e30),
    "float64 large": ((9, 1000), 0.0, 1e150),
    "float32 small": ((9, 1000), 0.0, 1e-25),
    "float32 near the maximum": ((9, 1000), 3e38, 1e37),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_values_and_blocks_larger_than_a_slab(case):
    shape, offset, scale = HARD[case]
    dtype = "float64" if case.startswith("float64") else "float32"
    x = (np.random.default_rng(1).uniform(-1, 0, shape) * scale + offset).astype(dtype)
    chunks = (4, 130) if shape == (9, 1000) else tuple(-(-n // 2) for n in shape)
    eps = 0.0 if shape == (9, 1000) else 1e-5
    y = cd.layer_norm(lazy(x, chunks), weight=np.ones(shape[-1]), eps=eps, axis=-1)
    check(y.compute(), x, (x.ndim - 1,), eps=eps)


def test_byte_order_is_kept():
    x = values().astype(">f4")
    y = cd.layer_norm(lazy(x, (5, 7))).compute()
    assert y.dtype == np.dtype(">f4")
    np.testing.assert_array_equal(y, cd.layer_norm(lazy(values(), (5, 7))).compute())


def test_gradients_stay_lazy():
    x, dy = values(), values(seed=1)
    grads = backward(lazy(dy, (5, 60)), lazy(x, (5, 60)), output_mask=EVERY)
    assert all(isinstance(a, da.Array) for a in grads)
    oracle.assert_gradients([a.compute() for a in grads], dy, x, (1,))


def test_weight_is_taken_as_it_is_at_the_call():
    weight = np.ones(COLS)
    y = cd.layer_norm(lazy(values(), (5, 13)), COLS, weight)
    weight[:] = 7
    assert np.abs(y.compute()).max() < 7


def refuse(*_):
    raise AssertionError("a block was computed")


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_nothing_is_computed_and_no_block_function_is_probed(chunks, monkeypatch):
    for name in TASKS:
        monkeypatch.setattr(_blocks, name, refuse)
    like = np.empty((0, 0), np.float32)
    x = lazy(values(), chunks).map_blocks(refuse, dtype=np.float32, meta=like)
    result = cd.layer_norm(x, weight=np.ones(COLS), bias=da.ones(COLS), return_stats=True)
    assert [type(a._meta) for a in result] == [np.ndarray] * 3
    with pytest.raises(AssertionError, match="a block was computed"):
        result.y.compute(scheduler="sync")


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize(
    "wanted",
    [lambda r: r[:1], lambda r: r[1:2], lambda r: r, lambda r: (r.y[:3, ::2],)],
    ids=["y", "mean", "all", "part"],
)
def test_no_block_is_computed_twice(wanted, optimize, monkeypatch):
    calls = collections.Counter()
    for name in TASKS:
        monkeypatch.setattr(_blocks, name, counted(calls, name, getattr(_blocks, name)))
    load = counted(calls, "load", np.copy)
    like = np.empty((0, 0), np.float32)
    for chunks, most in (
        ((6, 15), {"block_moments": 16, "statistics": 4}),
        ((6, 60), {"whole_rows": 4}),
    ):
        calls.clear()
        x = lazy(values(), chunks).map_blocks(load, dtype=np.float32, meta=like)
        blocks = math.prod(x.numblocks)
        result = cd.layer_norm(x, return_stats=True)
        want = wanted(result)
        dask.compute(*want, scheduler="threads", optimize_graph=optimize)
        most = most | {"load": blocks, "normalize_block": blocks if len(x.chunks[1]) > 1 else 0}
        assert calls["load"] > 0
        assert all(n <= most[name] for name, n in calls.items()), calls
        if len(want) == 3:
            assert calls == collections.Counter({k: n for k, n in most.items() if n})


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_the_library_itself_takes_dask_arrays(chunks):
    x, weight = lazy(values(), chunks), np.ones(COLS)
    adapter = cd.layer_norm(x, weight=weight, return_stats=True)
    library = cn.layer_norm(x, weight=weight, return_stats=True)
    assert isinstance(library, cn.LayerNormResult)
    assert [a.name for a in adapter] == [a.name for a in library]
    blocks = cn.layer_norm(x, order="F").to_delayed().ravel()
    assert all(block.flags.f_contiguous for block in dask.compute(*blocks))


def test_a_weight_stands_in_the_graph_once():
    x = lazy(values((64, COLS)), (2, 20))
    graph = dict(cd.layer_norm(x, COLS, values(COLS, seed=1)).__dask_graph__())
    held = [getattr(task, "value", task) for task in graph.values()]
    shapes = [task.shape for task in held if isinstance(task, np.ndarray)]
    assert shapes.count((20,)) == 3  # 32 times as many tasks read them
    assert set(shapes) == {(20,), (2, 20)}  # the latter are x's own


def test_names_are_those_of_the_same_call_and_of_no_other():
    x = lazy(values(), (5, 13))
    weight = values(COLS, seed=1)
    calls = {}, {"eps": 1e-3}, {"weight": weight}, {"weight": weight * 2}, {"axis": 0}
    names = [cd.layer_norm(x, **named).name for named in calls]
    assert len(set(names)) == len(names)
    assert names[2] == cd.layer_norm(x, weight=weight.copy()).name
    assert all(name.startswith("layer_norm") for name in names)
    shown = {dask.utils.key_split(key) for key in cd.layer_norm(x).__dask_graph__()}
    assert {"layer_norm", "layer_norm-moments", "layer_norm-statistics"} <= shown  # dashboards'


def test_unknown_lengths_of_other_axes():
    x = values((40, 24))
    y = cd.layer_norm(table().to_dask_array())
    check(y.compute(), frame().to_numpy())
    for chunks in ((7, 24), (7, 5)):
        source = lazy(x, chunks)
        y = cd.layer_norm(source[source[:, 0] > 0], 24)
        assert math.isnan(y.shape[0])
        assert y.chunks[1] == source.chunks[1]
        check(y.compute(), x[x[:, 0] > 0])


def frame():
    pd = pytest.importorskip("pandas")
    return pd.DataFrame(values((30, 4)), columns=list("abcd"), index=np.arange(30) * 2)


def table():
    return pytest.importorskip("dask.dataframe").from_pandas(frame(), npartitions=4)


def with_nulls(source):
    nullable = (source * 100).round().astype({"a": "Int32", "c": "Float32"})
    return nullable.map_partitions(lambda part: part.assign(a=part.a.mask(part.a % 2 == 0)))


def integers(source):
    return (source * 100).astype({"a": "int64", "b": "float64"})


@pytest.mark.parametrize(
    ("change", "kwargs"),
    [(lambda source: source, {"weight": values(4, seed=1)}), (integers, {}), (with_nulls, {})],
    ids=["float32", "integers", "nulls"],
)
def test_frames(change, kwargs):
    source = change(table())
    y = cd.layer_norm(source, **kwargs)
    assert (y.npartitions, y.divisions) == (source.npartitions, source.divisions)
    assert list(y.columns) == list("abcd")
    got = y.compute()
    assert got.index.equals(frame().index)
    assert (y.dtypes == got.dtypes).all()
    x = source.compute().to_numpy(np.float64, na_value=np.nan)
    exact = oracle.layer_norm(x, (1,), kwargs.get("weight"), None, 1e-5)[0]
    assert np.isnan(exact).any() == (change is with_nulls)
    assert not np.isnan(exact).all()
    oracle.assert_close(got.to_numpy().astype("f4"), exact, 4, scale=4)


X = da.ones((6, 8), chunks=(3, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cd.layer_norm(X, bias=da.ones(7)), r"bias has shape \(7,\).*\(8,\)"),
        (lambda: cd.layer_norm(X[X[:, 0] > 0], (6, 8)), "axis 0.*not known"),
        (lambda: cd.layer_norm(X[X[:, 0] > 0], 7), r"\(7,\).*\(nan, 8\)"),
        (lambda: cd.layer_norm(X, weight=strict.ones(8)), "weight is a array_api_strict array"),
        (lambda: cd.layer_norm(table(), 3), r"normalized_shape=\(3,\)"),
        (lambda: cd.layer_norm(table().assign(d="text")), "'d'.*not numeric"),
    ],
)
def test_errors_are_raised_at_the_call(call, said):
    """More of them in test_advice.py."""
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_cupy_blocks_of_whole_rows(cupy_lib):
    x = values((6, 40))
    source = da.from_array(cupy_lib.from_numpy(x), chunks=(3, 40), asarray=False)
    weight = values(40, seed=1)
    with pytest.raises(ValueError, match=r"weight is a numpy array but x is a cupy array"):
        cd.layer_norm(source, weight=weight)
    y = cd.layer_norm(source, weight=cupy_lib.from_numpy(weight))
    assert type(y._meta) is type(source._meta)
    halves = [y.blocks[i, 0].to_delayed()[0, 0].compute(scheduler="sync") for i in range(2)]
    got = np.concatenate([cupy_lib.to_numpy(half) for half in halves])
    check(got, x, (1,), weight)
