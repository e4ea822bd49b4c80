"""The backward benchmark: dx, dweight and dbias, alone and after a forward, as gpu_forward does."""

from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS
from bench.gpu_contender import Builder, Contender
from bench.gpu_copy import copies
from bench.gpu_data_backward import GradientInputs, make_gradient_inputs
from bench.gpu_forward import kernel_name
from bench.gpu_grid import BOTH, Case
from bench.gpu_session import Session
from bench.gpu_sweep import sweep
from bench.gpu_table import Table
from bench.peers_backward import BACKWARD_PEERS, backward_peers
from cupynorm._cuda.plan_bwd import choose_plan_bwd
from cupynorm._layout import GradientLayout, gradient_layout_of

__all__ = ["backward", "gradient_layout", "ours"]


def gradient_layout(case: Case) -> GradientLayout:
    """How the library meets the rows of a case; dx is allocated, so it has no gaps."""
    strides, affine = (case.pitch, 1), case.affine_dtype
    dtypes = (case.dtype, affine, affine, affine)
    return gradient_layout_of((case.rows, case.N), (1,), strides, strides, (case.N, 1), dtypes)


def kernel_names(session: Session, case: Case) -> str:
    """Names of what the plans launch for a case."""
    from cupynorm._cuda import arrays as _cuda

    device = _cuda.device_of(session.cupy.cuda.runtime.getDevice())
    plan = choose_plan_bwd(gradient_layout(case).problem, device)
    before = [kernel_name(session, case, stats=True)] if case.op == BOTH else []
    return "+".join([*before, *(stage.name for stage in plan.stages)])


def ours(session: Session, case: Case, inputs: GradientInputs) -> Contender:
    """The library on CuPy arrays, as a user calls it."""
    N, weight, bias, mask = case.N, inputs.weight, inputs.bias, inputs.wanted

    def backward(i: int) -> tuple[Any, ...]:
        arrays = inputs.dy[i], inputs.x[i], N, inputs.mean[i], inputs.rstd[i], weight
        return tuple(cn.layer_norm_backward(*arrays, output_mask=mask))

    def both(i: int) -> tuple[Any, ...]:
        x = inputs.x[i]
        y, mean, rstd = cn.layer_norm(x, N, weight, bias, EPS, return_stats=True)
        grads = cn.layer_norm_backward(inputs.dy[i], x, N, mean, rstd, weight, output_mask=mask)
        return (y, *grads)

    call = both if case.op == BOTH else backward
    return Contender("cupynorm", call, kernel=kernel_names(session, case), ours=True)


def backward(
    session: Session,
    table: Table,
    cases: list[Case],
    names: tuple[str, ...] = BACKWARD_PEERS,
    extra: tuple[Any, ...] = (),
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured.

    `extra` are further (name, function of (session, case, inputs)) contenders.
    """

    def contenders(session: Session, case: Case, inputs: GradientInputs) -> list[Builder]:
        builders: list[Builder] = [("cupynorm", lambda: ours(session, case, inputs))]
        builders += copies(session, case, inputs)
        builders += [(name, lambda f=f: f(session, case, inputs)) for name, f in extra]
        return builders + backward_peers(session, case, inputs, names)

    return sweep(session, table, cases, make_gradient_inputs, contenders)
