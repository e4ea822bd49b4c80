"""CUDA on the CPU: runs a kernel's very text, in fibers, and sees every access it makes."""
