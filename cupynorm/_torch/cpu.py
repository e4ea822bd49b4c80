"""What computes tensors on the CPU, by their addresses, and any by torch's own functions."""

import os
from typing import Any

import array_api_compat.torch as xp
import torch

from cupynorm import _reference
from cupynorm._cpu import engine, threads
from cupynorm._cpu.arrays import plain
from cupynorm._layout import Facts, as_table, problem_of
from cupynorm._reference import Rows
from cupynorm._torch.tensors import (
    LOW,
    Machine,
    Run,
    address_of,
    bytes_of,
    check_memory,
    stats_dtype,
)


class Functions(Machine):
    """What computes by torch's functions, on any device."""

    def forward(self, facts: Facts) -> Run:
        """``run(x, y, weight, bias, mean, rstd)``, where all but x and y may be None."""

        def run(x: Any, y: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
            with torch.no_grad():
                rows = Rows(xp, x, facts.axes)
                _store(_reference.normalize(rows, weight, bias, facts.eps), (y, mean, rstd))

        return run

    def backward(self, facts: Facts) -> Run:
        """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``; None: absent, not wanted."""

        def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *targets: Any) -> None:
            wanted = targets[0] is not None, targets[1] is not None, targets[2] is not None
            with torch.no_grad():
                rows = Rows(xp, x, facts.axes)
                hat = rows.restored(mean, rstd), rstd
                _store(_reference.gradients(rows, (dy, None, None), weight, hat, wanted), targets)

        return run


def _store(results: tuple[Any, ...], targets: tuple[Any, ...]) -> None:
    for result, target in zip(results, targets, strict=True):
        if target is not None:
            target.copy_(result)


def _copied(tensor: Any, turn: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """A row-major copy with the normalized axes last."""
    return tensor.detach().permute(turn).clone(memory_format=torch.contiguous_format).view(shape)


class Loops(Functions):
    """What computes on the CPU: the compiled loops, or torch's functions where none will do."""

    def forward(self, facts: Facts) -> Run:
        """``run(x, y, weight, bias, mean, rstd)``, where all but x and y may be None."""
        functions = super().forward(facts)
        problem = problem_of(facts)
        if not engine.available(facts.dtypes["x"]):
            return functions
        if problem is None:
            return self._forward_of_copies(facts, functions)
        loops = engine.normalizer(problem, facts.eps, lambda: num_threads())
        compute = stats_dtype(getattr(torch, facts.dtypes["x"]))
        x_bytes, y_bytes = bytes_of(facts, "x"), bytes_of(facts, "y")
        weight_bytes, bias_bytes = bytes_of(facts, "weight"), bytes_of(facts, "bias")
        copied: tuple[bool, bool] | None = None  # of weight and bias; shows at the first call

        def run(x: Any, y: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
            nonlocal copied
            if plain():
                functions(x, y, weight, bias, mean, rstd)
                return
            if copied is None:
                copied = _differs(weight, compute), _differs(bias, compute)
            w = b = m = r = 0
            if weight is not None:
                w = weight.data_ptr()
                if w < LOW:
                    check_memory("weight", weight, weight_bytes)
                if copied[0]:
                    weight = _as_row(weight, compute)  # the name keeps the copy for the call
                    w = weight.data_ptr()
            if bias is not None:
                b = bias.data_ptr()
                if b < LOW:
                    check_memory("bias", bias, bias_bytes)
                if copied[1]:
                    bias = _as_row(bias, compute)
                    b = bias.data_ptr()
            if mean is not None:
                m, r = mean.data_ptr(), rstd.data_ptr()
            source, target = x.data_ptr(), y.data_ptr()
            if source < LOW:
                check_memory("x", x, x_bytes)
            if target < LOW:
                check_memory("out", y, y_bytes)
            loops(source, target, w, b, m, r)

        return run

    def _forward_of_copies(self, facts: Facts, functions: Run) -> Run:
        """For tensors whose axes do not fold to rows and columns."""
        turn, table = as_table(facts)
        loops, x_bytes = self.forward(table), bytes_of(facts, "x")

        def run(x: Any, y: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
            if plain():
                functions(x, y, weight, bias, mean, rstd)
                return
            address_of("x", x, x_bytes)
            copy = _copied(x, turn, table.shape)
            loops(copy, copy, weight, bias, mean, rstd)
            target = y.permute(turn)
            target.copy_(copy.view(target.shape))

        return run

    def _backward_of_copies(self, facts: Facts, functions: Run) -> Run:
        turn, table = as_table(facts)
        loops = self.backward(table)
        x_bytes, dy_bytes = bytes_of(facts, "x"), bytes_of(facts, "dy")

        def run(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, dx: Any, *sums: Any) -> None:
            if plain():
                functions(dy, x, mean, rstd, weight, dx, *sums)
                return
            address_of("dy", dy, dy_bytes)
            address_of("x", x, x_bytes)
            slope, source = (_copied(a, turn, table.shape) for a in (dy, x))
            loops(slope, source, mean, rstd, weight, None if dx is None else slope, *sums)
            if dx is not None:
                target = dx.permute(turn)
                target.copy_(slope.view(target.shape))

        return run

    def backward(self, facts: Facts) -> Run:
        """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``; None: absent, not wanted."""
        functions = super().backward(facts)
        problem = problem_of(facts)
        if not engine.available(facts.dtypes["x"]):
            return functions
        if problem is None:
            return self._backward_of_copies(facts, functions)
        loops = engine.differentiator(problem, lambda: num_threads())
        compute = stats_dtype(getattr(torch, facts.dtypes["x"]))
        x_bytes, dy_bytes = bytes_of(facts, "x"), bytes_of(facts, "dy")
        weight_bytes = bytes_of(facts, "weight")

        def run(*arrays: Any) -> None:
            if plain():
                functions(*arrays)
                return
            dy, x, mean, rstd, weight, dx, dweight, dbias = arrays
            w = 0
            if weight is not None:
                address_of("weight", weight, weight_bytes)
                weight = _as_row(weight, compute)
                w = weight.data_ptr()
            mean, rstd = _as_row(mean, compute), _as_row(rstd, compute)
            to_weight, to_bias = _summed(dweight, compute), _summed(dbias, compute)
            loops(
                address_of("dy", dy, dy_bytes),
                address_of("x", x, x_bytes),
                mean.data_ptr(),
                rstd.data_ptr(),
                w,
                0 if dx is None else dx.data_ptr(),
                0 if to_weight is None else to_weight.data_ptr(),
                0 if to_bias is None else to_bias.data_ptr(),
            )
            if to_weight is not dweight:
                dweight.copy_(to_weight)
            if to_bias is not dbias:
                dbias.copy_(to_bias)

        return run


def _differs(value: Any, compute: Any) -> bool:
    """Whether the loops need a copy of a weight or bias; one element may be a negated view."""
    if value is None:
        return False
    return value.dtype is not compute or not value.is_contiguous() or value.numel() == 1


def _as_row(value: Any, compute: Any) -> Any:
    """A small tensor as contiguous memory of the dtype that the loops compute in."""
    if value.dtype is compute and value.is_contiguous() and not value.is_neg():
        return value
    return value.detach().resolve_neg().to(compute).contiguous()


def _summed(grad: Any, compute: Any) -> Any:
    """Where the loops write a sum: into the gradient itself, if it has their dtype."""
    return grad if grad is None or grad.dtype is compute else grad.to(compute)


def num_threads() -> int:
    """``CUPYNORM_NUM_THREADS`` where it is set, else what torch.set_num_threads() says.

    In a worker of a DataLoader, for one, that is 1.
    """
    if os.environ.get("CUPYNORM_NUM_THREADS", "").strip():
        return threads.num_threads()
    count: int = torch.get_num_threads()
    return count
