"""How a row comes into shared memory (K3, `kernels/stage.cuh`); pure Python."""

__all__ = [
    "LABELS",
    "STAGE_ASYNC",
    "STAGE_BULK",
    "STAGE_REGISTERS",
    "copied_bytes",
    "next_row_bytes",
    "staging_of",
]

STAGE_REGISTERS = 0
STAGE_ASYNC = 1  # cp.async, which every thread issues
STAGE_BULK = 2  # bulk copies, which one thread issues
LABELS = ("", "_async", "_bulk")  # in an entry's name
_VEC_BYTES = 16
_ARRIVAL_BYTES = 8


def staging_of(compute_capability: int) -> int:
    """Choose what asks least of the threads. Predicted: bench/results/PENDING.md."""
    if compute_capability < 80:
        return STAGE_REGISTERS
    return STAGE_ASYNC if compute_capability < 90 else STAGE_BULK


def copied_bytes(vecs: int, rows: int, arrivals: int) -> int:
    """Bytes for `rows` rows of `vecs` vectors and for mbarriers.

    A row that begins at no 16-byte boundary takes a granule more.
    """
    return rows * _VEC_BYTES * (vecs + 1) + arrivals * _ARRIVAL_BYTES


def next_row_bytes(vecs: int) -> int:
    """Bytes for the next row of a backward: of x, of dy, its mean and rstd, and an mbarrier."""
    return copied_bytes(vecs, rows=2, arrivals=1) + _VEC_BYTES
