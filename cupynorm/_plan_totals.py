"""The launch that adds up the partial sums of dweight and dbias."""

from cupynorm._plan import CODES, Stage
from cupynorm._problem import ITEMSIZE, stats_dtype

__all__ = ["TOTALS_THREADS", "totals_stage"]

TOTALS_THREADS = 1024


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
