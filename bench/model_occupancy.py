"""Blocks that a multiprocessor holds: by registers, shared memory, threads and slots."""

import csv
import functools
from pathlib import Path

from bench.model_gpus import Gpu
from cupynorm._cuda.plan import Stage

__all__ = ["MATRIX", "blocks_of", "most_registers", "registers_of", "resident_blocks"]

MATRIX = Path(__file__).resolve().parent / "results" / "compile-matrix.csv"
REGISTERS = 64 * 1024  # of a multiprocessor, from sm_75 to sm_120
PIECE = 256  # registers that a warp's come in
PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
KEPT = 1024  # bytes of each block's shared memory that the system takes, from sm_80 on


@functools.cache
def _matrix() -> dict[str, dict[str, int]]:
    with MATRIX.open(newline="", encoding="utf-8") as file:
        return {
            row["entry"]: {arch: int(n) for arch, n in row.items() if arch != "entry" and n}
            for row in csv.DictReader(file)
        }


def registers_of(name: str, gpu: Gpu) -> int | None:
    """Registers of a thread as ptxas counted them; None where the matrix has no such entry."""
    return _matrix().get(name, {}).get(f"sm_{gpu.compute_capability}")


def blocks_of(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // PIECE) * PIECE
    by_registers = REGISTERS // per_warp // PARTITIONS * PARTITIONS // warps
    by_shared = gpu.shared_per_sm // (shared_bytes + KEPT)
    by_threads = gpu.threads_per_sm // (32 * warps)
    return min(by_registers, by_shared, by_threads, gpu.blocks_per_sm)


def most_registers(threads: int, blocks: int) -> int:
    """What `__launch_bounds__` leaves a thread."""
    per_warp = REGISTERS // (blocks * -(-threads // 32)) // PIECE * PIECE
    return min(255, per_warp // 32)


def resident_blocks(stage: Stage, gpu: Gpu, registers: int | None = None) -> int:
    """Blocks per multiprocessor of a stage, from the matrix where it has the entry.

    Elsewhere `registers`, if given; or else what the plan states, which `__launch_bounds__` forces
    and the tests of the compile matrix hold.
    """
    found = registers_of(stage.name, gpu) or registers
    most = most_registers(stage.block[0], stage.blocks_per_sm)
    found = min(found, most) if found else most
    return max(1, blocks_of(gpu, stage.block[0], found, stage.shared_bytes))
