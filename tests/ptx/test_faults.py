"""Accesses, orders of them, and meetings of threads: each breach caught and named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.launch import Buffer
from tests.ptx.limits import KIB, DeviceLimits
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

FULL = "0xffffffffu"
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
    # Addresses, alignment, definedness.
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
    # Accesses that no barrier orders: a load may also come before the store that it needs.
    "no-barrier": (
        "uninitialized race", 64, 0, 1, "s[i] = x[i];\nif (n) __syncthreads();\ny[i] = s[i ^ 63];",
        None, "of shared memory"),
    "no-barrier-global": (
        "race uninitialized", 64, 0, 1, "y[i] = x[i];\nif (n) __syncthreads();\nx[i] = y[i ^ 63];",
        None, " of y"),
    "another-warp": (
        "uninitialized race", 64, 32, 1, "s[i] = x[i];\n__syncwarp();\ny[i] = s[i ^ n];",
        None, "of shared memory"),
    "another-warp-global": (
        "race uninitialized", 64, 32, 1, "y[i] = x[i];\n__syncwarp();\nx[i] = y[i ^ n];",
        None, " of y"),
    "overwritten-while-read": ("race", 64, 0, 1, """
s[i] = x[i];
__syncthreads();
float a = s[63 - i];
if (n) __syncthreads();
s[i] = 2 * a;
__syncthreads();
y[i] = s[i];""", None, "with no __syncthreads in between"),
    "a-shuffle-orders-no-memory": ("race", 64, 0, 1, """
s[i] = x[i];
if (n) __syncwarp();
__shfl_sync(0xffffffffu, 1, 0);
y[i] = s[i ^ 1];""", "y[i] = s[i ^ 1];", "__syncwarp", ": s[i] = x[i];"),
    "a-part-of-a-warp": ("race", 64, 16, 1, """
s[i] = x[i];
if (i % 32 < 16) __syncwarp(0xffffu);
__shfl_sync(0xffffffffu, 1, 0);
if (i % 32 < 16) y[i] = s[i ^ n];""", "y[i] = s[i ^ n];", "__syncwarp"),
    # Shuffles, votes and barriers that not all reach.
    "two-barriers": (
        "barrier-divergence", 64, 32, 64, """
if (i < n) {
  y[i] = 1;
  __syncthreads();  // first
} else {
  __syncthreads();  // second
}""", None, ": __syncthreads();  // first", ": __syncthreads();  // second"),
    "not-all-reach-it": (
        "barrier-divergence", 64, 60, 64, "if (i >= n) return;\n__syncthreads();\ny[i] = 1;",
        None, "waiting at __syncthreads, line", "exited"),
    "barrier-against-warp-barrier": (
        "barrier-divergence", 32, 5, 32, """
if (i == n) __syncthreads();
else __syncwarp();
y[i] = 1;""", None, "1 thread(s), first 5: waiting at __syncthreads, line",
        "31 thread(s), first 0: waiting in a warp operation with mask 0xffffffff, line",
        ": if (i == n) __sync", ": else __sync"),
    "shuffle-with-exited-lane": (
        "exited-lane", 32, 31, 32,
        f"if (i >= n) return;\ny[i] = __shfl_xor_sync({FULL}, 1.0f, 1);",
        "y[i] = __shfl_xor_sync", "names lane 31"),
    "shuffle-reads-outside": (
        "not-in-mask", 4, 4, 3, "y[i] = __shfl_sync(0x0fu, 1.0f, (int)n);",
        "y[i] = __shfl_sync", "reads lane 4"),
    "shuffle-outside-mask": (
        "not-in-mask", 32, 16, 8, "if (i < n) y[i] = __shfl_sync(0xffu, 1.0f, 0);",
        "__shfl_sync", "does not name it"),
    "vote-outside-mask": (
        "not-in-mask", 32, 16, 8, "if (i < n) y[i] = __any_sync(0xffu, i > 2);", "__any_sync"),
    "masks-differ": (
        "mask-mismatch", 32, 16, 32,
        f"y[i] = __shfl_xor_sync(i < n ? {FULL} : 0xfffffffeu, 1.0f, 1);", "__shfl_xor_sync"),
    "operations-differ": (
        "mask-mismatch", 32, 16, 32,
        f"if (i < n) y[i] = __shfl_xor_sync({FULL}, 1.0f, 1);\nelse __syncwarp();",
        None, ": if (i < n) y[i] = __shfl", ": else __syncwarp();"),
    "a-ring-that-waits": (
        "deadlock", 5, 0x11, 0, """
y[i] = 1;
if (n && i == 0) __syncwarp(0x3);
if (n && i == 1) __syncwarp(0x6);
if (n && i == 2) __syncwarp(0xc);
if (n && i == 3) __syncwarp(0x18);
if (n && i == 4) __syncwarp(n);""", None,
        "waiting in a warp operation with mask 0x00000018, line"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    wrong(*WRONG[name])


# ---- addresses, definedness and rights ----


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


# ---- races ----


def test_race_between_blocks():
    body = "y[blockIdx.x / n] = blockIdx.x;"
    wrong("race", 1, 2, 1, body, body, "another block", grid=(16,))


def test_blocks_of_another_launch_do_not_race():
    y = unwritten(64)
    for _ in range(2):
        good(COPY, (64,), (floats(64), y))


def test_the_read_only_path():
    """By it a load may see memory as it was before the launch, in whatever order it comes."""
    load, store = "ld.global.nc.f32 %f1, [%rd1];", "st.global.f32 [%rd1], %f2;"
    x, y = floats(64), unwritten(64)
    for body, at in (((load, store), store), ((store, load), load)):
        bad = ptx("\n".join(("mov.f32 %f2, 0f3F800000;", *body)))
        assert "this launch writes it" in caught("read-only-path", bad, (64,), (x, y), at)
    good(ptx(f"{load}\nst.global.f32 [%rd2], %f1;"), (64,), (x, y))
    text = COPY.replace("x, float* y", "__restrict__ x, float* __restrict__ y")
    caught("read-only-path", text, (64,), (x, x), "y[threadIdx.x] = x")
    good(COPY, (64,), (x, x))


# ---- shuffles, votes and barriers ----


@pytest.mark.parametrize(
    ("loop", "seed"),
    [
        ("while (*(volatile float*)x < n) {}", 1),  # what another thread should write
        ("for (volatile float sum = *x; n > 0;) sum = sum + 1;", None),
    ],
)
def test_endless_loop(loop, seed):
    words = "instructions with no barrier: an endless loop"
    wrong("deadlock", 1, 5, 0, loop, None, words, f": {loop}", seeds=(seed,))


def test_shuffle_with_a_lane_that_was_never_there():
    source = entry(f"y[i] = __shfl_xor_sync({FULL}, 1.0f, 1);")
    caught("exited-lane", source, (31,), (floats(1), unwritten(32), 0), "__shfl_xor_sync")


def test_only_the_barrier_of_all_threads_is_executed():
    caught("argument", ptx("bar.sync 1;"), (32,), (unwritten(32),) * 2, "bar.sync 1;")
    good(ptx("bar.sync 0;"), (32,), (unwritten(32),) * 2)


def test_votes_over_the_block():
    source = """
extern "C" __global__ void k(int* y) {
  int i = threadIdx.x;
  y[i] = __syncthreads_count(i % 3 == 0);
  y[i + 64] = __syncthreads_or(i == 40);
  y[i + 128] = __syncthreads_and(i == 40);
}
"""
    y = Buffer.empty(4 * 192, granule=4)
    good(source, (64,), (y,))
    assert (y.to_numpy(np.int32, (3, 64)) == [[22], [1], [0]]).all()


def test_full_mask_after_part_mask():
    """Half of a warp may meet among itself while the other half already waits for all."""
    source = """
extern "C" __global__ void k(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffffu, v, 1);
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 16);
}
"""
    y = Buffer.empty(128, granule=4)
    good(source, (32,), (y,))
    i = np.arange(32)
    assert (y.to_numpy(np.int32) == np.where(i < 16, i + 16, (i - 16) ^ 1)).all()


# ---- what a driver would refuse, or take for something else; what the engine does not know ----


@pytest.mark.parametrize(
    ("parameter", "words", "bad", "fine"),
    [
        ("float n", "4-byte floating-point number", 1e-5, np.float32(1e-5)),  # a double
        ("double n", "8-byte floating-point number", 3, 3.0),
        ("int n", "4-byte integer or pointer", 3, np.int32(3)),
        ("long long n", "8-byte integer or pointer", 3.0, 3),
        ("long long n", "8-byte integer or pointer", np.int32(3), np.int64(3)),
        ("long long n", "8-byte integer or pointer", True, 1),
    ],
)
def test_argument_of_another_type(parameter, words, bad, fine):
    source = f"""
extern "C" __global__ void k(float* y, {parameter}) {{ y[0] = (float)n; }}
"""
    message = caught("argument", source, (1,), (unwritten(1), bad))
    assert f"parameter 1 of k is a {words}" in message
    y = unwritten(1)
    good(source, (1,), (y, fine))
    assert y.to_numpy(np.float32)[0] == np.float32(fine)


def test_number_of_arguments():
    caught("argument", COPY, (64,), (floats(64),))


def test_text_that_does_not_compile():
    text = 'extern "C" __global__ void k(float* y) { y[0] = no_such_name; }'
    assert "no_such_name" in caught("compile", text, (1,), (unwritten(1),))


@pytest.mark.parametrize(
    ("launched", "words"),
    [
        ({"block": (1025,)}, "block x is 1025"),
        ({"block": (32, 33)}, "has 1056 threads"),
        ({"block": (1, 1, 65)}, "block z is 65"),
        ({"grid": (2**31,)}, "grid x is 2147483648"),
        ({"grid": (1, 65536)}, "grid y is 65536"),
        ({"grid": (0,)}, "grid x is 0"),
        ({"shared": 227 * KIB + 1}, "232449 bytes of dynamic"),
        ({"shared": 100 * KIB, "limits": DeviceLimits.of("86")}, "sm_86 takes 101376 per block"),
        ({"shared": 48 * KIB + 4, "opt_in_shared": 48 * KIB}, "max_dynamic_shared_size_bytes"),
        ({"block": (1024,), "registers_per_thread": 65}, "1024 threads of 65 registers"),
        ({"registers_per_thread": 256}, "255 per thread"),
    ],
)
def test_launch_beyond_the_device(launched, words):
    launched = {"block": (1,)} | launched
    args = (floats(64), unwritten(64))
    assert words in caught("limits", COPY, args=args, **launched)


def test_launch_at_the_limits():
    good(COPY, (1,), (floats(64), unwritten(64)), shared=227 * KIB)
    good(COPY, (1024,), (floats(1024), unwritten(1024)), registers_per_thread=64)


def test_too_much_static_shared():
    source = """
extern "C" __global__ void k(float* y) {
  __shared__ volatile float s[12289];
  s[threadIdx.x] = 1;
  y[0] = s[0];
}
"""
    assert "49156 bytes of static" in caught("limits", source, (1,), (unwritten(1),))
    good(source.replace("12289", "12288"), (1,), (unwritten(1),))


def test_too_many_parameters():
    source = """
struct Many { float first; char rest[N]; };
extern "C" __global__ void k(float* y, Many many) { y[0] = many.first; }
"""
    for rest, fits in ((4084, True), (4088, False)):
        text = source.replace("[N]", f"[{rest}]")
        args = (unwritten(1), np.zeros((), f"V{4 + rest}")[()])
        if fits:
            good(text, (1,), args)
        else:
            assert "4100 bytes of parameters" in caught("limits", text, (1,), args)


def test_launch_bounds():
    source = COPY.replace("void k", "void __launch_bounds__(32, 4)\nk")
    message = caught("limits", source, (64,), (floats(64), unwritten(64)))
    assert "64 threads; its __launch_bounds__ allow 32" in message
    good(source, (32,), (floats(64), unwritten(64)))


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("membar.gl;", "'membar.gl'"),  # an instruction
        ("sin.approx.f32 %f1, 0f00000000;", "'sin.approx.f32'"),
        ("add.rz.f32 %f1, 0f00000000, 0f00000000;", "'add.rz.f32'"),  # a modifier
        ("add.sat.s32 %r2, %r1, 1;", "'add.sat.s32'"),
        ("ld.acquire.gpu.global.f32 %f1, [%rd1];", "'.acquire'"),
        ("ld.local.f32 %f1, [%rd1];", "'.local'"),
        ("ld.global.v3.f32 {%f1, %f2, %f3}, [%rd1];", "'.v3'"),
        ("ld.global.b128 %rd6, [%rd1];", "'b128'"),  # a type
        ("add.s128 %rd6, %rd1, 1;", "'add.s128'"),
        (".reg .b128 %q<2>;\nmov.b64 %q1, %rd1;", "'b128'"),
        ("add.s32 %rd6, %r1, 1;", "%rd6 of b64"),  # a register of another width
        ("add.s32 %r9x, %r1, 1;", "%r9x"),  # one that nobody declared
        ("add.s32 %r2, %r1;", "2 operands"),
        ("mov.u32 %r2, %smid;", "%smid"),
        ("bra nowhere;", "nowhere"),
        ("bra behind;", "behind"),
        (".local .align 8 .b8 array[16];", "'.local'"),
        ("call.uni function, ();", "'call.uni'"),
        ("@%p1 bar.sync 0;", "a guard where lanes meet"),
        ("add.s32 %r2, %r1, 1", "no end of the statement"),
    ],
)
def test_what_the_engine_does_not_know(statement, words):
    text = ptx(statement).replace("ret;", "ret;\nbehind:")
    message = caught("compile", text, (64,), (floats(64), unwritten(64)))
    last = statement.split("\n")[-1].rstrip(";")
    line = next(k for k, row in enumerate(text.splitlines(), 1) if row.startswith(last))
    assert words in message and f"in line {line} of the PTX: {last}" in message


def test_a_program_without_an_end():
    text, args = ptx("ld.global.f32 %f1, [%rd1];"), (floats(64), unwritten(64))
    message = caught("argument", text.replace("ret;", ""), (64,), args)
    assert "ran past the end of the program" in message
    good(text, (64,), args)
