"""Tensors on the CPU: the compiled loops on their addresses, torch's functions where there are none."""

import os
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch

from cupynorm import _reference
from cupynorm._cpu import raw as _raw
from cupynorm._cpu import threads as _threads
from cupynorm._layout import Facts, Problem, problem_of, row_major_strides
from cupynorm._reference import Rows
from cupynorm._rules import ITEMSIZE
from cupynorm._torch.tensors import Machine, Run, address_of, reach, stats_dtype


class Loops(Machine):
    """What computes on the CPU."""

    name = "compiled loops"

    def forward(self, facts: Facts) -> Run:
        """``run(x, y, weight, bias, mean, rstd)``, where all but x and y may be None."""
        by_formula = _forward_by_formula(facts)
        problem = _problem_of(facts)
        if problem is None:
            return by_formula
        loops: Any = None
        compute = stats_dtype(getattr(torch, facts.dtypes["x"]))
        x_bytes, y_bytes = _bytes(facts, "x"), _bytes(facts, "y")
        weight_bytes, bias_bytes = _bytes_of_row(facts, "weight"), _bytes_of_row(facts, "bias")
        given, single = facts.out, facts.N == 1  # one element may be negated and contiguous

        def run(x: Any, y: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
            nonlocal loops
            if not _available():
                by_formula(x, y, weight, bias, mean, rstd)
                return
            if loops is None:
                loops = _normalizer(problem, facts.eps)
            w = b = m = r = 0
            if weight is not None:
                w = address_of("weight", weight, weight_bytes)
                if weight.dtype is not compute or not weight.is_contiguous() or single:
                    weight = _as_row(weight, compute)  # the name keeps the copy for the call
                    w = weight.data_ptr()
            if bias is not None:
                b = address_of("bias", bias, bias_bytes)
                if bias.dtype is not compute or not bias.is_contiguous() or single:
                    bias = _as_row(bias, compute)
                    b = bias.data_ptr()
            if mean is not None:
                m, r = mean.data_ptr(), rstd.data_ptr()
            to = address_of("out", y, y_bytes) if given else y.data_ptr()
            loops(address_of("x", x, x_bytes), to, w, b, m, r)

        return run

    def backward(self, facts: Facts) -> Run:
        """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``; None: absent, not wanted."""
        by_formula = _backward_by_formula(facts)
        problem = _problem_of(facts)
        if problem is None:
            return by_formula
        loops: Any = None
        compute = stats_dtype(getattr(torch, facts.dtypes["x"]))
        x_bytes, dy_bytes = _bytes(facts, "x"), _bytes(facts, "dy")
        weight_bytes = _bytes_of_row(facts, "weight")

        def run(*arrays: Any) -> None:
            nonlocal loops
            dy, x, mean, rstd, weight, dx, dweight, dbias = arrays
            if not _available():
                by_formula(*arrays)
                return
            if loops is None:
                loops = _differentiator(problem)
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


def _dense(facts: Facts) -> bool:
    """Whether all arrays of x's shape are row-major."""
    return all(s == row_major_strides(facts.shape, ()) for s in facts.strides.values())


def _bytes(facts: Facts, name: str) -> int:
    """Of an array of x's shape, from its first element on."""
    return ITEMSIZE[facts.dtypes["x"]] * reach(facts.shape, facts.strides[name] or ())


def _bytes_of_row(facts: Facts, name: str) -> int:
    """Of a weight or bias, whose elements may lie further apart."""
    return ITEMSIZE[facts.dtypes.get(name, "float32")] * facts.N


def _as_row(value: Any, compute: Any) -> Any:
    """A small tensor as contiguous memory of the dtype that the loops compute in."""
    if value.dtype is compute and value.is_contiguous() and not value.is_neg():
        return value
    return value.detach().resolve_neg().to(compute).contiguous()


def _summed(grad: Any, compute: Any) -> Any:
    """Where the loops write a sum: into the gradient itself, if it has their dtype."""
    return grad if grad is None or grad.dtype is compute else grad.to(compute)


def _num_threads() -> int:
    """``CUPYNORM_NUM_THREADS`` where it is set, else what torch.set_num_threads() says.

    In a worker of a DataLoader, for one, that is 1.
    """
    if os.environ.get("CUPYNORM_NUM_THREADS", "").strip():
        return _threads.num_threads()
    count: int = torch.get_num_threads()
    return count


# --- torch's functions ----------------------------------------------------------------------------


def _forward_by_formula(facts: Facts) -> Run:
    def run(x: Any, y: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
        with torch.no_grad():
            rows = Rows(xp, x, facts.axes)
            _store(_reference.normalize(rows, weight, bias, facts.eps), (y, mean, rstd))

    return run


def _backward_by_formula(facts: Facts) -> Run:
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


# --- the loops ------------------------------------------------------------------------------------


def _available() -> bool:
    return _raw.available()


def _problem_of(facts: Facts) -> Problem | None:
    problem = problem_of(facts)
    if problem is None or not _dense(facts) or facts.axes[0] + len(facts.axes) < len(facts.shape):
        return None
    return problem


def _normalizer(problem: Problem, eps: float) -> Callable[..., None]:
    kind, (M, N) = problem.dtype("x") or "", (problem.rows, problem.N)

    def call(x: int, y: int, weight: int, bias: int, mean: int, rstd: int) -> None:
        _raw.layer_norm_fwd(kind, x, y, M, N, weight, bias, eps, mean, rstd, _num_threads)

    return call


def _differentiator(problem: Problem) -> Callable[..., None]:
    kind, (M, N) = problem.dtype("x") or "", (problem.rows, problem.N)

    def call(dy: int, x: int, mean: int, rstd: int, weight: int, *to: int) -> None:
        dx, dweight, dbias = to
        _raw.layer_norm_bwd(kind, dy, x, dx, M, N, mean, rstd, weight, dweight, dbias, _num_threads)

    return call
