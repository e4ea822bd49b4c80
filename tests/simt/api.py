"""The runtime's C interface: structures as the C++ ones, functions with their types."""

from __future__ import annotations

import ctypes
import functools

from .build import runtime

_U64_COUNTERS = (
    "read_bytes", "written_bytes", "reads", "writes", "warp_reads", "warp_writes",
    "read_sectors", "write_sectors", "distinct_read_bytes", "distinct_written_bytes",
    "distinct_read_sectors", "distinct_write_sectors",
)  # fmt: skip


class Counters(ctypes.Structure):
    """`Counters` of memory.hpp."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _U64_COUNTERS),
        ("read_widths", ctypes.c_uint64 * 6),
        ("write_widths", ctypes.c_uint64 * 6),
        *((name, ctypes.c_uint64) for name in ("wavefronts", "minimal_wavefronts", "max_ways")),
    ]


class SiteCounters(ctypes.Structure):
    """`SiteCounters` of traffic.hpp."""

    _fields_ = [
        ("region", ctypes.c_void_p),
        ("pc", ctypes.c_uint32),
        ("write", ctypes.c_uint32),
        ("warp_accesses", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
        ("minimal_wavefronts", ctypes.c_uint64),
    ]


class Fault(ctypes.Structure):
    """`Fault` of engine.hpp."""

    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 3072),
        ("has_thread", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("depth", ctypes.c_uint32),
        ("pcs", ctypes.c_uint64 * 64),
    ]


class LaunchRequest(ctypes.Structure):
    """`LaunchRequest` of runtime.cpp."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("shuffled", ctypes.c_int),
        ("count", ctypes.c_int),
        ("flush", ctypes.c_int),
        ("wide_vectors", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("static_shared", ctypes.c_void_p),
        ("library_low", ctypes.c_uint64),
        ("library_high", ctypes.c_uint64),
    ]


@functools.cache
def api() -> ctypes.CDLL:
    """The loaded runtime with typed functions; a region is an address."""
    library = runtime()
    pointer, u64, u32, flag = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
    for name, result, arguments in (
        ("simt_region_new", pointer, (u64, u64, u32, ctypes.c_char_p)),
        ("simt_region_free", None, (pointer,)),
        ("simt_region_base", u64, (pointer,)),
        ("simt_region_define", None, (pointer, u64, u64)),
        ("simt_region_defined", pointer, (pointer,)),
        ("simt_region_set", None, (pointer, flag, flag)),
        ("simt_static_shared_new", pointer, (u64, u64)),
        ("simt_dynamic_region", pointer, ()),
        ("simt_remote_region", pointer, ()),
        ("simt_sites", u64, (ctypes.POINTER(SiteCounters),)),
        ("simt_launch", flag, (ctypes.POINTER(LaunchRequest), ctypes.POINTER(Fault))),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
