"""Tables of pandas, polars and cuDF: values, nulls, dtypes, memory, what is kept, refusals."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

import cupynorm as cn
from cupynorm import frames
from cupynorm.frames import tables
from tests import oracle
from tests.cpu.programs import run_python
from tests.test_columns import bitmap, expected

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")
pa = pytest.importorskip("pyarrow")

TABLE = {"pandas": pd.DataFrame, "polars": pl.DataFrame}
NULLS = ("propagate", "omit")


@pytest.fixture(params=TABLE)
def library(request):
    return request.param


def mixed(M=50):
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal(M).astype(np.float32),
        "b": rng.integers(-100, 100, M).astype(np.int16),
        "c": rng.random(M) > 0.5,
        "d": rng.integers(0, 255, M).astype(np.uint8),
    }


def dtype_of(y):
    """The one dtype of a table's columns."""
    (name,) = {str(dtype).lower() for dtype in y.dtypes}
    return name


def arrow(array):
    return pd.arrays.ArrowExtensionArray(array)


@pytest.fixture
def results(monkeypatch):
    """Matrices that tables are built over."""
    made, build = [], tables.build
    monkeypatch.setattr(tables, "build", lambda df, y: build(df, made.append(y) or y))
    return made


def test_names_dtypes_and_no_rows(library):
    """Values are drawn in test_any_call."""
    for data in (mixed(), mixed(0)):
        y = frames.layer_norm(TABLE[library](data))
        assert (type(y), list(y.columns), dtype_of(y)) == (TABLE[library], list("abcd"), "float32")
        assert len(y) == len(data["a"])
    data["e"] = np.linspace(0, 1, 0)
    for dtype, made in ((None, "float64"), ("float32", "float32"), ("float16", "float16")):
        assert dtype_of(frames.layer_norm(TABLE[library](data), dtype=dtype)) == made


def test_the_arguments_of_layer_norm(library):
    df = TABLE[library]({"a": [1, 2], "b": [3, 5], "c": [4, 4]})
    want = frames.layer_norm(df)
    for kwargs in ({}, {"axis": 1}, {"axis": -1}, {"axis": (1,)}, {"normalized_shape": 3}):
        assert cn.layer_norm(df, **kwargs).equals(want)
    assert cn.layer_norm(df, weight=np.full(3, 2.0)).equals(2 * want)
    with pytest.raises(TypeError, match="out="):
        cn.layer_norm(df, out=want)


class Table(pd.DataFrame):
    _metadata = ("unit",)

    @property
    def _constructor(self):
        return Table


def test_a_table_is_not_cast_to_say_what_is_not_wrong():
    """The way out of an error is tried when there is one, not in every call."""
    pd = pytest.importorskip("pandas")

    class Uncast(pd.DataFrame):
        def astype(self, *_, **__):
            pytest.fail("the whole table was cast")

    assert cn.layer_norm(Uncast({"a": [1.0, 2.0], "b": [3.0, 5.0]})).shape == (2, 2)


def test_pandas_keeps_what_is_not_a_value():
    names = pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["k", "n"])
    index = pd.date_range("2026-01-01", periods=4, name="day")
    df = Table(np.arange(12).reshape(4, 3) ** 2, index=index, columns=names)
    df.attrs["source"], df.unit = "sensor", "m"
    y = frames.layer_norm(df)
    pd.testing.assert_index_equal(y.index, index)
    pd.testing.assert_index_equal(y.columns, names)
    assert (type(y), y.unit, y.attrs) == (Table, "m", {"source": "sensor"})
    oracle.assert_close(y.to_numpy(), expected(df.to_numpy().T), 3)
    assert df.to_numpy()[3, 2] == 121
    twice = pd.DataFrame([[1, 2.0, True], [3, 5.0, False]], columns=["a", "b", "a"])
    y = frames.layer_norm(twice)
    assert list(y.columns) == ["a", "b", "a"]
    oracle.assert_close(y.to_numpy(), expected([[1, 3], [2, 5], [1, 0]], dtype="float64"), 3)


@pytest.mark.parametrize("nulls", NULLS)
def test_pandas_extension_dtypes(nulls):
    dtypes = {
        "Int64": [1, None, 2**40, 4],
        "UInt8": [1, 2, 3, 255],
        "Float32": [0.5, 1.5, None, -2],
        "boolean": [True, None, False, True],
        "double[pyarrow]": [1.0, 2.0, 3.0, None],
        "bool[pyarrow]": [True, False, None, True],
        "int16[pyarrow]": [5, -6, 7, 8],
        "float[pyarrow]": [None, 0.5, 1.0, 2.0],
        "Int16": [7, 8, None, -9],
        "uint32": [0, 2**31, 5, 6],
        "bool": [False, True, True, False],
        "float64": [1.0, 2.0, 3.0, np.nan],
    }
    df = pd.DataFrame({dtype: pd.array(x, dtype=dtype) for dtype, x in dtypes.items()})
    exact = df.astype("float64[pyarrow]").to_numpy(np.float64, na_value=np.nan)
    y = frames.layer_norm(df, nulls=nulls)
    assert dtype_of(y) == "float64"
    oracle.assert_close(y.to_numpy(), expected(exact.T, dtype="float64", omit=nulls == "omit"), 12)
    matrix = cn.layer_norm_columns(df, nulls=nulls)
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(matrix, y.to_numpy())


def test_pandas_arrow_slices_and_chunks():
    rng = np.random.default_rng(1)
    values, valid = rng.standard_normal(70).astype(np.float32), rng.random(70) > 0.3
    edges = (0, 30), (30, 30), (30, 55), (55, 70)
    parts = [pa.array(values[i:j], mask=~valid[i:j]) for i, j in edges]
    data = {
        "chunks": pd.Series(arrow(pa.chunked_array(parts))),
        "slice": pd.Series(arrow(pa.array(values > 0, mask=~valid))),
        "plain": values,
    }
    y = frames.layer_norm(pd.DataFrame(data).iloc[5:61], nulls="omit")
    x, known = values[5:61], valid[5:61]
    oracle.assert_close(
        y.to_numpy(), expected([x, x > 0, x], omit=True, valid=[known, known, known | True]), 3
    )


@pytest.mark.parametrize("pyarrow", [True, False])
@pytest.mark.parametrize("nulls", NULLS)
def test_polars_nulls_slices_and_chunks(pyarrow, nulls, monkeypatch):
    if not pyarrow:
        monkeypatch.setattr("cupynorm.frames.tables.find_spec", lambda name: None)
    valid = np.random.default_rng(3).random(60) > 0.2
    data = mixed(60)
    df = pl.DataFrame({**data, "e": pl.Series([1.5 if v else None for v in valid])})
    seen = pl.when(pl.Series(valid))
    df = df.with_columns(f=seen.then(pl.col("b")), g=seen.then(pl.col("c")))
    columns = [*data.values(), np.full(60, 1.5), data["b"], data["c"]]
    known = [valid | True] * 4 + [valid] * 3
    y = frames.layer_norm(df, nulls=nulls)
    assert (y.columns, dtype_of(y)) == (list("abcdefg"), "float64")
    want = expected(columns, dtype="float64", omit=nulls == "omit", valid=known)
    oracle.assert_close(y.to_numpy(), want, 7)
    oracle.assert_close(frames.layer_norm(df[7:31], nulls=nulls).to_numpy(), want[7:31], 7)
    joined = pl.concat([df[:20], df[20:]], rechunk=False)
    oracle.assert_close(frames.layer_norm(joined, nulls=nulls).to_numpy(), want, 7)


def test_columns_are_read_in_place():
    values = np.arange(100.0)
    df = pd.DataFrame({"numpy": values})
    df["arrow"] = arrow(pa.array(values))
    df["masked"] = pd.arrays.FloatingArray(values, np.arange(100) == 4)
    own = [df["numpy"].to_numpy(), values, df["masked"].array._data]
    columns = tables.read(df)
    assert [np.shares_memory(c[0], x) for c, x in zip(columns, own, strict=True)] == [True] * 3
    np.testing.assert_array_equal(columns[2][1], bitmap(np.arange(100) != 4))
    df = pl.DataFrame({"a": values})
    ((read,),) = tables.read(df)
    assert np.shares_memory(read, df["a"].to_numpy(allow_copy=False))


@pytest.mark.parametrize("layout", ["F", "C", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_pandas_result_is_one_block_without_a_copy(layout, dtype, results):
    x = (np.random.default_rng(2).standard_normal((300, 7)) * 50).astype(dtype)
    df = pd.DataFrame(dict(enumerate(x.T)))
    if layout != "columns":
        df = pd.DataFrame(np.asarray(x, order=layout), copy=False)
    block = frames.layer_norm(df).to_numpy()
    assert np.shares_memory(block, results[0])
    assert block.flags.c_contiguous if layout == "C" else block.flags.f_contiguous
    oracle.assert_close(block, expected(x.T), 7)
    assert frames.layer_norm(df, order="C").to_numpy().flags.c_contiguous
    assert frames.layer_norm(df, order="F").to_numpy().flags.f_contiguous


def test_polars_result_is_one_block_without_a_copy(results):
    y = frames.layer_norm(pl.DataFrame({"a": np.arange(50.0), "b": np.ones(50), "c": [0.0] * 50}))
    for j, series in enumerate(y.get_columns()):
        assert np.shares_memory(series.to_numpy(allow_copy=False), results[0][:, j])


# --- cuDF: its interface, by a twin whose device memory is the host's ---------------------------


class TwinSeries:
    """What is used of a cuDF Series, over a pyarrow array."""

    def __init__(self, array):
        validity, data = array.buffers()
        self.array, self.dtype = array, np.dtype(tables.ARROW[str(array.type)])
        self.__cuda_array_interface__ = {
            "shape": (len(array),),
            "strides": (self.dtype.itemsize,),
            "typestr": self.dtype.str,
            "data": (data.address, False),
            "version": 1,
        }
        if array.null_count:
            bits = {"shape": (len(array),), "strides": None, "typestr": "<t1", "version": 1}
            bits["data"] = (validity.address, True)
            self.__cuda_array_interface__["mask"] = SimpleNamespace(__cuda_array_interface__=bits)

    def __len__(self):
        return len(self.array)


class TwinFrame(dict):
    """What is used of a cuDF DataFrame, over its columns by name."""

    columns = property(list)
    dtypes = property(lambda self: [series.dtype for series in self.values()])


TwinFrame.__name__, TwinFrame.__module__ = "DataFrame", "cudf"


def on_host(memory):
    """View of what a `__cuda_array_interface__` describes, were it the host's."""
    interface = memory.__cuda_array_interface__
    return np.asarray(SimpleNamespace(__array_interface__=interface, keep=memory))


def test_cudf_columns_are_their_buffers_and_bitmaps():
    valid = np.arange(77) % 5 > 0
    values = np.arange(77.0), np.arange(77, dtype=np.int16)
    arrays = {"a": pa.array(values[0]), "b": pa.array(values[1], mask=~valid)}
    df = TwinFrame({name: TwinSeries(array) for name, array in arrays.items()})
    read = [tuple(map(on_host, column)) for column in tables.read(df)]
    assert [[part.dtype for part in column] for column in read] == [["f8"], ["i2", "u1"]]
    np.testing.assert_array_equal(read[0][0], values[0])
    y = cn.layer_norm_columns(read, nulls="omit")
    oracle.assert_close(
        y, expected(values, dtype="float64", omit=True, valid=[valid | True, valid]), 2
    )
    df["s"] = SimpleNamespace(dtype="category")
    with pytest.raises(TypeError, match=r"columns 's' .* are not numeric"):
        tables.read(df)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("cudf") is None, reason="cudf is not installed")
def test_cudf():
    import cudf
    import cupy

    df = cudf.DataFrame({"a": [1, None, 3], "b": [1.5, 2.5, None], "c": [True, False, True]})
    df.index = [5, 6, 7]
    valid = [np.array([1, 0, 1], bool), np.array([1, 1, 0], bool), np.ones(3, bool)]
    columns = [np.array([1, 0, 3]), np.array([1.5, 2.5, 0]), np.array([True, False, True])]
    for nulls in NULLS:
        y = frames.layer_norm(df, nulls=nulls)
        assert isinstance(y, cudf.DataFrame)
        assert y.index.to_arrow().to_pylist() == [5, 6, 7]
        assert list(y.columns) == ["a", "b", "c"]
        want = expected(columns, dtype="float64", omit=nulls == "omit", valid=valid)
        oracle.assert_close(cupy.asnumpy(y.to_cupy()), want, 3)


def test_a_table_brings_no_other_library():
    program = (
        "import sys, numpy, polars\n"
        "from cupynorm import frames\n"
        "sys.modules['pyarrow'] = None\n"  # an import of it fails
        "from cupynorm.frames import tables\n"
        "tables.find_spec = lambda name: None\n"
        "frames.layer_norm(polars.DataFrame({'a': [1.0], 'b': [2.0]}))\n"
        "print([m for m in ('pandas', 'cudf', 'cupy', 'torch', 'dask') if m in sys.modules])"
    )
    assert run_python(program, CUPYNORM_NUMBA="0").strip() == "[]"  # numba would take seconds
