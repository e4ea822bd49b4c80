"""What must hold of a compiled entry, and sentences for what does not."""

from __future__ import annotations

from cupynorm._plan import Stage
from tests.nvrtc.build import Facts
from tests.simt.limits import DeviceLimits

# CUDA occupancy: a warp's registers come in pieces of 256, and warps by four, because the four
# partitions of a multiprocessor each have a quarter of the registers.
REGISTER_PIECE = 256
PARTITIONS = 4


def blocks_by_registers(limits: DeviceLimits, registers: int, threads: int) -> int:
    """Blocks that one multiprocessor has registers for."""
    per_warp = -(-registers * 32 // REGISTER_PIECE) * REGISTER_PIECE
    warps = limits.registers // per_warp // PARTITIONS * PARTITIONS
    return warps // -(-threads // 32)


def blocks_that_fit(limits: DeviceLimits, facts: Facts, stage: Stage) -> dict[str, int]:
    """Blocks that one multiprocessor holds, by what limits them."""
    threads = stage.block[0]
    # From sm_80 on the system keeps 1 KiB of each block's shared memory.
    kept = 1024 if int(limits.compute_capability) >= 80 else 0
    shared = stage.shared_bytes + facts.static_shared + kept
    return {
        "registers": blocks_by_registers(limits, max(facts.registers, 1), threads),
        "threads": limits.threads_per_multiprocessor // threads,
        "shared memory": limits.shared_per_multiprocessor // max(shared, 1),
    }


def vecs_in_flight(stage: Stage) -> int:
    """16-byte accesses of x that a thread must have, unrolled."""
    if stage.family in ("shared", "split"):
        return 4  # of a chunk
    rows = stage.constants[3] if stage.family == "warp" else 1
    return stage.constants[2] * rows


def faults(stage: Stage, facts: Facts, arch: str) -> list[str]:
    """Every promise of the plan that the compiled entry breaks; empty when it keeps them all."""
    limits = DeviceLimits.of(arch)
    found = [f"NVRTC says: {line}" for line in facts.complaints]
    if not facts.has_entry or facts.registers < 0:
        return [*found, f"no entry {stage.name} was compiled"]
    if facts.stack or facts.spill_stores or facts.spill_loads:
        found.append(
            f"stack frame of {facts.stack} bytes, {facts.spill_stores} bytes of spill stores, "
            f"{facts.spill_loads} of loads, at {facts.registers} registers"
        )
    if facts.local:
        found.append(f"{facts.local} variables in local memory")
    for limit, blocks in blocks_that_fit(limits, facts, stage).items():
        if blocks < stage.blocks_per_sm:
            found.append(
                f"the plan states {stage.blocks_per_sm} blocks per multiprocessor, {limit} allow "
                f"{blocks} ({facts.registers} registers, {stage.block[0]} threads)"
            )
    refusal = limits.refuse(
        stage.grid,
        stage.block,
        stage.shared_bytes,
        facts.static_shared,
        stage.shared_bytes,
        facts.registers,
    )
    return found + ([refusal] if refusal else []) + _of_instructions(stage, facts)


def _of_instructions(stage: Stage, facts: Facts) -> list[str]:
    found = []
    wanted = vecs_in_flight(stage)
    if facts.loads128 < wanted:
        found.append(f"{facts.loads128} global loads of 128 bits, {wanted} vectors of x to load")
    if stage.kernel.endswith("_stats"):
        wanted = 0  # y is the next kernel's
    if facts.stores128 < wanted:
        found.append(f"{facts.stores128} global stores of 128 bits, {wanted} vectors of y to store")
    if facts.no_ftz or not (facts.ftz or stage.x_dtype == "float64"):
        found.append(f"{facts.no_ftz} float32 instructions keep subnormals, {facts.ftz} flush them")
    if facts.approximate:
        found.append(f"{facts.approximate} divisions or roots are not IEEE")
    return found
