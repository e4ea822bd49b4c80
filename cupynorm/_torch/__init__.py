"""Tensors: who watches them, then their addresses.

`doors` tells which way a call takes, `tensors` is the door of those that nobody watches. The folder
may import torch, the engines of `_cpu` and `_cuda`, `_reference`, and what is below.
"""
