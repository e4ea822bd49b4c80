"""How many instructions a lane runs per element and per row, from the machine code of the entries.

python -m bench.model_code    # compiles with NVRTC, writes bench/results/instructions.csv; no GPU

Two entries that differ by a vector per thread, or by a row per group, differ by what that costs:
the length of their machine code, 16 bytes an instruction. What only edges of rows and skewed
addresses run is cut out of the text first, so that the code left is one path from begin to end.
"""

import csv
import functools
import io
import re
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu_tune import plan_of
from cupynorm._cuda.plan import TABLE, VEC_BYTES, Device, Stage
from cupynorm._cuda.plan_bwd import BWD_TABLE, choose_plan_bwd
from cupynorm._cuda.source import source_of
from cupynorm._problem import ITEMSIZE, GradientProblem, Problem

__all__ = ["ARCHS", "COUNTS", "Instructions", "counted", "instructions_of"]

COUNTS = Path(__file__).resolve().parent / "results" / "instructions.csv"
ARCHS = (80, 89, 90, 100, 120)
DTYPES = ("float32", "bfloat16", "float16")
INSTRUCTION_BYTES = 16
SHARED = 227 * 1024
# Edges of rows, skewed addresses, odd weights: text, and what stands for it.
EDGES = (
    ("{ return (int)((u64)p & 15u); }", "{ return 0; }"),
    ("if ((end & 15) && tail >= head && lane == tail % LANES) {", "if (false) {"),
    ("if ((end & 15) && tail >= head) {", "if (false) {"),
    ("if (left >= V && ((u64)p & (WIDTH - 1)) == 0) {", "if (true) {"),
)
# Kept for a text that has them: rounds of 32 bytes, whose code stands beside that of 16.
IF_THERE = (("if (LANES < 32 || VECS < 2 || !has_wide_vectors() ||", "if (true ||"),)
# The backward leaves its sums over rows once per block; a sum of them keeps them alive.
PUT_TOTALS = "__device__ __forceinline__ void put_totals("
KEEP_TOTALS = (
    "{ A t = 0; for (int k = 0; k < VECS; ++k) for (int i = 0; i < V; ++i) "
    "t += totals.dweight[k][i] + totals.dbias[k][i]; partials[index] = t; return;"
)
KEPT_PER_ELEMENT = 2


@dataclass(frozen=True)
class Instructions:
    """Of a lane: for an element, for a row that it has a part of, and for its thread."""

    per_element: float
    per_row: float
    per_thread: float


def counted(arch: int, dtype: str) -> dict[str, Instructions]:
    """Count of "fwd" and "bwd" on an architecture."""
    per_vec = VEC_BYTES // ITEMSIZE[dtype]
    one, two, four = (_length(_fwd(dtype, vecs, 1), arch) for vecs in (1, 2, 4))
    two_rows = _length(_fwd(dtype, 1, 2), arch)
    element = (four - two) / 2 / per_vec
    row = two_rows - one - per_vec * element
    forward = Instructions(element, row, one - row - per_vec * element)
    short, long = (_length(_bwd(dtype, vecs), arch) for vecs in (1, 2))
    element = (long - short) / per_vec - KEPT_PER_ELEMENT
    backward = Instructions(element, short - per_vec * (element + KEPT_PER_ELEMENT), 0)
    return {"fwd": forward, "bwd": backward}


def _fwd(dtype: str, vecs: int, rows: int) -> Stage:
    """K1 with 32 lanes a row; with few blocks per multiprocessor, so that nothing is squeezed."""
    row = replace(TABLE[2], max_vecs=128, rows_per_group=rows, blocks_per_sm=4)
    N = 32 * vecs * VEC_BYTES // ITEMSIZE[dtype]
    strides = (0, N, 1)
    problem = Problem("layer_norm_fwd", dtype, dtype, dtype, 1, 2**20, N, strides, strides, False)
    return plan_of(row, problem, Device(90, 100, SHARED)).stages[0]


def _bwd(dtype: str, vecs: int) -> Stage:
    N = BWD_TABLE[2].max_vecs * vecs * VEC_BYTES // ITEMSIZE[dtype]
    strides = (0, N, 1)
    problem = GradientProblem(
        dtype, dtype, dtype, dtype, True, 1, 2**20, N, strides, strides, strides
    )
    return choose_plan_bwd(problem, Device(90, 100, SHARED)).stages[0]


def _straight(source: str) -> str:
    for text, instead in EDGES:
        if text not in source:
            msg = f"the kernel text has no longer {text!r}: bench/model_code.py cuts it out"
            raise ValueError(msg)
        source = source.replace(text, instead)
    for text, instead in IF_THERE:
        source = source.replace(text, instead)
    if PUT_TOTALS in source:
        begin = source.index("{", source.index(PUT_TOTALS))
        source = source[:begin] + KEEP_TOTALS + source[begin + 1 :]
        source = re.sub(r"\n    add_(groups|warps)<.*?;\n", "\n", source)
    return source


def _length(stage: Stage, arch: int) -> float:
    """Instructions in the machine code of an entry."""
    from tests.nvrtc.build import compile_text, options

    _, cubin, log = compile_text(_straight(source_of(stage)), options(str(arch)))
    if not cubin:
        raise ValueError(log)
    at, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    strings = cubin[headers[names][4] :][: headers[names][5]]
    for header in headers:
        if strings[header[0] :].startswith(b".text."):
            return header[5] / INSTRUCTION_BYTES
    msg = f"no code in the cubin of {stage.name}"
    raise ValueError(msg)


@functools.cache
def _kept() -> dict[tuple[int, str, str], Instructions]:
    with COUNTS.open(newline="", encoding="utf-8") as file:
        return {
            (int(r["arch"]), r["dtype"], r["direction"]): Instructions(
                float(r["per_element"]), float(r["per_row"]), float(r["per_thread"])
            )
            for r in csv.DictReader(file)
        }


def instructions_of(arch: int, dtype: str, direction: str) -> Instructions:
    """The committed count; float64 is taken as float32, whose text it shares."""
    return _kept()[arch, dtype if dtype in DTYPES else "float32", direction]


def main() -> int:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arch", "dtype", "direction", "per_element", "per_row", "per_thread"])
    for arch in ARCHS:
        for dtype in DTYPES:
            for direction, n in counted(arch, dtype).items():
                row = (n.per_element, n.per_row, n.per_thread)
                writer.writerow([arch, dtype, direction, *(f"{v:.1f}" for v in row)])
    COUNTS.write_text(out.getvalue(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
