"""Every backward entry that the plan can ask for, by asking it; the part each test run compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from cupynorm._cuda.launch import choose_plan
from cupynorm._cuda.plan import CHUNK_VECS, VEC_BYTES, Device, Stage
from cupynorm._cuda.rows import BACKWARD
from cupynorm._layout import Problem
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import ITEMSIZE, stats_dtype
from tests.ptx.limits import DeviceLimits

_KINDS = ("warp", "block", "shared", "split", "cluster", "totals")
FAMILIES = tuple(f"{kind}_bwd" for kind in _KINDS)

Wanted = tuple[bool, bool, bool]  # dx, dweight, dbias
ALL: Wanted = (True, True, True)
# Tried on the longest row of each kernel only.
RARELY: tuple[Wanted, ...] = ((True, False, False), (False, True, True), (True, True, False))
ROWS = 2**20
_MOST_CHUNKS = max(row.cluster * row.slots for row in BACKWARD)
_ALONE = [row for row in BACKWARD if row.cluster == 1]
_LAST = max(row.max_vecs for row in BACKWARD if row.family == "shared")


def stages(
    arch: str,
    x_dtype: str,
    vecs: int,
    weight: str | None,
    wanted: Wanted = ALL,
    max_cluster: int = 8,
) -> tuple[Stage, ...]:
    """What launches rows of `vecs` whole vectors."""
    N = vecs * VEC_BYTES // ITEMSIZE[x_dtype]
    totals = weight or stats_dtype(x_dtype)
    named = zip(("x", "weight", "dweight", "dbias"), (x_dtype, weight, totals, totals), strict=True)
    kept = (True, weight, *wanted[1:])
    strides = [(a, (0, N, 1)) for a in ("x", "dy", "dx") if a != "dx" or wanted[0]]
    problem = Problem(
        LAYER_NORM, True, tuple(pair for pair, keep in zip(named, kept, strict=True) if keep),
        1, ROWS, N, tuple(strides), (ROWS, 1),
    )  # fmt: skip
    device = Device(int(arch), 100, DeviceLimits.of(arch).opt_in_shared, max_cluster)
    return choose_plan(problem, device).stages


def sampled_vecs() -> Iterator[int]:
    """Each table row's longest, each number of vectors per thread of K3, and beyond."""
    for row in _ALONE[:-1]:
        yield from range(row.threads_per_row, row.max_vecs + 1, row.threads_per_row)
    yield from range(2 * CHUNK_VECS, _MOST_CHUNKS * CHUNK_VECS + 1, CHUNK_VECS // 4)
    yield from (_LAST + 1, 2**20)


@cache
def shapes(arch: str, x_dtype: str, max_cluster: int = 8) -> dict[str, int]:
    """By entry with a weight of x's dtype and all results: the longest row that runs it."""
    found = {}
    for vecs in sorted(set(sampled_vecs())):
        for stage in stages(arch, x_dtype, vecs, x_dtype, ALL, max_cluster):
            found[stage.name] = vecs
    return found


def _longest(arch: str, x_dtype: str, max_cluster: int) -> list[int]:
    """The longest row of each kernel."""
    last = {}
    for vecs in sorted(set(sampled_vecs())):
        last[stages(arch, x_dtype, vecs, x_dtype, ALL, max_cluster)[0].kernel] = vecs
    return list(last.values())


def entries(arch: str, x_dtype: str, family: str, everything: bool) -> list[Stage]:
    """Stages to compile, without repeats: every one, or the longest of each kernel."""
    # K3 is what a device without clusters takes: its copies differ by architecture all the same.
    most = 1 if family == "shared_bwd" else 8
    few = _longest(arch, x_dtype, most)
    asked = [(v, x_dtype, ALL) for v in few]
    if everything:
        every = sorted(set(shapes(arch, x_dtype, most).values()))
        weights = (x_dtype, *dict.fromkeys(w for w in ("float32", None) if w != x_dtype))
        asked = [(v, w, ALL) for w in weights for v in every]
        asked += [(v, x_dtype, wanted) for wanted in RARELY for v in few]
    chosen = {}
    for vecs, weight, wanted in asked:
        for stage in stages(arch, x_dtype, vecs, weight, wanted, most):
            if stage.family == family:
                chosen[stage.name] = stage
    return list(chosen.values())
