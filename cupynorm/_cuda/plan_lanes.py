"""Decides when K6 keeps few columns in registers, a thread to a row; pure Python."""

from cupynorm._cuda.plan import CODES, Device, Stage
from cupynorm._problem import ITEMSIZE

__all__ = ["LANES", "lanes_stage"]

# kernels/layer_norm_lanes.cuh: what a thread holds of a column, so that a warp reads 256 bytes.
BYTES = 8
THREADS = 64  # few: blocks that end one by one leave no gap between a wave's reads and its writes
# Columns in registers, and the blocks that a multiprocessor holds of them without a spill. Ten
# warps get no more registers each than twelve, so 40 columns want four blocks.
# With 4 blocks of 64 columns 128 KiB are on their way, with 16 of 8 columns 64 KiB.
LANES = ((8, 16), (16, 10), (24, 8), (32, 6), (40, 4), (48, 4), (56, 4), (64, 4))


def lanes_stage(
    dtypes: tuple[str, str | None, str | None], outer: int, M: int, N: int, device: Device
) -> Stage | None:
    """Make the launch for x and y that both lie along the rows; None where a tile does better.

    That is beyond 64 columns (56 of all but float32), and where the rows fill less than half of a
    block or give the multiprocessors fewer than two blocks each: a tile takes 32 rows, and its
    threads share a row.

    Where x or y has its columns next to each other the tile turns it, whatever N. Written from
    registers, a row's piece of 16 bytes would lie a row away from the next lane's: 32 sectors for
    half of their bytes, where the tile fills each sector in one access. Turning it in registers
    takes five shuffles an element, and the tile one store and one load.
    """
    rows = BYTES // ITEMSIZE[dtypes[0]]
    most = 64 if dtypes[0] == "float32" else 56  # or it spills even at 255 registers
    fitting = [row for row in LANES if N <= row[0] <= most]
    grid = outer * -(-M // (THREADS * rows))
    if not fitting or THREADS * rows >= 2 * M or grid < 2 * device.sm_count:
        return None
    cols, blocks_per_sm = fitting[0]
    parts = ["layer_norm_fwd_lanes", CODES[dtypes[0]], f"t{THREADS}_c{cols}_r{rows}"]
    parts += [f"{name}_{CODES[d]}" for name, d in zip("wb", dtypes[1:], strict=True) if d]
    return Stage(
        kernel="layer_norm_fwd_lanes",
        family="lanes",
        constants=(THREADS, cols, rows),
        name="_".join(parts),
        x_dtype=dtypes[0],
        weight_dtype=dtypes[1],
        bias_dtype=dtypes[2],
        grid=(grid, 1, 1),
        block=(THREADS, 1, 1),
        shared_bytes=0,
        blocks_per_sm=blocks_per_sm,
    )
