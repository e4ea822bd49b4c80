"""What the backward's planners share: a plan, and the launch that adds up its partial sums."""

from dataclasses import dataclass

from cupynorm._cuda.plan import CODES, Stage
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["TOTALS_THREADS", "GradientPlan", "totals_stage"]

TOTALS_THREADS = 1024


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """What runs a backward problem on a device."""

    family: str
    stages: tuple[Stage, ...]
    threads_per_row: int
    vecs_per_thread: int
    rows_per_block: int
    partials: int  # blocks (K4: clusters) that leave sums for dweight and dbias
    pitch: int  # columns of one partial
    workspace_bytes: int
    passes: int  # over memory: of x, dy and dx, of which each has one at least
    source: str
    sections: int = 0  # per row (K5)
    chunks_per_section: int = 0
    sums_at: int = 0  # bytes into the workspace, K5's
    gradients_at: int = 0


def totals_stage(x_dtype: str, dtypes: tuple[str | None, str | None], N: int) -> tuple[Stage, ...]:
    """Add up the partials; nothing where neither dweight nor dbias is wanted."""
    if dtypes == (None, None):
        return ()
    code = CODES[stats_dtype(x_dtype)]
    parts = ["column_totals", code]
    parts += [f"{label}_{CODES[d]}" for label, d in zip(("dw", "db"), dtypes, strict=True) if d]
    stage = Stage(
        kernel="column_totals",
        family="totals_bwd",
        constants=(),
        name="_".join(parts),
        x_dtype=stats_dtype(x_dtype),  # of the partials
        weight_dtype=dtypes[0],
        bias_dtype=dtypes[1],
        grid=(sum(d is not None for d in dtypes) * -(-N // 32), 1, 1),
        block=(TOTALS_THREADS, 1, 1),
        shared_bytes=32 * 33 * ITEMSIZE[stats_dtype(x_dtype)],
        blocks_per_sm=1,
    )
    return (stage,)
