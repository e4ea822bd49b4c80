"""The cases that the cost model predicts, and how one becomes a problem, a plan and a row."""

from dataclasses import dataclass
from typing import Any

from bench.gpu_grid import BOTH, BWD, FEW, FWD, LAYOUT, SMALL, Case, case
from bench.model_gpus import GPUS, Gpu
from bench.model_time import Prediction, copy_time, predict
from cupynorm._cuda.plan import choose_plan
from cupynorm._cuda.plan_bwd import choose_plan_bwd
from cupynorm._cuda.plan_column import (
    ColumnProblem,
    ColumnsProblem,
    choose_plan_column,
    choose_plan_columns,
)
from cupynorm._cuda.plan_column_bwd import ColumnGradientProblem, choose_plan_column_bwd
from cupynorm._layout import gradient_layout_of, layout_of

__all__ = ["COLUMNS_OF", "Predicted", "cases", "families", "planned", "predicted", "predictions"]

COLUMNS_OF = "columns"  # layout of K7's cases: float32 columns of their own
NAMES = {
    "warp": "K1", "block": "K2", "shared": "K3", "cluster": "K4", "split": "K5", "column": "K6",
    "lanes": "K6",
    "columns": "K7",
}  # fmt: skip


@dataclass(frozen=True)
class Predicted:
    """One row of the model's table."""

    case: Case
    gpu: Gpu
    families: str
    time: Prediction
    copy_us: float

    @property
    def gb_per_s(self) -> float:
        """Of the floor's bytes, as the benchmark counts."""
        return self.case.moved_bytes / self.time.us / 1e3

    @property
    def fraction_of_copy(self) -> float:
        """As the benchmark has it: over a copy of the passes' bytes."""
        copied = self.case.copy_bytes // 32 * 32
        return self.gb_per_s / (copied / self.copy_us / 1e3)


def planned(case: Case, gpu: Gpu) -> list[tuple[Any, Any]]:
    """(problem, plan) of each pass, as the library chooses on that GPU; empty: it copies first."""
    if case.op == BOTH:
        return [*planned(_of(case, FWD), gpu), *planned(_of(case, BWD), gpu)]
    if case.layout in ("C", "offset", "pitch"):
        return [_rows(case, gpu)]
    return _tiles(case, gpu)


def _of(case: Case, op: str) -> Case:
    return Case(case.dtype, case.rows, case.N, case.group, case.weight_dtype, case.layout, op)


def _rows(case: Case, gpu: Gpu) -> tuple[Any, Any]:
    shape, strides, affine = (case.rows, case.N), (case.pitch, 1), case.affine_dtype
    if case.op == FWD:
        dtypes = (case.dtype, affine, affine)
        problem = layout_of(shape, (1,), strides, strides, dtypes, False).problem
        return problem, choose_plan(problem, gpu.device)
    names = (case.dtype, affine, affine, affine)
    layout = gradient_layout_of(shape, (1,), strides, strides, (case.N, 1), names)
    return layout.problem, choose_plan_bwd(layout.problem, gpu.device)


def _tiles(case: Case, gpu: Gpu) -> list[tuple[Any, Any]]:
    M, N, d, affine = case.rows, case.N, case.dtype, case.affine_dtype
    if case.layout == COLUMNS_OF:
        columns = ColumnsProblem(d, affine, affine, M, N, (N, 1), False)
        return [(columns, choose_plan_columns(columns, gpu.device))]
    lies = [(0, 1, M) if letter == "F" else (0, N, 1) for letter in case.layout]
    if case.op == FWD:
        problem = ColumnProblem(d, affine, affine, 1, M, N, lies[0], lies[1], (M, 1))
        return [(problem, choose_plan_column(problem, gpu.device))]
    strides = (lies[1], lies[0], lies[0], (M, 1))  # of dy, x, dx, the statistics
    gradient = ColumnGradientProblem(d, affine, affine, affine, True, 1, M, N, *strides)
    chosen = choose_plan_column_bwd(gradient, gpu.device)
    return [(gradient, chosen[0])] if chosen else []


def families(plans: list[tuple[Any, Any]]) -> str:
    """K1 to K7 of the plans."""
    return "+".join(NAMES.get(plan.family, plan.family) for _, plan in plans)


def predicted(case: Case, gpu: Gpu, merged: bool = True) -> Predicted | None:
    """What the model says of a case; None where the library copies first."""
    plans = planned(case, gpu)
    if not plans:
        return None
    shares = [_of(case, op).moved_bytes for op in ((FWD, BWD) if case.op == BOTH else (case.op,))]
    parts = [
        predict(*pair, gpu, share, merged=merged) for pair, share in zip(plans, shares, strict=True)
    ]
    time = Prediction(*(sum(values) for values in zip(*map(_numbers, parts), strict=True)))
    return Predicted(case, gpu, families(plans), time, copy_time(case.copy_bytes, gpu))


def _numbers(p: Prediction) -> tuple[float, ...]:
    return p.us, p.fixed, p.floor, p.extra, p.gaps, p.in_flight, p.issue


def cases() -> list[Case]:
    """What the tables show: the benchmark's groups, forward and backward, rows and tiles."""
    some = [64, 256, 1024, 4096, 16384, 65536, 262144, 1048576]
    made = [case(d, N) for d in ("bfloat16", "float32") for N in some]
    made += [case("bfloat16", N, SMALL) for N in some]
    made += [
        case("bfloat16", N * 2**20, FEW, rows, weight_dtype=None)
        for rows in (1, 8)
        for N in (1, 4, 16, 64)
    ]
    made += [case(d, N, op=BWD) for d in ("bfloat16", "float32") for N in some[:-1]]
    made += [case("bfloat16", N, SMALL, op=BWD) for N in some[:-1]]
    tiles = (8, 64, 256, 900, 2048)
    for d in ("bfloat16", "float32"):
        made += [_tile(d, N, way) for way in ("FF", "FC") for N in tiles]
        made += [_tile(d, N, "FF", BWD) for N in tiles[:-1]]
    made += [_tile("float32", N, COLUMNS_OF) for N in tiles]
    return made


def _tile(dtype: str, N: int, layout: str, op: str = FWD) -> Case:
    c = case(dtype, N, op=op)
    return Case(dtype, c.rows // 1024 * 1024 or 1024, N, LAYOUT, layout=layout, op=op)


def predictions(chosen: list[Case] | None = None) -> list[Predicted]:
    """Every case on every GPU."""
    found = (predicted(c, gpu) for c in chosen or cases() for gpu in GPUS)
    return [p for p in found if p]
