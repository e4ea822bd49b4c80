"""Executes the PTX that NVRTC emits, on the CPU, and sees every access that it makes."""
