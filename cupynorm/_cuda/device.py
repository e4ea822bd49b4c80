"""What a plan needs to know of a GPU."""

from dataclasses import dataclass

__all__ = ["Device"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of a GPU.

    Attributes
    ----------
    compute_capability : int
        90 for sm_90.
    sm_count : int
        Streaming multiprocessors.
    shared_bytes : int
        Shared memory a block may have after opting in, in bytes.
    max_cluster : int
        Blocks of a cluster at most, without meaning before sm_90; 1 plans without clusters.
    """

    compute_capability: int
    sm_count: int
    shared_bytes: int
    max_cluster: int = 8

    @property
    def clusters(self) -> int:
        """Blocks of a cluster at most; 1 where there are none."""
        return self.max_cluster if self.compute_capability >= 90 else 1
