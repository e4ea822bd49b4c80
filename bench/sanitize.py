"""Each kernel family at aligned, odd, offset, pitched, in-place and column-major shapes, checked.

`compute-sanitizer --tool memcheck python -m bench.sanitize` watches it; alone it is a short test
that needs no pytest. CuPy's memory pool is off: every array ends where its memory ends.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import cupynorm as cn
from bench import command_line
from bench.cases import BOTH, EPS, FWD, Case
from bench.device import Gpu, ahead, make_inputs, simulated_cupy
from bench.peers import ours

# (dtype, M, N): the families by row length, each at a multiple of a vector and off it, forward and
# backward. The family of a length is the plan's affair. With three rows or more a block of the
# backward takes several, and column_totals adds up several partials at 5.
SHAPES = (
    ("float32", 37, 32), ("float16", 9, 100), ("bfloat16", 5, 255), ("float64", 3, 33),
    ("float32", 5, 1023),  # warp, 32 lanes
    ("bfloat16", 3, 4096), ("float32", 3, 4095),  # block
    ("float32", 2, 9001), ("float64", 2, 8192),  # shared, from sm_90 on clusters of 2, 4 and 8
    ("float32", 1, 40001), ("bfloat16", 5, 80000),  # split, or clusters
    ("float16", 2, 270000),  # of 768 threads; the backward is K5's
    ("float32", 1, 470001),  # split everywhere
    ("float32", 70001, 8),  # column-major: registers; the others take tiles, from 4096 on panels
)  # fmt: skip
TINY = (SHAPES[0], ("float32", 2, 33))
LAYOUTS = ("C", "offset", "apart", "pitch", "F-F")
WAYS = (*((op, layout) for op in (FWD, BOTH) for layout in LAYOUTS), (FWD, "F-C"))


class Once(Gpu):
    """Nothing is timed, so one set of inputs is enough."""

    def buffers(self, case: Case) -> int:
        return 1


def run(device: Gpu, shapes: Sequence[Any] = SHAPES, out: Callable[[str], Any] = print) -> int:
    """Run all, forward and both ways, and in place; the number of wrong results."""
    wrong = 0
    for dtype, M, N in shapes:
        for op, layout in WAYS:
            case = Case(op, "sanitize", dtype, (M, N), layout=layout)
            inputs = make_inputs(device, case)
            y = ours(inputs, out=op == FWD).call(0)
            error, allowed = inputs.judge(0, y if op == BOTH else (y,), True, EPS)
            right = error <= allowed
            if op == FWD and layout == "C":  # the bits are those of the same call into y
                x, affine = inputs.x[0], (inputs.weight, inputs.bias)
                bits, host = device.lib.asnumpy(y).tobytes(), device.lib.asnumpy
                right &= host(cn.layer_norm(x, N, *affine, EPS, out=x)).tobytes() == bits
            wrong += not right
            out(f"{'ok   ' if right else 'WRONG'} {case}: error {error:.3g}, allowed {allowed:g}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if any result is wrong."""
    parser = command_line("sanitize", __doc__)
    parser.add_argument("--simulate", action="store_true", help="on the simulated device, tiny")
    simulate = parser.parse_args(argv).simulate
    with contextlib.ExitStack() as stack:
        if simulate:
            stack.enter_context(simulated_cupy())
        import cupy

        cupy.cuda.set_allocator(None)
        device, shapes = Once(cupy, simulated=simulate), TINY if simulate else SHAPES
        ahead(device, [lambda s=s: run(device, [s], lambda line: None) for s in shapes])
        wrong = run(device, shapes)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
