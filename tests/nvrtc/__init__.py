"""NVRTC without a GPU: compiles what a plan would launch and reads what became of it."""
