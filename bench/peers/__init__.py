"""Who takes part in a case: the library, everybody else who offers the op, and plain copies."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import cupynorm as cn
from bench.cases import EPS, FWD, OPS
from bench.contender import Builder, Contender, refuse
from bench.device import Inputs, launched
from bench.peers import arrays, tensors

ORDERS = {"F-C": "C", "C-F": "F"}  # of a y that is made; elsewhere it lies as x does
# Who is slow and would tell nothing new in a sweep, or is not in its figure.
LEFT_OUT = {g: ("formula",) for g in ("dtypes", "odd")}
LEFT_OUT["columns"] = ("formula", "cupynorm.torch", "scikit-learn")
# Seconds of compilation for each case: asked for by name on a CPU.
OPTIONAL = ("torch-compile", "torch-view-compile")


def ours(inputs: Inputs, out: bool = False) -> Contender:
    """The library on arrays, as a user calls it."""
    case, x, weight, bias = inputs.case, inputs.x, inputs.weight, inputs.bias
    forward = getattr(cn, OPS[case.op].norm)
    differentiate = getattr(cn, f"{OPS[case.op].norm}_backward")
    about: dict[str, Any] = {"axis": case.axis, "order": ORDERS.get(case.layout, "K")}
    pulled = {"axis": case.axis, "output_mask": (True, *[case.affine_dtype is not None] * 2)}
    if case.op != FWD and out:
        refuse("out= is for a forward alone")

    def make(i: int) -> Any:
        return forward(x[i], None, weight, bias, EPS, **about)

    def fill(i: int) -> Any:
        return forward(x[i], None, weight, bias, EPS, axis=case.axis, out=inputs.y[i])

    def back(i: int) -> tuple[Any, ...]:
        given = inputs.dy[i], x[i], None, inputs.mean[i], inputs.rstd[i], weight
        return tuple(differentiate(*given, **pulled))

    def both(i: int) -> tuple[Any, ...]:
        y, mean, rstd = forward(x[i], None, weight, bias, EPS, return_stats=True, **about)
        return (y, *differentiate(inputs.dy[i], x[i], None, mean, rstd, weight, **pulled))

    def columns(i: int) -> Any:
        y = inputs.y[i] if out else None
        return cn.layer_norm_columns(inputs.columns[i], weight, bias, EPS, out=y)

    call = fill if out else {"forward": make, "backward": back, "both": both}[case.direction]
    made = Contender(call, kernel_names(inputs), ours=True, fresh=inputs.device.fresh and not out)
    if inputs.columns:
        # A call uploads the table of its columns from memory that is its own: a graph would replay
        # the upload from where nothing is any more.
        made.call, made.capture = columns, launched
    return made


def kernel_names(inputs: Inputs) -> str:
    """Names of what is launched on a GPU, as `explain` tells them."""
    case = inputs.case
    if inputs.device.kind == "cpu" or inputs.columns:
        return "columns" if inputs.columns else ""
    x, y, both = inputs.x[0], next(iter(inputs.y), None), case.direction == "both"
    ways = {"forward": {"out": y, "return_stats": both}, "backward": {"backward": True}}
    told = [cn.explain(x, None, inputs.weight, inputs.bias, axis=case.axis, **way)
            for direction, way in ways.items() if both or direction == case.direction]  # fmt: skip
    return "+".join(text.partition(",")[0] for e in told for text in e.launches)


# -- the roof: as many bytes as the case must move, beside it --------------------------------------

COPIES = """
struct alignas(16) Vec { unsigned v[4]; };

// Either a grid of a few blocks strides over the array (per_block = 0), or each block has a piece,
// like a norm's kernel with a row per block.
extern "C" __global__ void __launch_bounds__(256)
copy(const Vec* x, Vec* y, long long vecs, long long per_block) {
    const long long first = per_block ? per_block : blockDim.x;
    const long long step = per_block ? blockDim.x : (long long)gridDim.x * blockDim.x;
    const long long end = per_block ? min(vecs, (blockIdx.x + 1) * per_block) : vecs;
    long long i = blockIdx.x * first + threadIdx.x;
    for (; i + 3 * step < end; i += 4 * step) {
        const Vec a = x[i], b = x[i + step], c = x[i + 2 * step], d = x[i + 3 * step];
        y[i] = a, y[i + step] = b, y[i + 2 * step] = c, y[i + 3 * step] = d;
    }
    for (; i < end; i += step) y[i] = x[i];
}
"""
EMPTY = 'extern "C" __global__ void empty_kernel(long long unused) {}'


def copies(inputs: Inputs) -> list[Builder]:
    """Ways to move as many bytes; the fastest of a kind in this run is the roof."""
    lib, source, target = inputs.device.lib, inputs.copy_from, inputs.copy_to
    vecs = inputs.case.copy_bytes // 32  # of 16 bytes
    size, count = 16 * vecs, inputs.case.copy_bytes // 2 // inputs.case.itemsize

    def same(i: int, y: Any) -> bool:
        a, b = (inputs.device.plain(f.view("uint8")[:size]) for f in (source[i], y))
        return bool((a == b).all())

    def into(i: int) -> Any:
        lib.copyto(target[i][:count], source[i][:count])
        return target[i]

    def fresh(i: int) -> Any:
        made = lib.empty(count, source[i].dtype)
        lib.copyto(made, source[i][:count])
        return made

    def memcpy(i: int) -> Any:
        target[i].data.copy_from_device_async(source[i].data, size)
        return target[i]

    def kernel(blocks: int, per_block: int) -> Contender:
        function = lib.RawKernel(COPIES, "copy")

        def call(i: int) -> Any:
            function((max(1, blocks),), (256,), (source[i], target[i], vecs, per_block))
            return target[i]

        return Contender(call, "copy", arrived=same)

    if inputs.device.kind == "cpu":
        kept, new = Contender(into, arrived=same), Contender(fresh, arrived=same, fresh=True)
        return [("copyto", lambda: kept), ("copyto fresh", lambda: new)]
    stride = min(-(-vecs // 256), 8 * inputs.device.sm_count)
    return [
        ("copy-stride", lambda: kernel(stride, 0)),
        ("copy-block", lambda: kernel(-(-vecs // 1024), 1024)),
        ("copy-memcpy", lambda: Contender(memcpy, "cudaMemcpyAsync", arrived=same)),
    ]


def empty_kernel(device: Any) -> Callable[[int], Any]:
    """A launch without work: the fixed cost, t0, that every row of a table contains."""
    function = device.lib.RawKernel(EMPTY, "empty_kernel")
    return lambda i: function((1,), (32,), (0,))


# -- everybody: a peer is a line here, and a function of its library in the file that is named -----

MAKERS: dict[str, Callable[[Inputs], Contender]] = {
    "cupynorm": ours,
    "cupynorm out=": functools.partial(ours, out=True),
    **{name: functools.partial(tensors.contender, name=name) for name in tensors.FUNCTIONS},
    **tensors.STRIDED,
    **arrays.MAKERS,
}
ONNX = {"onnxruntime", "onnxruntime out="}
ELSEWHERE = {"cpu": {"liger", "cupy-fuse"}, "cuda": {*ONNX, "scikit-learn"}}
COPIED = {"cpu": ("copyto", "copyto fresh"), "cuda": ("copy-stride", "copy-block", "copy-memcpy")}
ROWS_ALONE = {*tensors.FUNCTIONS, *ONNX, "cupy-fuse"}


def names(kind: str) -> tuple[str, ...]:
    return (*(n for n in MAKERS if n not in ELSEWHERE[kind]), *COPIED[kind])


def contenders(inputs: Inputs, chosen: Iterable[str]) -> list[Builder]:
    """Builders of those that are asked for and that the layout of a case concerns."""
    wanted = set(chosen) - set(LEFT_OUT.get(inputs.case.group, ()))
    # On rows not the ways to get there; on strided columns not those who know rows alone.
    wanted -= ROWS_ALONE if inputs.case.strided else tensors.STRIDED.keys()
    made = [(n, functools.partial(make, inputs)) for n, make in MAKERS.items() if n in wanted]
    return made + [(n, build) for n, build in copies(inputs) if n in wanted]
