"""What is measured: ops, and their cases in the order of measurement. A new op is a row of OPS."""

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EPS = 1e-5
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Op:
    """What is computed, and the least that it moves."""

    norm: str  # whose reference check.py has, and each peer a function
    direction: str
    passes: int  # over M * N elements of x, y, dy and dx
    vectors: int  # of N: weight, bias; weight, dweight, dbias
    statistics: int  # of M: mean and rstd, written and read


FWD, BWD, BOTH = "layer_norm_fwd", "layer_norm_bwd", "layer_norm_fwd_bwd"
OPS = {
    FWD: Op("layer_norm", "forward", 2, 2, 0),
    BWD: Op("layer_norm", "backward", 3, 3, 2),
    BOTH: Op("layer_norm", "both", 5, 5, 4),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One problem that every contender solves.

    Layouts: C; offset, whose bases are one element off, and apart, y's three; pitch, whose rows are
    16 bytes apart; F-C, F-F and C-F, where x and y lie by column (F) or by row; NCHW; columns, each
    an array.
    """

    op: str
    group: str
    dtype: str
    shape: tuple[int, ...]
    axis: int = -1
    layout: str = "C"
    weight_dtype: str | None = "same"  # "same": x's; None: neither weight nor bias

    N = property(lambda self: self.shape[self.axis])
    M = property(lambda self: math.prod(self.shape) // self.N)
    direction = property(lambda self: OPS[self.op].direction)
    label = property(lambda self: "x".join(map(str, self.shape)))
    itemsize = property(lambda self: ITEMSIZE[self.dtype])

    @property
    def affine_dtype(self) -> str | None:
        return self.dtype if self.weight_dtype == "same" else self.weight_dtype

    @property
    def strided(self) -> bool:
        return self.layout not in ("C", "offset", "apart", "pitch")

    @property
    def pitch(self) -> int:
        return self.N + (16 // self.itemsize if self.layout == "pitch" else 0)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the passes: what the copies beside a case move."""
        return self.M * self.N * OPS[self.op].passes * self.itemsize

    @property
    def moved_bytes(self) -> int:
        """The floor, whatever a kernel really moves: bench/README.md, 5."""
        op, affine = OPS[self.op], self.affine_dtype
        vectors = op.vectors * self.N * ITEMSIZE[affine] if affine else 0
        return self.copy_bytes + vectors + op.statistics * self.M * max(4, self.itemsize)

    def __str__(self) -> str:
        where = "" if self.layout == "C" else f" {self.layout}"
        return f"{self.direction} {self.dtype} {self.label}{where}"


# -- on the CPU -----------------------------------------------------------------------------------

# The eight that the claims speak of: what models and tables have, and one row per thread.
SHAPES = ((8, 768), (512, 768), (4096, 768), (16384, 1024), (4096, 4096), (1024, 16384),
          (200000, 64), (2, 4000000))  # fmt: skip
SWEEP = 2**23  # elements: x and y are 64 MiB of float32, beyond a usual last-level cache


def _of(group: str, shapes: Iterable[Any], ops: Iterable[str], *dtypes: str, **about: Any) -> Any:
    every = itertools.product(dtypes or ("float32",), shapes, ops)
    return [Case(op, group, dtype, shape, **about) for dtype, shape, op in every]


def _layouts() -> list[Case]:
    """Column-major matrices, as frames hand them over, and channels-first images."""
    shapes = ((200000, 64), (20000, 500))
    made = _of("layouts", shapes, (FWD, BWD), layout="F-F")
    made += _of("layouts", shapes, (FWD,), layout="F-C")
    return made + _of("layouts", ((32, 96, 56, 56),), (FWD, BWD), axis=1, layout="NCHW")


GROUPS = {
    "shapes": lambda: _of("shapes", SHAPES, OPS),
    "small": lambda: _of("small", ((1, 8), (8, 64), (32, 256)), (FWD, BOTH)),
    "layouts": _layouts,
    "columns": lambda: _of("columns", ((SWEEP // 4**k, 4**k) for k in range(2, 11)), (FWD,)),
    "dtypes": lambda: _of("dtypes", ((512, 768), (4096, 4096)), (FWD, BOTH), "float16", "bfloat16",
                          "float64"),
    "odd": lambda: _of("odd", ((4096, 767), (16381, 1023), (2000, 5001)), (FWD, BOTH)),
    "scale": lambda: _of("scale", ((512, 768), (4096, 4096), (200000, 64)), (FWD,),
                         weight_dtype=None),
}  # fmt: skip


def cpu_cases(groups: Iterable[str]) -> list[Case]:
    return [case for name, make in GROUPS.items() if name in groups for case in make()]


# -- on a GPU -------------------------------------------------------------------------------------

GB, MB = 10**9, 10**6
BIG, SMALL, FEW, LAYOUT, LAYOUTS = "1GB", "33MB", "few rows", "layout", "layouts"
COLUMN_LAYOUTS = ("F-C", "F-F", "C-F", "columns")
# Channels and pixels of ConvNeXt-T's stages at 224 x 224.
IMAGES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7))


def sized(
    op: str, dtype: str, N: int, group: str = BIG, M: int | None = None, **about: Any
) -> Case:
    """Case of about the bytes of its group; an odd number of rows, so that blocks have a rest."""
    size = 33 * MB if group == SMALL else GB
    M = M or max(1, size // (OPS[op].passes * ITEMSIZE[dtype] * N)) | 1
    return Case(op, group, dtype, (M, N), **about)


def _columns(layout: str, dtype: str, N: int, odd: bool = False, **about: Any) -> Case:
    """About 1 GB; columns that begin on a boundary of 128 bytes, or anywhere if `odd`."""
    M = GB // (2 * ITEMSIZE[dtype] * N) // 64 * 64 + odd
    return Case(FWD, LAYOUTS, dtype, (M, N), layout=layout, **about)


def _images(*dtypes: str) -> list[Case]:
    shapes = [(d, (GB // (2 * ITEMSIZE[d] * math.prod(s)), *s)) for d in dtypes for s in IMAGES]
    return [Case(FWD, LAYOUTS, d, shape, axis=1, layout="NCHW") for d, shape in shapes]


def _forward() -> list[Case]:
    """About four minutes with torch.compile; the cases that the claims rest on come first."""
    make, wide = functools.partial(sized, FWD), (256, 1024, 4096, 16384, 65536, 262144, 1000, 4095)
    cases = [make(d, N) for d in ("bfloat16", "float32") for N in wide]
    cases += [make("bfloat16", N, SMALL) for N in (256, 1024, 4096, 16384, 65536)]
    few = (("bfloat16", 1, 64), ("bfloat16", 8, 4), ("float32", 1, 16))
    cases += [make(d, N * 2**20, FEW, M, weight_dtype=None) for d, M, N in few]
    cases += [make("float32", 2**24, FEW, 1), make("float16", 1024), make("float16", 4096)]
    cases += [make("float64", 4096), make("bfloat16", 4096, LAYOUT, weight_dtype="float32")]
    cases += [make("bfloat16", 4096, LAYOUT, layout="offset")]
    return [*cases, make("bfloat16", 4095, LAYOUT, layout="pitch")]


def _backward() -> list[Case]:
    """About eight minutes, half of it for the cases that the claims rest on."""
    make, both = functools.partial(sized, BWD), functools.partial(sized, BOTH)
    wide, halves = (4096, 1024, 256, 16384, 64, 1000, 4095), ("bfloat16", "float32")
    cases = [make(d, N) for N in wide for d in halves]
    cases += [make("float16", N) for N in (1024, 4096)]
    cases += [make("bfloat16", N, SMALL) for N in (256, 1024, 4096, 16384)]
    cases += [make("float32", N, SMALL) for N in (1024, 4096)]
    cases += [both(d, N) for N in (1024, 4096, 16384) for d in halves]
    cases += [both("bfloat16", N, SMALL) for N in (1024, 4096)]
    cases += [make(d, 65536) for d in halves]  # K4
    cases += [make("bfloat16", 2**18), make("bfloat16", 2**22, FEW, 8, weight_dtype=None)]  # K5
    cases += [make("bfloat16", 4096, LAYOUT, weight_dtype=w) for w in ("float32", None)]
    return [*cases, make("bfloat16", 4096, LAYOUT, layout="offset"), make("float64", 4096)]


def _strided() -> list[Case]:
    """About two minutes; the claim on F-C first."""
    cases = [_columns("F-C", "float32", N) for N in (64, 8, 900, 31, 200, 500)]
    cases += [_columns("columns", "float32", N) for N in (64, 8, 500)]
    cases += [*_images("bfloat16"), *(_columns("F-F", "float32", N) for N in (8, 64, 500))]
    cases += [_columns("F-C", "float32", 100, weight_dtype=None)]  # what scale(axis=1) computes
    cases += [_columns("F-C", "float32", 200, odd=True), _columns("C-F", "float32", 500)]
    cases += [_columns("F-C", "bfloat16", N) for N in (64, 500)]
    return [*cases, _columns("F-F", "bfloat16", 64, odd=True)]


# For the simulated device: a warp, an offset base, a pitch without weight, a cluster, each layout.
TINY = {
    "forward": [Case(FWD, BIG, "float32", (5, 32)), Case(FWD, FEW, "float32", (1, 33001)),
                Case(FWD, LAYOUT, "float32", (3, 33), layout="offset"),
                Case(FWD, LAYOUT, "float32", (2, 33), layout="pitch")],
    "backward": [Case(BWD, BIG, "float32", (5, 32)), Case(BWD, FEW, "float32", (1, 9001)),
                 Case(BWD, LAYOUT, "float32", (2, 33), layout="pitch", weight_dtype=None),
                 Case(BOTH, BIG, "float32", (5, 32))],
    "layouts": [*(Case(FWD, LAYOUTS, "float32", (41, 9), layout=way) for way in COLUMN_LAYOUTS),
                Case(FWD, LAYOUTS, "float32", (2, 5, 3, 4), 1, "NCHW", None)],
}  # fmt: skip
QUICK = {"forward": _forward, "backward": _backward, "layouts": _strided}


def gpu_cases(step: str, tiny: bool = False) -> list[Case]:
    return TINY[step] if tiny else QUICK[step]()
