"""NumPy arrays: compiled loops over rows and strips of rows, or NumPy blocks without Numba.

`arrays` is NumPy's door, `engine` takes addresses, `threads` tells how many share a call. It may
import `_layout` and what is below; these three and `blocks` do without Numba.
"""
