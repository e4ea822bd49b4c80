"""Torch tensors: who watches them, then their addresses."""
