"""Calls whose bits and error sentences are held: what `tests/frozen.json` was made of.

``python -m tests.frozen`` writes the file anew. A change of it is a change of what users see, and
says in its commit why.
"""

import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import cupynorm as cn
from tests.conftest import ALL_DTYPES, Backend, library, np_dtype

FILE = Path(__file__).with_name("frozen.json")
LIBRARIES = (Backend.NUMPY, Backend.TORCH, Backend.STRICT)  # JAX's bits go by the CPU


def values(shape: tuple[int, ...], dtype: str, seed: int = 0, offset: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * 2 + offset).astype(np_dtype(dtype))


def digest(*arrays: Any) -> str:
    """Of shapes, dtypes and bits; of layouts where strides say more than the shape."""
    text = hashlib.sha256()
    for a in arrays:
        a = np.asarray(a)
        text.update(f"{a.shape} {a.dtype}".encode())
        text.update(np.ascontiguousarray(a).tobytes())
    return text.hexdigest()[:16]


# --- layouts: x by name, and the axes to normalize ------------------------------------------------

LAYOUTS = {
    "small": (lambda d: values((8, 64), d), {}),
    "one_axis": (lambda d: values((33,), d), {}),
    "odd": (lambda d: values((7, 131), d, offset=1e3), {}),
    "rows": (lambda d: values((70, 1000), d), {}),
    "two_axes": (lambda d: values((5, 6, 40), d), {"normalized_shape": (6, 40)}),
    "long": (lambda d: values((3, 9001), d), {}),
    "many": (lambda d: values((700, 768), d), {}),
    "few_long": (lambda d: values((2, 150001), d), {}),
    "column_major": (lambda d: np.asfortranarray(values((300, 37), d)), {}),
    "channels_first": (lambda d: values((3, 24, 5, 7), d), {"axis": 1}),
    "turned_axes": (lambda d: values((4, 5, 6), d), {"axis": (2, 0)}),
    "padded": (lambda d: values((40, 96), d)[:, 3:80], {}),
    "backwards": (lambda d: values((12, 65), d)[::-1, ::-1], {}),
    "every_other": (lambda d: values((12, 130), d)[:, ::2], {}),
    "first_axis": (lambda d: values((90, 33), d), {"axis": 0}),
}


def affine(x: np.ndarray, how: dict[str, Any], kind: str, dtype: str) -> dict[str, np.ndarray]:
    """Weight and bias: '' none, 'w', 'b', 'wb', 'wb16' (in float16), in x's dtype of sums."""
    axes = how.get("axis", -1)
    axes = axes if isinstance(axes, tuple) else (axes,)
    shape = how.get("normalized_shape", tuple(x.shape[a] for a in axes))
    own = "float64" if dtype == "float64" else "float32"
    wide = "float16" if kind.endswith("16") else own
    made = {}
    if "w" in kind:
        made["weight"] = values(shape, wide, seed=1, offset=1.0)
    if "b" in kind:
        made["bias"] = values(shape, wide, seed=2, offset=0.0)
    return made


def given_to(backend: Backend, a: np.ndarray) -> Any:
    """An array of the library; torch has no negative strides."""
    turned = backend is Backend.TORCH and any(step < 0 for step in a.strides)
    return library(backend).from_numpy(a.copy() if turned else a)


def taken_from(backend: Backend, a: Any) -> np.ndarray:
    host = np.asarray(library(backend).to_numpy(a))
    as_bits = backend is Backend.TORCH and host.dtype == ml_dtypes.bfloat16
    return host.view(np.int16) if as_bits else host


def forward(backend: Backend, layout: str, dtype: str, kind: str) -> list[np.ndarray]:
    make, how = LAYOUTS[layout]
    x = make(dtype)
    given = {k: given_to(backend, v) for k, v in affine(x, how, kind, dtype).items()}
    result = cn.layer_norm(given_to(backend, x), **how, **given, return_stats=True)
    plain = cn.layer_norm(given_to(backend, x), **how, **given)
    y, *stats = (taken_from(backend, a) for a in result)
    assert digest(taken_from(backend, plain)) == digest(y)
    return [y, *stats]


def backward(backend: Backend, layout: str, dtype: str) -> list[np.ndarray]:
    make, how = LAYOUTS[layout]
    x = make(dtype)
    dy = np.copy(x * 0, order="K") + values(x.shape, dtype, seed=4, offset=0.1)
    # Statistics of NumPy's own: what is frozen here is the backward alone.
    _, mean, rstd = cn.layer_norm(x, **how, return_stats=True)
    given = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, **affine(x, how, "w", dtype)}
    given = {k: given_to(backend, v) for k, v in given.items()}
    grads = cn.layer_norm_backward(**given, **{"normalized_shape": None, **how})
    return [taken_from(backend, a) for a in grads]


def array_cases() -> Any:
    """(name, function that gives arrays), in both directions."""
    for backend, layout, dtype in itertools.product(LIBRARIES, LAYOUTS, ALL_DTYPES):
        few = backend is Backend.STRICT
        if few and (layout in ("many", "few_long", "rows") or dtype.endswith("16")):
            continue
        kinds = ("", "wb", "wb16") if layout in ("small", "odd", "long") else ("wb",)
        about, name = (backend, layout, dtype), f"{backend.value} {layout} {dtype}"
        for kind in kinds:
            yield f"forward {name} {kind}".rstrip(), functools.partial(forward, *about, kind)
        if not dtype.endswith("16"):
            yield f"backward {name}", functools.partial(backward, *about)


def ordered(dtype: str, order: str) -> list[np.ndarray]:
    y = cn.layer_norm(values((6, 5, 4), dtype), axis=1, order=order)
    return [y, np.array(y.strides)]


def in_place(dtype: str) -> list[np.ndarray]:
    x = values((9, 70), dtype)
    assert cn.layer_norm(x, out=x) is x
    return [x]


def into(dtype: str) -> list[np.ndarray]:
    out = np.zeros((70, 9), np_dtype(dtype)).T
    assert cn.layer_norm(values((9, 70), dtype), out=out) is out
    return [out]


def unaligned() -> list[np.ndarray]:
    memory = np.zeros(9 * 70 * 4 + 1, np.uint8)
    x = memory[1:].view(np.float32).reshape(9, 70)
    x[...] = values((9, 70), "float32")
    return [cn.layer_norm(x)]


def written_cases() -> Any:
    """Out, order, and in place, of NumPy arrays: bits, and where they lie."""
    for dtype in ALL_DTYPES:
        for order in "KCF":
            yield f"order {order} {dtype}", functools.partial(ordered, dtype, order)
        yield f"in place {dtype}", functools.partial(in_place, dtype)
        yield f"into column-major {dtype}", functools.partial(into, dtype)
    big = values((9, 70), "float32").astype(">f4")
    yield "other byte order", lambda: [cn.layer_norm(big).astype("<f4")]
    yield "unaligned", unaligned
    for name, nothing in (
        ("empty rows", np.empty((4, 0), "f4")),
        ("no rows", np.empty((0, 4), "f4")),
    ):
        yield name, lambda x=nothing: list(cn.layer_norm(x, return_stats=True))


def error_cases() -> Any:
    """(name, function that raises)."""
    x = np.ones((4, 6), np.float32)
    w, memory = np.ones(6, np.float32), np.ones((6, 6), np.float32)
    calls = {
        "integer x": lambda: cn.layer_norm(np.ones((2, 3), int)),
        "bool x": lambda: cn.layer_norm(np.ones((2, 3), bool)),
        "complex x": lambda: cn.layer_norm(np.ones((2, 3), complex)),
        "longdouble x": lambda: cn.layer_norm(np.ones((2, 3), np.longdouble)),
        "list": lambda: cn.layer_norm([[1.0, 2.0]]),
        "scalar": lambda: cn.layer_norm(np.float32(2)),
        "no axis": lambda: cn.layer_norm(np.array(1.0)),
        "masked": lambda: cn.layer_norm(np.ma.ones((2, 3))),
        "matrix": lambda: cn.layer_norm(np.asmatrix(np.ones((2, 3)))),
        "both": lambda: cn.layer_norm(x, 6, axis=-1),
        "axis out of range": lambda: cn.layer_norm(x, axis=2),
        "axis twice": lambda: cn.layer_norm(x, axis=(0, -2)),
        "axis empty": lambda: cn.layer_norm(x, axis=()),
        "axis float": lambda: cn.layer_norm(x, axis=1.0),
        "axis bool": lambda: cn.layer_norm(x, axis=True),
        "axis string": lambda: cn.layer_norm(x, axis="last"),
        "shape": lambda: cn.layer_norm(x, 5),
        "shape too long": lambda: cn.layer_norm(x, (2, 4, 6)),
        "shape empty": lambda: cn.layer_norm(x, ()),
        "shape float": lambda: cn.layer_norm(x, 6.0),
        "shape float in a tuple": lambda: cn.layer_norm(x, (6.0,)),
        "eps string": lambda: cn.layer_norm(x, eps="1e-5"),
        "eps bool": lambda: cn.layer_norm(x, eps=True),
        "eps nan": lambda: cn.layer_norm(x, eps=float("nan")),
        "eps huge": lambda: cn.layer_norm(x, eps=10**400),
        "order": lambda: cn.layer_norm(x, order="A"),
        "weight shape": lambda: cn.layer_norm(x, 6, np.ones(5, np.float32)),
        "weight dtype": lambda: cn.layer_norm(x, 6, np.ones(6, int)),
        "bias dtype": lambda: cn.layer_norm(x, 6, w, np.ones(6, bool)),
        "weight list": lambda: cn.layer_norm(x, 6, [1.0] * 6),
        "bias scalar": lambda: cn.layer_norm(x, 6, w, 0.0),
        "weight masked": lambda: cn.layer_norm(x, 6, np.ma.ones(6)),
        "out shape": lambda: cn.layer_norm(x, out=np.ones((6, 4), np.float32)),
        "out dtype": lambda: cn.layer_norm(x, out=np.ones((4, 6))),
        "out order": lambda: cn.layer_norm(x, out=np.ones_like(x), order="C"),
        "out list": lambda: cn.layer_norm(x, out=[0.0]),
        "out read-only": lambda: cn.layer_norm(x, out=np.broadcast_to(np.float32(0), (4, 6))),
        "out over x": lambda: cn.layer_norm(memory[:4], out=memory[1:5]),
        "out over weight": lambda: cn.layer_norm(x[:1], 6, w, out=w.reshape(1, 6)),
        "out over bias": lambda: cn.layer_norm(x[:1], 6, None, w, out=w.reshape(1, 6)),
        "out over itself": lambda: cn.layer_norm(
            x, out=np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (4, 6), (4, 4))
        ),
        "dy shape": lambda: _backward(dy=np.ones((6, 4), np.float32)),
        "dy dtype": lambda: _backward(dy=np.ones((4, 6))),
        "mean shape": lambda: _backward(mean=np.ones(4, np.float32)),
        "mean dtype": lambda: _backward(mean=np.ones((4, 1))),
        "rstd list": lambda: _backward(rstd=[1.0]),
        "mask": lambda: _backward(output_mask=(1, 0, 1)),
        "mask too short": lambda: _backward(output_mask=(True,)),
        "mask no sequence": lambda: _backward(output_mask=True),
        "backward weight": lambda: _backward(weight=np.ones(3, np.float32)),
        "backward both": lambda: _backward(axis=1),
        "device unknown": lambda: cn.explain(x, device="sm_10"),
        "warmup dtype": lambda: cn.warmup(8, dtypes="int8", device="cpu"),
        "prepare list": lambda: cn.prepare([1.0]),
        "prepared shape": lambda: cn.prepare(x)(x[:2]),
        "prepared dtype": lambda: cn.prepare(x)(x.astype(np.float64)),
        "prepared strides": lambda: cn.prepare(x)(np.asfortranarray(x)),
        "prepared type": lambda: cn.prepare(x)([1.0]),
        "prepared out": lambda: cn.prepare(x)(x, out=np.ones(3, np.float32)),
    }
    calls |= _errors_of_torch() | _errors_of_tables()
    for name, call in calls.items():
        yield f"error {name}", call


def _backward(**changed: Any) -> Any:
    x = np.ones((4, 6), np.float32)
    stats = np.ones((4, 1), np.float32)
    given = {"dy": x, "x": x, "normalized_shape": 6, "mean": stats, "rstd": stats} | changed
    return cn.layer_norm_backward(**given)


def _errors_of_torch() -> dict[str, Any]:
    import torch

    t, w = torch.ones(4, 6), torch.ones(6)
    x = np.ones((4, 6), np.float32)
    return {
        "torch integer": lambda: cn.layer_norm(t.int()),
        "torch shape": lambda: cn.layer_norm(t, 5),
        "torch float shape": lambda: cn.layer_norm(t, 6.0),
        "torch weight shape": lambda: cn.layer_norm(t, 6, torch.ones(5)),
        "torch weight of NumPy": lambda: cn.layer_norm(t, 6, np.ones(6, np.float32)),
        "NumPy weight of torch": lambda: cn.layer_norm(x, 6, w),
        "torch weight elsewhere": lambda: cn.layer_norm(t, 6, w.to("meta")),
        "torch out dtype": lambda: cn.layer_norm(t, out=t.double()),
        "torch out shape": lambda: cn.layer_norm(t, out=torch.ones(6)),
        "torch out over x": lambda: cn.layer_norm(torch.ones(5, 6)[:4], out=t.expand(4, 6)[:2]),
        "torch out over weight": lambda: cn.layer_norm(t[:1], 6, w, out=w.view(1, 6)),
        "torch out requires grad": lambda: cn.layer_norm(
            t, out=torch.ones(4, 6, requires_grad=True)
        ),
        "torch eps": lambda: cn.layer_norm(t, eps="x"),
        "torch prepared grad": lambda: cn.prepare(t)(torch.ones(4, 6, requires_grad=True)),
        "torch prepared shape": lambda: cn.prepare(t)(t[:2]),
    }


def _errors_of_tables() -> dict[str, Any]:
    import pandas as pd

    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    words = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    c = np.ones(3, np.float32)
    return {
        "frame of words": lambda: cn.layer_norm(words),
        "frame weight": lambda: cn.layer_norm(frame, 2, np.ones(3)),
        "frame axis": lambda: cn.layer_norm(frame, axis=0),
        "frame shape": lambda: cn.layer_norm(frame, 3),
        "series": lambda: cn.layer_norm(frame["a"]),
        "columns empty": lambda: cn.layer_norm_columns([]),
        "columns lengths": lambda: cn.layer_norm_columns([c, c[:2]]),
        "columns 2-D": lambda: cn.layer_norm_columns([c, c.reshape(1, 3)]),
        "columns nulls": lambda: cn.layer_norm_columns([c, c], nulls="zero"),
        "columns dtype": lambda: cn.layer_norm_columns([c, c], dtype="int32"),
        "columns of objects": lambda: cn.layer_norm_columns([c, np.array(["a", "b", "c"])]),
        "columns weight": lambda: cn.layer_norm_columns([c, c], np.ones(3)),
        "columns out": lambda: cn.layer_norm_columns([c, c], out=np.ones((2, 3), np.float32)),
    }


def cases() -> dict[str, Any]:
    """Every call by name."""
    return dict(itertools.chain(array_cases(), written_cases(), error_cases()))


def outcome(call: Any) -> str:
    """Digest of what a call gives, or the sentence of what it raises."""
    try:
        arrays = call()
    except (ImportError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return digest(*arrays) if isinstance(arrays, list) else f"gave a {type(arrays).__name__}"


if __name__ == "__main__":
    found = {name: outcome(call) for name, call in cases().items()}
    FILE.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(len(found), "calls")
