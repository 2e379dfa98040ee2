"""The kernels themselves; the modules of the same names have the functions that launch them."""
