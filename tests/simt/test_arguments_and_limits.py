"""What a driver would refuse, or take for something else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt.launch import SimtFault
from tests.simt.limits import KIB, DeviceLimits
from tests.simt.run_kernel import COPY, caught, floats, run, unwritten


def test_float_parameter_fed_a_double():
    source = """
extern "C" __global__ void k(float* y, float eps) { y[0] = eps; }
"""
    message = caught("argument", source, (1,), (unwritten(1), 1e-5))
    assert "parameter 1 of k is a 4-byte floating-point number" in message
    run(source, (1,), (unwritten(1), np.float32(1e-5)))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("int n", 3),
        ("double n", 3),
        ("long long n", 3.0),
        ("long long n", np.int32(3)),
        ("long long n", True),
    ],
)
def test_argument_of_another_type(parameter, value):
    source = f"""
extern "C" __global__ void k(float* y, {parameter}) {{ y[0] = (float)n; }}
"""
    caught("argument", source, (1,), (unwritten(1), value))


def test_number_of_arguments():
    caught("argument", COPY, (64,), (floats(64),))


def test_text_that_does_not_compile():
    with pytest.raises(SimtFault, match="no_such_name") as info:
        run(
            'extern "C" __global__ void k(float* y) { y[0] = no_such_name; }', (1,), (unwritten(1),)
        )
    assert info.value.kind == "compile"


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
    block = launched.pop("block", (1,))
    message = caught("limits", COPY, block, (floats(64), unwritten(64)), **launched)
    assert words in message


def test_launch_at_the_limits():
    run(COPY, (1,), (floats(64), unwritten(64)), shared=227 * KIB)
    run(COPY, (1024,), (floats(1024), unwritten(1024)), registers_per_thread=64)


def test_too_much_static_shared():
    source = """
extern "C" __global__ void k(float* y) {
  __shared__ float s[12289];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[0] = s[0];
}
"""
    assert "49156 bytes of static" in caught("limits", source, (1,), (unwritten(1),))


def test_launch_bounds():
    source = COPY.replace("void k", "void __launch_bounds__(32, 4)\nk")
    message = caught("limits", source, (64,), (floats(64), unwritten(64)))
    assert "64 threads; its __launch_bounds__ allow 32" in message
    run(source, (32,), (floats(64), unwritten(64)))
