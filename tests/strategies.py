"""Arrays as the tests draw them."""

import numpy as np


def spread(fill, shape, steps, turned):
    """An array of any strides: every ``steps[k]``-th of an axis of memory whose axes are turned.

    ``fill(shape)`` makes the memory, which may be more than the array shows: it is cut.
    """
    whole = [max(shape[axis] * abs(steps[axis]), 1) for axis in turned]
    x = fill(whole).transpose(np.argsort(turned))[tuple(slice(None, None, s) for s in steps)]
    return x[tuple(slice(0, n) for n in shape)]
