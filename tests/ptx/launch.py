"""Run a kernel on the CPU: `launch()` as a GPU's driver takes it, plus what it may touch.

A launch tells what it moved of each buffer and of shared memory: bytes, sectors, bank conflicts.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .api import Counters, Fault, LaunchRequest, api
from .buffer import Buffer
from .fault import PtxFault
from .kernel import Kernel, kernel
from .limits import DeviceLimits


@dataclass(frozen=True)
class BufferTraffic:
    """What one launch did to one buffer; bytes and accesses are summed over lanes.

    Sectors are the 32-byte pieces of memory that each warp access touches. The distinct counts
    take each byte and sector once per block: what is left when L1 merges the accesses.
    """

    name: str
    ptr: int
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int
    warp_reads: int
    warp_writes: int
    read_sectors: int
    write_sectors: int
    distinct_read_bytes: int
    distinct_written_bytes: int
    distinct_read_sectors: int
    distinct_write_sectors: int
    read_widths: dict[int, int]
    write_widths: dict[int, int]

    # Bytes that lanes asked for, over those of the sectors that warp accesses touched; and the same
    # of the distinct ones.
    read_sector_use = property(lambda self: _ratio(self.read_bytes, self.read_sectors))
    write_sector_use = property(lambda self: _ratio(self.written_bytes, self.write_sectors))
    merged_read_sector_use = property(
        lambda self: _ratio(self.distinct_read_bytes, self.distinct_read_sectors)
    )
    merged_write_sector_use = property(
        lambda self: _ratio(self.distinct_written_bytes, self.distinct_write_sectors)
    )


@dataclass(frozen=True)
class SharedTraffic:
    """What one launch did to shared memory, static and dynamic together, of all blocks."""

    read_bytes: int = 0
    written_bytes: int = 0
    warp_reads: int = 0
    warp_writes: int = 0
    wavefronts: int = 0
    minimal_wavefronts: int = 0
    max_ways: int = 0
    remote_read_bytes: int = 0  # of other blocks of the cluster; not in the bytes above
    remote_written_bytes: int = 0


def _ratio(nbytes: int, sectors: int) -> float:
    return nbytes / (32 * sectors) if sectors else 1.0


@dataclass(frozen=True)
class Traffic:
    """What one launch moved: `traffic["x"]` or `traffic[buffer]`, and `traffic.shared`."""

    buffers: tuple[BufferTraffic, ...]
    shared: SharedTraffic

    def __getitem__(self, key: Any) -> BufferTraffic:
        """Of the buffer with a name, of a Buffer, or of an array of the CuPy stand-in."""
        if isinstance(key, str):
            found = [b for b in self.buffers if b.name == key]
        else:
            memory = key if isinstance(key, Buffer) else key.data.mem
            found = [b for b in self.buffers if b.ptr == memory.ptr]
        if len(found) != 1:
            msg = f"{len(found)} buffers match {key!r}; there are {[b.name for b in self.buffers]}"
            raise KeyError(msg)
        return found[0]

    # Of all buffers, summed over lanes.
    read_bytes = property(lambda self: sum(b.read_bytes for b in self.buffers))
    written_bytes = property(lambda self: sum(b.written_bytes for b in self.buffers))


def collect(buffers: Sequence[Buffer]) -> Traffic:
    """Counters of the launch that has just ended."""
    records = []
    for b in buffers:
        c = Counters.from_address(b.region)
        own = [f.name for f in fields(BufferTraffic) if f.name not in ("name", "ptr")]
        values = {name: getattr(c, name) for name in own}
        for key in ("read_widths", "write_widths"):
            values[key] = {1 << i: n for i, n in enumerate(values[key]) if n}
        records.append(BufferTraffic(name=b.name, ptr=b.ptr, **values))
    shared = Counters.from_address(api().ptx_shared_region())
    remote = Counters.from_address(api().ptx_remote_region())
    own = [f.name for f in fields(SharedTraffic) if not f.name.startswith("remote_")]
    merged = {name: getattr(shared, name) for name in own}
    away = remote.read_bytes, remote.written_bytes
    return Traffic(tuple(records), SharedTraffic(*merged.values(), *away))


# One engine per process, which runs one launch at a time.
_lock = threading.RLock()


def load(source: str, entry: str, arch: str = "90") -> Kernel:
    """Compile and decode, without a launch; the PTX is kept on disk."""
    with _lock:
        return kernel(source, entry, arch)


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
) -> Traffic:
    """Run `entry` of `source`; raise PtxFault for what a GPU would punish.

    Parameters
    ----------
    args : sequence
        Passed as CuPy passes them: Buffer and int in 8 bytes, float as a double, NumPy scalars in
        their own width.
    buffers : sequence of Buffer
        All memory that the kernel may touch.
    seed : int or None
        Order of warps and blocks. None is the order of their numbers. With 0 lanes that parted meet
        again as soon as they can, which is what traffic is counted for; every other seed takes them
        in any order, and warps a few instructions at a time; odd ones deliver copies at once, all
        others as late as they may come.
    limits : DeviceLimits, optional
        Of the device, for whose architecture the text is compiled; sm_90 when not given.
    opt_in_shared : int, optional
        The function's attribute for dynamic shared memory beyond 48 KiB; when not given, whatever
        the launch needs.
    registers_per_thread : int, optional
        As the compiler reports them, to hold the block against the register file.
    device : int
        Buffers of another device are out of reach.
    count : bool
        Whether to count traffic; the checks are made in any case.
    """
    limits = limits or DeviceLimits.of("90")
    grid, block = _triple(grid), _triple(block)
    with _lock:
        loaded = kernel(source, entry, limits.compute_capability)
        program = loaded.program
        opt_in = shared_bytes if opt_in_shared is None else opt_in_shared
        refusal = limits.refuse(
            grid, block, shared_bytes, loaded.static_bytes, opt_in, registers_per_thread,
            loaded.cluster,
        )  # fmt: skip
        bounds, threads = loaded.launch_bounds, block[0] * block[1] * block[2]
        if not refusal and bounds and threads > bounds:
            refusal = f"block {block} has {threads} threads; its __launch_bounds__ allow {bounds}"
        if not refusal and program.parameter_bytes > limits.parameters:
            most = limits.parameters
            refusal = f"{program.parameter_bytes} bytes of parameters; drivers take {most}"
        if not refusal and max(loaded.cluster[1:]) > 1:
            refusal = f"a cluster of {loaded.cluster}: only those along x are executed"
        if refusal:
            raise PtxFault("limits", f"{entry}: {refusal}")
        packed = loaded.pack(args)
        for b in buffers:
            api().ptx_region_set(b.region, b.writable, b.device != device)
        regions = (ctypes.c_void_p * max(1, len(buffers)))(*(b.region for b in buffers))
        gaps = _gaps(program.shared_spans, program.dynamic_from)
        parameters = np.frombuffer(packed, np.uint8)
        apart = bool(seed)
        held = program.instructions, program.constants, program.suspects, parameters, gaps
        request = LaunchRequest(
            *(array.ctypes.data for array in held), len(program.instructions),
            program.register_bytes, program.predicates, program.suspect_count, len(gaps) // 2,
            program.shared_granule.bit_length() - 1, grid, block, loaded.cluster[0],
            program.dynamic_from + shared_bytes, seed is not None, apart, apart and seed % 2, count,
            (seed or 0) & (2**64 - 1), ctypes.addressof(regions), len(buffers),
        )  # fmt: skip
        fault = Fault()
        ended = api().ptx_launch(ctypes.byref(request), ctypes.byref(fault))
        if ended == 2:
            raise MemoryError("no memory for the shared memory of a cluster")
        if ended:
            raise loaded.exception(fault)
        return collect(buffers)


def _gaps(spans: Sequence[tuple[int, int]], dynamic_from: int) -> np.ndarray:
    """(from, to) of shared memory that belongs to no variable."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), dynamic_from]
    gaps = [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]
    return np.array(gaps or [(0, 0)], np.uint32).ravel()[: 2 * len(gaps) or None]


def _triple(values: Iterable[int]) -> tuple[int, int, int]:
    x, y, z = (*values, 1, 1)[:3]
    return int(x), int(y), int(z)
