"""Row rules on the rank that stores the rows, block by block or in fused kernels."""
