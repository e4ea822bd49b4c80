"""Tests of the CPU path, which may name its private files."""
