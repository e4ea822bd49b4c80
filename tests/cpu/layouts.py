"""Arrays of any layout, and their bits."""

import tempfile

import numpy as np


def values(shape, dtype, seed=0, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (offset + scale * rng.standard_normal(shape)).astype(dtype)


def bits(a):
    a = np.ascontiguousarray(a.astype(a.dtype.newbyteorder("=")))
    return a.view(f"u{a.dtype.itemsize}")


def same_bits(a, b):
    return np.array_equal(bits(a), bits(b))


def guarded(shape, dtype, order="C"):
    """Array with a marked element before and after it, and a check that they still stand."""
    memory = np.full(int(np.prod(shape)) + 2, 77, dtype)

    def check():
        assert memory[0] == 77 and memory[-1] == 77

    return memory[1:-1].reshape(shape, order=order), check


def unaligned(x):
    view = np.ndarray(x.shape, x.dtype, np.empty(x.nbytes + 1, np.uint8)[1:])
    view[...] = x
    assert not view.flags.aligned
    return view


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def as_memmap(x):
    with tempfile.TemporaryFile() as file:
        x.tofile(file)
        return np.memmap(file, x.dtype, "r", shape=x.shape)


def field_of_records(x):
    records = np.zeros(x.shape, [("flag", "u1"), ("value", x.dtype)])
    records["value"] = x
    return records["value"]  # strides that are no multiple of the item size


LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "sliced rows": lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
    "stepped": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "swapped axes": lambda x: np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1),
    "unaligned": unaligned,
    "field of records": field_of_records,
    "subclass": lambda x: x.view(type("Tagged", (np.ndarray,), {})),
    "read-only": read_only,
    "memmap": as_memmap,
}
