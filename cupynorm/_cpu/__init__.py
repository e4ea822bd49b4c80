"""The CPU path: compiled loops, or NumPy blocks where numba is not installed.

`arrays` and `engine` are its doors. It may import numpy, and numba in what `compiled` compiles.
"""
