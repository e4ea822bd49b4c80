"""Which thread reads which element, from a plan; what the pictures draw and a test compares.

`tests/test_pictures.py` takes elements away and sees which thread of the kernel misses them.
"""

from dataclasses import dataclass

from cupynorm._cuda.plan import CHUNK_THREADS, CHUNK_VECS, VEC_BYTES, Plan
from cupynorm._rules import ITEMSIZE

__all__ = ["Holder", "columns_per_vec", "holder", "tile_holder"]

WARP_VECS = CHUNK_VECS // 8  # of a chunk, whose 256 threads are 8 warps


@dataclass(frozen=True)
class Holder:
    """A thread, and at which place among its own it has the element's vector."""

    block: int
    thread: int
    slot: int


def columns_per_vec(plan: Plan) -> int:
    """How many neighbouring columns move together."""
    return VEC_BYTES // ITEMSIZE[plan.stages[0].x_dtype]


def holder(plan: Plan, row: int, col: int, N: int) -> Holder:
    """Who reads an element of a row-major x of N columns; K5: in the kernel of the statistics."""
    vec = col // columns_per_vec(plan)
    maps = {
        "warp": _warp,
        "block": _block,
        "shared": _shared,
        "cluster": _cluster,
        "split": _split,
    }
    return maps[plan.family](plan, row, vec, -(-N // columns_per_vec(plan)))


def _warp(plan: Plan, row: int, vec: int, vecs: int) -> Holder:
    threads, lanes, _, rows = plan.stages[0].constants
    groups = threads // lanes
    block, rest = divmod(row, groups * rows)
    turn, group = divmod(rest, groups)
    k, lane = divmod(vec, lanes)
    return Holder(block, group * lanes + lane, turn * plan.vecs_per_thread + k)


def _block(plan: Plan, row: int, vec: int, total: int) -> Holder:
    warp, rest = divmod(vec, 32 * plan.vecs_per_thread)
    k, lane = divmod(rest, 32)
    return Holder(row, warp * 32 + lane, k)


def _in_chunk(vec: int) -> tuple[int, int, int]:
    """Chunk, thread of its 256, and which of the thread's four vectors."""
    chunk, rest = divmod(vec, CHUNK_VECS)
    warp, rest = divmod(rest, WARP_VECS)
    k, lane = divmod(rest, 32)
    return chunk, warp * 32 + lane, k


def _shared(plan: Plan, row: int, vec: int, vecs: int) -> Holder:
    threads = plan.stages[0].block[0]
    chunk, thread, k = _in_chunk(vec)
    turn, group = divmod(chunk, threads // CHUNK_THREADS)
    return Holder(row, group * CHUNK_THREADS + thread, 4 * turn + k)


def _cluster(plan: Plan, row: int, vec: int, vecs: int) -> Holder:
    """Block `rank` of a row's cluster has the chunks from chunks * rank / blocks on."""
    blocks, threads = plan.stages[0].constants[:2]
    chunks = -(-vecs // CHUNK_VECS)
    chunk, thread, k = _in_chunk(vec)
    rank = next(r for r in range(blocks) if chunk < chunks * (r + 1) // blocks)
    turn, group = divmod(chunk - chunks * rank // blocks, threads // CHUNK_THREADS)
    return Holder(row * blocks + rank, group * CHUNK_THREADS + thread, 4 * turn + k)


def _split(plan: Plan, row: int, vec: int, vecs: int) -> Holder:
    chunk, thread, k = _in_chunk(vec)
    section, turn = divmod(chunk, plan.chunks_per_section)
    return Holder(row * plan.sections + section, thread, 4 * turn + k)


def tile_holder(plan: Plan, row: int, col: int) -> Holder:
    """Who loads an element whose neighbours in memory are those of the next rows (K6, K7)."""
    threads, rows = plan.stages[0].constants[:2]
    lanes = threads // plan.threads_per_row  # words along the rows; the rest share the columns
    block, within = divmod(row, rows)
    turn, part = divmod(col % plan.panel, plan.threads_per_row)
    return Holder(block, part * lanes + within // (rows // lanes), turn)
