"""One sweep over cases: inputs, contenders, copies; checked, timed, written as it goes."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from bench.gpu_clock import capture, interleave
from bench.gpu_contender import Builder, measure
from bench.gpu_copy import copies, empty_kernel
from bench.gpu_grid import Case
from bench.gpu_session import Session
from bench.gpu_table import Table, rows_of

__all__ = ["sweep"]

ROUNDS = 15
EMPTY_LAUNCHES = 500
WARM_SECONDS = 1.0  # an idle GPU takes this long to reach its clocks


def sweep(
    session: Session,
    table: Table,
    cases: list[Case],
    make_inputs: Callable[[Session, Case], Any],
    contenders: Callable[[Session, Case, Any], list[Builder]],
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured."""
    _fixed_cost(session, table)
    done = 0
    for case in cases:
        if session.time_left() < 0:
            break
        try:
            inputs = make_inputs(session, case)
            if not done:
                _warm(session, case, inputs)
            builders = contenders(session, case, inputs)
            table.add(rows_of(case, measure(session, case, inputs, builders, ROUNDS)))
        except Exception as error:  # the inputs do not fit, say; other cases may
            note = f"{type(error).__name__}: {error}"
            table.add([_failed(case, note)])
        done += 1
    left = len(cases) - done
    return f"{done} cases" + (f"; {left} left out at the deadline" if left else "")


def _failed(case: Case, note: str) -> dict[str, Any]:
    fields = {k: getattr(case, k) for k in ("op", "group", "dtype", "rows", "N", "layout")}
    return {**fields, "peer": "cupynorm", "status": "error", "note": note}


def _warm(session: Session, case: Case, inputs: Any) -> None:
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
