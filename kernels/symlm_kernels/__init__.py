"""Triton kernels of the optimizer's step, each with a pure torch twin of the same signature in `reference`."""
