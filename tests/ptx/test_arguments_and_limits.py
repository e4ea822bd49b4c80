"""What a driver would refuse, or take for something else; what the engine does not know."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.limits import KIB, DeviceLimits
from tests.ptx.run_kernel import COPY, caught, floats, good, ptx, unwritten


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
