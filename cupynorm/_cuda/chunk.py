"""The unit of K3, K4 and K5, in numbers, as `kernels/chunk.cuh` has it."""

__all__ = ["CHUNK_PARTIALS", "CHUNK_THREADS", "CHUNK_VECS", "VEC_BYTES"]

VEC_BYTES = 16
CHUNK_VECS = 1024  # 256 threads of 4 vectors, 16 KiB
CHUNK_THREADS = 256
CHUNK_PARTIALS = 25
