"""The benchmark of layouts: K6 and K7 beside copies of as many bytes, against copying first."""

from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS
from bench.gpu_clock import launched
from bench.gpu_contender import Builder, Contender
from bench.gpu_copy import copies
from bench.gpu_data_layouts import LayoutInputs, make_layout_inputs
from bench.gpu_grid_layouts import LayoutCase
from bench.gpu_session import Session
from bench.gpu_sweep import sweep
from bench.gpu_table import Table
from bench.peers_layouts import LAYOUT_PEERS, layout_peers
from cupynorm._arrays import element_strides
from cupynorm._cuda.plan_column import ColumnsProblem, choose_plan_columns

__all__ = ["layouts", "ours"]


def kernel_names(session: Session, case: LayoutCase, inputs: LayoutInputs) -> str:
    """Names of what the plan launches for a case."""
    from cupynorm._cuda import arrays as _cuda

    index, affine = session.cupy.cuda.runtime.getDevice(), case.affine_dtype
    if inputs.columns:
        problem = ColumnsProblem(
            case.dtype, affine, affine, case.rows, case.N, (case.N, 1), omit=False
        )
        stages = choose_plan_columns(problem, _cuda.device_of(index)).stages
    else:
        strides = (element_strides(inputs.x[0]), element_strides(inputs.y[0]))
        dtypes = (case.dtype, affine, affine)
        stages = _cuda.prepared_fwd(index, case.shape, (1,), *strides, dtypes, False).plan.stages
    return "+".join(stage.name for stage in stages)


def ours(session: Session, case: LayoutCase, inputs: LayoutInputs) -> Contender:
    """The library as a user calls it."""
    weight, bias, name = inputs.weight, inputs.bias, kernel_names(session, case, inputs)
    if not inputs.columns:

        def call(i: int) -> Any:
            return cn.layer_norm(
                inputs.x[i], weight=weight, bias=bias, eps=EPS, axis=1, out=inputs.y[i]
            )

        return Contender("cupynorm", call, kernel=name, ours=True)

    def of_columns(i: int) -> Any:
        return cn.layer_norm_columns(inputs.columns[i], weight, bias, EPS, out=inputs.y[i])

    # A call uploads the table of its columns from memory that is its own: a graph would replay the
    # upload from where nothing is any more.
    return Contender("cupynorm", of_columns, kernel=name, ours=True, capture=launched)


def layouts(
    session: Session,
    table: Table,
    cases: list[LayoutCase],
    names: tuple[str, ...] = LAYOUT_PEERS,
    extra: tuple[Any, ...] = (),
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured.

    `extra` are further (name, function of (session, case, inputs)) contenders.
    """

    def contenders(session: Session, case: LayoutCase, inputs: LayoutInputs) -> list[Builder]:
        builders: list[Builder] = [("cupynorm", lambda: ours(session, case, inputs))]
        builders += copies(session, case, inputs)
        builders += [(name, lambda f=f: f(session, case, inputs)) for name, f in extra]
        return builders + layout_peers(session, case, inputs, names)

    return sweep(session, table, cases, make_layout_inputs, contenders)
