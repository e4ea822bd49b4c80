"""Run a kernel's text on the CPU: `launch()` as a GPU's driver takes it, plus what it may touch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from .api import Fault, LaunchRequest, api
from .buffer import Buffer
from .counts import BufferTraffic, SharedTraffic, SiteTraffic, Traffic, collect
from .fault import KINDS, SimtFault
from .kernel import Kernel, kernel
from .limits import DeviceLimits

__all__ = [
    "KINDS",
    "Buffer",
    "BufferTraffic",
    "DeviceLimits",
    "SharedTraffic",
    "SimtFault",
    "SiteTraffic",
    "Traffic",
    "launch",
    "load",
]

# The runtime has one engine per process and runs one block at a time.
_lock = threading.RLock()


def load(source: str, entry: str) -> Kernel:
    """Compile and load, without a launch; the compiled library is cached on disk."""
    with _lock:
        return kernel(source, entry)


def launch(
    source: str,
    entry: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int = 0,
    args: Sequence[Any] = (),
    *,
    buffers: Sequence[Buffer] = (),
    seed: int | None = 0,
    limits: DeviceLimits | None = None,
    opt_in_shared: int | None = None,
    registers_per_thread: int | None = None,
    device: int = 0,
    count: bool = True,
    flush: bool = True,
) -> Traffic:
    """Run `entry` of `source`; raise SimtFault for what a GPU would punish.

    Parameters
    ----------
    args : sequence
        Passed as CuPy passes them: Buffer and int in 8 bytes, float as a double, NumPy scalars in
        their own width.
    buffers : sequence of Buffer
        All memory that the kernel may touch.
    seed : int or None
        Order of threads and blocks; None is the order of their numbers.
    limits : DeviceLimits, optional
        Of the device; sm_90 when not given.
    opt_in_shared : int, optional
        The function's attribute for dynamic shared memory beyond 48 KiB; when not given, whatever
        the launch needs.
    registers_per_thread : int, optional
        As the compiler reports them, to hold the block against the register file.
    device : int
        Buffers of another device are out of reach.
    count : bool
        Whether to count traffic; the checks are made in any case.
    flush : bool
        Subnormals are zero, as CuPy's -ftz=true has it for float32. Here float64 flushes too, which
        it does not on a GPU: switch it off to see float64 subnormals.
    """
    limits = limits or DeviceLimits.of("90")
    grid, block = _triple(grid), _triple(block)
    with _lock:
        loaded = kernel(source, entry)
        opt_in = shared_bytes if opt_in_shared is None else opt_in_shared
        refusal = limits.refuse(
            grid, block, shared_bytes, loaded.static_bytes, opt_in, registers_per_thread,
            loaded.cluster,
        )  # fmt: skip
        bounds, threads = loaded.launch_bounds, block[0] * block[1] * block[2]
        if not refusal and bounds and threads > bounds:
            refusal = f"block {block} has {threads} threads; its __launch_bounds__ allow {bounds}"
        if not refusal and max(loaded.cluster[1:]) > 1:
            refusal = f"a cluster of {loaded.cluster}: only those along x are simulated"
        if not refusal and loaded.cluster[0] > 1 and loaded.static_bytes:
            refusal = "static shared memory in a cluster is not simulated; take dynamic"
        if refusal:
            raise SimtFault("limits", f"{entry}: {refusal}")
        packed = loaded.pack(args)
        for b in buffers:
            api().simt_region_set(b.region, b.writable, b.device != device)
        regions = (ctypes.c_void_p * max(1, len(buffers)))(*(b.region for b in buffers))
        pointers = (ctypes.c_void_p * max(1, len(packed)))(*(ctypes.addressof(p) for p in packed))
        request = LaunchRequest(
            loaded.address, ctypes.addressof(pointers), grid, block, loaded.cluster[0],
            shared_bytes, seed is not None, count, flush, int(limits.compute_capability) >= 100,
            (seed or 0) & (2**64 - 1), ctypes.addressof(regions), len(buffers),
            loaded.static_region, *loaded.mapped_range,
        )  # fmt: skip
        fault = Fault()
        if api().simt_launch(ctypes.byref(request), ctypes.byref(fault)):
            raise loaded.exception(fault)
        return collect(loaded.static_region, buffers, bool(shared_bytes), loaded.describe)


def _triple(values: Iterable[int]) -> tuple[int, int, int]:
    x, y, z = (*values, 1, 1)[:3]
    return int(x), int(y), int(z)
