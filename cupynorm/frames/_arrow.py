"""Arrow's arrays as columns: NumPy views of their buffers and bitmaps."""

from importlib import import_module
from typing import Any

import numpy as np

# By the names that Arrow gives its types.
DTYPES = {"bool": "bool", "halffloat": "float16", "float": "float32", "double": "float64"}
DTYPES |= {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def read(data: Any) -> tuple[Any, ...]:
    """Give (values, validity, offset) of a pyarrow Array or ChunkedArray of a type of `DTYPES`.

    Nothing is copied but what lies in more than one chunk, and bools, which Arrow packs to bits.
    """
    if hasattr(data, "chunks"):
        chunks = [chunk for chunk in data.chunks if len(chunk)]
        if not chunks:
            return (np.empty(0, DTYPES[str(data.type)]),)
        join = import_module("pyarrow").concat_arrays
        data = chunks[0] if len(chunks) == 1 else join(chunks)
    validity, buffer = data.buffers()
    first, size = data.offset, len(data)
    if str(data.type) == "bool":
        bits = np.frombuffer(buffer, np.uint8)[first // 8 : (first + size + 7) // 8]
        unpacked = np.unpackbits(bits, bitorder="little")
        values = unpacked[first % 8 : first % 8 + size].view(np.bool_)
    else:
        values = np.frombuffer(buffer, DTYPES[str(data.type)])[first : first + size]
    if validity is None or data.null_count == 0:
        return (values,)
    return values, np.frombuffer(validity, np.uint8), first
