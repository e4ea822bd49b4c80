"""What a device of each compute capability can launch."""

from __future__ import annotations

import math
from dataclasses import dataclass

KIB = 1024
# NVIDIA CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability":
# opt-in shared memory per block, shared memory per multiprocessor, threads per multiprocessor.
_TABLE = {
    "75": (64, 64, 1024),
    "80": (163, 164, 2048),
    "86": (99, 100, 1536),
    "89": (99, 100, 1536),
    "90": (227, 228, 2048),
    "100": (227, 228, 2048),
    "120": (99, 100, 1536),
}


@dataclass(frozen=True)
class DeviceLimits:
    """Limits of a launch on one compute capability."""

    compute_capability: str = "90"
    opt_in_shared: int = 227 * KIB
    shared_per_multiprocessor: int = 228 * KIB
    threads_per_multiprocessor: int = 2048
    threads: int = 1024
    block: tuple[int, int, int] = (1024, 1024, 64)
    grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)
    shared: int = 48 * KIB
    registers: int = 64 * KIB
    registers_per_thread: int = 255
    parameters: int = 4 * KIB  # bytes; drivers before CUDA 12.1 take no more
    cluster: int = 8  # the portable size; 16 would need an attribute that no CuPy call sets

    @classmethod
    def of(cls, compute_capability: str) -> DeviceLimits:
        """Limits of "75", "80", "86", "89", "90", "100" or "120"."""
        opt_in, shared, threads = _TABLE[compute_capability]
        return cls(compute_capability, opt_in * KIB, shared * KIB, threads)

    def refuse(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        static_shared: int,
        opt_in: int,
        registers_per_thread: int | None,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> str:
        """Why the device would refuse the launch; empty when it would not."""
        sm, threads = f"sm_{self.compute_capability}", math.prod(block)
        for axis, g, b, c, most_g, most_b in zip(
            "xyz", grid, block, cluster, self.grid, self.block, strict=True
        ):
            if not 1 <= g <= most_g:
                return f"grid {axis} is {g}; {sm} takes 1 to {most_g}"
            if not 1 <= b <= most_b:
                return f"block {axis} is {b}; {sm} takes 1 to {most_b}"
            if g % c:
                return f"grid {axis} is {g}, no multiple of the cluster's {c}"
        blocks, shared = math.prod(cluster), dynamic_shared + static_shared
        if blocks > 1 and int(self.compute_capability) < 90:
            return f"clusters of {blocks} blocks; {sm} has none, sm_90 and newer have"
        if blocks > self.cluster:
            return f"clusters of {blocks} blocks; {sm} takes {self.cluster}"
        if threads > self.threads:
            return f"block {block} has {threads} threads; {sm} takes {self.threads}"
        if static_shared > self.shared:
            return f"{static_shared} bytes of static shared memory; {sm} takes {self.shared}"
        if dynamic_shared < 0 or shared > self.opt_in_shared:
            return (
                f"{dynamic_shared} bytes of dynamic and {static_shared} of static shared memory; "
                f"{sm} takes {self.opt_in_shared} per block"
            )
        if shared > self.shared and dynamic_shared > opt_in:
            return (
                f"{dynamic_shared} bytes of dynamic shared memory need the opt-in attribute "
                f"max_dynamic_shared_size_bytes, which is {opt_in}"
            )
        # Registers are handed out to warps in pieces of 256.
        held = registers_per_thread or 0
        used = -(-threads // 32) * -(-held * 32 // 256) * 256
        if held > self.registers_per_thread or used > self.registers:
            return (
                f"{threads} threads of {held} registers use {used}; "
                f"{sm} has {self.registers} per block and {self.registers_per_thread} per thread"
            )
        return ""
