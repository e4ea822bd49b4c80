"""What a launch moved of each buffer and of shared memory: bytes, sectors, bank conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .api import Counters, api
from .buffer import Buffer


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
