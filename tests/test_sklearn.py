"""LayerNormalizer: scikit-learn's own checks, values, every kind of data, pipelines, refusals."""

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype, why_not

pytest.importorskip("sklearn")

import sklearn
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

from cupynorm.frames.columns import Column
from cupynorm.sklearn import LayerNormalizer, RMSNormalizer
from cupynorm.sklearn import _data as _estimator_data

BACKENDS = [b for b in Backend if b is not Backend.NUMPY_PLAIN]
RNG = np.random.default_rng(20260601)
X = RNG.standard_normal((20, 7)) * 3 + 50
M, N = X.shape


def close(y, x):
    want = oracle.layer_norm(np.asarray(x), (1,), None, None, 1e-5)[0]
    oracle.assert_close(np.asarray(y), want, want.shape[1])


def namespaces(check):
    """Libraries that an array-API check needs."""
    named = getattr(check, "keywords", {})
    pairs = [named[k] for k in ("X_ns_and_device", "other_ns_and_device") if k in named]
    return {named.get("array_namespace"), *(pair.xp for pair in pairs)}


@parametrize_with_checks(
    [LayerNormalizer(), LayerNormalizer(eps=0.5, output_type="input"), RMSNormalizer()]
)
def test_scikit_learns_estimator_checks(estimator, check, monkeypatch):
    if "cupy" in namespaces(check) and why_not(Backend.CUPY):
        pytest.skip(f"scikit-learn would make a CuPy array: {why_not(Backend.CUPY)}")
    # scikit-learn looks at it when it dispatches, so that none of the array-API checks is skipped.
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    check(estimator)


def test_what_the_tags_promise():
    """Beside what scikit-learn's own checks ask of them."""
    tags = get_tags(LayerNormalizer())
    assert tags.array_api_support and not tags.requires_fit and not tags.input_tags.allow_nan
    check_is_fitted(LayerNormalizer())
    stateless = LayerNormalizer()
    for x in (X, X[:, :3]):  # without fit there is no number of features to hold it to
        close(stateless.transform(x), x)
    assert not hasattr(stateless, "n_features_in_")
    assert not hasattr(stateless, "inverse_transform")


def without_checks_on_the_stand_in(lib):
    """The stand-in for CuPy has no arithmetic to look for NaN with."""
    return sklearn.config_context(assume_finite=lib.backend is Backend.CUPY_SIMULATED)


def test_values_dtype_and_library(lib, dtype):
    x = lib.array(X, dtype)
    with without_checks_on_the_stand_in(lib):
        y = LayerNormalizer().fit_transform(x)
    assert type(y) is type(x)
    assert lib.dtype(y) == dtype
    assert getattr(y, "device", None) == getattr(x, "device", None)
    close(lib.to_numpy(y), lib.to_numpy(x))
    if lib.backend.same_bits:
        same = lib.to_numpy(cn.layer_norm(x)).tobytes()
        assert lib.to_numpy(y).tobytes() == same


INTEGERS = ("int8", "uint8", "int64", "uint64", "bool", "longdouble", ">f8", "object", "bfloat16")


def test_what_is_no_float_becomes_one(lib):
    if lib.backend is Backend.CUPY_SIMULATED:
        return  # has no arithmetic; CuPy itself is among the cases on a GPU
    for kind in INTEGERS if lib.backend.numpy else ("int32", "bool"):
        x = lib.from_numpy((X > 50 if kind == "bool" else X).astype(np_dtype(kind)))
        y = LayerNormalizer().fit_transform(x)
        wide = "float32" if lib.backend is Backend.JAX else "float64"
        assert type(y) is type(x)
        assert lib.dtype(y) == ("bfloat16" if kind == "bfloat16" else wide)
        close(lib.to_numpy(y), lib.to_numpy(x).astype(np.float64))


def test_gradients_go_through():
    torch = pytest.importorskip("torch")
    x = torch.tensor(X, requires_grad=True)
    dy = RNG.standard_normal(X.shape)
    y = LayerNormalizer(copy=False).transform(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(dy))
    want = oracle.layer_norm_backward(dy, X, (1,), None, 1e-5)[0]
    np.testing.assert_allclose(dx.numpy(), want, rtol=1e-10, atol=1e-12)


@pytest.fixture
def frame():
    """Columns of four dtypes."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X[:, :4], [f"row {i}" for i in range(M)], list("abcd"))
    return frame.astype({"a": np.float32, "c": np.int16}).assign(d=X[:, 3] > 50)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_table_gives_an_array_and_input_gives_a_table(frame, library):
    pytest.importorskip(library)
    x = frame if library == "pandas" else pytest.importorskip("polars").from_pandas(frame)
    normalizer = LayerNormalizer().fit(x)
    assert normalizer.feature_names_in_.tolist() == list("abcd")
    assert normalizer.get_feature_names_out().tolist() == list("abcd")
    assert normalizer.n_features_in_ == 4
    y = normalizer.transform(x)
    assert (type(y), y.dtype, y.flags.c_contiguous) == (np.ndarray, np.float64, True)
    close(y, frame.to_numpy(np.float64))
    for asking in ("nothing", "the same"):
        normalizer = LayerNormalizer(output_type="input")
        if asking == "the same":
            normalizer.set_output(transform=library)
        y = normalizer.fit_transform(x)
        assert type(y) is type(x)
        assert list(y.columns) == list("abcd")
        assert library == "polars" or y.index.equals(frame.index)
        close(y.to_numpy(), frame.to_numpy(np.float64))
    assert type(LayerNormalizer(output_type="input").transform(X.tolist())) is np.ndarray


def test_dtype_of_a_frame():
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    values = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    made = {
        "float16": ["float16 float16"],
        "float32": ["float32 int8", "Float32 Float32", "float[pyarrow] uint8[pyarrow]"],
        "float64": ["float32 int32", "int8 bool", "Int64 boolean", "object float32"],
    }
    for dtype, dtypes in ((dtype, one) for dtype, several in made.items() for one in several):
        kinds = dict(zip("abc", (dtypes.split() * 2)[:3], strict=True))
        y = LayerNormalizer().fit_transform(pd.DataFrame(values, columns=[*"abc"]).astype(kinds))
        assert y.dtype == dtype
        close(y, values)


@pytest.mark.parametrize("library", ["pandas", "polars"])
@pytest.mark.parametrize("made_of", ["array", "tensor", "pandas", "polars"])
def test_a_table_of_anything(frame, library, made_of):
    tables = pytest.importorskip(library), pytest.importorskip("polars")
    makers = {"array": lambda: X, "tensor": lambda: pytest.importorskip("torch").tensor(X),
              "pandas": lambda: frame, "polars": lambda: tables[1].from_pandas(frame)}  # fmt: skip
    x, plain = makers[made_of](), made_of in ("array", "tensor")
    y = LayerNormalizer().set_output(transform=library).fit_transform(x)
    assert type(y) is tables[0].DataFrame
    assert list(y.columns) == ([f"x{j}" for j in range(N)] if plain else list("abcd"))
    assert (library, made_of) != ("pandas", "pandas") or y.index.equals(frame.index)
    close(y.to_numpy(), X if plain else frame.to_numpy(np.float64))
    if library == "pandas":  # of which there is an output_type too
        y = LayerNormalizer(output_type=library).fit_transform(x)
        assert type(y) is tables[0].DataFrame


@pytest.mark.needs("not_numpy", "has_float16")
def test_output_type_numpy(lib):
    with without_checks_on_the_stand_in(lib):
        y = LayerNormalizer(output_type="numpy").fit_transform(lib.array(X))
    assert (type(y), y.dtype) == (np.ndarray, np.float32)
    close(y, X.astype(np.float32))


def test_output_type_cupy(cupy_lib):
    y = LayerNormalizer(output_type="cupy").fit_transform(X)
    assert type(y).__module__.startswith("cupy")
    close(cupy_lib.to_numpy(y), X)
    with without_checks_on_the_stand_in(cupy_lib):
        assert type(LayerNormalizer(output_type="cupy").transform(y)) is type(y)


@pytest.mark.gpu
@pytest.mark.skipif(bool(why_not(Backend.CUPY)), reason=str(why_not(Backend.CUPY)))
@pytest.mark.parametrize("output_type", [None, "input", "numpy", "cupy", "pandas", "cudf"])
def test_cudf(frame, output_type):
    cudf = pytest.importorskip("cudf")
    x = cudf.from_pandas(frame)
    y = LayerNormalizer(output_type=output_type).fit_transform(x)
    assert type(y).__module__.partition(".")[0] == (output_type or "cudf").replace("input", "cudf")
    if hasattr(y, "columns"):
        assert list(y.columns) == list("abcd")
        host = y.to_pandas() if hasattr(y, "to_pandas") else y
        assert host.index.equals(frame.index)
        y = host.to_numpy()
    close(y.get() if hasattr(y, "get") else y, frame.to_numpy(np.float64))
    assert type(LayerNormalizer(output_type="cudf").fit_transform(frame)) is cudf.DataFrame
    with pytest.raises(ValueError, match="nulls in 'a'"):
        LayerNormalizer().fit(x.assign(a=x["a"].where(x["a"] > 50)))


@pytest.mark.needs("strided")
def test_copy_false_writes_into_x(lib):
    with without_checks_on_the_stand_in(lib):
        x = lib.array(X)
        y = LayerNormalizer(copy=False).fit_transform(x)
        close(lib.to_numpy(x), X.astype(np.float32))
        assert lib.to_numpy(y).tobytes() == lib.to_numpy(x).tobytes()
        x = lib.array(X)
        LayerNormalizer().fit_transform(x)
        assert lib.to_numpy(x).tobytes() == X.astype(np.float32).tobytes()


def test_copy_false_leaves_what_it_must_not_write_to(frame):
    before = frame.copy(deep=True)
    one_block = frame.astype(np.float64)
    for x in (frame, frame.astype(object), one_block):
        LayerNormalizer(copy=False).fit_transform(x)
    assert frame.equals(before)
    assert one_block.equals(before.astype(np.float64))
    locked = X.copy()
    locked.flags.writeable = False
    close(LayerNormalizer(copy=False).transform(locked), X)
    whole = np.arange(12).reshape(3, 4)
    close(LayerNormalizer(copy=False).transform(whole), whole)
    assert whole.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert LayerNormalizer(copy=False).transform([[1.0, 2.0]]).shape == (1, 2)
    lent = Lender(X.copy())
    close(LayerNormalizer(copy=False).transform(lent), X)
    assert lent.values.tobytes() == X.tobytes()


class Lender:
    """No array, but NumPy gets one without a copy."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype, copy=False)

    def __len__(self):
        return len(self.values)

    @property
    def shape(self):
        return self.values.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.needs("unstrided")
def test_missing_values_are_refused(lib, value):
    spoilt = X.copy()
    spoilt[3, 4] = value
    for x in (spoilt, lib.array(spoilt)):
        for method in ("fit", "transform", "fit_transform"):
            with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
                getattr(LayerNormalizer(), method)(x)


def test_infinities_that_cancel_in_a_sum_are_found():
    torch = pytest.importorskip("torch")
    for pair in ([np.inf, -np.inf], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="Input X contains NaN or infinity"):
            LayerNormalizer().transform(torch.tensor([pair]))
    large = torch.full((4, 60000), 60000.0, dtype=torch.float16)
    large[:, ::2] = 0  # finite, but their sum is not, in float16
    assert torch.isfinite(LayerNormalizer().transform(large)).all()


@pytest.mark.parametrize("kind", ["NaN", "Int64", "arrow", "matrix", "polars", "inf"])
def test_tables_with_missing_values_name_the_columns(kind):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"first": [1.0, 2.0], "second": [3.0, 4.0], "third": [5.0, 6.0]})
    if kind in ("Int64", "arrow"):
        frame = frame.astype("Int64" if kind == "Int64" else "int32[pyarrow]")
    elif kind == "matrix":
        frame = pd.DataFrame(frame.to_numpy().copy(), columns=frame.columns)
    elif kind == "polars":
        frame = pytest.importorskip("polars").from_pandas(frame)
    LayerNormalizer().fit_transform(frame)
    if kind == "polars":
        frame = frame.with_columns(second=frame["second"].replace(4.0, None))
    else:
        missing = {"Int64": pd.NA, "arrow": pd.NA, "inf": np.inf}
        frame.loc[1, "second"] = missing.get(kind, np.nan)
    for method in ("fit", "transform"):
        with pytest.raises(ValueError, match=r"NaN, infinity or nulls in 'second'\. "):
            getattr(LayerNormalizer(), method)(frame)
    with sklearn.config_context(assume_finite=True):
        y = LayerNormalizer().fit_transform(frame)
    assert np.isnan(y).all(axis=1).tolist() == [False, True]
    assert not np.isnan(y[0]).any()
    many = pd.DataFrame({f"c{j}": [1.0, np.nan] for j in range(9)})
    with pytest.raises(ValueError, match=r"nulls in 'c0', 'c1', 'c2', 'c3', 'c4' and 4 more"):
        LayerNormalizer().fit(many)


def test_bitmaps_are_looked_at_in_their_rows_alone():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0]})
    bits = np.array([0b11100000, 0b00000000], np.uint8)  # as cuDF has one where there are no nulls
    column = Column(frame["a"].to_numpy(), bits, 5)
    _estimator_data.refuse_bad_columns(frame, [column], "it")
    with pytest.raises(ValueError, match="nulls in 'a'"):
        _estimator_data.refuse_bad_columns(frame, [column._replace(offset=6)], "it")


@pytest.mark.parametrize("method", ["fit", "transform"])
def test_each_method_refuses_by_itself(method):
    """Every sentence is raised, by `fit_transform`, in test_advice.py."""
    sparse, torch = pytest.importorskip("scipy.sparse"), pytest.importorskip("torch")
    for x, error, words, parameters in (
        (sparse.csr_array(X), TypeError, "would make it dense", {}),
        (np.ma.masked_less(X, 50), TypeError, "mask would be ignored", {}),
        (torch.tensor(X)[:, :0], ValueError, "0 feature", {}),
        (X, ValueError, "eps=-1e-05 is negative", {"eps": -1e-5}),
        (X, TypeError, "eps=True is a bool", {"eps": True}),
        (X, ValueError, "is not one of", {"output_type": ["numpy"]}),
    ):
        normalizer = LayerNormalizer(**parameters)  # which refuses nothing itself
        with pytest.raises(error, match=words):
            getattr(normalizer, method)(x)


def test_another_library_than_fit_has_seen(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    normalizer = LayerNormalizer().fit(X)
    assert type(normalizer.transform(torch.tensor(X))) is torch.Tensor
    with sklearn.config_context(array_api_dispatch=True):
        with pytest.raises(ValueError, match=r"same namespace as .*: numpy, not torch"):
            normalizer.transform(torch.tensor(X))
        assert type(LayerNormalizer().transform(torch.tensor(X))) is torch.Tensor
        close(normalizer.transform(X.tolist()), X)


def test_column_transformer(frame):
    blocks = ColumnTransformer(
        [("row", LayerNormalizer(), ["a", "b"]), ("column", StandardScaler(), ["c"])],
        remainder="passthrough",
    )
    close(blocks.fit_transform(frame)[:, :2], frame[["a", "b"]].to_numpy(np.float64))
    y = blocks.set_output(transform="pandas").fit_transform(frame)
    assert list(y.columns) == ["row__a", "row__b", "column__c", "remainder__d"]
    assert y.index.equals(frame.index)
    close(y[["row__a", "row__b"]].to_numpy(), frame[["a", "b"]].to_numpy(np.float64))
    assert blocks.get_feature_names_out()[0] == "row__a"
