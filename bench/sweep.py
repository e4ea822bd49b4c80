"""One sweep over cases: inputs, contenders, copies; checked, timed, written as it goes."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bench.cases import Case
from bench.contender import SECONDS, Builder, interleave, measure
from bench.data import make_inputs
from bench.device import Device, captured
from bench.peers import copies, empty_kernel
from bench.table import Table, about, rows_of, timing

Item = TypeVar("Item")
EVERY = 5.0  # seconds between lines: logs stay readable
EMPTY_LAUNCHES = 500
WARM_SECONDS = 1.0  # an idle GPU takes this long to reach its clocks


def sweep(
    device: Device,
    table: Table,
    cases: Sequence[Case],
    contenders: Callable[[Any], list[Builder]],
    seconds: float = SECONDS,
) -> str:
    """Measure the cases until the deadline; a sentence on what was measured."""
    if device.kind == "cuda" and cases[0].group != "python":
        _fixed_cost(device, table)
    done = 0
    for case in progress(cases, "bench"):
        if device.time_left() < 0:
            break
        try:
            inputs = make_inputs(device, case)
            if not done:
                _warm(device, inputs)
            table.add(rows_of(case, measure(device, inputs, contenders(inputs), seconds)))
        except Exception as error:  # the inputs do not fit, say; other cases may
            note = f"{type(error).__name__}: {error}"
            table.add([about(case) | {"peer": "cupynorm", "status": "error", "note": note}])
            device.recover()
        done += 1
    left = len(cases) - done
    return f"{done} cases" + (f"; {left} left out at the deadline" if left else "")


def _warm(device: Any, inputs: Any) -> None:
    if device.simulated or device.kind == "cpu":
        return
    contender, end = copies(inputs)[0][1](), time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        for i in range(len(inputs)):
            contender.call(i)
        device.synchronize()


def _fixed_cost(device: Any, table: Table) -> None:
    """t0: what a kernel without work takes of a batch; reported apart, never subtracted."""
    call, count = empty_kernel(device), 2 if device.simulated else EMPTY_LAUNCHES
    call(0)
    device.synchronize()
    batch = captured(device, lambda: [call(i) for i in range(count)] and None, count)
    t = interleave({"empty": batch}, device.turn, device.rounds, SECONDS)["empty"]
    row = {"op": "empty_kernel", "peer": "empty", "kernel": "empty_kernel", "method": batch.method}
    table.add([row | timing(t) | {"status": "ok", "bytes": 0}])


def progress(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield items, and say now and then which one is at work."""
    said = -EVERY
    for number, item in enumerate(items, 1):
        if time.monotonic() - said >= EVERY or number == len(items):
            print(f"{label} {number}/{len(items)}: {item}", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield item
