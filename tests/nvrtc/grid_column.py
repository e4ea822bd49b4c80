"""Every entry of K6 and K7 that the plan can ask for; the part each test run compiles."""

from __future__ import annotations

import itertools
from functools import cache

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Stage
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import stats_dtype
from tests.ptx.limits import DeviceLimits

FAMILIES = ("column", "lanes", "columns", "column_bwd", "panels_bwd")
# How x and y lie; of K7 y and what of NaN; of the backward ("d") x and dy.
_WAYS = ("FF", "FC", "CF", "F", "C", "F_omit", "C_omit", "FFd", "FCd", "CFd")
_TIGHT = 16  # columns of the registers' kernel
# 72 as well: the widest tile of rows is asked for where registers end.
_COLUMNS = (*range(8, 73, 8), *range(80, 2400, 24), 10_000)


@cache
def shapes(arch: str, x_dtype: str) -> dict[str, tuple[int, int, str]]:
    """By entry without weight and bias: (M, N, way) of a problem that runs it."""
    found = {}
    for M, N, way in itertools.product((64, 2**20), _COLUMNS, _WAYS):
        for stage in stages(arch, x_dtype, (M, N, way), (None, None)):
            found[stage.name] = M, N, way
    return found


def stages(
    arch: str, x_dtype: str, shape: tuple[int, int, str], flags: tuple[str | None, str | None]
) -> tuple[Stage, ...]:
    """What launches a matrix that lies as `way` says, x first."""
    M, N, way = shape
    device = Device(int(arch), 100, DeviceLimits.of(arch).opt_in_shared)
    backward, letters = way.endswith("d"), way.removesuffix("_omit").rstrip("d")
    dtypes = {"x": x_dtype, "weight": flags[0], "bias": flags[1]}
    names: tuple[str, ...] = ("x", "y")[-len(letters) :]
    if backward:
        totals = flags[0] or stats_dtype(x_dtype)
        dtypes = {"x": x_dtype, "weight": flags[0], "dweight": totals, "dbias": totals}
        names, letters = ("x", "dy", "dx"), letters + letters[0]
    problem = Problem(
        LAYER_NORM, backward, tuple((a, d) for a, d in dtypes.items() if d), 1, M, N,
        tuple(
            (a, (0, 1, M) if letter == "F" else (0, N, 1))
            for a, letter in zip(names, letters, strict=True)
        ),
        (M, 1), omit=way.endswith("omit"),
    )  # fmt: skip
    plan = choose_plan(problem, device).stages
    return plan[:1] if backward else plan


def entries(arch: str, x_dtype: str, family: str, everything: bool) -> list[Stage]:
    """Stages to compile, without repeats: every one, or that with the longest code."""
    weights = (x_dtype, *dict.fromkeys(w for w in ("float32", None) if w != x_dtype))
    chosen = {}
    for shape in shapes(arch, x_dtype).values():
        for weight in weights if everything else weights[:1]:
            for stage in stages(arch, x_dtype, shape, (weight, weight)):
                if stage.family == family:
                    chosen[stage.name] = stage
    if everything:
        return list(chosen.values())
    # Of lanes that with the fewest registers to spare, of tiles the widest.
    tight = [stage for stage in chosen.values() if stage.constants[1] == _TIGHT]
    by_size = sorted(chosen.values(), key=lambda stage: stage.constants[1])
    return tight[:1] if family == "lanes" else by_size[-1:]
