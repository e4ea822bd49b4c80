"""What the GPU benchmark measures: cases, and the forward ones in the order of measurement."""

from dataclasses import dataclass

from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = [
    "BIG",
    "BOTH",
    "BWD",
    "FEW",
    "FWD",
    "GB",
    "GRIDS",
    "LAYOUT",
    "ODD",
    "POWERS",
    "SMALL",
    "Case",
    "case",
    "full",
    "quick",
    "tiny",
]

MB, GB = 10**6, 10**9
BIG, SMALL, FEW, LAYOUT = "1GB", "33MB", "few rows", "layout"
FWD, BWD, BOTH = "layer_norm_fwd", "layer_norm_bwd", "layer_norm_fwd_bwd"
PASSES = {FWD: 2, BWD: 3, BOTH: 5}  # of rows * N elements that no kernel can do without
VECTORS = {FWD: 2, BWD: 3, BOTH: 5}  # of N: weight, bias; weight, dweight, dbias
STATISTICS = {FWD: 0, BWD: 2, BOTH: 4}  # of rows: mean and rstd, written and read

POWERS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
ODD = (
    255,
    768,
    1000,
    1023,
    4095,
    5001,
    32767,
)  # 768 is a usual model width; the others break vectors


@dataclass(frozen=True, slots=True)
class Case:
    """One problem that every contender solves."""

    dtype: str
    rows: int
    N: int
    group: str
    weight_dtype: str | None = "same"  # "same": x's; None: neither weight nor bias
    layout: str = "C"  # "offset": base one element off; "pitch": rows 16 bytes apart
    op: str = FWD

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def affine_dtype(self) -> str | None:
        return self.dtype if self.weight_dtype == "same" else self.weight_dtype

    @property
    def copy_bytes(self) -> int:
        """Bytes of the passes over x, y, dy and dx: what the copies beside a case move."""
        return self.rows * self.N * PASSES[self.op] * self.itemsize

    @property
    def moved_bytes(self) -> int:
        """The floor, whatever a kernel really moves.

        Forward: x read once, y written once, weight and bias read once; no statistics are asked
        for, so none are counted. Backward: x and dy read once, dx written once, mean and rstd read
        once, weight read, dweight and dbias written; partial sums are the kernel's own affair.
        Both: the sum of the two, and the statistics are written too. Without weight there are
        neither dweight nor dbias.
        """
        affine = VECTORS[self.op] * self.N * ITEMSIZE[self.affine_dtype] if self.affine_dtype else 0
        statistics = STATISTICS[self.op] * self.rows * ITEMSIZE[stats_dtype(self.dtype)]
        return self.copy_bytes + statistics + affine

    @property
    def pitch(self) -> int:
        """Elements from one row to the next."""
        return self.N + (16 // self.itemsize if self.layout == "pitch" else 0)


def case(
    dtype: str,
    N: int,
    group: str = BIG,
    rows: int | None = None,
    op: str = FWD,
    **options: str | None,
) -> Case:
    """Case of about the bytes of its group; an odd number of rows, so that blocks have a rest."""
    if rows is None:
        size = GB if group != SMALL else 33 * MB
        rows = max(1, size // (PASSES[op] * ITEMSIZE[dtype] * N)) | 1
    return Case(dtype, rows, N, group, op=op, **options)


def quick() -> list[Case]:
    """About four minutes with torch.compile; the cases that the claims rest on come first."""
    wide = (256, 1024, 4096, 16384, 65536, 262144, 1000, 4095)
    cases = [case("bfloat16", N) for N in wide]
    cases += [case("float32", N) for N in wide]
    cases += [case("bfloat16", N, SMALL) for N in (256, 1024, 4096, 16384, 65536)]
    cases += [
        case("bfloat16", 64 * 2**20, FEW, 1, weight_dtype=None),
        case("bfloat16", 4 * 2**20, FEW, 8, weight_dtype=None),
        case("float32", 16 * 2**20, FEW, 1, weight_dtype=None),
        case("float32", 16 * 2**20, FEW, 1),
        case("float16", 1024),
        case("float16", 4096),
        case("float64", 4096),
        case("bfloat16", 4096, LAYOUT, weight_dtype="float32"),
        case("bfloat16", 4096, LAYOUT, layout="offset"),
        case("bfloat16", 4095, LAYOUT, layout="pitch"),
    ]
    return cases


def full() -> list[Case]:
    """The quick grid, then every other point; give it several runs or a long `--seconds`."""
    cases = quick()
    for dtype in ("bfloat16", "float32", "float16"):
        cases += [case(dtype, N) for N in sorted(POWERS + ODD)]
        cases += [case(dtype, N, SMALL) for N in sorted(POWERS + ODD)]
    cases += [case("float64", N) for N in sorted(POWERS + ODD)]
    for rows in (1, 2, 4, 8):
        for N in (2**20, 4 * 2**20, 16 * 2**20, 64 * 2**20):
            for dtype in ("bfloat16", "float32"):
                cases.append(case(dtype, N, FEW, rows, weight_dtype=None))
                cases.append(case(dtype, N, FEW, rows))
    for N in (1000, 1024, 4096, 5001, 16384):
        for dtype in ("bfloat16", "float32"):
            for layout in ("offset", "pitch"):
                cases.append(case(dtype, N, LAYOUT, layout=layout))
            cases.append(case(dtype, N, LAYOUT, weight_dtype=None))
        cases += [case(d, N, LAYOUT, weight_dtype="float32") for d in ("float16", "bfloat16")]
        cases.append(case("float64", N))
    return list(dict.fromkeys(cases))


def tiny() -> list[Case]:
    """For the simulated device: a warp, an offset base, a pitch, and a cluster's row."""
    return [
        Case("float32", 5, 32, BIG),
        Case("float32", 3, 33, LAYOUT, layout="offset"),
        Case("float32", 2, 33, LAYOUT, layout="pitch"),
        Case("float32", 1, 33001, FEW),
    ]


GRIDS = {"quick": quick, "full": full, "tiny": tiny}
