"""Tensors on a GPU: launches on torch's current stream, scratch from torch's allocator."""

from collections.abc import Callable
from typing import Any

import torch

from cupynorm._cuda.arrays import ready_on
from cupynorm._cuda.launch import BACKWARD, FORWARD
from cupynorm._layout import Facts, kernel_problem_of, rows_last
from cupynorm._torch.tensors import Machine, Run, address_of, bytes_of

_RESULTS = ("y", "dx", "dweight", "dbias", "mean", "rstd")


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


class Kernels(Machine):
    """What computes on one GPU."""

    def __init__(self, index: int) -> None:
        self._index = index

    def forward(self, facts: Facts) -> Run:
        """``run(x, y, weight, bias, mean, rstd)``, where all but x and y may be None."""
        return self._settled(facts, FORWARD)

    def backward(self, facts: Facts) -> Run:
        """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``; None: absent, not wanted."""
        return self._settled(facts, BACKWARD)

    def _settled(self, facts: Facts, names: tuple[str, ...]) -> Run:
        index, problem = self._index, kernel_problem_of(facts)
        copies = dict(problem.copies)
        meets = [_meeting(name, facts, name in copies) for name in names]
        order = rows_last(len(facts.shape), facts.axes)
        written = [i for i, name in enumerate(names) if name in _RESULTS and name in copies]
        ready: Any = None

        def run(*arrays: Any) -> None:
            nonlocal ready
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    run(*arrays)
                return
            if ready is None:
                ready = ready_on(index, problem)
            # The names keep copies alive until they are on the stream; torch's allocator orders
            # reuse by stream, so they may be dropped before they are read.
            met = [None if a is None else meet(a) for meet, a in zip(meets, arrays, strict=True)]
            nbytes, workspace = ready.workspace_bytes, 0
            if nbytes:
                scratch = torch.empty(nbytes, dtype=torch.uint8, device=arrays[0].device)
                workspace = scratch.data_ptr()
            pointers = [0 if a is None else a.data_ptr() for a in met]
            ready.run(pointers, facts.eps, workspace, _stream(index))
            for i in written:
                if arrays[i] is not None:
                    arrays[i].permute(order).copy_(met[i])

        return run


def _meeting(name: str, facts: Facts, copied: bool) -> Callable[..., Any]:
    """How the kernels meet a tensor: as it lies, or as memory of its own with the rows last."""
    order = rows_last(len(facts.shape), facts.axes)
    if name in _RESULTS and name not in ("mean", "rstd"):
        if copied:
            return lambda a: torch.empty(a.permute(order).shape, dtype=a.dtype, device=a.device)
        if name != "y" or not facts.out:
            return lambda a: a
    nbytes = 1 if name in ("mean", "rstd") else bytes_of(facts, name)

    def meet(a: Any) -> Any:
        address_of(name, a, nbytes)
        if copied:
            return a.permute(order).contiguous()
        # The small ones have N or rows elements, and unit stride.
        return a if name in ("x", "dy", "y") else a.resolve_neg().contiguous()

    return meet
