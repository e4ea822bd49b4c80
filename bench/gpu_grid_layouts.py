"""Cases of the table of layouts: how x and y lie, N from 8 to 900, and ConvNeXt's images."""

import math
from dataclasses import dataclass

from bench.gpu_grid import GB, Case
from cupynorm._problem import ITEMSIZE

__all__ = [
    "COLUMN_LAYOUTS",
    "IMAGES",
    "LAYOUTS",
    "LAYOUT_GRIDS",
    "LayoutCase",
    "full",
    "quick",
    "tiny",
]

LAYOUTS = "layouts"
COLUMN_LAYOUTS = ("F-C", "F-F", "C-F", "columns")
# Channels and pixels of ConvNeXt-T's stages at 224 x 224.
IMAGES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7))


@dataclass(frozen=True, slots=True)
class LayoutCase(Case):
    """A case whose x and y lie as `layout` says; NCHW: `pixels` of each of rows / H / W images."""

    pixels: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x and y, as they are passed."""
        if self.layout != "NCHW":
            return self.rows, self.N
        return self.rows // math.prod(self.pixels), self.N, *self.pixels


def columns(
    layout: str, dtype: str, N: int, *, odd: bool = False, weight_dtype: str | None = "same"
) -> LayoutCase:
    """About 1 GB; columns that begin on a boundary of 128 bytes, or anywhere if `odd`."""
    rows = GB // (2 * ITEMSIZE[dtype] * N) // 64 * 64 + odd
    return LayoutCase(dtype, rows, N, LAYOUTS, weight_dtype, layout)


def image(dtype: str, stage: tuple[int, int, int]) -> LayoutCase:
    """About 1 GB of images, channels first."""
    C, H, W = stage
    count = GB // (2 * ITEMSIZE[dtype] * C * H * W)
    return LayoutCase(dtype, count * H * W, C, LAYOUTS, "same", "NCHW", pixels=(H, W))


def quick() -> list[LayoutCase]:
    """About two minutes; the claim on F-C first."""
    cases = [columns("F-C", "float32", N) for N in (64, 8, 900, 31, 200, 500)]
    cases += [columns("columns", "float32", N) for N in (64, 8, 500)]
    cases += [image("bfloat16", stage) for stage in IMAGES]
    cases += [columns("F-F", "float32", N) for N in (8, 64, 500)]
    cases += [
        columns("F-C", "float32", 100, weight_dtype=None),  # what scale(axis=1) computes
        columns("F-C", "float32", 200, odd=True),
        columns("C-F", "float32", 500),
        columns("F-C", "bfloat16", 64),
        columns("F-C", "bfloat16", 500),
        columns("F-F", "bfloat16", 64, odd=True),
    ]
    return cases


def full() -> list[LayoutCase]:
    """The quick grid, then every other point."""
    cases = quick()
    for dtype in ("float32", "bfloat16", "float64"):
        for N in (8, 13, 16, 31, 64, 65, 100, 200, 333, 500, 777, 900):
            cases += [columns(layout, dtype, N) for layout in COLUMN_LAYOUTS]
        for N in (13, 64, 200, 777):
            cases += [columns(layout, dtype, N, odd=True) for layout in ("F-C", "F-F", "C-F")]
        cases += [columns("F-C", dtype, N, weight_dtype=None) for N in (16, 500)]
    cases += [image(dtype, stage) for dtype in ("float32", "float16") for stage in IMAGES]
    return list(dict.fromkeys(cases))


def tiny() -> list[LayoutCase]:
    """For the simulated device: each layout once."""
    cases = [LayoutCase("float32", 41, 9, LAYOUTS, "same", layout) for layout in COLUMN_LAYOUTS]
    return [*cases, LayoutCase("float32", 24, 5, LAYOUTS, None, "NCHW", pixels=(3, 4))]


LAYOUT_GRIDS = {"quick": quick, "full": full, "tiny": tiny}
