"""What must hold of a compiled entry, and sentences for what does not."""

from __future__ import annotations

from cupynorm._cuda.plan import STAGE_ASYNC, STAGE_BULK, STAGE_REGISTERS, Stage
from tests.nvrtc.facts import Facts
from tests.ptx.limits import DeviceLimits

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


def vecs_in_flight(stage: Stage) -> tuple[int, int]:
    """16-byte accesses that a thread must have, unrolled: loads of x and dy, stores of y or dx."""
    kernel, constants = stage.template, stage.constants
    sums_alone = kernel in ("column_totals", "bwd_split_merge")
    if sums_alone or "d_column" in kernel or stage.family == "lanes":
        return 0, 0  # K6 and K7 move words along the rows
    if stage.family.endswith("_bwd"):
        if kernel == "bwd_split_sums":
            return 2 * 4, 0
        held = -4 if kernel in ("bwd_warp", "bwd_block") else 2  # its place
        vecs = 2 if kernel == "bwd_split_apply" else constants[held]
        return 0 if staging_in(stage) else 2 * vecs, vecs * constants[-3]
    if kernel == "fwd_shared":
        return 0, 4  # of a chunk
    if kernel == "fwd_split_merge":
        return 0, 0  # but for a row that is looked at again
    if stage.family == "split":
        return 4, 4 * (kernel == "fwd_split_normalize")
    rows = constants[3] if stage.family == "warp" else 1
    vecs = constants[2] if stage.family == "warp" else constants[1]
    return vecs * rows, vecs * rows


def staging_in(stage: Stage) -> int:
    """How K3 and K4 bring their rows into shared memory; other kernels bring none."""
    if stage.template == "fwd_shared":  # with a residual through registers
        return STAGE_REGISTERS if stage.op.residual else stage.constants[2]
    return stage.constants[3] if stage.template == "bwd_shared" else STAGE_REGISTERS


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
    launched, shared = (stage.grid, stage.block), stage.shared_bytes
    refusal = limits.refuse(*launched, shared, facts.static_shared, shared, facts.registers)
    found += _of_instructions(stage, facts) + _of_copies(stage, facts)
    return found + ([refusal] if refusal else [])


def _of_copies(stage: Stage, facts: Facts) -> list[str]:
    staging = staging_in(stage)
    held = {STAGE_ASYNC: facts.copies128, STAGE_BULK: facts.bulk_copies}
    wrong = [way for way, number in held.items() if (number > 0) != (way == staging)]
    return [f"staging {staging}, but copies by {held}"] if wrong else []


def _of_instructions(stage: Stage, facts: Facts) -> list[str]:
    found = []
    loads, stores = vecs_in_flight(stage)
    if facts.loads128 < loads:
        found.append(f"{facts.loads128} global loads of 128 bits, {loads} vectors to load")
    if facts.stores128 < stores:
        found.append(f"{facts.stores128} global stores of 128 bits, {stores} vectors to store")
    if facts.no_ftz or not (facts.ftz or stage.x_dtype == "float64"):
        found.append(f"{facts.no_ftz} float32 instructions keep subnormals, {facts.ftz} flush them")
    if facts.approximate:
        found.append(f"{facts.approximate} divisions or roots are not IEEE")
    if facts.fusable:
        found.append(f"{facts.fusable} sums of products that ptxas may fuse or not")
    return found
