"""Addresses, alignment, definedness and rights: each breach caught and named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.launch import Buffer, DeviceLimits
from tests.ptx.run_kernel import (
    COPY,
    LOAD4,
    caught,
    entry,
    floats,
    good,
    ptx,
    run,
    unwritten,
    wrong,
)

VECTOR = "*(float4*)(y + 4 * i) = *(float4*)(x + 4 * i + n);"
VARIABLES = """
__shared__ volatile float a[32], b[32];
a[i] = b[i] = 1;
__syncwarp();
if (i == 0) ACCESS;
"""
# Of each: the kind of fault, threads, n of a bad and of a good launch, the text, the line to blame,
# words of the message.
WRONG = {
    "overrun": ("out-of-bounds", 128, 64, 63, "if (i <= n) {\ny[i % 64] =\nx[i];\n}", "x[i];",
                "4-byte load", "ends 4 bytes after x (256 bytes; offset 256)"),
    "overrun-store": ("out-of-bounds", 128, 64, 63, "if (i <= n) {\ny[i] =\nx[i % 64];\n}",
                      "y[i] =", "4-byte store", "ends 4 bytes after y"),
    "underrun": ("out-of-bounds", 1, -1, 0, "y[0] = x[n];", "x[n]", "starts 4 bytes before x"),
    "wild": ("out-of-bounds", 1, 1 << 44, 0, "y[0] = x[n];", "x[n]", " at 0x", "outside every"),
    "vector-overrun": ("out-of-bounds", 15, 8, 4, VECTOR, VECTOR, "16-byte load", "offset 256"),
    "vector": ("misaligned", 8, 1, 4, VECTOR, VECTOR, "is 4 modulo 16"),
    "overrun-shared": (
        "out-of-bounds", 1, 64, 63, "s[n] = 1;", "s[n] = 1;", "memory (256 bytes; offset 256)"),
    "underrun-shared": ("out-of-bounds", 1, -1, 0, "s[n] = 1;", "s[n] = 1;", "offset -4"),
    "load-between-variables": (
        "out-of-bounds", 32, 32, 31, VARIABLES.replace("ACCESS", "y[0] = b[n] + a[n]"), "y[0]",
        "between its variables"),
    "store-between-variables": (
        "out-of-bounds", 32, 32, 31, VARIABLES.replace("ACCESS", "a[n] = 2, b[n] = 2"), "a[n]",
        "between its variables"),
    "shared": ("misaligned", 1, 2, 4, "*(volatile float*)(shared + n) = x[0];", "(shared + n)",
               "2 modulo 4"),
    "uninitialized": ("uninitialized", 32, 3, -1, "if (i != n) s[i] = 1;\ny[i] = s[i];", "y[i]",
                      "from offset 12 of shared memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    wrong(*WRONG[name])


@pytest.mark.parametrize("nbytes", [1, 255, 4097])
def test_a_byte_past_the_end(nbytes):
    body = "y[0] = ((const unsigned char*)x)[n];"
    args = Buffer.from_array(np.zeros(nbytes, np.uint8), name="x"), unwritten(1)
    message = caught("out-of-bounds", entry(body), (1,), (*args, nbytes), body)
    assert f"1-byte load outside every buffer: it ends 1 bytes after x ({nbytes} bytes" in message
    good(entry(body), (1,), (*args, nbytes - 1))


def test_alignment_is_that_of_the_address():
    x = floats(160, offset=8)
    message = caught("misaligned", LOAD4, (32,), (x, unwritten(128), 0))
    assert "16-byte load at offset 0 of x: the address is 8 modulo 16" in message
    good(LOAD4, (32,), (x, unwritten(128), 2))


def test_vectors_of_32_bytes():
    registers = ", ".join(f"%{k}" for k in range(8))
    source = f"""
extern "C" __global__ void k(const float* x, float* y, long long shift) {{
  float v[8];
  asm volatile("ld.global.v8.f32 {{{registers}}}, [%8];"  // load
    : {", ".join(f'"=f"(v[{k}])' for k in range(8))} : "l"(x + 8 * threadIdx.x + shift));
  asm volatile("st.global.v8.f32 [%8], {{{registers}}};"  // store
    : : {", ".join(f'"f"(v[{k}])' for k in range(8))}, "l"(y + 8 * threadIdx.x));
}}
"""
    x, y, wide = floats(264), unwritten(256), DeviceLimits.of("100")
    t = good(source, (32,), (x, y, 8), limits=wide)["x"]
    assert (y.to_numpy(np.float32) == np.arange(8, 264)).all()
    assert (t.read_widths, t.read_bytes, t.read_sectors, t.warp_reads) == ({32: 32}, 1024, 32, 1)
    message = caught("misaligned", source, (32,), (x, unwritten(256), 4), limits=wide)
    assert "32-byte load" in message and "is 16 modulo 32" in message
    caught("out-of-bounds", source, (32,), (x, unwritten(252), 8), limits=wide)


@pytest.mark.parametrize("offset", [0, 2, 16, 100, 254])
def test_offset_of_a_buffer(offset):
    for nbytes in (2, 4096, 8190, 10000):
        assert Buffer.empty(nbytes, offset=offset).ptr % 256 == offset


def test_reading_what_nobody_wrote():
    x = Buffer.empty(256, name="workspace", granule=4)
    message = caught("uninitialized", COPY, (64,), (x, unwritten(64)), "x[threadIdx.x]")
    assert "workspace" in message
    x.write(np.zeros(63, np.float32))
    message = caught("uninitialized", COPY, (64,), (x, unwritten(64)))
    assert "nobody wrote byte 252" in message and "thread (63, 0, 0)" in message
    x.write(np.zeros(1, np.float32), start=252)
    good(COPY, (64,), (x, unwritten(64)))


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ("st.global.f32 [%rd2], %f1;", "st.global"),
        ("ld.global.f32 %f1, [%rd6];", "ld.global"),  # an address
        ("setp.eq.s32 %p1, %r1, 0;\n@%p1 mov.f32 %f1, 0f00000000;\nst.global.f32 [%rd2], %f1;",
         "st.global"),  # thread 0 wrote it, for itself
        ("@%p1 bra over;\nst.global.f32 [%rd2], 0f00000000;\nover:", "@%p1 bra"),
        ("@!%p1 st.global.f32 [%rd2], 0f00000000;", "@!%p1 st"),
        ("setp.eq.s32 %p1, %r1, 0;\n@%p1 bra over;\nmov.f32 %f1, 0f00000000;\nover:\n"
         "st.global.f32 [%rd2], %f1;", "st.global"),  # on one way alone
    ],
)  # fmt: skip
def test_a_register_that_nobody_wrote(body, at):
    args = (floats(64), unwritten(64))
    message = caught("uninitialized", ptx(body), (64,), args, at)
    assert "a register that nobody has written" in message
    written = "mov.f32 %f1, 0f00000000;\nmov.u64 %rd6, %rd1;\nsetp.eq.s32 %p1, %r1, 99;\n"
    good(ptx(written + body), (64,), args)


def test_guards_keep_accesses_from_memory():
    """Where the guard is off the address may be any, and nothing is read, written or counted."""
    x, y = floats(16), unwritten(64)
    body = """
setp.lt.s32 %p1, %r1, 16;
mov.f32 %f1, 0f3F800000;
@%p1 ld.global.f32 %f1, [%rd1];
@!%p1 st.global.f32 [%rd2], %f1;
"""
    traffic = good(ptx(body), (64,), (x, y))
    assert (traffic["x"].reads, traffic["y"].writes) == (16, 48)
    assert not y.defined()[:64].any()
    assert (y.to_numpy(np.float32)[16:] == 1).all()
    unguarded = body.replace("@%p1 ld", "ld")
    caught("out-of-bounds", ptx(unguarded), (64,), (x, y), "ld.global")


def test_definedness_lasts_from_launch_to_launch():
    work, y = Buffer.empty(256, granule=4), unwritten(64)
    run(COPY, (64,), (floats(64), work))
    run(COPY, (64,), (work, y))
    assert (y.to_numpy(np.float32) == np.arange(64)).all() and y.defined().all()


def test_unwritten_memory_is_poisoned():
    y = unwritten(64)
    run(COPY, (32,), (floats(64), y))
    assert y.defined().reshape(64, 4).all(1).tolist() == [True] * 32 + [False] * 32
    assert (y.bytes()[128:] == 0xFF).all()


@pytest.mark.parametrize("first", [0, 1])
def test_shared_memory_is_undefined_in_each_block(first):
    body = "if (blockIdx.x != n) s[i] = 1;\ny[blockIdx.x * 32 + i] = s[i];"
    wrong("uninitialized", 32, first, -1, body, "y[blockIdx.x", "of shared memory", grid=(2,))


def test_read_only_buffer():
    x = floats(64, writable=False)
    caught("read-only", COPY, (64,), (floats(64), x), "y[threadIdx.x] =")
    good(COPY, (64,), (x, unwritten(64)))


def test_memory_of_another_device():
    x, y = floats(64, device=1), unwritten(64)
    caught("wrong-device", COPY, (64,), (x, y))
    good(COPY, (64,), (x, unwritten(64, device=1)), device=1)
