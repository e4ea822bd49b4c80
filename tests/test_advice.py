"""Every sentence that the library can raise: raised, its way out executed, and the call taken."""

import contextlib
import functools
import re
import sys
import tokenize
import traceback
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import cupynorm as cn
from docs._generate import errors, sentences
from tests.conftest import _simulated

# Reached by nothing here, and why.
UNREACHED = {
    "_torch.machines.check_device: x on a GPU": "a tensor on a GPU, CuPy missing",
    "_torch.machines.check_device: x is on device": "a tensor on a device of a third kind",
    "_torch.autograd._no_second_derivative": "tests/torch/test_compile.py: half a minute",
    "sklearn._check_library": "SCIPY_ARRAY_API=1 before SciPy is imported: tests/test_sklearn.py",
    "_cuda.plan.make_stage": "2^31 blocks: no memory for them",
}
X = np.arange(12, dtype=np.float32).reshape(3, 4)
ROW, STATS = np.ones(4, np.float32), np.ones((3, 1), np.float32)
BACK = {"dy": X, "x": X, "normalized_shape": 4, "mean": STATS, "rstd": STATS}
DROP = object()  # an argument left out


@contextlib.contextmanager
def without(*names):
    """As if these packages were not installed."""
    kept = [n for n in sys.modules if n == "cupynorm._cuda.arrays"]
    with mock.patch.dict(sys.modules, dict.fromkeys(names)):
        for name in kept:
            del sys.modules[name]
            vars(sys.modules["cupynorm._cuda"]).pop("arrays", None)
        yield


def run(call, given):
    """Call with the arguments, of which `inside` is a context to call in."""
    given = {k: v for k, v in given.items() if v is not DROP}
    with given.pop("inside", contextlib.nullcontext)():
        return call(**given)


def ways_in(said, given):
    """What the way out of a sentence spells, evaluated."""
    import dask.array
    import jax
    import pandas
    import polars
    import pyarrow.compute
    import torch

    known = {"numpy": np, "pandas": pandas, "polars": polars, "pyarrow": pyarrow, "dask": dask}
    known |= {"jax": jax, "torch": torch, "cupy": sys.modules.get("cupy"), **given}
    known |= {"columns": [given["column"]]} if "column" in given else {}
    known |= {"layer": SimpleNamespace(**given)}
    known["df"] = next((given[k] for k in ("x", "df", "columns", "X") if k in given), None)
    for found in re.finditer(r"(?:[Pp]ass|e\.g\.|first:|data:|assign one:|, or) ", said):
        text = re.sub(r"^layer\.\w+ = ", "", said[found.end() :])
        for end in range(len(text), 3, -1):
            spelled = text[:end].strip()
            with contextlib.suppress(SyntaxError, NameError, ValueError):  # words
                if spelled[-1] != ",":
                    yield spelled, eval(compile(spelled, "advice", "eval"), known)
                    break


def sentences_of(error):
    """Which sentences an error is, by the lines that raised it and by its text."""
    lines = {(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)}
    paths = {name: str(module.path) for name, module in sentences._modules().items()}
    at = {s for s in sentences.sentences() if (paths[s.module], s.line) in lines}
    if len({s.text for s in at}) > 1:
        fits = {s: ".*".join(map(re.escape, re.split("‹.*?›", s.text))) for s in at}
        at = {s for s, fit in fits.items() if re.search(fit, str(error), re.S)}
    return at


def follow(call, given, way_out):
    """Raise, follow the way out, call again with success; give the sentences.

    `way_out` is changed arguments, another call, or the name of the argument that takes what the
    sentence spells.
    """
    known = (TypeError, ValueError, ImportError, RuntimeError, AttributeError)
    with pytest.raises(known) as caught:
        run(call, given)
    said, found = str(caught.value), sentences_of(caught.value)
    assert found, f"none of ours: {caught.value!r}"
    if callable(way_out):
        way_out()
    elif isinstance(way_out, dict):
        run(call, given | way_out)
    else:
        ways = list(ways_in(said, given))
        assert ways, said
        for text, value in ways:
            try:
                run(call, given | {way_out: value})
            except Exception as error:
                msg = f"{text!r} of {said!r} leads to {error!r}"
                raise AssertionError(msg) from error
    return found


# --- rows: a call, what is wrong with it, the way out -------------------------------------------


def columns_without_numbers():
    """Words, dates, lists, and numbers that are no floats; a class."""
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import torch

    words, lists = ["b", "a"], [[1.0], [2.0]]
    yield from (pd.Series(words), pd.Series(X[0].astype("M8[s]")), pd.Series([1j, 2.0]))
    yield from (pd.MultiIndex.from_product([words, [1]]), pa.array(words), pa.array(lists))
    yield from (pl.Series(words), pl.Series(lists), pl.Series([1, 2], dtype=pl.Int128))
    yield from (np.array([{}, {}]), np.array(words), np.ndarray)
    with pytest.warns(UserWarning, match="prototype"):
        yield torch.masked.masked_tensor(torch.ones(3, 4), torch.ones(3, 4) > 0)


def arguments():
    import array_api_strict as strict
    import jax.numpy as jnp
    import polars
    import scipy.sparse
    import torch

    ln, add, back = cn.layer_norm, cn.add_layer_norm, cn.layer_norm_backward
    t, memory = torch.ones(3, 4), np.zeros((4, 4), np.float32)
    over = np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (3, 4), (4, 4))
    exporter = SimpleNamespace(__dlpack__=0, __dlpack_device__=lambda: (1, 0))
    device = strict.Device("device1")
    simulated = {"inside": _simulated}
    for x in (None, [[1, 2], [3, 4]], 3.0, scipy.sparse.csr_array(X.astype(int)), t.to_sparse(),
              torch.nested.nested_tensor([t, t[:2]]), np.ma.masked_equal(X.astype(int), 3),
              np.matrix(X), np.array(3.0), X.astype("M8[s]"),
              polars.Series([1, None])):  # fmt: skip
        yield ln, {"x": x}, "x"
    for x in columns_without_numbers():
        yield ln, {"x": x}, "x"
    yield cn.rms_norm, {"x": polars.LazyFrame({"a": [1.0]})}, {"x": X}
    yield ln, {"x": exporter}, {"x": X}
    for weight in (t[0], [1, 2, 3, 4], ROW.astype(int), ROW[None]):
        yield ln, {"x": X, "weight": weight}, "weight"
    yield ln, {"x": t, "weight": ROW[::-1]}, "weight"
    yield ln, {"x": strict.asarray(X), "weight": strict.asarray(ROW, device=device)}, "weight"
    for bad, good in (((), 4), (3, (4,)), ((3, "4"), (3, 4))):
        yield ln, {"x": X, "normalized_shape": bad}, {"normalized_shape": good}
    for bad in ((), 2, (0, 0)):
        yield ln, {"x": X, "axis": bad}, {"axis": -1}
    yield ln, {"x": X, "normalized_shape": 4, "axis": 1}, {"axis": DROP}
    for bad in ("1e-5", float("inf")):
        yield ln, {"x": X, "eps": bad}, {"eps": 1e-5}
    yield ln, {"x": X, "order": "A"}, {"order": "C"}
    yield ln, {"x": X, "out": X.astype(float)}, {"out": X.copy()}
    yield ln, {"x": X, "out": X.copy(), "order": "C"}, {"order": DROP}
    yield ln, {"x": X, "out": np.broadcast_to(np.float32(0), X.shape)}, {"out": np.empty_like(X)}
    yield ln, {"x": memory[:3], "out": memory[1:]}, {"out": memory[:3]}
    yield ln, {"x": X[:1], "weight": ROW, "out": ROW[None]}, {"out": np.empty_like(X[:1])}
    yield ln, {"x": X, "out": over}, {"out": np.empty_like(X)}
    yield ln, {"x": jnp.ones(4), "out": jnp.ones(4)}, {"out": DROP}
    yield ln, {"x": jnp.ones(4), "order": "F"}, {"order": "K"}
    for bad in (None, X[:2]):
        yield add, {"x": X, "residual": bad}, {"residual": X}
    yield add, {"x": X, "residual": X.astype(float)}, {"residual": X}
    for bad in (None, STATS[:2]):
        yield back, BACK | {"mean": bad}, {"mean": STATS}
    for bad in (None, X[:2]):
        yield back, BACK | {"dy": bad}, {"dy": X}
    yield back, BACK | {"dy": X.astype(float)}, {"dy": X}
    yield back, BACK | {"output_mask": (1, 0)}, {"output_mask": (True, True, True)}
    yield named, {"name": "layernorm"}, {"name": "layer_norm"}
    four, lacking = {"normalized_shape": 4}, functools.partial(without, "ml_dtypes")
    yield cn.LayerNorm, four | {"dtype": "bfloat16", "inside": lacking}, {"dtype": "float32"}
    yield at_address, {"offset": 2} | simulated, {"offset": 0}
    released = torch.ones(3, 4)
    released.untyped_storage().resize_(0)
    names = ("__dlpack__", "__dlpack_device__")
    for x in (SimpleNamespace(**{name: getattr(released, name) for name in names}), released):
        yield ln, {"x": x}, lambda x=x: restored(released, ln, x)
    functional, layer = torch._to_functional_tensor(t[0]), cn.LayerNorm(4)
    state = {"weight": t[0], "bias": t[0]}
    for bad in (functional, t[0].to("meta")):
        yield layer.load_state_dict, {"state": state | {"bias": bad}}, {"state": state}
    threads = functools.partial(mock.patch.dict, "os.environ", CUPYNORM_NUM_THREADS="none")
    yield _fresh_threads, {"inside": threads}, {"inside": DROP}
    lacking = functools.partial(without, "cupy")
    yield cn.warmup, four | {"inside": lacking}, simulated | {"dtypes": ["float32"]}
    yield cn.warmup, four, {"device": "cpu"}


def named(name):
    return getattr(cn, name)


def at_address(offset):
    import cupy

    return cn.layer_norm(cupy.place(X, offset=offset))


def restored(released, call, x):
    released.untyped_storage().resize_(released.nbytes)
    try:
        return call(x)
    finally:
        released.untyped_storage().resize_(0)


def _fresh_threads():
    from cupynorm._cpu import threads

    return threads.num_threads()


def _reports():
    import jax.numpy as jnp

    yield cn.explain, {"x": X, "device": "sm_10"}, {"device": "sm_90"}
    yield cn.explain, {"x": jnp.ones(4), "device": "sm_90"}, {"x": X}
    yield cn.explain, {"x": X, "op": "norm"}, {"op": "layer_norm"}
    here = {"normalized_shape": 4, "device": "cpu"}
    yield cn.warmup, here | {"device": "tpu"}, {"device": "cpu"}
    yield cn.warmup, here | {"normalized_shape": -4}, {"normalized_shape": 4}
    yield cn.warmup, here | {"dtypes": "int8"}, {"dtypes": "float32"}
    bar = {"progress": True, "inside": functools.partial(without, "tqdm.auto")}
    yield cn.warmup, here | bar, {"progress": DROP}


def tables():
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import torch

    from cupynorm import frames

    df, norm = pd.DataFrame({"a": [1, 2], "b": [3, 4]}), frames.layer_norm
    columns = cn.layer_norm_columns
    c, bits = np.ones(3, np.float32), np.ones(1, np.uint8)
    yield norm, {"df": X}, lambda: cn.layer_norm(X)
    yield norm, {"df": df, "dtype": "bfloat16"}, lambda: columns(df, dtype="bfloat16")
    yield cn.layer_norm, {"x": df, "axis": 0}, "x"
    yield cn.layer_norm, {"x": pa.table({"a": [1, 2]}), "return_stats": True}, "x"
    yield norm, {"df": df, "nulls": "drop"}, {"nulls": "omit"}
    yield norm, {"df": df[[]]}, {"df": df}
    yield norm, {"df": df.assign(t=pd.to_timedelta([1, 2], unit="s"))}, "df"
    tables = torch.ones(2, 3), pl.LazyFrame({"a": [1]}), df["a"], pa.array([1])
    for given in (X, {"a": c}, iter([c]), 3, *tables):
        yield columns, {"columns": given}, "columns"
    yield columns, {"columns": []}, {"columns": [c]}
    yield columns, {"columns": [(c, bits, 0, 0)]}, {"columns": [(c, bits)]}
    kinds = c.astype("M8[s]"), c.astype(complex), c[:, None], pl.Series(list("abc"))
    for given in (torch.ones(3), *kinds):
        yield one_column, {"column": given}, "column"
    yield columns, {"columns": [c, c[:2]]}, {"columns": [c, c]}
    for bad in (c, bits[:0]):
        yield columns, {"columns": [(c, bad)]}, {"columns": [(c, bits)]}
    yield columns, {"columns": [c], "dtype": "int8"}, {"dtype": "float64"}
    for out in (np.ones((3, 2), np.float32), np.ones((3, 1), np.float16)):
        given = {"columns": [c], "out": out, "dtype": "float32"}
        yield columns, given, {"out": np.ones((3, 1), np.float32)}
    yield on_gpu, {"offset": 3}, {"offset": 0}


def one_column(column):
    return cn.layer_norm_columns([column])


def on_gpu(offset):
    """Columns with a bitmap in CuPy's memory."""
    with _simulated():
        import cupy

        c, bits = cupy.ones(3, np.float32), cupy.zeros(2, np.uint8)
        return cn.layer_norm_columns([(c, bits, offset)])


def dask():
    import dask.array as da
    import dask.dataframe as dd
    import pandas as pd
    import scipy.sparse
    from dask import delayed

    import cupynorm.dask

    norm, x = cupynorm.dask.layer_norm, da.ones((4, 3))
    df = dd.from_pandas(pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), npartitions=1)
    yield norm, {"x": X}, {"x": da.from_array(X)}
    yield cn.layer_norm, {"x": x, "out": np.ones((4, 3))}, {"out": DROP}
    yield norm, {"x": df["a"]}, lambda: norm(df["a"].to_frame())
    yield cn.layer_norm, {"x": delayed(np.ones)((4, 3))}, {"x": da.ones((4, 3))}
    stats = {"mean": da.ones((3, 1)), "rstd": da.ones((3, 1))}
    lazy = BACK | {"dy": da.ones((3, 4)), "x": da.ones((3, 4))}
    yield cn.layer_norm_backward, lazy | stats | {"mean": np.ones((3, 1))}, "mean"
    array = df.to_dask_array(lengths=True)
    yield norm, {"x": df, "return_stats": True}, lambda: norm(array, return_stats=True)
    yield norm, {"x": df, "weight": da.ones(2)}, "weight"
    yield norm, {"x": x, "weight": [1, 2, 3]}, "weight"
    sparse = scipy.sparse.csr_array(np.ones((4, 3)))
    for blocks in (sparse, np.ma.ones((4, 3), int), np.ma.ones((4, 3))):
        yield computed, {"x": da.from_array(blocks, chunks=(2, 3))}, "x"
    yield computed, {"x": x.astype(complex)}, "x"
    yield norm, {"x": x[:, x[0] > 0]}, lambda: norm(x[:, x[0] > 0].compute_chunk_sizes())


def computed(x):
    return cn.layer_norm(x).compute()


def sklearn():
    import dask.array as da
    import jax.numpy as jnp
    import pandas as pd
    import scipy.sparse
    import torch

    from cupynorm.sklearn import LayerNormalizer

    def fit(X, **how):
        return LayerNormalizer(**how).fit_transform(X)

    bad = ("eps", "1", 1e-5), ("eps", -1.0, 0), ("copy", 3, True), ("output_type", "list", None)
    for name, wrong, right in bad:
        yield fit, {"X": X, name: wrong}, {name: right}
    for kind in ("cudf", "cupy"):  # neither of which is here
        yield fit, {"X": X, "output_type": kind}, {"output_type": None}
    yield fit, {"X": torch.ones(3, 4, device="meta")}, {"X": torch.ones(3, 4)}
    yield fit, {"X": da.from_array(X)}, "X"
    sparse = pd.DataFrame({"a": pd.arrays.SparseArray([0.0, 1.0])})
    nested = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)])
    for bad in (scipy.sparse.csr_array(X), torch.ones(3, 4).to_sparse(), sparse, nested):
        yield fit, {"X": bad}, "X"
    yield fit, {"X": jnp.ones(4)}, "X"
    yield fit, {"X": jnp.ones((2, 2), complex)}, {"X": jnp.ones((2, 2))}
    yield fit, {"X": torch.ones(0, 4)}, {"X": torch.ones(1, 4)}
    yield fit, {"X": torch.full((1, 4), torch.nan)}, {"X": torch.ones(1, 4)}
    holes = pd.DataFrame({"a": [1.0, np.nan], "b": [1.0, 2.0]})
    omitted = functools.partial(cn.frames.layer_norm, holes, nulls="omit")
    yield fit, {"X": holes}, lambda: (fit(holes.dropna()), omitted())


def of_weight(weight):
    layer = cn.LayerNorm(4)
    layer.weight = weight
    assert str(layer)
    return layer


def to_torch(weight):
    return of_weight(weight).to_torch()


def loaded(weight, state):
    return of_weight(weight).load_state_dict(state)


def layers():
    import tempfile

    import jax.numpy as jnp
    import torch

    def copied(layer):
        layer.weight = layer.weight.copy()

    folder = tempfile.mkdtemp()
    layer, t = cn.LayerNorm(4), torch.nn.LayerNorm(4)
    yield cn.LayerNorm, {"normalized_shape": ()}, {"normalized_shape": 64}
    yield cn.LayerNorm, {"normalized_shape": 4, "device": "tpu"}, {"device": "cpu"}
    yield cn.LayerNorm, {"normalized_shape": 4, "device": "cuda"}, {"device": "cpu"}
    yield layer.backward, {"dy": X}, lambda: (layer(X), layer.backward(X))
    yield cn.LayerNorm.from_torch, {"module": torch.nn.Linear(2, 2)}, {"module": t}
    yield cn.LayerNorm.from_torch, {"module": torch.nn.LayerNorm(4, device="meta")}, {"module": t}
    state = {"weight": ROW, "bias": ROW}
    yield layer.load_state_dict, {"state": {"weight": ROW}}, {"strict": False}
    yield layer.load_state_dict, {"state": state | {"weight": ROW[:2]}}, {"state": state}
    yield layer.load_state_dict, {"state": state | {"weight": [1.0] * 4}}, {"state": state}
    yield layer.load_state_dict, {"state": None}, {"state": state}
    masked = np.ma.masked_equal(ROW, 0)
    yield layer.load_state_dict, {"state": state | {"bias": masked}}, {"state": state}
    odd = [1.0] * 4, jnp.ones(4), torch.ones(4), ROW[::-1], ROW.astype(">f4"), ROW.astype(int)
    for weight in odd:
        yield to_torch, {"weight": weight}, "weight"
        if not isinstance(weight, np.ndarray):
            yield functools.partial(loaded, state=state), {"weight": weight}, "weight"
    locked = cn.LayerNorm(4)
    locked.weight = np.broadcast_to(np.float32(1), 4)
    load = functools.partial(locked.load_state_dict, state)
    yield load, {}, lambda: (copied(locked), load())
    layer(X)
    layer.grad["weight"] = np.ones(3, np.float32)
    yield layer.backward, {"dy": X}, lambda: (layer.zero_grad(), layer.backward(X))
    yield layer.save, {"path": f"{folder}/norm"}, {"path": f"{folder}/norm.npz"}
    lacking = functools.partial(without, "safetensors", "safetensors.numpy")
    path = f"{folder}/norm.safetensors"
    others = path, f"{folder}/a.npz"
    yield layer.save, {"path": path, "inside": lacking}, lambda: [*map(layer.save, others)]
    for ending in ("safetensors", "npz"):
        with open(f"{folder}/cut.{ending}", "w") as file:
            file.write("no")
        layer.save(f"{folder}/norm.{ending}")
        yield layer.load, {"path": f"{folder}/cut.{ending}"}, {"path": f"{folder}/norm.{ending}"}
    np.savez(f"{folder}/int.npz", weight=np.ones(4, int), bias=ROW)
    yield layer.load, {"path": f"{folder}/int.npz"}, {"path": f"{folder}/norm.npz"}


def tensors():
    import torch

    import cupynorm.torch as ct

    class Norm(torch.nn.Module):
        def __init__(self, weight, scale=1):
            super().__init__()
            self.weight, self.eps, self.scale = weight, 1e-5, scale

        def forward(self, x):
            wide = x.float()
            x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return (x_hat * self.scale).to(x.dtype) * self.weight

    t, weight = torch.ones(3, 4), torch.nn.Parameter(torch.ones(4))
    model, short = torch.nn.Sequential(torch.nn.LayerNorm(4)), (4,)
    yield ct.convert, {"model": t}, {"model": model}
    yield ct.convert, {"model": Norm(weight), "also": {Norm: "norm"}}, {"also": {Norm: "rms_norm"}}
    for bad in (Norm(None), Norm(weight, 2)):
        yield ct.convert, {"model": bad, "also": {Norm: "rms_norm"}}, {"also": {}}
    yield cn.layer_norm, {"x": t, "weight": weight, "out": t.clone()}, {"out": DROP}
    released = torch.ones(3, 4)
    released.untyped_storage().resize_(0)
    yield cn.layer_norm, {"x": released}, {"x": t}
    yield ct.layer_norm, {"input": X, "normalized_shape": short}, "input"
    yield ct.layer_norm, {"input": t.to_sparse(), "normalized_shape": short}, "input"
    yield ct.layer_norm, {"input": t.int(), "normalized_shape": short}, "input"
    yield cn.prepare, {"x": [1.0]}, "x"
    mine = torch.nn.Buffer(torch.ones(4)).as_subclass(type("T", (torch.Tensor,), {}))
    yield cn.prepare, {"x": t, "weight": mine}, {"weight": weight.detach()}
    import jax.numpy as jnp
    import pandas as pd

    for other in (jnp.ones(4), pd.DataFrame({"a": [1.0]})):
        yield cn.prepare, {"x": other}, lambda other=other: cn.layer_norm(other)


def pictures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cupynorm import plot

    x = np.arange(24.0).reshape(4, 6)
    images = {"x": x.reshape(4, 2, 3), "normalized_shape": (2, 3), "images": 0}
    yield plot.moments, images, {"images": 1}
    yield plot.affine, {"x": x}, {"weight": np.ones(6)}
    yield plot.distributions, {"x": x[:0]}, {"x": x}
    yield plot.affine, {"x": x * np.nan, "weight": np.ones(6)}, {"x": x}
    for bad in ([9], 2.5, "1"):
        yield plot.distributions, {"x": x, "rows": bad}, {"rows": [3]}
    yield plot.distributions, {"x": x, "rows": 0}, {"rows": 1}
    yield plot.distributions, {"x": x, "ax": plt.gca()}, {"ax": plt.subplots(1, 2)[1]}
    lacking = functools.partial(without, "matplotlib.pyplot")
    yield plot.distributions, {"x": x, "inside": lacking}, {"inside": DROP}


PRIVATE = ("_calls", "_libraries", "_rules", "_reference", "_cpu", "_report", "__init__", "_cuda")
ROWS = {
    PRIVATE: (arguments, _reports),
    ("frames",): (tables,),
    ("dask",): (dask,),
    ("sklearn",): (sklearn,),
    ("modules",): (layers,),
    ("_torch", "torch", "prepared"): (tensors,),
    ("plot",): (pictures,),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("rooms", ROWS, ids=lambda rooms: rooms[0])
def test_every_sentence_and_its_way_out(rooms):
    """A sentence of these rooms without a row fails, and so does a row that raises none."""
    seen = set()
    for rows in ROWS[rooms]:
        for row in rows():
            seen |= follow(*row)
    wanted = {s for s in sentences.sentences() if s.module.partition(".")[0] in rooms}
    missing = [f"{s.module}.{s.function}: {s.text}" for s in wanted - seen]
    assert not [m for m in missing if not m.startswith(tuple(UNREACHED))]


def test_every_room_has_rows():
    rooms = {s.module.partition(".")[0] for s in sentences.sentences()}
    assert rooms <= {room for many in ROWS for room in many}


# --- every kind of values: taken, or told how ---------------------------------------------------


def kinds():
    """Values of every dtype, by library; a table beside a column of floats, and alone."""
    import jax
    import ml_dtypes
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import torch

    names = [*"?bhilqBHILQefdgFDG", "M8[s]", "m8[ms]", "S3", "U3", "O"]
    odd = [">f4", np.dtypes.StringDType(), [("a", "i4"), ("b", "f4")]]
    odd += [ml_dtypes.float8_e4m3fn, ml_dtypes.int4]
    found = [*map(X.astype, names + odd), X.view("V4"), np.full((3, 4), "a")]
    yield [*found, *map(np.ma.masked_array, found[: len(names)])]
    t = torch.ones(3, 4)
    dtypes = "bool uint8 uint16 uint32 uint64 int8 int64 complex64 bfloat16"
    dtypes += " float8_e4m3fn float8_e5m2"
    layouts = [t.to_sparse(), t.to_sparse_csr(), t.to_mkldnn()]
    layouts.append(torch.quantize_per_tensor(t, 1.0, 0, torch.quint8))
    yield [*(t.to(getattr(torch, name)) for name in dtypes.split()), *layouts]
    dtypes = "bool", "int32", "uint8", "complex64", "float8_e4m3fn"
    yield [*map(jax.numpy.asarray(X).astype, dtypes), jax.random.key(0)[None]]
    days = pd.to_datetime(["2020", "2021"])
    plain = [[1j, 2], np.ones(2, np.longdouble), pd.arrays.SparseArray([0.0, 1]), ["a", None]]
    plain += [pd.Categorical([1, 2]), days, days.tz_localize("UTC"), days - days[0]]
    plain += [days.to_period("D"), pd.interval_range(0, 2), [[1], [2]]]
    plain += [pd.array([1, None], d) for d in ("Int64", "UInt8", "Float32", "boolean")]
    types = [pa.int8(), pa.decimal128(25, 2), pa.duration("s"), pa.timestamp("s"), pa.date32(),
             pa.time32("s"), pa.date64(), pa.string(), pa.null(), pa.bool_()]  # fmt: skip
    odd = {pa.null(): [None, None], pa.bool_(): [True, None], pa.string(): ["a", None]}
    arrows = [pa.array(odd.get(d, [1, None]), d) for d in types]
    arrows += [pa.array(np.ones(2, np.float16)), pa.array([[1], [2]])]
    arrows.append(pa.array(["a", "b"]).dictionary_encode())
    plain += [pd.Series(a, dtype=pd.ArrowDtype(a.type)) for a in arrows]
    for values in plain:
        yield [pd.DataFrame({"a": [1.0, 2.0], "b": values}), pd.DataFrame({"b": values})]
    for values in arrows:
        both = pa.table({"a": [1.0, 2.0], "b": values}), pa.table({"b": values})
        yield [*both, both[0].to_batches()[0], *([pl.from_arrow(one) for one in both])]
    numbers = pl.Int128, pl.Decimal(10, 2), pl.Duration, pl.Time, pl.Date
    series = [pl.Series([1, 2], dtype=d) for d in numbers]
    words = pl.Categorical, pl.Enum(["a", "b"]), pl.String
    series += [pl.Series(["a", "b"], dtype=d) for d in words]
    yield [pl.DataFrame({"a": [1.0, 2.0], "b": s}) for s in series] + [s.to_frame() for s in series]


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*quantiz:UserWarning")
def test_every_kind_of_values():
    from cupynorm import frames

    for values in kinds():
        for x in values:
            calls = [(cn.layer_norm, "x")]
            if frames.is_table(x):
                calls += [(frames.layer_norm, "df"), (cn.layer_norm_columns, "columns")]
            for call, name in calls:
                try:
                    run(call, {name: x})
                except (TypeError, ValueError) as error:
                    if str(error).endswith("pass columns of numbers"):
                        continue  # lists, of which nobody can make numbers
                    follow(call, {name: x}, name)


# --- the list of sentences, and the page of it: no raise escapes them ---------------------------


def test_every_raise_is_a_sentence_or_internal():
    told = {(s.module, s.line) for s in sentences.sentences()}
    inside = {(module, name.partition(":")[0]) for module, name in sentences.INTERNAL}
    wrappers, missing = set(), []
    for module, function, line in sentences.all_raises():
        if (module, line) in told or (module, function) in inside:
            continue
        if function.startswith(("_refuse", "refuse", "needing")):
            wrappers.add((module, function))  # its callers' sentences stand for it
        else:
            missing.append((module, function, line))
    # `raise` alone passes on what was caught, which said its sentence elsewhere.
    paths = {name: module.path for name, module in sentences._modules().items()}
    lines = {m: paths[m].read_text().splitlines() for m, _, _ in missing}
    assert not [at for at in missing if lines[at[0]][at[2] - 1].strip() != "raise"]
    assert wrappers  # or the branch above looks at nothing


def test_the_count_is_that_of_the_words():
    """Another way to count: the word, outside of texts and comments, is what the trees hold."""
    found = 0
    for path in sentences.PACKAGE.rglob("*.py"):
        with path.open("rb") as file:
            found += sum(token.string == "raise" for token in tokenize.tokenize(file.readline))
    assert len(sentences.all_raises()) == found


def test_a_sentence_says_what_to_do():
    badly_joined = r"  |(?<!\.)\.\.(?!\.)|\s$|‹msg›|‹fault›|‹way_out›"
    for sentence in sentences.sentences():
        assert all(part.strip() for part in sentence.parts), sentence.text
        assert not re.search(badly_joined, sentence.text), sentence.text


def test_the_page_has_them_all():
    text = errors.page()
    assert text.count(":::{admonition}") == len(sentences.sentences()) > 50
    assert text.count("**Way out:** ") == len(sentences.sentences())
    named = {module for modules in errors.TOPICS.values() for module in modules}
    rooms = {s.module.partition(".")[0] for s in sentences.sentences()}
    assert named <= rooms, "a topic of a room that is gone"


MODULE = """\
from typing import NoReturn
WHAT = 'pass {what}'
def f(x, n):
    hint = 'a list' if n else 'an int'
    if n > 3:
        msg = f'x is {x!r}; pass {hint}'
        msg += ', or less'
        raise ValueError(msg)
    _refuse(f'{n} is odd', WHAT.format(what=n))
def _refuse(fault, way_out) -> NoReturn:
    raise TypeError(f'{fault}; {way_out}')
"""


def test_messages_are_read_as_they_are_built(monkeypatch, tmp_path):
    def parsed(text):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(sentences, "_modules", functools.cache(modules))
        return sentences.sentences.__wrapped__()

    modules = sentences._modules.__wrapped__
    monkeypatch.setattr(sentences, "PACKAGE", tmp_path)
    found = parsed(MODULE)
    assert [(s.function, s.error, s.text, s.when) for s in found] == [
        ("f", "ValueError", "x is ‹x›; pass a list or an int, or less", "n > 3"),
        ("f", "TypeError", "‹n› is odd; pass ‹what›", ""),
    ]
    assert found[0].parts == ("x is ‹x›; ", "pass a list or an int, or less")
    with pytest.raises(ValueError, match=r"module\.py:2 raises without a sentence"):
        parsed("def f():\n    raise KeyError\n")
