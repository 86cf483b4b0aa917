"""Kernels on plain arrays: codes, scales, matrices. Knows no pytree, no model and no file."""
