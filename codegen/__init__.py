"""Triton kernels, emitted as text from specs. Knows nothing of graphs or passes."""
