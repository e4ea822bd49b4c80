"""The forward benchmark: every case against copies of the same bytes and against the peers."""

import dataclasses
import time
from typing import Any

import cupynorm as cn
from bench.gpu_check import EPS
from bench.gpu_clock import capture, interleave
from bench.gpu_contender import Builder, Contender, measure
from bench.gpu_copy import copies, empty_kernel
from bench.gpu_data import Inputs, make_inputs
from bench.gpu_grid import Case
from bench.gpu_session import Session
from bench.gpu_table import Table, rows_of
from bench.peers import PEERS, peers
from cupynorm._layout import layout_of
from cupynorm._plan import choose_plan

__all__ = ["forward", "ours"]

ROUNDS = 15
EMPTY_LAUNCHES = 500
WARM_SECONDS = 1.0  # an idle GPU takes this long to reach its clocks


def kernel_name(session: Session, case: Case) -> str:
    """Names of what the plan launches for a case."""
    from cupynorm import _cuda

    strides, affine = (case.pitch, 1), case.affine_dtype
    shape = (case.rows, case.N)
    layout = layout_of(shape, (1,), strides, strides, (case.dtype, affine, affine), False)
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
    _fixed_cost(session, table)
    done = 0
    for case in cases:
        if session.time_left() < 0:
            break
        try:
            inputs = make_inputs(session, case)
            if not done:
                _warm(session, case, inputs)
            builders: list[Builder] = [("cupynorm", lambda c=case, i=inputs: ours(session, c, i))]
            builders += copies(session, case, inputs)
            builders += [(n, lambda f=f, c=case, i=inputs: f(session, c, i)) for n, f in extra]
            builders += peers(session, case, inputs, names)
            table.add(rows_of(case, measure(session, case, inputs, builders, ROUNDS)))
        except Exception as error:  # the inputs do not fit, say; other cases may
            note = f"{type(error).__name__}: {error}"
            table.add([_failed(case, note)])
        done += 1
    left = len(cases) - done
    return f"{done} cases" + (f"; {left} left out at the deadline" if left else "")


def _failed(case: Case, note: str) -> dict[str, Any]:
    fields = {k: getattr(case, k) for k in ("group", "dtype", "rows", "N", "layout")}
    return {**fields, "op": "layer_norm_fwd", "peer": "cupynorm", "status": "error", "note": note}


def _warm(session: Session, case: Case, inputs: Inputs) -> None:
    if session.simulated:
        return
    contender = copies(session, case, inputs)[0][1]()
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        for i in range(len(inputs)):
            contender.call(i)
        session.synchronize()


def _fixed_cost(session: Session, table: Table) -> None:
    """t0: what a kernel without work takes of a batch; reported apart, never subtracted."""
    contender, calls = empty_kernel(session), 2 if session.simulated else EMPTY_LAUNCHES
    contender.call(0)
    session.synchronize()
    batch = capture(session, lambda: [contender.call(i) for i in range(calls)] and None, calls)
    times = interleave(session, {"empty": batch}, ROUNDS)["empty"]
    row = {"op": "empty_kernel", "peer": "empty", "kernel": "empty_kernel"}
    row |= {"method": batch.method, "status": "ok", "bytes": 0}
    fields = dataclasses.asdict(times)
    table.add([row | {f"{k}_us" if k != "rounds" else k: v for k, v in fields.items()}])
