"""Predicts how near a plan comes to a copy on GPUs that are not at hand: bytes, bytes in flight."""

import csv
import functools
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cupynorm as cn
from bench import command_line
from bench.cases import BWD, FEW, FWD, LAYOUT, OPS, Case, sized
from bench.device import numpy_dtype
from tests.nvrtc.check import blocks_by_registers
from tests.ptx.limits import DeviceLimits

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- model: begin -->", "<!-- model: end -->"
ABOUT = """# Cost model

Written by `python -m bench.model --markdown`. **Nothing here was measured by us.**

    time = t0 + 2 us * (launches - 1) + bytes / (S * (1 - exp(-D / S)))

Bytes and launches are those of `cn.explain`. S is what the memory gives. D is what the resident
blocks draw from an idle memory (Little's law): their bytes on the way over its latency. How many
blocks are resident say the registers of the compile matrix, shared memory and threads. Instructions
take no time here, so a prediction is an upper bound, and says what is in the way. Bytes in flight
are cub::DeviceTransform's (L40S, RTX 5090: from A100's latency), t0 fits to Quack's times on an
H100 and to oink's on a GB300, else assumed.
"""
NEXT_LAUNCH = 2.0  # microseconds between two kernels that wait for each other; assumed
L2_SHARE = 0.5  # of L2 that keeps what will be read again; assumed
MARGIN = 4.0  # DeviceTransform's bytes in flight saturate the memory: 1 - exp(-4) = 98 % flow
KEPT = 1024  # bytes of each block's shared memory that the system takes
CHUNK = 16 * 1024  # bytes that a block of a split row, or of a copy, reads at once
COPY_BLOCKS = 8  # of 256 threads, on a multiprocessor


class Gpu(NamedTuple):
    """Data-sheet numbers, and what of them is reached; `explain` plans for one GPU of each arch."""

    name: str
    arch: str
    sm_count: int
    bandwidth: float  # GB/s
    reached: float  # of it, by the best streaming kernel
    l2_mib: int
    in_flight: int  # KiB per multiprocessor that saturate the memory
    t0: float  # microseconds: launch, fill and drain
    blocks: int  # of a multiprocessor
    source: str  # of reached

    @property
    def supply(self) -> float:
        return self.bandwidth * self.reached * 1e3

    @property
    def latency(self) -> float:
        """Microseconds from a load to its data on an idle memory; half of a copy is loads."""
        return self.in_flight * 1024 / MARGIN / (self.supply / 2 / self.sm_count)


GPUS = (
    Gpu("A100", "sm_80", 108, 2039, 0.88, 40, 16, 7.0, 32, "assumed; Apex has 0.81"),
    Gpu("L40S", "sm_89", 142, 864, 0.90, 96, 6, 7.0, 24, "assumed"),
    Gpu("H100", "sm_90", 132, 3350, 0.90, 50, 32, 7.3, 32, "Quack's RMSNorm, 3020 GB/s"),
    Gpu("H200", "sm_90", 132, 4800, 0.87, 50, 48, 7.3, 32, "torch.compile's RMSNorm, 4176 GB/s"),
    Gpu("B200", "sm_100", 148, 8000, 0.89, 126, 64, 9.6, 32, "triad on a GB300, 7140 GB/s"),
    Gpu("RTX 5090", "sm_120", 170, 1792, 0.86, 96, 10, 7.0, 32, "Quack's RMSNorm, 1539 GB/s"),
)


class Prediction(NamedTuple):
    kernel: str  # K1 to K7
    us: float
    fraction_of_copy: float
    why: str  # what costs most beyond the floor


@functools.cache
def matrix() -> dict[str, dict[str, str]]:
    """Registers by entry and architecture, as ptxas counted them."""
    with (RESULTS / "compile-matrix.csv").open(newline="", encoding="utf-8") as file:
        return {row["entry"]: row for row in csv.DictReader(file)}


def resident(entry: str, threads: int, shared_bytes: int, gpu: Gpu) -> int:
    registers = int(matrix().get(entry, {}).get(gpu.arch) or 64)
    limits = DeviceLimits.of(gpu.arch.removeprefix("sm_"))
    by_shared = limits.shared_per_multiprocessor // (shared_bytes + KEPT)
    by_threads = limits.threads_per_multiprocessor // (-(-threads // 32) * 32)
    by_registers = blocks_by_registers(limits, registers, threads)
    return max(1, min(by_registers, by_shared, by_threads, gpu.blocks))


def unallocated(shape: tuple[int, ...], dtype: str, by_column: bool) -> Any:
    """An array that has shape and strides, and no memory behind them."""
    base, dims = np.empty(1, numpy_dtype(dtype)), range(len(shape))
    parts = [shape[:k] if by_column else shape[k + 1 :] for k in dims]
    steps = [base.itemsize * math.prod(part) for part in parts]
    return np.lib.stride_tricks.as_strided(base, shape, steps, writeable=True)


@functools.cache
def explained(case: Case, arch: str) -> Any:
    """What the library says of a case; a list of columns as a column-major x."""
    x, y = (unallocated(case.shape, case.dtype, case.layout[k] in "Fc") for k in (0, -1))
    affine = [case.affine_dtype] * 2 if case.affine_dtype else []
    vectors = [np.empty(case.N, numpy_dtype(dtype)) for dtype in affine]
    about: dict[str, Any] = {"backward": True} if case.op == BWD else {"out": y}
    return cn.explain(x, None, *vectors, axis=case.axis, device=arch, **about)


LAUNCH = re.compile(r"(\w+), grid (\d+)(?: in clusters of (\d+))?, block (\d+), shared (\d+)")


def predict(case: Case, gpu: Gpu) -> Prediction | None:
    """What the model says of a forward or a backward; None where the library copies first."""
    e = explained(case, gpu.arch)
    if e.copies:
        return None
    launches = [LAUNCH.match(text).groups() for text in e.launches]  # type: ignore[union-attr]
    mains = [launch for launch in launches if not launch[0].startswith("column_totals")]
    entry, grid, cluster, threads, shared = max(mains, key=lambda g: int(g[1]) * int(g[3]))
    split, moved = "split" in entry, e.bytes_moved
    if split:  # what is read again comes from L2 where that holds it
        moved -= min(moved - e.bytes_floor, L2_SHARE * gpu.l2_mib * 2**20)
    held = OPS[case.op].passes * e.rows_per_block * case.N * case.itemsize / int(cluster or 1)
    unit = min(moved / int(grid), held, 2 * CHUNK if split else held)
    at_once = min(int(grid), resident(entry, int(threads), int(shared), gpu) * gpu.sm_count)
    fixed, in_flight = gpu.t0 + NEXT_LAUNCH * (len(launches) - 1), flow(moved, unit, at_once, gpu)
    stream, floor = moved / gpu.supply, e.bytes_floor / gpu.supply
    parts = {"bytes": stream - floor, "bytes in flight": in_flight - stream, "launches": fixed}
    worst, us = max(parts, key=lambda name: parts[name]), fixed + in_flight
    copy = gpu.t0 + flow(case.copy_bytes, 2 * CHUNK, COPY_BLOCKS * gpu.sm_count, gpu)
    fraction = case.moved_bytes / us / (case.copy_bytes / copy)
    why = worst if parts[worst] > 0.01 * us else "the memory"
    return Prediction(e.kernel.split()[0], us, fraction, why)


def flow(moved: float, unit: float, at_once: int, gpu: Gpu) -> float:
    """Microseconds of bytes that come in units, so many at once; the last round may be short."""
    full, rest = divmod(max(1, round(moved / unit)), at_once)

    def one(units: int) -> float:
        share = 1 - math.exp(-units * unit / gpu.latency / gpu.supply)
        return units * unit / (gpu.supply * share) if units else 0.0

    return full * one(at_once) + one(rest)


# -- claims and pages -----------------------------------------------------------------------------

DTYPES = ("bfloat16", "float32")


def _rows(op: str, *lengths: int) -> list[Case]:
    return [sized(op, d, N) for d in DTYPES for N in lengths]


def _tiles(*lengths: int) -> list[Case]:
    shapes = [(d, sized(FWD, d, N).M // 1024 * 1024, N) for d in DTYPES for N in lengths]
    return [Case(FWD, LAYOUT, d, (M, N), layout="F-C") for d, M, N in shapes]


_LONG = [(M, N << 20) for M in (1, 8) for N in (1, 64)]
_FEW = [Case(FWD, FEW, "bfloat16", shape, weight_dtype=None) for shape in _LONG]
# Number of a claim in PENDING.md, what it says, its aim over the copy, its cases.
CLAIMS = (
    ("3", "forward at 1 GB, N from 256 to 16384", 0.95, _rows(FWD, 256, 1024, 4096, 16384)),
    ("3", "forward at 1 GB, N from 65536 up", 0.95, _rows(FWD, 65536, 262144, 1048576)),
    ("12", "backward at 1 GB, N from 64 to 16384", 0.90, _rows(BWD, 64, 256, 1024, 4096, 16384)),
    ("15", "backward of longer rows", 0.50, _rows(BWD, 65536, 262144)),
    ("3a", "forward, 1 and 8 rows of 1M to 64M columns", 0.85, _FEW),
    ("23", "K6, column-major to rows, 8 to 900 columns", 0.85, _tiles(8, 64, 256, 900)),
)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [[*header, *(g.name for g in GPUS)], ["---"] * (len(header) + len(GPUS)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def claims() -> str:
    rows, notes = [], []
    for number, text, aim, cases in CLAIMS:
        cells = []
        for gpu in GPUS:
            found = [(p, c) for c in cases if (p := predict(c, gpu))]
            p, c = min(found, key=lambda pair: pair[0].fraction_of_copy)
            cells.append(f"{p.fraction_of_copy:.2f}")
            if p.fraction_of_copy < aim - 0.01:
                cells[-1] = f"**{cells[-1]}**"
                notes.append(f"- {number}, {gpu.name}: {c.dtype} {c.label}, {p.kernel}: {p.why}.")
        rows.append([number, text, f"≥ {aim:.0%}", *cells])
    said = "The worst case of each claim over the copy; **bold** where the model says no:"
    return f"{said}\n\n{_table(['#', 'claim', 'aim'], rows)}\n\n" + "\n".join(notes)


def page() -> str:
    known = [
        f"- {g.name}, planned as {g.arch}: {g.bandwidth:g} GB/s, {g.reached:.0%} of it reached "
        f"({g.source}), {g.in_flight} KiB in flight so {g.latency:.2f} us latency, t0 {g.t0:g} us"
        for g in GPUS
    ]
    parts = [ABOUT + "\n" + "\n".join(known), "## Claims", claims()]
    for _, text, _, cases in CLAIMS:
        rows = []
        for c in cases:
            found = (predict(c, gpu) for gpu in GPUS)
            cells = [f"{p.kernel} {p.fraction_of_copy:.2f}" if p else "copies" for p in found]
            rows.append([f"{c.dtype} {c.label}", *cells])
        parts += [f"## Over the copy: {text}", _table([""], rows)]
    return "\n\n".join(parts) + "\n"


def files() -> dict[Path, str]:
    pending = RESULTS / "PENDING.md"
    before, _, rest = pending.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return {RESULTS / "model.md": page(), pending: f"{before}{BEGIN}\n\n{claims()}\n\n{END}{after}"}


def main(argv: list[str] | None = None) -> int:
    parser = command_line("model", __doc__)
    parser.add_argument("--markdown", action="store_true", help="write the committed files")
    if not parser.parse_args(argv).markdown:
        print(page())
        return 0
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
