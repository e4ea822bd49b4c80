"""Accesses that no barrier orders must be caught, those that one orders must not."""

from __future__ import annotations

import pytest

from tests.ptx.run_kernel import COPY, caught, floats, good, ptx, unwritten, wrong

# Of each: the kind of fault, threads, n of a bad and of a good launch, the text, the line to blame,
# words of the message. Without a barrier a load may also come before the store that it needs.
WRONG = {
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
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    wrong(*WRONG[name])


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
