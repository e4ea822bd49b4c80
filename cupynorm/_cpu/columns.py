"""ADAPTER, to be deleted when `frames` and `sklearn` import these from `arrays`."""

from cupynorm._cpu.arrays import Column, as_matrix
from cupynorm._cpu.arrays import normalize_columns as layer_norm_fwd

__all__ = ["Column", "as_matrix", "layer_norm_fwd"]
