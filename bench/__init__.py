"""Measurements: `bench.cpu` on any machine, `bench.gpu` where there is a CUDA GPU."""
