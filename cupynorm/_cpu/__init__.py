"""NumPy arrays: compiled loops, or NumPy blocks where Numba is not installed."""
