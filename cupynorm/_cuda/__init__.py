"""CUDA kernels: which run, with what launches, and the arrays of CuPy."""
