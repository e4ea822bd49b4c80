"""Calls of every public function: drawn from a `random.Random`, run, and held to the oracle.

`tests.soak` draws from seeds, hypothesis from choices that shrink, to the first and the smallest.
"""

import importlib
import math
from importlib.util import find_spec

import numpy as np

import cupynorm as cn
from cupynorm._ops import OPS
from tests import oracle
from tests.conftest import ALL_DTYPES, Backend, np_dtype
from tests.directions import stats_dtype
from tests.test_columns import DTYPES, bitmap, column, expected

# Public functions by the method of `Call` that calls them.
WAYS = {
    "forward": "layer_norm rms_norm add_layer_norm add_rms_norm prepare explain",
    "backward": "layer_norm_backward rms_norm_backward",
    "layer": "LayerNorm RMSNorm",
    "columns": "layer_norm_columns rms_norm_columns",
    "table": "frames.layer_norm frames.rms_norm",
    "lazy": "dask.layer_norm",
    "samples": "sklearn.LayerNormalizer sklearn.RMSNormalizer",
    "tensors": "torch.layer_norm torch.rms_norm torch.add_layer_norm torch.add_rms_norm",
    "module": "torch.LayerNorm torch.RMSNorm",
}
WAY = {name: way for way, names in WAYS.items() for name in names.split()}
OF_NUMPY, ANY_OP = ("layer", "columns", "table", "lazy"), ("prepare", "explain", "dask.layer_norm")
NEEDS = {"frames": "pandas", "dask": "dask", "sklearn": "sklearn", "torch": "torch"}
ABSENT = {room for room, library in NEEDS.items() if not find_spec(library)}
TABLES = [library for library in ("pandas", "polars") if find_spec(library)]


def public(name):
    """What users call ``cupynorm.<name>``."""
    module, _, function = f"cupynorm.{name}".rpartition(".")
    return getattr(importlib.import_module(module), function)


def reach(door, ours=False):
    """Names that take arrays of a library; `ours`: those in which no other library has a part."""
    for name, way in WAY.items():
        room = name.rpartition(".")[0]
        fits = door.numpy if way in OF_NUMPY else name != "prepare" or door.strided
        fits = door.value.startswith("torch") if room == "torch" else fits
        if fits and not (room and (ours or door.compiles or room in ABSENT)):
            yield name


def sum_of(total, x, residual):
    """Hold a sum to the one that is rounded once."""
    exact = (x.astype(float) + residual.astype(float)).astype(residual.dtype)
    assert total.dtype == exact.dtype
    np.testing.assert_array_equal(total.astype(float), exact.astype(float), "the sum")
    return total


def largest(*arrays):
    """Of the finite numbers, and 1."""
    return max(np.abs(a[np.isfinite(a)]).max(initial=1) for a in arrays if a is not None)


def close(a, exact, N, weight=None, bias=None):
    """The one bound, times the largest result, or weight or bias if they are smaller, beyond 1."""
    scale = min(largest(exact), largest(np.ones(1), weight, bias))
    oracle.assert_close(a, exact, N, scale=scale)


class Call:
    """A call of one public function; where it fails, the error's note tells what was called."""

    def __init__(self, rnd, lib, kinds=ALL_DTYPES, shape=None, ours=False):
        self.rnd, self.lib, self.door = rnd, lib, lib.backend
        self.name = self.pick(*reach(self.door, ours))
        self.way, bare = WAY[self.name], self.name.rpartition(".")[2]
        plain = self.way == "samples" or not bare.islower()  # a class: without 1 + weight
        ops = [op for op in OPS.values() if not op.unit_weight or not (op.center or plain)]
        if self.name not in ANY_OP:
            wanted = "layer" in bare.lower(), bare.startswith("add")
            ops = [op for op in ops if (op.center, op.residual) == wanted]
        self.op = self.pick(*(op for op in ops if not (op.residual and self.way == "lazy")))
        some = ("float32",) if self.door.compiles else self.door.dtypes
        self.kind = self.pick(*(kind for kind in kinds if kind in some))
        few = self.door is Backend.JAX or self.way == "samples"  # the former compiles each shape
        self.shape = shape if shape and not (few or self.way == "lazy") else self.some_shape()
        ndim = len(self.shape)
        n = self.rnd.randint(1, ndim) if not few and self.maybe() else 1
        self.axes = tuple(range(ndim - n, ndim))
        if not few and self.way not in ("layer", "tensors", "module") and self.maybe(0.4):
            self.axes = tuple(self.rnd.sample(range(ndim), n))
        self.length = tuple(self.shape[a] for a in self.axes)
        self.N = math.prod(self.length)
        self.eps = self.pick(1e-5, 1e-12, 0.1, *[None] * (not self.op.center))
        self.zero = {"zero_centered_weight": True} if self.op.unit_weight else {}
        self.kept = []  # arrays that were given, and their bytes
        self.text = f"{self.door.value} {self.name}: {self.op.name}, eps={self.eps}"

    def run(self):
        try:
            getattr(self, self.way)()
        except Exception as error:
            error.add_note(self.text)
            raise

    # --- what is drawn ------------------------------------------------------------------------

    def pick(self, *of):
        return self.rnd.choice(of)

    def maybe(self, share=0.5):
        return self.rnd.random() > 1 - share

    def say(self, label, value):
        self.text += f", {label}={value}"
        return value

    def numbers(self):
        return np.random.default_rng(self.rnd.getrandbits(32))

    def some_shape(self):
        if self.door is Backend.JAX:
            return self.pick((3, 4), (2, 3, 4)) if self.way != "samples" else (3, 4)
        ndim = self.rnd.randint(1, 4) if self.way != "samples" else 2
        least = 0 if self.way != "samples" and self.maybe(0.1) else 1
        sides = [self.rnd.randint(least, 5 if self.door.compiles else 9) for _ in range(ndim)]
        if not self.door.compiles and self.maybe(0.3):
            sides[-1] = self.rnd.randint(1, 1200)
        return tuple(sides)

    def array(self, label, shape=None, kind=None):
        """Numbers in memory of any layout, as NumPy has them; some of x's shape are not finite."""
        odd, kind = shape is None, kind or self.kind
        shape = self.shape if odd else shape
        steps, turned = [1] * len(shape), list(range(len(shape)))
        if self.door.strided and math.prod(shape) < 20_000 and self.maybe():
            ways = (1, 1, 2, 3, -1, -2) if self.door.numpy else (1, 1, 2, 3)
            steps = [self.pick(*ways) for _ in shape]
            turned = self.rnd.sample(turned, len(shape))
        scale, offset = self.pick(1.0, 1e-3, 30.0), self.pick(0.0, 2.0)
        whole = [max(shape[axis] * abs(steps[axis]), 1) for axis in turned]
        memory = (self.numbers().standard_normal(whole) * scale + offset).astype(np_dtype(kind))
        a = memory.transpose(np.argsort(turned))[tuple(slice(None, None, s) for s in steps)]
        a = a[tuple(slice(0, n) for n in shape)]
        self.say(label, f"{kind}{list(shape)} steps {steps} of {turned} * {scale} + {offset}")
        if odd and a.size and self.maybe(0.2):
            finite = self.way == "samples"  # scikit-learn refuses others
            value = self.say("with", self.pick(0.0, 2.5, *([] if finite else [np.nan, np.inf])))
            place = [self.rnd.randint(0, n - 1) for n in shape]
            if math.isfinite(value):  # throughout a row
                place = [slice(None) if k in self.axes else i for k, i in enumerate(place)]
            a[tuple(place)] = value
        return a

    def affine(self, label, kind=None):
        some = ("float32",) if self.door.compiles else self.door.dtypes
        return self.array(label, self.length, kind or self.pick(self.kind, *some))

    def operands(self, *labels, one_kind=False):
        """Arrays of x's shape, a weight and a bias; None where there is none."""
        wider = "float32" if self.kind.endswith("16") else self.kind
        kinds = {"residual": self.pick(self.kind, wider)}
        arrays = [self.array(label, kind=kinds.get(label)) for label in labels]
        weight = self.affine("weight") if self.op.unit_weight or self.maybe(0.7) else None
        alone = weight is not None or not self.name.endswith("Norm")  # a class has none alone
        with_bias = self.op.center and alone and self.maybe(0.7)
        kind = weight.dtype.name if one_kind and weight is not None else None
        return arrays, weight, self.affine("bias", kind) if with_bias else None

    def said_axes(self):
        """The axes as a caller may say them."""
        ndim, one = len(self.shape), len(self.axes) == 1
        if self.axes == tuple(range(ndim - len(self.axes), ndim)) and self.maybe():
            shape = self.length[0] if one and self.maybe() else self.length
            return {"normalized_shape": self.say("normalized_shape", shape)}
        axes = tuple(a - ndim if self.maybe(0.3) else a for a in self.axes)
        return {"axis": self.say("axis", axes[0] if one and self.maybe() else axes)}

    # --- what is compared ---------------------------------------------------------------------

    def given(self, *arrays):
        found = [None if a is None else self.lib.from_numpy(a) for a in arrays]
        self.kept += [
            (a, host.tobytes()) for a, host in zip(found, arrays, strict=True) if host is not None
        ]
        return found

    def options(self, weight, bias):
        how = {"eps": self.eps, "weight": weight}
        return how | ({"bias": bias} if self.op.center else {})

    def assert_kept(self, *written):
        for a, was in self.kept:
            if not any(a is target for target in written):
                assert self.lib.to_numpy(a).tobytes() == was, "an input changed"

    def host(self, found):
        arrays = found if isinstance(found, (tuple, list)) else (found,)
        return [None if a is None else np.asarray(self.lib.to_numpy(a)) for a in arrays]

    def oracles(self, a, more=0):
        """Weight or bias, or a gradient of them, of ascending axes."""
        return None if a is None else a.transpose(np.argsort(self.axes)).astype(np.float64) + more

    def epsilon(self, kind):
        return float(np.finfo(stats_dtype(kind)).eps) if self.eps is None else self.eps

    def agree(self, found, x, weight, bias, kind=None):
        """Hold y, of x's dtype or another, and the statistics, if they are there, to the oracle."""
        kind, stats = kind or x.dtype.name, stats_dtype(x.dtype.name)
        small = tuple(1 if k in self.axes else n for k, n in enumerate(x.shape))
        looks = (x.shape, kind), (small, stats), (small, stats)
        assert [(a.shape, a.dtype.name) for a in found] == list(looks[: len(found)])
        if not x.size:
            assert all(np.isnan(a).all() for a in found[1:])
            return
        affine = self.oracles(weight, self.op.unit_weight), self.oracles(bias)
        given = x, sorted(self.axes), *affine, self.epsilon(kind), self.op.center
        want = oracle.layer_norm(*given)[:: 1 if self.op.center else 2]
        for k, (a, exact) in enumerate(zip(found, want, strict=False)):
            close(a, exact, self.N, *(affine if not k else [exact]))

    def agree_gradients(self, found, dy, x, weight, mask=(True, True, True), bias=None):
        """Hold dx, dweight and dbias to the oracle, those that the mask has."""
        kinds = [stats_dtype(x.dtype.name) if weight is None else weight.dtype.name] * 2
        kinds[1:] = kinds[1:] if bias is None else [bias.dtype.name]
        looks = (x.shape, x.dtype.name), *((self.length, kind) for kind in kinds)
        looks = [look if there else None for look, there in zip(looks, mask, strict=False)]
        assert [None if a is None else (a.shape, a.dtype.name) for a in found] == looks
        if not x.size:
            assert not any(a.any() for a in found[1:] if a is not None)
        else:
            turn, none = np.argsort(self.axes), [None] * (3 - len(found))
            sums = (None if a is None else a.transpose(turn) for a in found[1:])
            how = self.oracles(weight, self.op.unit_weight), self.epsilon(x.dtype.name)
            axes = sorted(self.axes)
            oracle.assert_gradients([found[0], *sums, *none], dy, x, axes, *how, self.op.center)

    # --- the ways -----------------------------------------------------------------------------

    def forward(self):
        """All options; inputs are left alone, or written to where that is asked for."""
        op, into, order = self.op, {}, "K"
        hosts, weight, bias = self.operands(*["x", "residual"][: 1 + op.residual])
        before, args = [a.copy() for a in hosts], self.given(*hosts)
        how = self.said_axes() | self.options(*self.given(weight, bias))
        how |= {"return_stats": self.say("return_stats", stats)} if (stats := self.maybe()) else {}
        for key, host, a in zip(("out", "sum_out"), hosts, args, strict=False):
            if self.door.writable and self.maybe(0.3):
                new = not self.say(f"{key} in place", self.maybe())
                into[key] = self.given(self.array(key, kind=host.dtype.name))[0] if new else a
        if self.door.strided and not into and self.maybe():
            how["order"] = order = self.say("order", self.pick(*"KCF"))
        function, added = public(op.function), {"op": op.name}
        added |= {"residual": args[1]} if op.residual else {}
        if self.name == "prepare":
            want = self.host(function(*args, **how, **self.zero))
            found = cn.prepare(args[0], **how, **added)(*args, **into)
            assert [a.tobytes() for a in self.host(found)] == [a.tobytes() for a in want]
        else:
            if self.name == "explain":
                device = self.pick(None, *["sm_75", "sm_90"] * self.door.strided)
                back = self.say("backward", self.maybe())
                about = {"device": self.say("device", device), "backward": back}
                told = cn.explain(args[0], **how, **into, **added, **about)
                assert (told.op, told.dtype, told.cols) == (op.name, self.kind, self.N)
                assert told.rows * told.cols == hosts[0].size
                assert told.stats_dtype == stats_dtype(self.kind)
                assert str(told)
            found = function(*args, **how, **into, **self.zero)
        results = found if isinstance(found, tuple) else (found,)
        for key, target in into.items():
            assert results[key == "sum_out"] is target
        self.assert_kept(*into.values())
        y, *others = self.host(found)
        if self.door.numpy and "out" not in into:
            assert y.strides == np.empty_like(hosts[0], order=order).strides
        source = sum_of(others.pop(0), *before) if op.residual else before[0]
        assert len(others) == stats * (1 + op.center)
        self.agree([y, *others], source, weight, bias, self.kind)

    def backward(self):
        op = self.op
        (x, dy), weight, _ = self.operands("x", "dy")
        how, every = self.said_axes(), (True,) * (2 + op.center)
        mask = self.pick(every, None, tuple(self.maybe() for _ in every))
        gx, gdy, gw = self.given(x, dy, weight)
        how |= {"weight": gw} | self.zero
        stats = public(op.function)(gx, eps=self.eps, return_stats=True, **how)[1:]
        named = dict(zip(("mean", "rstd")[not op.center :], stats, strict=True))
        how = {"normalized_shape": None} | how | named
        how |= {"output_mask": self.say("output_mask", mask)}
        self.kept += [(a, self.lib.to_numpy(a).tobytes()) for a in stats]
        found = self.host(public(self.name)(gdy, gx, **how))
        self.assert_kept()
        default = (True, weight is not None, True)[: len(every)]
        self.agree_gradients(found, dy, x, weight, default if mask is None else mask)

    def layer(self):
        (x, dy), weight, bias = self.operands("x", "dy", one_kind=True)
        with_bias = [bias is not None] * self.op.center
        kind = None if weight is None else weight.dtype
        layer = public(self.name)(self.length, self.eps, weight is not None, *with_bias, dtype=kind)
        for name, a in (("weight", weight), ("bias", bias)):
            if a is not None:
                getattr(layer, name)[...] = a
        self.agree([layer(x)], x, weight, bias)
        mask = True, weight is not None, bias is not None
        found = [layer.backward(dy), *(layer.grad.get(name) for name in ("weight", "bias"))]
        self.agree_gradients(found, dy, x, weight, mask)

    def tensors(self):
        """Of trailing axes, and what flows back from y alone."""
        import torch

        op, hosts = self.op, {}
        arrays, hosts["weight"], hosts["bias"] = self.operands("x", *["residual"] * op.residual)
        hosts |= zip(("x", "residual"), arrays, strict=False)
        leaves = {
            k: torch.nn.Parameter(self.given(a)[0]) for k, a in hosts.items() if a is not None
        }
        args = [leaves[name] for name in ("x", "residual") if name in leaves]
        affine = {name: leaves.get(name) for name in ("weight", "bias")[: 1 + op.center]}
        if self.way == "module":
            there = (a is not None for a in affine.values())
            function = public(self.name)(self.length, self.eps, *there)
            for name, parameter in affine.items():
                setattr(function, name, parameter)
            found = function(*args)
        else:
            found = public(self.name)(*args, self.length, eps=self.eps, **affine, **self.zero)
        dy = self.array("dy")
        y, *total = self.host(found)
        tensor = found.y if op.residual else found
        slopes = torch.autograd.grad(tensor, list(leaves.values()), self.given(dy)[0])
        got = dict(zip(leaves, self.host(slopes), strict=True))
        source = sum_of(*total, *arrays) if op.residual else arrays[0]
        if op.residual:
            slope, got["x"] = got["x"], got["residual"]
            rounded = got["x"].astype(slope.dtype)
            np.testing.assert_array_equal(slope.astype(float), rounded.astype(float))
        self.agree([y], source, hosts["weight"], hosts["bias"], self.kind)
        found = [got.get(name) for name in ("x", "weight", "bias")]
        mask = True, hosts["weight"] is not None, hosts["bias"] is not None
        self.agree_gradients(found, dy, source, hosts["weight"], mask, hosts["bias"])

    module = tensors

    def columns(self):
        """Of any numbers, with nulls; as columns, or as a table."""
        table = self.way == "table"
        library = self.say("library", self.pick(*TABLES)) if table else None
        M, N = self.rnd.randint(1, 70), self.rnd.randint(1, 12)
        some = [k for k in DTYPES if not (table and k == "bfloat16")]
        one, mixed = self.pick("float32", *some), self.maybe()
        kinds = [self.pick(*some) if mixed else one for _ in range(N)]
        self.say("columns", f"{M} x {kinds}")
        values = [self.column(kind, M) for kind in kinds]
        valid = [np.full(M, True) for _ in kinds]
        given = list(values)
        for j in range(0 if table else N):
            if self.maybe(0.3):
                share, bit = self.pick(0.5, 0.0, 1.0), self.pick(0, 1, 7, 8, 13)
                valid[j] = self.numbers().random(M) >= share
                step = self.pick(1, 2)
                bits = np.repeat(bitmap(valid[j], bit), step)[::step]
                given[j] = values[j], bits, bit
                self.say(f"nulls of {j}", f"{share} from bit {bit}, step {step}")
        self.axes, self.length, self.N = (0,), (N,), N
        weight = self.affine("weight") if self.op.unit_weight or self.maybe() else None
        bias = self.affine("bias") if self.op.center and self.maybe() else None
        omit = self.say("omit", self.maybe())
        dtype = "float32" if table and self.kind == "bfloat16" else self.kind
        how = self.options(weight, bias) | self.zero | {"dtype": self.say("dtype", dtype)}
        how |= {"nulls": "omit"} if omit else {}
        if table:
            frame = importlib.import_module(library).DataFrame
            df = frame({f"c{j}": a for j, a in enumerate(values)})
            found = public(self.name)(df, order=self.say("order", self.pick(*"KCF")), **how)
            assert type(found) is frame
            assert list(found.columns) == list(df.columns)
            y = found.to_numpy()
        else:
            out = self.pick(None, np.empty((M, N), np_dtype(dtype), order=self.pick(*"CF")))
            y = public(self.name)(given, out=out, **how)
            assert out is None or y is out
        affine = self.oracles(weight, self.op.unit_weight), self.oracles(bias)
        about = {"dtype": dtype, "omit": omit, "valid": valid, "center": self.op.center}
        want = expected(values, *affine, eps=self.epsilon(dtype), **about)
        assert y.dtype == np_dtype(dtype)
        close(y, want, N, *affine)

    table = columns

    def column(self, kind, M):
        if kind.lstrip("u").startswith("int") and self.maybe(0.3):
            ends = np.iinfo(kind)
            a = self.numbers().integers(ends.min, ends.max, M, kind, endpoint=True)
        else:
            a = column(self.numbers(), kind, M)
        if "float" in kind and self.maybe(0.2):
            a = a * np_dtype(kind).type(500)
        if "float" in kind and self.maybe(0.2):
            a[self.rnd.randint(0, M - 1)] = np.nan
        return a[:: self.pick(1, -1)]

    def lazy(self):
        """Of Dask's arrays in any chunks; RMS norm by the function that takes any array."""
        import dask.array as da

        (x,), weight, bias = self.operands("x")
        chunks = tuple(self.cut(n) for n in x.shape)
        source = da.from_array(x, chunks=self.say("chunks", chunks))
        lazily = self.say("weight of Dask", self.maybe())
        affine = [a if a is None or not lazily else da.from_array(a, 200) for a in (weight, bias)]
        how = self.said_axes() | self.options(*affine) | self.zero | {"return_stats": True}
        found = public(self.name if self.op.center else "rms_norm")(source, **how)
        assert found.y.chunks == source.chunks
        self.agree([a.compute(scheduler="sync") for a in found], x, weight, bias)

    def cut(self, n):
        """Lengths of chunks of n elements, some of none."""
        ends = sorted(self.rnd.randint(0, n) for _ in range(self.rnd.randint(0, 3)))
        return tuple(b - a for a, b in zip([0, *ends], [*ends, n], strict=True))

    def samples(self):
        x = self.array("x")
        before, given = x.copy(), self.given(x)
        copy = not self.say("in place", self.maybe(0.3))
        y = public(self.name)(eps=self.eps, copy=copy).fit_transform(*given)
        self.assert_kept(*([] if copy else given))
        self.agree(self.host(y), before, None, None)
