"""From addresses to kernel launches: the argument lists of the plans, in their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cupynorm._cuda.plan import Plan
from cupynorm._cuda.plan_bwd import GradientPlan
from cupynorm._cuda.plan_column import ColumnPlan, ColumnProblem
from cupynorm._cuda.plan_column_bwd import ColumnGradientProblem
from cupynorm._layout import GradientLayout, Layout

__all__ = [
    "ReadyBackward",
    "ReadyForward",
    "launch_bwd",
    "launch_fwd",
    "ready_bwd",
    "ready_column",
    "ready_column_bwd",
    "ready_fwd",
]

# A loaded kernel: called with grid, block, arguments, bytes of shared memory and a stream, or None
# for CuPy's current one.
Function = Callable[..., None]


@dataclass(frozen=True, slots=True)
class ReadyForward:
    """All of a forward call that does not depend on its pointers."""

    plan: Plan | ColumnPlan
    functions: tuple[Function, ...]
    tail: tuple[int, ...]  # the arguments after the pointers, but for eps
    copies: tuple[str, ...]  # arrays that the plan expects as row-major copies, rows last
    workspace_bytes: int
    # Where one launch does all: function, grid, block, shared bytes, the arguments between pointers
    # and eps, those after eps. A warm call looks at no plan.
    alone: tuple[Function, Any, Any, int, tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class ReadyBackward:
    """All of a backward call that does not depend on its pointers."""

    plan: GradientPlan
    functions: tuple[Function, ...]
    tail: tuple[int, ...]
    copies: tuple[str, ...]
    workspace_bytes: int


def ready_fwd(layout: Layout, plan: Plan, functions: tuple[Function, ...]) -> ReadyForward:
    """Join a forward layout, a plan for it, and the plan's loaded kernels."""
    p = layout.problem
    steps = (*p.x_strides[:2], *p.y_strides[:2])
    copies = (("x", layout.copy_x), ("y", layout.copy_y))
    labels = tuple(label for label, reason in copies if reason)
    tail = (p.rows, p.M, *steps, p.N)
    alone = _alone(plan, functions, tail, ()) if plan.family != "split" else None
    return ReadyForward(plan, functions, tail, labels, plan.workspace_bytes, alone)


def _alone(
    plan: Plan | ColumnPlan,
    functions: tuple[Function, ...],
    tail: tuple[int, ...],
    after: tuple[int, ...],
) -> tuple[Function, Any, Any, int, tuple[int, ...], tuple[int, ...]]:
    stage = plan.stages[0]
    return functions[0], stage.grid, stage.block, stage.shared_bytes, tail, after


def ready_column(
    problem: ColumnProblem, plan: ColumnPlan, functions: tuple[Function, ...]
) -> ReadyForward:
    """Join a forward problem with strided columns, a plan for it, and the plan's kernels."""
    p = problem
    tail = (p.rows, p.M, *p.x_strides, *p.y_strides, *p.stats_strides, p.N)
    alone = _alone(plan, functions, tail, (plan.panel,) if plan.panel else ())
    return ReadyForward(plan, functions, tail, (), plan.workspace_bytes, alone)


def ready_bwd(
    layout: GradientLayout, plan: GradientPlan, functions: tuple[Function, ...]
) -> ReadyBackward:
    """Join a backward layout, a plan for it, and the plan's loaded kernels."""
    p = layout.problem
    steps = (*p.dy_strides[:2], *p.x_strides[:2], *p.dx_strides[:2])
    labels = tuple(label for label, _ in layout.copies)
    tail = (p.rows, p.M, *steps, p.N)
    return ReadyBackward(plan, functions, tail, labels, plan.workspace_bytes)


def ready_column_bwd(
    problem: ColumnGradientProblem,
    plan: GradientPlan,
    slots: int,
    functions: tuple[Function, ...],
) -> ReadyBackward:
    """Join a backward problem with strided columns, a plan for it, and the plan's kernels."""
    p = problem
    strides = (*p.dy_strides, *p.x_strides, *p.dx_strides, *p.stats_strides)
    return ReadyBackward(
        plan, functions, (p.rows, p.M, *strides, slots, p.N), (), plan.workspace_bytes
    )


def launch_fwd(
    ready: ReadyForward,
    pointers: Sequence[int],
    eps: float,
    workspace: int = 0,
    stream: Any = None,
) -> None:
    """Launch a forward.

    Parameters
    ----------
    ready : ReadyForward
        The plan, for the device that is current.
    pointers : sequence of int
        Addresses of x, y, weight, bias, mean and rstd; 0 for what is absent.
    eps : float
        Added to the variance.
    workspace : int
        Address of ``ready.workspace_bytes`` bytes that nothing else on the stream writes.
    stream : object with ``ptr``, optional
        Where to launch; CuPy's current stream by default.
    """
    if ready.alone is not None:
        function, grid, block, shared_bytes, tail, after = ready.alone
        function(grid, block, (*pointers, *tail, eps, *after), shared_bytes, stream)
        return
    plan: Any = ready.plan
    arguments = (*pointers, *ready.tail, eps)
    rows, M, x_outer, x_row, _, _, N = ready.tail
    sections = (plan.sections, plan.chunks_per_section)
    calls = (
        (pointers[0], workspace, rows, M, x_outer, x_row, N, *sections),
        (*arguments, workspace, *sections, plan.parts),
    )
    for stage, function, call in zip(plan.stages, ready.functions, calls, strict=True):
        function(stage.grid, stage.block, call, stage.shared_bytes, stream)


def launch_bwd(
    ready: ReadyBackward, pointers: Sequence[int], workspace: int = 0, stream: Any = None
) -> None:
    """Launch a backward.

    Parameters
    ----------
    ready : ReadyBackward
        The plan, for the device that is current.
    pointers : sequence of int
        Addresses of dy, x, mean, rstd, weight, dx, dweight and dbias; 0 for what is absent.
    workspace : int
        Address of ``ready.workspace_bytes`` bytes, aligned to 16, that nothing else on the stream
        writes.
    stream : object with ``ptr``, optional
        Where to launch; CuPy's current stream by default.
    """
    plan = ready.plan
    rows, N = ready.tail[0], ready.tail[-1]
    *inputs, dweight, dbias = pointers
    common = (*inputs, workspace, *ready.tail)
    sums, gradients = workspace + plan.sums_at, workspace + plan.gradients_at
    for stage, function in zip(plan.stages, ready.functions, strict=True):
        call: tuple[int, ...] = common
        if stage.kernel == "column_totals":
            call = (workspace, plan.partials, plan.pitch, N, dweight, dbias)
        elif stage.kernel == "layer_norm_bwd_split_sums":
            call = (*common, sums, plan.sections, plan.chunks_per_section)
        elif stage.kernel == "layer_norm_bwd_split_merge":
            call = (sums, gradients, rows, plan.sections, N)
        elif stage.kernel == "layer_norm_bwd_split_apply":
            call = (*common, gradients, plan.partials)
        function(stage.grid, stage.block, call, stage.shared_bytes, stream)
