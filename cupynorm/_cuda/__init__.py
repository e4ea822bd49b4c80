"""CUDA kernels: which run, how they are launched, and the door of CuPy's arrays.

`launch` takes addresses and a stream, `arrays` CuPy arrays; only the latter imports CuPy. The
folder may import `_layout` and what is below, and `source` reads the texts of `kernels/`.
"""
