"""The exception that a bad kernel or launch ends in."""

from __future__ import annotations

KINDS = frozenset({
    "argument",  # not what the entry's parameters are, or a shuffle's width
    "barrier-divergence",  # that not all threads of the block, or of the cluster, reach
    "compile",
    "deadlock",
    "exited-block",  # whose shared memory another block of the cluster accesses
    "in-flight",  # a copy was, when its source or target was written or the block ended
    "exited-lane",  # named in a mask, but no longer there
    "limits",  # beyond the device
    "mask-mismatch",  # lanes that name each other call different things
    "mbarrier",  # never initialized, or used otherwise than it was
    "misaligned",
    "not-started",  # as exited-block, before a cluster barrier shows that the block is there
    "not-in-mask",  # a lane outside the mask calls or is read
    "out-of-bounds",
    "race",
    "read-only",
    "read-only-path",  # by which the launch reads what it writes
    "uninitialized",
    "wrong-device",
})  # fmt: skip


class PtxFault(RuntimeError):
    """What a GPU would punish, or should: `kind` is one of KINDS, the message says where.

    `line` is the line of the kernel text, 0 where there is none.
    """

    def __init__(self, kind: str, message: str, line: int = 0) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.line = line
