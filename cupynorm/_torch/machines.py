"""What computes tensors, settled for one look: compiled loops, kernels, or torch's own functions.

``run(*arrays)`` takes them in the order of `FORWARD` or `BACKWARD`, and after these of `RESIDUAL`,
results too; None: not there.
"""

import importlib.util
import math
import operator
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from cupynorm import _libraries, _reference
from cupynorm._cpu import engine, threads
from cupynorm._cuda.launch import BACKWARD, FORWARD, RESIDUAL
from cupynorm._layout import Facts, as_table, kernel_problem_of, rows_last
from cupynorm._rules import stats_dtype

Run = Callable[..., None]
Launch = Callable[..., None]  # on the addresses of what was met; 0: absent


def run_of(facts: Facts) -> Run:
    """What computes a call on the device of its facts, imported when its first tensor arrives."""
    kind = facts.device.type
    if not facts.size:
        return _of_nothing(facts)
    if kind == "meta":  # shape and dtype are all there is
        return nothing
    if _is_looped(facts):
        return _loops(facts)
    if kind == "cuda" and importlib.util.find_spec("cupy") is not None:
        check_device(facts.device)
        return kernels(facts, facts.device.index)
    return _functions(facts)


def check_device(device: Any) -> None:
    """Refuse a device on which neither loops nor kernels compute."""
    if device.type == "cuda":
        with _libraries.needing("x on a GPU needs CuPy", _libraries.GET_CUPY):
            import_module("cupynorm._cuda.arrays")
    elif device.type not in ("cpu", "meta"):
        msg = (
            f"x is on device type {device.type}, which has no layer_norm here; move it to 'cpu' or "
            "'cuda', or call torch.nn.functional.layer_norm"
        )
        raise ValueError(msg)


def nothing(*_: Any) -> None:
    """Compute nothing, and make no memory for it."""


def _of_nothing(facts: Facts) -> Run:
    """Of an empty x: the mean of nothing is NaN, the sum over no rows zero."""
    first, value = (6, 0.0) if facts.backward else (4, math.nan)

    def run(*arrays: Any) -> None:
        for total in arrays[first:]:
            if total is not None:
                total.fill_(value)

    return run


def _functions(facts: Facts) -> Run:
    """By torch's own functions, on any device."""
    if facts.backward:
        gradients = _reference.DOOR.differentiator(facts)

        def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *more: Any) -> None:
            with torch.no_grad():
                _store(gradients(dy, x, mean, rstd, weight, *more[3:]), more[:3])

        return backward
    results = _reference.DOOR.normalizer(facts._replace(stats=True, order="K"))

    def forward(x: Any, y: Any, weight: Any, bias: Any, *more: Any) -> None:
        stats, residual = more[:2] if facts.op.center else more[1:2], more[2:3]
        with torch.no_grad():
            found = results(x, weight, bias, None, *residual, *(None for _ in residual))
            _store(found, (y, *more[3:], *stats))

    return forward


def _store(results: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
    for result, target in zip(results, targets, strict=True):
        if target is not None:
            target.copy_(result)


# --- by address -----------------------------------------------------------------------------------

# What torch keeps without memory, zeros that it knows to be such or what functionalize wraps, is at
# 0, and a view of it at its offset: torch's own functions take it. Few live tensors lie as low.
LOW = 1 << 32


def _dtype_of(facts: Facts, name: str) -> str:
    """Of an array of x's shape."""
    return facts.dtypes["residual" if name in ("residual", "sum") else "x"]


def _meeting(facts: Facts, name: str, kind: Any, compute: Any) -> Callable[[Any], Any]:
    """How an array is met: as it lies, or as memory of its own of dtype `kind`, with the rows last.

    Small ones become contiguous, and where `compute` is a dtype, of that; then a weight is what
    x_hat is multiplied by, as loops know no other.
    """
    order = rows_last(len(facts.shape), facts.axes)
    if name in ("y", "sum", "dx") and kind is not None:
        return lambda a: torch.empty(a.permute(order).shape, dtype=kind, device=a.device)
    if name in ("dx", "dweight", "dbias") or (name in ("mean", "rstd") and not facts.backward):
        return lambda a: a if kind is None else torch.empty_like(a, dtype=kind)
    told_from_one = name == "weight" and facts.op.unit_weight and compute is not None

    def meet(a: Any) -> Any:
        if name in facts.strides:
            return a if kind is None else a.detach().permute(order).to(kind).contiguous()
        if _lies(a, compute) and not told_from_one:
            return a
        a = a.detach().resolve_neg()
        if compute is not None:
            a = a.to(compute) + 1 if told_from_one else a.to(compute)
        return a.contiguous()

    return meet


def _by_address(
    facts: Facts, copied: Mapping[str, Any], compute: Any, launch: Launch, least: int = 0
) -> Run:
    """Meet each array, launch on the addresses, put back the results that were met elsewhere.

    There are at least so many addresses, of which the last are 0.
    """
    names: tuple[str, ...] = BACKWARD if facts.backward else FORWARD
    names += tuple(name for name in RESIDUAL if name in facts.strides)
    count = max(least, len(names))
    meets = [_meeting(facts, name, copied.get(name), compute) for name in names]
    order = rows_last(len(facts.shape), facts.axes)
    results = "y", "sum", "dx", "dweight", "dbias"
    written = [i for i, name in enumerate(names) if name in copied and name in results]
    functions = _functions(facts)
    which: Any = None  # arrays there are, and whether all are met as they lie: this shows at the
    as_they_lie = False  # first call, as those of the others look like its own

    def run(*arrays: Any) -> None:
        nonlocal which, as_they_lie
        # The names keep copies alive until they are on the stream; torch's allocator orders reuse
        # by stream, so they may be dropped before they are read.
        met: Any = arrays
        if not as_they_lie:
            met = [None if a is None else meet(a) for meet, a in zip(meets, arrays, strict=True)]
            if which is None:
                which = [i for i, a in enumerate(arrays) if a is not None]
                as_they_lie = all(map(operator.is_, met, arrays))
        at = [0] * count
        for i in which:
            at[i] = pointer = met[i].data_ptr()
            if pointer < LOW:
                functions(*arrays)
                return
        launch(*at)
        for i in written:
            if arrays[i] is not None:
                to = arrays[i].permute(order) if names[i] in facts.strides else arrays[i]
                to.copy_(met[i])

    return run


# --- compiled loops -------------------------------------------------------------------------------


def _is_looped(facts: Facts) -> bool:
    on_cpu = facts.size > 0 and facts.device.type == "cpu"
    return on_cpu and engine.available(facts.dtypes["x"])


def in_place(facts: Facts) -> tuple[Callable[..., None], Callable[[Any, Any], bool]] | None:
    """Give the loops, by address, and whether a weight and a bias lie as they take them.

    None where it is not by loops that a forward call is computed, or not on arrays as they lie.
    """
    problem = engine.problem_in_place(facts) if _is_looped(facts) else None
    if problem is None:
        return None
    compute = getattr(torch, stats_dtype(facts.dtypes["x"]))

    def lie(weight: Any, bias: Any) -> bool:
        told_from_one = facts.op.unit_weight and weight is not None
        return _lies(weight, compute) and _lies(bias, compute) and not told_from_one

    return engine.normalizer(problem, facts.eps, num_threads), lie


def _loops(facts: Facts) -> Run:
    """By compiled loops, of copies where axes do not fold to rows and columns."""
    computed = stats_dtype(facts.dtypes["x"])
    compute = getattr(torch, computed)
    problem: Any = engine.problem_in_place(facts)
    copied: dict[str, Any] = {}
    if problem is None:
        problem = engine.problem_in_place(as_table(facts)[1])
        copied = {name: getattr(torch, _dtype_of(facts, name)) for name in facts.strides}
    sums = (k for k in ("dweight", "dbias") if facts.dtypes.get(k, computed) != computed)
    copied |= dict.fromkeys(sums, compute)
    if facts.backward:
        return _by_address(facts, copied, compute, engine.differentiator(problem, num_threads))
    loops = engine.normalizer(problem, facts.eps, num_threads)
    return _by_address(facts, copied, compute, loops, 8)  # with residual and sum, or without


def _lies(value: Any, compute: Any) -> bool:
    """Whether a weight or bias is taken as it lies; a view of one element may be negated."""
    if value is None:
        return True
    alike = compute is None or value.dtype is compute
    return alike and value.is_contiguous() and value.numel() > 1 and not value.is_neg()


def num_threads() -> int:
    """``CUPYNORM_NUM_THREADS`` where it is set, else what torch.set_num_threads() says.

    In a worker of a DataLoader, for one, that is 1.
    """
    if os.environ.get("CUPYNORM_NUM_THREADS", "").strip():
        return threads.num_threads()
    count: int = torch.get_num_threads()
    return count


# --- kernels --------------------------------------------------------------------------------------


class _Stream:
    """What a launch needs to know of a stream."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _stream(index: int) -> _Stream:
    """Torch's current stream on a GPU."""
    # Triton and Inductor use it too: a tenth of the cost of torch.cuda.current_stream(), which
    # makes an object that knows events.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return _Stream(torch.cuda.current_stream(index).cuda_stream if raw is None else raw(index))


def kernels(facts: Facts, index: int) -> Run:
    """By kernels on a GPU: on torch's current stream, scratch from torch's allocator."""
    from cupynorm._cuda.arrays import ready_on

    problem = kernel_problem_of(facts)
    ready = ready_on(index, problem)
    nbytes = ready.workspace_bytes

    def launch(*pointers: int) -> None:
        scratch, workspace = None, 0
        if nbytes:  # held until the launch, as copies are
            scratch = torch.empty(nbytes, dtype=torch.uint8, device=facts.device)
            workspace = scratch.data_ptr()
        ready.run(pointers, facts.eps, workspace, _stream(index))

    by_address = _by_address(
        facts, dict.fromkeys(ready.copies, getattr(torch, ready.dtype)), None, launch
    )

    def run(*arrays: Any) -> None:
        if torch.cuda.current_device() == index:
            by_address(*arrays)
        else:
            with torch.cuda.device(index):
                by_address(*arrays)

    return run
