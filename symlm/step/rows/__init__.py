"""Row rules where the rows are, block by block or in fused kernels."""
