"""Run a kernel's text on the CPU: guarded buffers, a launch, what it moved, how it failed."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .build import CompileError, kernel_paths, runtime, source_lines
from .limits import DeviceLimits

KINDS = frozenset({
    "argument", "barrier-divergence", "compile", "deadlock", "exited-lane", "limits",
    "mask-mismatch", "misaligned", "not-in-mask", "out-of-bounds", "race", "read-only",
    "stack-overflow", "uninitialized", "wrong-device",
})  # fmt: skip


class SimtFault(RuntimeError):
    """What a GPU would punish, or should: `kind` is one of `KINDS`, the message says where."""

    def __init__(self, kind: str, message: str, line: int = 0) -> None:
        if kind not in KINDS:
            message, kind = f"{message} (unknown kind {kind!r})", "argument"
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.line = line


class _Counters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in (
            "read_bytes", "written_bytes", "reads", "writes", "warp_reads", "warp_writes",
            "read_sectors", "write_sectors", "distinct_read_bytes", "distinct_written_bytes",
            "distinct_read_sectors", "distinct_write_sectors",
        )),
        ("read_widths", ctypes.c_uint64 * 6),
        ("write_widths", ctypes.c_uint64 * 6),
        *((name, ctypes.c_uint64) for name in ("wavefronts", "minimal_wavefronts", "max_ways")),
    ]  # fmt: skip


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 3072),
        ("has_thread", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("depth", ctypes.c_uint32),
        ("pcs", ctypes.c_uint64 * 64),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("shuffled", ctypes.c_int),
        ("count", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("static_shared", ctypes.c_void_p),
        ("library_low", ctypes.c_uint64),
        ("library_high", ctypes.c_uint64),
    ]


@functools.cache
def _api() -> ctypes.CDLL:
    api = runtime()
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    for name, result, arguments in (
        ("simt_region_new", pointer, (u64, u64, ctypes.c_uint32, ctypes.c_char_p)),
        ("simt_region_free", None, (pointer,)),
        ("simt_region_base", u64, (pointer,)),
        ("simt_region_define", None, (pointer, u64, u64)),
        ("simt_region_defined", pointer, (pointer,)),
        ("simt_region_set", None, (pointer, ctypes.c_int, ctypes.c_int)),
        ("simt_static_shared_new", pointer, (u64, u64)),
        ("simt_dynamic_region", pointer, ()),
        ("simt_launch", ctypes.c_int, (ctypes.POINTER(_Request), ctypes.POINTER(_Fault))),
    ):
        function = getattr(api, name)
        function.restype, function.argtypes = result, arguments
    return api


class Buffer:
    """Device memory: exact bounds, guard pages, and for each byte whether anybody wrote it.

    Parameters
    ----------
    nbytes : int
        Size; nothing is defined at first and every byte is 0xFF.
    name : str
        What faults and traffic records call it.
    offset : int
        Address of the first byte modulo 256; 0 is what CuPy's allocator gives.
    writable : bool
        Whether kernels may store.
    granule : int
        Bytes (1, 2, 4, 8) told apart by the race check: the narrowest access of the kernel.
    device : int
        Kernels on another device may not touch it.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        name: str = "buffer",
        offset: int = 0,
        writable: bool = True,
        granule: int = 1,
        device: int = 0,
    ) -> None:
        if not 0 <= offset < 256:
            msg = f"offset must be in [0, 256), got {offset}"
            raise ValueError(msg)
        api = _api()
        self.name, self.nbytes, self.writable, self.device = name, nbytes, writable, device
        shift = granule.bit_length() - 1
        self._region = api.simt_region_new(nbytes, offset, shift, name.encode()[:95])
        if not self._region:
            msg = f"no memory for a buffer of {nbytes} bytes"
            raise MemoryError(msg)
        self.ptr: int = api.simt_region_base(self._region)
        weakref.finalize(self, api.simt_region_free, self._region)

    @classmethod
    def empty(cls, nbytes: int, **options: Any) -> Buffer:
        """Memory that nobody has written."""
        return cls(nbytes, **options)

    @classmethod
    def from_array(cls, array: np.ndarray, **options: Any) -> Buffer:
        """Memory holding the array's elements in C order."""
        options.setdefault("granule", _granule(array.dtype))
        buffer = cls(array.nbytes, **options)
        buffer.write(array)
        return buffer

    def bytes(self) -> np.ndarray:
        """The memory itself as uint8, writable; writing here does not define."""
        return _view(self, self.ptr, self.nbytes)

    def defined(self) -> np.ndarray:
        """One bool per byte: whether anybody wrote it."""
        return _view(self, _api().simt_region_defined(self._region), self.nbytes).view(bool)

    def write(self, array: np.ndarray, start: int = 0) -> None:
        """Copy the array's elements in C order to byte `start`, which defines them."""
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.bytes()[start : start + raw.size] = raw
        _api().simt_region_define(self._region, start, raw.size)

    def to_numpy(self, dtype: Any, shape: Any = None) -> np.ndarray:
        """Copy of the contents."""
        dtype = np.dtype(dtype)
        flat = np.frombuffer(self.bytes().tobytes(), dtype, self.nbytes // dtype.itemsize).copy()
        return flat if shape is None else flat.reshape(shape)


def _granule(dtype: np.dtype) -> int:
    size = dtype.itemsize
    return size if size in (1, 2, 4, 8) else 1


class _Memory:
    """A view into a buffer that keeps the buffer alive."""

    def __init__(self, owner: Buffer, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False),
        }  # fmt: skip


def _view(owner: Buffer, address: int, nbytes: int) -> np.ndarray:
    return np.asarray(_Memory(owner, address, nbytes)) if nbytes else np.empty(0, np.uint8)


@dataclass(frozen=True)
class BufferTraffic:
    """What one launch did to one buffer; bytes and accesses are summed over lanes.

    Sectors are the 32-byte pieces of memory that each warp access touches. The distinct counts
    take each byte and sector once per block: what is left when L1 merges the accesses.
    """

    name: str
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

    @property
    def read_sector_use(self) -> float:
        """Bytes that lanes asked for, over the bytes of the sectors that warp accesses touched."""
        return _ratio(self.read_bytes, 32 * self.read_sectors)

    @property
    def write_sector_use(self) -> float:
        """As read_sector_use, for stores."""
        return _ratio(self.written_bytes, 32 * self.write_sectors)

    @property
    def merged_read_sector_use(self) -> float:
        """Distinct bytes over the bytes of distinct sectors, per block."""
        return _ratio(self.distinct_read_bytes, 32 * self.distinct_read_sectors)

    @property
    def merged_write_sector_use(self) -> float:
        """As merged_read_sector_use, for stores."""
        return _ratio(self.distinct_written_bytes, 32 * self.distinct_write_sectors)


@dataclass(frozen=True)
class SharedTraffic:
    """What one launch did to shared memory, static and dynamic together."""

    read_bytes: int = 0
    written_bytes: int = 0
    warp_reads: int = 0
    warp_writes: int = 0
    wavefronts: int = 0
    minimal_wavefronts: int = 0
    max_ways: int = 0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


@dataclass(frozen=True)
class Traffic:
    """What one launch moved: `traffic["x"]` or `traffic[buffer]`, and `traffic.shared`."""

    buffers: tuple[BufferTraffic, ...]
    shared: SharedTraffic
    keys: tuple[int, ...] = ()

    def __getitem__(self, key: str | Buffer) -> BufferTraffic:
        if isinstance(key, Buffer):
            return self.buffers[self.keys.index(id(key))]
        found = [b for b in self.buffers if b.name == key]
        if len(found) != 1:
            msg = f"{len(found)} buffers are named {key!r}; there are {[b.name for b in self.buffers]}"
            raise KeyError(msg)
        return found[0]

    @property
    def read_bytes(self) -> int:
        """Bytes read from buffers, summed over lanes."""
        return sum(b.read_bytes for b in self.buffers)

    @property
    def written_bytes(self) -> int:
        """Bytes written to buffers, summed over lanes."""
        return sum(b.written_bytes for b in self.buffers)


class _Kernel:
    """A compiled entry, loaded."""

    def __init__(self, source: str, entry: str) -> None:
        self.entry = entry
        try:
            self.path, _ = kernel_paths(source, entry)
        except CompileError as error:
            raise SimtFault("compile", f"{entry}: {error}") from None
        self.lines = source.splitlines()
        library = ctypes.CDLL(str(self.path))
        self.call = ctypes.cast(library.simt_call, ctypes.c_void_p).value
        out = (ctypes.c_int * 512)()
        count = library.simt_signature(out)
        self.signature = [(chr(out[2 * i]), out[2 * i + 1]) for i in range(count)]
        library.simt_static_shared.restype = ctypes.c_void_p
        low = library.simt_static_shared(0) or 0
        self.static_bytes = (library.simt_static_shared(1) or 0) - low
        self.static_region = None
        if self.static_bytes:
            self.static_region = _api().simt_static_shared_new(low, self.static_bytes)
        self.range = _mapped_range(self.path, self.call)
        self._library = library

    def describe(self, offset: int) -> tuple[str, int]:
        """`line 12: the text of it`, and 12."""
        return self._describe_all((offset,))[0]

    def _describe_all(self, offsets: Sequence[int]) -> list[tuple[str, int]]:
        out = []
        for file, line in source_lines(self.path, list(offsets)):
            known = file == self.path.with_suffix(".cpp").name and 0 < line <= len(self.lines)
            text = f": {self.lines[line - 1].strip()}" if known else ""
            out.append((f"line {line}{text}" if known else "an unknown line", line if known else 0))
        return out

    def raise_fault(self, fault: _Fault) -> None:
        """Turn the runtime's report into an exception with source lines."""
        message = fault.message.decode()
        tokens = sorted(set(re.findall(r"@\{([0-9a-f]+)\}", message)))
        frames = list(fault.pcs[: fault.depth])
        offsets = [int(t, 16) for t in tokens] + frames
        texts = self._describe_all(offsets)
        for token, (text, _) in zip(tokens, texts, strict=False):
            message = message.replace(f"@{{{token}}}", text)
        stack = [t for t in texts[len(tokens) :] if t[1]]
        if fault.has_thread:
            message += f"\n  in block {tuple(fault.block)}, thread {tuple(fault.thread)} of {self.entry}"
        else:
            message += f"\n  in {self.entry}"
        for i, (text, _) in enumerate(stack):
            message += f"\n  {'at' if i == 0 else 'called from'} {text}"
        raise SimtFault(fault.kind.decode(), message, stack[0][1] if stack else 0)


def _mapped_range(path: Path, inside: int) -> tuple[int, int]:
    """Lowest and highest address of the library that is mapped around `inside`."""
    rows = [r.split() for r in Path("/proc/self/maps").read_text().splitlines()]
    spans = [r[0].split("-") for r in rows if r[-1] == str(path)]
    return min(int(a, 16) for a, _ in spans), max(int(b, 16) for _, b in spans)


_kernel = functools.cache(_Kernel)
# The runtime runs one block at a time for the whole process.
_lock = threading.RLock()


def load(source: str, entry: str) -> None:
    """Compile and load, without a launch."""
    with _lock:
        _kernel(source, entry)


def _pack(kernel: _Kernel, args: Sequence[Any]) -> list[ctypes.Array[ctypes.c_char]]:
    """Bytes of each argument, checked against the entry's own parameter types."""
    if len(args) != len(kernel.signature):
        msg = f"{kernel.entry} takes {len(kernel.signature)} arguments, got {len(args)}"
        raise SimtFault("argument", msg)
    packed = []
    for i, (arg, (letter, size)) in enumerate(zip(args, kernel.signature, strict=True)):
        if isinstance(arg, Buffer):
            raw, kinds = np.uint64(arg.ptr).tobytes(), "pi"
        elif isinstance(arg, (bool, np.bool_)):
            raw, kinds = bytes([arg]), "i"
        elif isinstance(arg, int):
            raw, kinds = (int(arg) & (2**64 - 1)).to_bytes(8, "little"), "pi"
        elif isinstance(arg, float):
            raw, kinds = np.float64(arg).tobytes(), "f"
        elif isinstance(arg, np.generic) or (isinstance(arg, np.ndarray) and arg.size == 1):
            raw = arg.tobytes()
            kinds = "f" if arg.dtype.kind == "f" else "pi" if arg.dtype.kind in "iu" else "s"
        else:
            msg = f"argument {i} of {kernel.entry} is a {type(arg).__name__}"
            raise SimtFault("argument", msg)
        if letter not in kinds or len(raw) != size:
            what = {"i": "integer", "p": "pointer", "f": "floating-point number", "s": "struct"}
            msg = (
                f"parameter {i} of {kernel.entry} is a {size}-byte {what[letter]}, but the launch "
                f"passes {arg!r}, which goes as {len(raw)} bytes of {type(arg).__name__}"
            )
            raise SimtFault("argument", msg)
        packed.append(ctypes.create_string_buffer(raw, len(raw)))
    return packed


def _triple(values: Iterable[int]) -> tuple[int, int, int]:
    x, y, z = (*values, 1, 1)[:3]
    return int(x), int(y), int(z)


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
    """Run `entry` of `source`; raise SimtFault for what a GPU would punish.

    Parameters
    ----------
    buffers : sequence of Buffer
        All memory that the kernel may touch.
    seed : int or None
        Order of threads and blocks; None is the order of their numbers.
    limits : DeviceLimits, optional
        Of the device; sm_90 when not given.
    opt_in_shared : int, optional
        The function's attribute for dynamic shared memory beyond 48 KiB; `shared_bytes` when not given.
    count : bool
        Whether to count traffic; the checks are made in any case.
    """
    limits = limits or DeviceLimits.of("90")
    grid, block = _triple(grid), _triple(block)
    with _lock:
        kernel = _kernel(source, entry)
        opt_in = shared_bytes if opt_in_shared is None else opt_in_shared
        refusal = limits.refuse(
            grid, block, shared_bytes, kernel.static_bytes, opt_in, registers_per_thread
        )
        if refusal:
            raise SimtFault("limits", f"{entry}: {refusal}")
        packed = _pack(kernel, args)
        api = _api()
        for b in buffers:
            api.simt_region_set(b._region, b.writable, b.device != device)
        regions = (ctypes.c_void_p * max(1, len(buffers)))(*(b._region for b in buffers))
        pointers = (ctypes.c_void_p * max(1, len(packed)))(*(ctypes.addressof(p) for p in packed))
        request = _Request(
            kernel.call, ctypes.addressof(pointers), grid, block, shared_bytes, seed is not None,
            count, (seed or 0) & (2**64 - 1), ctypes.addressof(regions), len(buffers),
            kernel.static_region, *kernel.range,
        )  # fmt: skip
        fault = _Fault()
        if api.simt_launch(ctypes.byref(request), ctypes.byref(fault)):
            kernel.raise_fault(fault)
        return _traffic(kernel, buffers, bool(shared_bytes))


def _traffic(kernel: _Kernel, buffers: Sequence[Buffer], dynamic: bool) -> Traffic:
    records = []
    for b in buffers:
        c = _Counters.from_address(b._region)
        values = {f.name: getattr(c, f.name) for f in fields(BufferTraffic) if f.name != "name"}
        for key in ("read_widths", "write_widths"):
            values[key] = {1 << i: n for i, n in enumerate(values[key]) if n}
        records.append(BufferTraffic(name=b.name, **values))
    shared = [_Counters.from_address(_api().simt_dynamic_region())] if dynamic else []
    if kernel.static_region:
        shared.append(_Counters.from_address(kernel.static_region))
    merged = {
        f.name: (max if f.name == "max_ways" else sum)([getattr(c, f.name) for c in shared] or [0])
        for f in fields(SharedTraffic)
    }
    return Traffic(tuple(records), SharedTraffic(**merged), tuple(id(b) for b in buffers))
