"""The forward benchmark: every case against copies of the same bytes and against the peers."""

from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS
from bench.gpu_contender import Builder, Contender
from bench.gpu_copy import copies
from bench.gpu_data import Inputs, make_inputs
from bench.gpu_grid import Case
from bench.gpu_session import Session
from bench.gpu_sweep import sweep
from bench.gpu_table import Table
from bench.peers import PEERS, peers
from cupynorm._cuda.plan import choose_plan
from cupynorm._layout import layout_of

__all__ = ["forward", "kernel_name", "ours"]


def kernel_name(session: Session, case: Case, stats: bool = False) -> str:
    """Names of what the plan launches for a case."""
    from cupynorm._cuda import arrays as _cuda

    strides, affine = (case.pitch, 1), case.affine_dtype
    shape = (case.rows, case.N)
    layout = layout_of(shape, (1,), strides, strides, (case.dtype, affine, affine), stats)
    device = _cuda.device_of(session.cupy.cuda.runtime.getDevice())
    return "+".join(stage.name for stage in choose_plan(layout.problem, device).stages)


def ours(session: Session, case: Case, inputs: Inputs) -> Contender:
    """The library as a user calls it."""

    def call(i: int) -> Any:
        return cn.layer_norm(inputs.x[i], case.N, inputs.weight, inputs.bias, EPS, out=inputs.y[i])

    return Contender("cupynorm", call, kernel=kernel_name(session, case), ours=True)


def forward(
    session: Session,
    table: Table,
    cases: list[Case],
    names: tuple[str, ...] = PEERS,
    extra: tuple[Any, ...] = (),
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured.

    `extra` are further (name, function of (session, case, inputs)) contenders.
    """

    def contenders(session: Session, case: Case, inputs: Inputs) -> list[Builder]:
        builders: list[Builder] = [("cupynorm", lambda: ours(session, case, inputs))]
        builders += copies(session, case, inputs)
        builders += [(name, lambda f=f: f(session, case, inputs)) for name, f in extra]
        return builders + peers(session, case, inputs, names)

    return sweep(session, table, cases, make_inputs, contenders)
