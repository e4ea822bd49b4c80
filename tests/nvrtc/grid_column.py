"""Every entry of K6 and K7 that the plan can ask for; the part each test run compiles."""

from __future__ import annotations

import itertools
from functools import cache

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import Device, Stage
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import stats_dtype
from tests.simt.limits import DeviceLimits

FAMILIES = ("column", "lanes", "columns", "column_bwd", "panels_bwd")
# How x and y lie; of K7 y and what of NaN; of the backward ("d") x and dy.
_WAYS = ("FF", "FC", "CF", "F", "C", "F_omit", "C_omit", "FFd", "FCd", "CFd")
_ELSEWHERE = ("FC", "C_omit", "FCd")
# Columns that a test run compiles the registers' kernel for; the first, the one with the fewest
# registers to spare, on the other architectures, for the dtypes whose code is the longest.
_LANES = (16, 32, 56)
_LANES_ELSEWHERE = ("float16", "float64")
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


def entries(arch: str, x_dtype: str, family: str, full: bool, everything: bool) -> list[Stage]:
    """Stages to compile, without repeats.

    A test run compiles the ways of _ELSEWHERE and the columns of _LANES alone: all of them where
    `full`, one on the other architectures, of tiles the widest.
    """
    if not (full or everything) and is_left_out(x_dtype, family):
        return []
    weights = (x_dtype, *dict.fromkeys(w for w in ("float32", None) if w != x_dtype))
    chosen = {}
    for shape in shapes(arch, x_dtype).values():
        if not everything and not _in_test_runs(shape, family):
            continue
        for weight in weights if everything else weights[:1]:
            for stage in stages(arch, x_dtype, shape, (weight, weight)):
                if stage.family == family:
                    chosen[stage.name] = stage
    if full or everything or not chosen:
        return list(chosen.values())
    by_size = sorted(chosen.values(), key=lambda stage: stage.constants[1])
    return by_size[:1] if family == "lanes" else by_size[-1:]


def is_left_out(x_dtype: str, family: str) -> bool:
    """Whether a test run compiles nothing of a family on the other architectures.

    The panels' kernel is made of what "column_bwd" is made of.
    """
    return family == "panels_bwd" or (family == "lanes" and x_dtype not in _LANES_ELSEWHERE)


def _in_test_runs(shape: tuple[int, int, str], family: str) -> bool:
    return shape[1] in _LANES if family == "lanes" else shape[2] in _ELSEWHERE
