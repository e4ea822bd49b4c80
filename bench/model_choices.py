"""What the cost model would choose where the plan tables have a threshold, and its worth."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench import gpu_tune, gpu_tune_backward
from bench.gpu_grid import BWD, FWD, Case, case
from bench.model_cases import planned
from bench.model_gpus import GPUS, Gpu
from bench.model_occupancy import most_registers, registers_of
from bench.model_time import predict
from cupynorm._cuda import plan_column as _plan_column
from cupynorm._cuda.plan import CHUNK_VECS, TABLE, VEC_BYTES, TableRow
from cupynorm._cuda.plan_bwd import BWD_TABLE
from cupynorm._problem import ITEMSIZE

__all__ = ["WORTH", "Choice", "Crossover", "choices", "crossovers", "tiles"]

WORTH = 0.90  # a predicted gain that is clear: the model's own error is not much smaller
DTYPES = ("bfloat16", "float32")
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # rows per multiprocessor
REGISTERS_OF_VEC = 4
# K3's forward holds its row in shared memory, and takes the registers that there are: the 80 of one
# block per multiprocessor become 64 without a spill where two are asked for (sm_80, 90, 100).
SQUEEZE = 1.25
SAME = 1e-3  # of sums of logarithms
TODAYS_TILE = "as fits"


@dataclass(frozen=True)
class Choice:
    """A threshold: what stands there, what the model takes, and the times' ratios by GPU."""

    threshold: str
    today: str
    model: str
    ratios: dict[str, float]  # the model's time over today's; on each GPU

    @property
    def mean(self) -> float:
        """Geometric mean over the GPUs."""
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))

    @property
    def clear(self) -> bool:
        return self.mean < WORTH


@dataclass(frozen=True)
class Crossover:
    """From which share of rows per multiprocessor on K3 is no slower than K5, on each GPU."""

    vecs: int
    shares: dict[str, float | None]  # None: K5 is faster at every share tried
    ratios: dict[str, float]  # K5's time over K3's at the table's share


@functools.cache
def choices() -> tuple[Choice, ...]:
    """Every row of both tables against its neighbours, then the widths of tiles."""
    return *_rows(), *tiles()


def _rows() -> Iterator[Choice]:
    for number, row in enumerate(TABLE[:-1]):
        if row.family in ("warp", "block", "shared"):
            name = f"forward row {number}: {row.family} to {row.max_vecs} vectors"
            yield _choice(name, row, gpu_tune.candidates(row), gpu_tune.label, FWD)
    for number, row in enumerate(BWD_TABLE[:-1]):
        name = f"backward row {number}: {row.family} to {row.max_vecs} vectors"
        every, label = gpu_tune_backward.candidates(row), gpu_tune_backward.label
        yield _choice(name, every[0], every, label, BWD)


def _choice(name: str, today: Any, candidates: list[Any], label: Any, op: str) -> Choice:
    """The candidate that is fastest in the mean over GPUs, dtypes and two lengths."""
    row: TableRow = getattr(today, "row", today)
    lengths = (row.max_vecs, max(1, 3 * row.max_vecs // 4))
    cases = [case(d, vecs * VEC_BYTES // ITEMSIZE[d], op=op) for d in DTYPES for vecs in lengths]
    times = {c: {g.name: _mean(c, cases, g, today) for g in GPUS} for c in candidates}
    gpus = [g for g in GPUS if times[today][g.name]]
    usable = [c for c in candidates if all(times[c][g.name] for g in gpus)]
    if not gpus:
        return Choice(name, label(today), label(today), {g.name: 1.0 for g in GPUS})
    best = min(usable, key=lambda c: sum(math.log(times[c][g.name]) for g in gpus))
    if sum(math.log(times[best][g.name] / times[today][g.name]) for g in gpus) > -SAME:
        best = today
    ratios = {g.name: times[best][g.name] / times[today][g.name] for g in gpus}
    return Choice(name, label(today), label(best), ratios)


def _mean(candidate: Any, cases: list[Case], gpu: Gpu, today: Any) -> float:
    """Geometric mean of microseconds; 0 where shared memory or registers do not suffice."""
    tune = gpu_tune_backward if hasattr(candidate, "row") else gpu_tune
    logs = 0.0
    for c in cases:
        ((problem, _),) = planned(c, gpu)
        plan, now = (tune.plan_of(which, problem, gpu.device) for which in (candidate, today))
        if any(stage.shared_bytes > gpu.shared_per_block for stage in plan.stages):
            return 0.0
        registers, main = _registers(plan, now, gpu), plan.stages[0]
        most = most_registers(main.block[0], main.blocks_per_sm)
        squeezed = SQUEEZE if plan.family == "shared" and tune is gpu_tune else 1.0
        if candidate != today and registers and registers > squeezed * most:
            return 0.0  # it would spill
        # A gain must hold where each warp's access stands alone.
        p = predict(problem, plan, gpu, c.moved_bytes, registers, merged=False)
        logs += math.log(p.us)
    return math.exp(logs / len(cases))


def _registers(plan: Any, today: Any, gpu: Gpu) -> int | None:
    """Of a candidate that was never compiled: today's, and four for each vector more."""
    known = registers_of(today.stages[0].name, gpu)
    if known is None:
        return None

    def held(p: Any) -> int:
        both = 2 if p.stages[0].kernel.startswith("layer_norm_bwd") else 1
        rows = max(1, p.rows_per_block * p.threads_per_row // p.stages[0].block[0])
        return both * rows * int(p.vecs_per_thread)

    return max(32, known + REGISTERS_OF_VEC * (held(plan) - held(today)))


@functools.cache
def crossovers() -> list[Crossover]:
    """Where K5 takes over from K3, by the share of rows per multiprocessor."""
    found = []
    for vecs in (2 * CHUNK_VECS + 1, 4 * CHUNK_VECS, 8 * CHUNK_VECS, 14 * CHUNK_VECS):
        shares: dict[str, float | None] = {}
        ratios = {}
        for gpu in GPUS:
            times = {s: _two(vecs, max(1, int(s * gpu.sm_count)), gpu) for s in SHARES}
            if None in times.values():
                continue  # K3 does not hold such rows there
            pairs = {s: t for s, t in times.items() if t}
            shares[gpu.name] = next((s for s, (k3, k5) in pairs.items() if k3 <= k5), None)
            k3, k5 = pairs[0.5]
            ratios[gpu.name] = k5 / k3
        found.append(Crossover(vecs, shares, ratios))
    return found


def _two(vecs: int, rows: int, gpu: Gpu) -> tuple[float, float] | None:
    """Microseconds of K3 and of K5."""
    few = Case("bfloat16", rows, vecs * VEC_BYTES // 2, "few rows")
    ((problem, _),) = planned(few, gpu)
    row = next(r for r in TABLE if r.family == "shared" and vecs <= r.max_vecs)
    plans = [gpu_tune.plan_of(r, problem, gpu.device) for r in (row, TABLE[-1])]
    if plans[0].stages[0].shared_bytes > gpu.shared_per_block:
        return None
    k3, k5 = (predict(problem, plan, gpu, few.moved_bytes).us for plan in plans)
    return k3, k5


def tiles() -> Iterator[Choice]:
    """K6's tile against the others that fit, at the lengths where the choice falls."""
    for dtype in DTYPES:
        for N in (8, 32, 64, 256, 512, 900):
            c = replace(case(dtype, N), layout="FC")
            pairs = {g: _shapes(c, g) for g in GPUS}
            every = set.intersection(*(set(p) for p in pairs.values()))
            if not every:
                continue
            now = {g.name: p["today"] for g, p in pairs.items()}
            sums = {s: sum(math.log(pairs[g][s]) for g in GPUS) for s in sorted(every)}
            best = min(sums, key=lambda s: sums[s])
            if sums[best] > sums["today"] - SAME:
                best = "today"
            ratios = {g.name: pairs[g][best] / now[g.name] for g in GPUS}
            if best == "today":
                best = TODAYS_TILE
            yield Choice(f"K6 tile, {dtype}, {N} columns, F to C", TODAYS_TILE, best, ratios)


def _shapes(c: Case, gpu: Gpu) -> dict[str, float]:
    """Microseconds by tile, "today" for the plan's own."""
    ((problem, plan),) = planned(c, gpu)
    times = {"today": predict(problem, plan, gpu, c.moved_bytes).us}
    tile = _plan_column.Tile(problem.x_dtype, 1, problem.M, problem.N, exchanges=3)
    for shape in _plan_column.SHAPES:
        words, threads, blocks = shape
        rows, shared = words * tile.rows_per_word, tile.nbytes(shape, problem.N)
        if shared > gpu.shared_per_block:
            continue
        stage = replace(
            plan.stages[0],
            name="",
            grid=(-(-problem.M // rows), 1, 1),
            block=(threads, 1, 1),
            shared_bytes=shared,
            blocks_per_sm=blocks,
        )
        other = replace(
            plan,
            stages=(stage,),
            threads_per_row=threads // words,
            rows_per_block=rows,
            panel=problem.N,
            panels=1,
        )
        label = f"{words} words, {threads} threads"
        times[label] = predict(problem, other, gpu, c.moved_bytes).us
    return times
