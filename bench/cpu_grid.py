"""What the CPU benchmark measures: cases, in the order of measurement."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from bench.gpu_grid import BOTH, BWD, FWD, PASSES, STATISTICS, VECTORS
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["GROUPS", "SHAPES", "CpuCase", "grid"]

# The eight that the claims speak of: what models and tables have, and one row per thread.
SHAPES = (
    (8, 768),
    (512, 768),
    (4096, 768),
    (16384, 1024),
    (4096, 4096),
    (1024, 16384),
    (200000, 64),
    (2, 4000000),
)
HALVES = ("float16", "bfloat16")
SWEEP = 2**23  # elements: x and y are 64 MiB of float32, beyond a usual last-level cache
# Column-major matrices, as frames hand them over, and channels-first images.
LAYOUTS = (((200000, 64), -1, "F"), ((20000, 500), -1, "F"), ((32, 96, 56, 56), 1, "C"))


@dataclass(frozen=True, slots=True)
class CpuCase:
    """One problem that every contender solves."""

    op: str
    group: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1
    order: str = "C"  # of x and dy in memory
    affine: bool = True
    eps: float = 1e-5

    @property
    def N(self) -> int:
        return self.shape[self.axis]

    @property
    def M(self) -> int:
        return math.prod(self.shape) // self.N

    @property
    def copy_bytes(self) -> int:
        """Bytes of the passes over x, y, dy and dx: what the copies beside a case move."""
        return self.M * self.N * PASSES[self.op] * ITEMSIZE[self.dtype]

    @property
    def moved_bytes(self) -> int:
        """The least that can move: as the GPU benchmark counts, see bench/README.md."""
        affine = VECTORS[self.op] * self.N * ITEMSIZE[self.dtype] if self.affine else 0
        statistics = STATISTICS[self.op] * self.M * ITEMSIZE[stats_dtype(self.dtype)]
        return self.copy_bytes + affine + statistics

    def __str__(self) -> str:
        layout = "" if self.order == "C" and self.axis == -1 else f" {self.order} axis={self.axis}"
        return f"{self.op.removeprefix('layer_norm_')} {self.dtype} {self.label}{layout}"

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))


def shapes() -> Iterable[CpuCase]:
    """The eight shapes in float32: forward, backward, both."""
    return (CpuCase(op, "shapes", shape) for shape in SHAPES for op in (FWD, BWD, BOTH))


def small() -> Iterable[CpuCase]:
    """Where a call costs more than its arithmetic; (1, 8) is as good as none."""
    for shape in ((1, 8), (8, 64), (32, 256)):
        yield CpuCase(FWD, "small", shape)
        yield CpuCase(BOTH, "small", shape)


def layouts() -> Iterable[CpuCase]:
    """Arrays whose normalized axis is strided."""
    for shape, axis, order in LAYOUTS:
        for op in (FWD, BWD):
            yield CpuCase(op, "layouts", shape, axis=axis, order=order)


def dtypes() -> Iterable[CpuCase]:
    """What is half as wide and twice as wide."""
    for dtype in (*HALVES, "float64"):
        for shape in ((512, 768), (4096, 4096)):
            yield CpuCase(FWD, "dtypes", shape, dtype)
            yield CpuCase(BOTH, "dtypes", shape, dtype)


def odd() -> Iterable[CpuCase]:
    """Lengths that break vectors."""
    for shape in ((4096, 767), (16381, 1023), (2000, 5001)):
        yield CpuCase(FWD, "odd", shape)
        yield CpuCase(BOTH, "odd", shape)


def scale() -> Iterable[CpuCase]:
    """What scikit-learn's `scale` computes: without weight, bias and eps, so by everybody here."""
    plain = functools.partial(CpuCase, FWD, "scale", affine=False, eps=0.0)
    return (plain(shape) for shape in ((512, 768), (4096, 4096), (200000, 64)))


def columns() -> Iterable[CpuCase]:
    """Bandwidth against N at a constant number of bytes."""
    return (CpuCase(FWD, "columns", (SWEEP // N, N)) for N in (2**k for k in range(4, 21, 2)))


def rows() -> Iterable[CpuCase]:
    """Time against bytes at a constant N."""
    return (CpuCase(FWD, "rows", (4**k, 1024)) for k in range(8))


GROUPS = {f.__name__: f for f in (shapes, small, layouts, columns, rows, dtypes, odd, scale)}


def grid(groups: Iterable[str]) -> list[CpuCase]:
    """Cases of the groups, in their order here."""
    return [case for name, make in GROUPS.items() if name in groups for case in make()]
